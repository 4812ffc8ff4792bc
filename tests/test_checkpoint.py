"""Checkpoints: views of the file under the published names, or one sentence that says why not."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npvlm.config import Config, parse_config
from npvlm.errors import NpvlmError
from npvlm.files.checkpoint import open_checkpoint
from npvlm.files.names import EMBED_TOKENS, LM_HEAD, expected_shapes
from npvlm.model.weights import BFloat16, Weight, unpack
from tests.published import saved_by_transformers5
from tests.test_names import respelled

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "F8_E4M3": 1}


def a_config(family: str = "gemma", tied: bool = True) -> Config:
    return parse_config(saved_by_transformers5(family) | {"tie_word_embeddings": tied})


def tensors_of(config: Config, dtype: str = "F32", seed: int = 0) -> Tensors:
    """Draw every tensor of a config as the bytes of a stored dtype."""
    draw = np.random.default_rng(seed)
    found: Tensors = {}
    for name, shape in expected_shapes(config).items():
        values = draw.standard_normal(shape, dtype=np.float32)
        if dtype == "F32":
            content = values.tobytes()
        elif dtype == "F16":
            content = values.astype(np.float16).tobytes()
        elif dtype == "BF16":
            content = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            content = bytes(values.size * WIDTH[dtype])
        found[name] = (dtype, shape, content)
    return found


def write(path: Path, tensors: Tensors, pad: int = 0) -> None:
    """Write a safetensors file; `pad` blanks in its header move the tensors off their places."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, content) in tensors.items():
        places = [offset, offset + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": places}
        offset += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    parts = [struct.pack("<Q", len(text)), text, *(content for _, _, content in tensors.values())]
    path.write_bytes(b"".join(parts))


def shard(folder: Path, tensors: Tensors, count: int = 3) -> None:
    """Write a checkpoint as several files and their index."""
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[i::count])
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: object) -> None:
    values = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))


def same(found: dict[str, Weight], tensors: Tensors) -> bool:
    return set(found) == set(tensors) and all(
        (w.bits if isinstance(w, BFloat16) else w).tobytes() == tensors[name][2]
        and w.shape == tensors[name][1]
        for name, w in found.items()
    )


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def refusal(folder: Path, config: Config) -> str:
    with pytest.raises(NpvlmError) as caught:
        open_checkpoint(folder, config)
    said = str(caught.value)
    assert "\n" not in said
    assert caught.value.exit_code == 3
    return said


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_every_dtype_is_kept_as_it_is_stored(tmp_path: Path, family: str, dtype: str) -> None:
    config = a_config(family)
    tensors = tensors_of(config, dtype)
    write(tmp_path / "model.safetensors", tensors)
    found = open_checkpoint(tmp_path, config)
    assert same(found, tensors)
    for weight in found.values():
        assert isinstance(weight, BFloat16) == (dtype == "BF16")


@pytest.mark.parametrize("release", ["published", "saved by 5", "modules of 4.52", "modules of 5"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_every_layout_gives_the_same_weights(
    tmp_path: Path, release: str, tied: bool, sharded: bool
) -> None:
    config = a_config("gemma2", tied)
    tensors = tensors_of(config, "BF16")
    spelled = {respelled(name, release): tensor for name, tensor in tensors.items()}
    if sharded:
        shard(tmp_path, spelled)
    else:
        write(tmp_path / "model.safetensors", spelled)
    assert same(open_checkpoint(tmp_path, config), tensors)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_are_read_only_views_of_the_mapped_file(tmp_path: Path, dtype: str) -> None:
    config = a_config()
    write(tmp_path / "model.safetensors", tensors_of(config, dtype))
    for weight in open_checkpoint(tmp_path, config).values():
        array = weight.bits if isinstance(weight, BFloat16) else weight
        assert not array.flags.owndata
        assert not array.flags.writeable
        base: Any = array
        while not isinstance(base, np.memmap):
            base = base.base
        assert base.mode == "r"


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_tensors_that_lie_off_their_alignment_are_read_all_the_same(
    tmp_path: Path, dtype: str
) -> None:
    config = a_config()
    tensors = tensors_of(config, dtype)
    write(tmp_path / "model.safetensors", tensors, pad=3)
    found = open_checkpoint(tmp_path, config)
    assert same(found, tensors)
    table = unpack(found[EMBED_TOKENS], np.float32)
    bits = np.frombuffer(tensors[EMBED_TOKENS][2], np.float32 if dtype == "F32" else np.uint16)
    exact = bits if dtype == "F32" else (bits.astype(np.uint32) << 16).view(np.float32)
    exact = exact.reshape(table.shape)
    assert np.array_equal(table, exact)
    products = exact @ exact.T  # BLAS may add in another order where memory is aligned
    order = 2.0**-24 * table.shape[1] * np.abs(products).max()
    np.testing.assert_allclose(table @ table.T, products, rtol=0, atol=order)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident pages are Linux's")
def test_opening_touches_no_weight(tmp_path: Path) -> None:
    """Sixty mebibytes that take no room on disk: what is read of them gets resident."""
    values = saved_by_transformers5("gemma")
    values["text_config"] |= {"vocab_size": 700_000}
    config = parse_config(values)
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in expected_shapes(config).items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    before = resident_pages()
    found = open_checkpoint(tmp_path, config)
    assert resident_pages() - before < 1000
    table = found[EMBED_TOKENS]
    assert isinstance(table, np.ndarray)
    assert table[::40].sum() == 0.0  # now read: the measure sees it
    assert resident_pages() - before > 10_000


def test_a_tied_head_alone_serves_as_the_embedding_table_too(tmp_path: Path) -> None:
    config = a_config()
    tensors = tensors_of(config)
    renamed = {"lm_head.weight" if n == EMBED_TOKENS else n: t for n, t in tensors.items()}
    write(tmp_path / "model.safetensors", renamed)
    assert same(open_checkpoint(tmp_path, config), tensors)


def test_a_head_in_the_file_is_used_even_where_the_config_says_tied(tmp_path: Path) -> None:
    tensors = tensors_of(a_config(tied=False))
    write(tmp_path / "model.safetensors", tensors)
    found = open_checkpoint(tmp_path, a_config(tied=True))
    assert same(found, tensors)
    assert LM_HEAD in found


def test_an_untied_model_needs_both_tables(tmp_path: Path) -> None:
    tensors = tensors_of(a_config(tied=False))
    for name in (LM_HEAD, EMBED_TOKENS):
        write(tmp_path / "model.safetensors", {n: t for n, t in tensors.items() if n != name})
        said = refusal(tmp_path, a_config(tied=False))
        assert f"1 missing ({name})" in said


def test_saved_position_ids_are_passed_over(tmp_path: Path) -> None:
    config = a_config()
    tensors = tensors_of(config)
    extra: Tensors = {"vision_tower.vision_model.embeddings.position_ids": ("I8", (4,), bytes(4))}
    write(tmp_path / "model.safetensors", tensors | extra)
    assert same(open_checkpoint(tmp_path, config), tensors)


def test_everything_that_does_not_fit_is_named_in_one_message(tmp_path: Path) -> None:
    config = a_config()
    tensors = tensors_of(config)
    norm = "language_model.model.norm.weight"
    bias = "multi_modal_projector.linear.bias"
    queries = "language_model.model.layers.0.self_attn.q_proj.weight"
    table = "vision_tower.vision_model.post_layernorm.weight"
    del tensors[norm]
    tensors["model.vision_tower.head.probe"] = ("F32", (1,), bytes(4))
    tensors[bias] = ("F32", (3,), bytes(12))
    tensors[queries] = ("F32", (24, 40), tensors[queries][2])
    tensors[table] = ("F64", (30,), bytes(240))
    write(tmp_path / "model.safetensors", tensors)
    said = refusal(tmp_path, config)
    assert f"1 missing ({norm})" in said
    assert "1 unexpected (model.vision_tower.head.probe)" in said
    assert "2 of another shape" in said
    assert f"{bias} is [3], expected [24]" in said
    assert f"{queries} is [24, 40], expected [40, 24]" in said
    assert f"1 of another type ({table} is F64, expected F32, F16 or BF16)" in said
    assert "config.json" in said


def test_tensors_of_many_layers_are_named_together(tmp_path: Path) -> None:
    config = a_config()
    tensors = {f"model.h.{i}.w": ("F32", (1,), bytes(4)) for i in (0, 1, 2, 5, 7, 8)}
    write(tmp_path / "model.safetensors", tensors)
    said = refusal(tmp_path, config)
    assert "6 unexpected (model.h.{0-2,5,7-8}.w)" in said
    assert "language_model.model.layers.{0-2}.mlp.up_proj.weight, " in said


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path) -> None:
    content = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "git lfs pull" in refusal(tmp_path, a_config())


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    config = a_config()
    tensors = {f"block{i}.w": ("F32", (1,), bytes(4)) for i in range(700)}
    write(tmp_path / "model.safetensors", tensors)
    said = refusal(tmp_path, config)
    assert "700 unexpected" in said
    assert "and 640 more" in said
    assert len(said) < 3000


def test_the_other_family_is_recognised(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", tensors_of(a_config("gemma2")))
    assert "is this a PaliGemma 2 checkpoint" in refusal(tmp_path, a_config("gemma"))
    write(tmp_path / "model.safetensors", tensors_of(a_config("gemma")))
    assert "is this a PaliGemma 1 checkpoint" in refusal(tmp_path, a_config("gemma2"))


def test_weights_for_pictures_of_another_size_are_recognised(tmp_path: Path) -> None:
    values = saved_by_transformers5("gemma")
    values["vision_config"] |= {"image_size": 56}
    write(tmp_path / "model.safetensors", tensors_of(parse_config(values)))
    said = refusal(tmp_path, a_config())
    assert "position_embedding.weight is [16, 30], expected [4, 30]" in said
    assert "pictures of another size" in said


def test_packed_and_adapter_weights_are_recognised(tmp_path: Path) -> None:
    tensors = tensors_of(a_config())
    extra: Tensors = {
        "language_model.model.layers.0.mlp.up_proj.weight.absmax": ("F32", (1,), b"0000")
    }
    write(tmp_path / "model.safetensors", tensors | extra)
    assert "the weights are packed" in refusal(tmp_path, a_config())
    extra = {"language_model.model.layers.0.mlp.up_proj.lora_A.weight": ("F32", (1,), b"0000")}
    write(tmp_path / "model.safetensors", tensors | extra)
    assert "adapter" in refusal(tmp_path, a_config())
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    assert "holds an adapter" in refusal(tmp_path, a_config())


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(a_config())
    other = "model.language_model.norm.weight"
    tensors[other] = tensors["language_model.model.norm.weight"]
    write(tmp_path / "model.safetensors", tensors)
    said = refusal(tmp_path, a_config())
    assert "language_model.model.norm.weight" in said
    assert other in said
    assert "are the same tensor" in said


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(a_config())
    write(tmp_path / "a.safetensors", tensors)
    write(tmp_path / "b.safetensors", {EMBED_TOKENS: tensors[EMBED_TOKENS]})
    write_index(tmp_path, {EMBED_TOKENS: "a.safetensors", "x": "b.safetensors"})
    said = refusal(tmp_path, a_config())
    assert "a.safetensors" in said
    assert "b.safetensors are the same tensor" in said


OUTSIDE = [
    *("../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", ".."),
    *("C:a.safetensors", "a\0.safetensors", "a\n.safetensors", "\ud800.safetensors", "", "a.bin"),
    *(7, None, ["a.safetensors"], {"a": 1}),
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name))
def test_a_shard_can_only_be_a_plain_name_in_the_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "a.safetensors", tensors_of(a_config()))
    write_index(folder, {EMBED_TOKENS: name})
    said = refusal(folder, a_config())
    assert "expected the plain name of a .safetensors file in the same folder" in said


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)
    assert "has no weight_map" in refusal(tmp_path, a_config())


def test_missing_shards_are_named(tmp_path: Path) -> None:
    shard(tmp_path, tensors_of(a_config()))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    said = refusal(tmp_path, a_config())
    assert "names 3 files and 1 of them are missing: model-00002-of-00003.safetensors" in said


def test_links_are_followed_as_the_hub_cache_makes_them(tmp_path: Path) -> None:
    config = a_config()
    tensors = tensors_of(config)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    shard(blobs, tensors)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "blobs", file.name))
    assert same(open_checkpoint(snapshot, config), tensors)
    (blobs / "model-00001-of-00003.safetensors").unlink()
    assert "model-00001-of-00003.safetensors" in refusal(snapshot, config)


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    assert "is no regular file" in refusal(tmp_path, a_config())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is no regular file" in refusal(tmp_path, a_config())


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    write(path, tensors_of(a_config()))
    path.write_bytes(path.read_bytes()[:keep])
    assert "is no whole safetensors file" in refusal(tmp_path, a_config())


@pytest.mark.parametrize(
    "places",
    [[0, 8], [8, 12], [4, 0], [0, 1 << 62], [-4, 0], ["0", "4"], [0], None],
    ids=str,
)
def test_a_header_that_lies_is_refused(tmp_path: Path, places: object) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": places}
    text = json.dumps({EMBED_TOKENS: entry}).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "is no whole safetensors file" in refusal(tmp_path, a_config())


@pytest.mark.parametrize("content", [b"GGUF" + bytes(64), b"PK\x03\x04" + bytes(64)])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "is no whole safetensors file" in refusal(tmp_path, a_config())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pt_224.npz", "model.gguf"])
def test_other_formats_are_named_and_safetensors_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    said = refusal(tmp_path, a_config())
    assert f"has {name} and no model.safetensors" in said
    assert "fetch the model's safetensors files" in said


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "has neither model.safetensors nor" in refusal(tmp_path, a_config())
    assert "is not there, expected a folder" in refusal(tmp_path / "nowhere", a_config())


# Headers from strangers; sizes, places and truncation stand above


def write_header(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize("length", [2**22 + 1, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_any_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(file, 2**33)  # a file with holes, which takes no room on the disk
    assert f"a header of {length:,} bytes" in refusal(tmp_path, a_config())


@pytest.mark.parametrize("inside", ["name", "entry"])
def test_a_header_that_says_a_thing_twice_is_refused(tmp_path: Path, inside: str) -> None:
    write(tmp_path / "model.safetensors", tensors_of(a_config()))
    header, data = header_and_data(tmp_path / "model.safetensors")
    text = json.dumps(header)
    if inside == "name":  # of the two, a reader that takes the first gets other weights
        text = f"{text[:-1]}, {json.dumps(EMBED_TOKENS)}: {json.dumps(header[EMBED_TOKENS])}}}"
    else:
        text = text.replace('"dtype"', '"dtype": "F32", "dtype"', 1)
    write_header(tmp_path / "model.safetensors", text.encode(), data)
    assert "is there twice" in refusal(tmp_path, a_config())


@pytest.mark.parametrize(
    "name", ["\x1b[2J", "two\nlines", "\x00", "\u202egnp", "\x9b31m", "x" * 100_000, "日本", ""]
)
def test_any_name_of_a_tensor_is_one_short_line_that_steers_no_terminal(
    tmp_path: Path, name: str
) -> None:
    config = a_config()
    write(tmp_path / "model.safetensors", tensors_of(config) | {name: ("F32", (1,), bytes(4))})
    said = refusal(tmp_path, config)
    assert "1 unexpected" in said and len(said) < 1000
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e" for c in said)


@pytest.mark.parametrize("shape", [(0,), (0, 2**62), (3, 0)])
def test_tensors_without_numbers_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    config = a_config()
    tensors = tensors_of(config) | {EMBED_TOKENS: ("F32", shape, b"")}
    write(tmp_path / "model.safetensors", tensors)
    assert f"{EMBED_TOKENS} is {list(shape)}" in refusal(tmp_path, config)


def test_more_layers_than_the_files_have_are_named_and_fewer_as_well(tmp_path: Path) -> None:
    values = saved_by_transformers5("gemma")
    write(tmp_path / "model.safetensors", tensors_of(parse_config(values)))
    layers = values["text_config"]["num_hidden_layers"]
    for other, says in ((layers + 900, "missing"), (layers - 1, "unexpected")):
        changed = values | {"text_config": values["text_config"] | {"num_hidden_layers": other}}
        said = refusal(tmp_path, parse_config(changed))
        assert says in said and len(said) < 2000


def test_a_shard_whose_name_no_disk_takes_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "expected the plain name" in refusal(tmp_path, a_config())
