"""Converting: what is in the new folder, that it opens as it was meant, and that no half stays."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import npvlm
from npvlm.config import Config, parse_config, read_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.checkpoint import open_checkpoint
from npvlm.files.names import EMBED_TOKENS, LM_HEAD, POSITIONS, expected_shapes, multiplies
from npvlm.files.packed import at_precision, packing, parts_of
from npvlm.files.writer import Tensor, TensorFile, shard, tensor_file
from npvlm.kernels.packing import PACKERS as KERNELS
from npvlm.model.weights import (
    PACKERS,
    BFloat16,
    BFloat16Product,
    Int4,
    Int8,
    Weight,
    rotation_block,
    round_to_bfloat16,
    unpack,
)
from npvlm.work import convert as job
from npvlm.work.convert import convert
from npvlm.work.demo import draw_picture
from tests.published import configs, saved_by_transformers5
from tests.test_checkpoint import Tensors, refusal, resident_pages, tensors_of, write
from tests.test_checkpoint import shard as save_shards
from tests.test_cli import CLI, one_line, run

PRECISIONS = ["bfloat16", "int8", "int4"]
SHAPES = Path(npvlm.__file__).parent / "bundled" / "shapes"


def quiet(*_: int) -> None:
    """Progress that no one sees."""


def a_source(
    folder: Path, family: str = "gemma", dtype: str = "F32", tied: bool = True
) -> tuple[Path, Config]:
    """A tiny checkpoint folder, without a vocabulary."""
    values = saved_by_transformers5(family) | {"tie_word_embeddings": tied}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    config = parse_config(values)
    write(folder / "model.safetensors", tensors_of(config, dtype))
    return folder, config


def opened(folder: Path) -> dict[str, Weight]:
    return open_checkpoint(folder, read_config(folder))


def bits_of(weight: Weight) -> tuple[Any, ...]:
    """Everything a weight is: its class and the bytes of its arrays."""
    if isinstance(weight, Int8 | Int4):
        return (type(weight), weight.width, *(array.tobytes() for array in parts_of(weight)))
    if isinstance(weight, BFloat16):
        return BFloat16, weight.bits.tobytes()
    return weight.dtype, weight.tobytes()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sparse(folder: Path, **sizes: int) -> Path:
    """A source of zeros, some of them large, that takes no room on the disk."""
    values = saved_by_transformers5("gemma")
    values["text_config"] |= sizes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in expected_shapes(parse_config(values)).items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return folder


# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_converted_folder_has_the_weights_that_loading_at_a_precision_makes(
    tmp_path: Path, precision: str, family: str, dtype: str
) -> None:
    source, config = a_source(tmp_path / "source", family, dtype)
    convert(source, tmp_path / "new", precision, quiet)
    found, expected = opened(tmp_path / "new"), opened(source)
    expected = at_precision(expected, precision, PACKERS)
    assert {n: bits_of(w) for n, w in found.items()} == {n: bits_of(w) for n, w in expected.items()}
    kinds = {"int8": Int8, "int4": Int4, "bfloat16": BFloat16}
    for name, shape in expected_shapes(config).items():
        layers = name.startswith("language_model.model.layers.")
        kind = Int8 if precision == "int4" and not layers else kinds[precision]
        assert isinstance(found[name], kind) or not multiplies(name, shape)
    assert read_config(tmp_path / "new").quantization == (
        None if precision == "bfloat16" else precision
    )


@pytest.mark.parametrize("name", ["paligemma-3b-pt-224", "paligemma2-3b-pt-224"])
def test_weights_of_linear_layers_and_the_table_are_packed_and_nothing_else(name: str) -> None:
    shapes = expected_shapes(parse_config(configs()[name]))
    kept = {n for n, shape in shapes.items() if not multiplies(n, shape)}
    assert EMBED_TOKENS not in kept and POSITIONS in kept
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in kept
    assert all("norm" in n or n.endswith(".bias") or ".embeddings." in n for n in kept)
    packed = {n.split(".")[-2] for n in shapes if n not in kept}
    towers = {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2"}
    assert packed == towers | {"gate_proj", "up_proj", "down_proj", "linear", "embed_tokens"}


@pytest.mark.parametrize("name", ["paligemma-3b-pt-224", "paligemma2-3b-pt-224"])
def test_int4_has_4_bits_in_the_layers_of_the_decoder_and_8_in_all_other_matrices(
    name: str,
) -> None:
    shapes = expected_shapes(parse_config(configs()[name]))
    kinds = {n: packing(n, shape, "int4") for n, shape in shapes.items()}
    four = {n.split(".")[-2] for n, kind in kinds.items() if kind == "int4"}
    assert four == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(n.startswith("language_model.model.layers.") for n in kinds if kinds[n] == "int4")
    assert kinds[EMBED_TOKENS] == kinds["multi_modal_projector.linear.weight"] == "int8"
    assert packing(LM_HEAD, shapes[EMBED_TOKENS], "int4") == "int8"
    assert {kind for n, kind in kinds.items() if multiplies(n, shapes[n])} == {"int4", "int8"}
    assert {kind for n, kind in kinds.items() if not multiplies(n, shapes[n])} == {None}


def test_what_is_not_packed_stays_as_it_was_stored(tmp_path: Path) -> None:
    source, config = a_source(tmp_path / "source", dtype="F16")
    convert(source, tmp_path / "new", "int4", quiet)
    before, after = opened(source), opened(tmp_path / "new")
    kept = [n for n, shape in expected_shapes(config).items() if not multiplies(n, shape)]
    assert kept
    assert [bits_of(before[n]) for n in kept] == [bits_of(after[n]) for n in kept]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_output_layer_of_its_own_is_converted_as_well(tmp_path: Path, precision: str) -> None:
    source, _ = a_source(tmp_path / "source", tied=False)
    convert(source, tmp_path / "new", precision, quiet)
    expected = at_precision(opened(source), precision, PACKERS)[LM_HEAD]
    assert bits_of(opened(tmp_path / "new")[LM_HEAD]) == bits_of(expected)


def test_a_head_beside_a_tied_table_is_packed_and_read_again(tmp_path: Path) -> None:
    values = saved_by_transformers5("gemma")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(values))
    tensors = tensors_of(parse_config(values | {"tie_word_embeddings": False}))
    write(source / "model.safetensors", tensors)
    convert(source, tmp_path / "new", "int8", quiet)
    assert isinstance(opened(tmp_path / "new")[LM_HEAD], Int8)


def test_tensors_of_int8_and_int4_have_the_types_and_shapes_of_the_format(tmp_path: Path) -> None:
    source, _ = a_source(tmp_path / "source")
    name = "language_model.model.layers.0.mlp.down_proj.weight"  # [24, 50]
    expected = {
        "int8": {name: ("I8", [24, 64]), f"{name}_scale": ("F32", [24])},
        "int4": {name: ("U8", [24, 64]), f"{name}_scale": ("BF16", [24, 4])},
    }
    for precision, tensors in expected.items():
        convert(source, tmp_path / precision, precision, quiet)
        with safe_open(tmp_path / precision / "model.safetensors", framework="numpy") as file:
            found = {n: file.get_slice(n) for n in file.keys() if n.startswith(name)}  # noqa: SIM118
            assert {n: (s.get_dtype(), s.get_shape()) for n, s in found.items()} == tensors
        entry = json.loads((tmp_path / precision / "config.json").read_text())["quantization"]
        assert entry == {"format": "npvlm", "version": 1, "precision": precision}


def test_bfloat16_is_an_ordinary_checkpoint_whose_config_says_its_type(tmp_path: Path) -> None:
    source, _ = a_source(tmp_path / "source")
    for given, expected in (
        ({}, {"torch_dtype"}),
        ({"torch_dtype": "float32"}, {"torch_dtype"}),
        ({"dtype": "float32"}, {"dtype"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype", "torch_dtype"}),
    ):
        values = saved_by_transformers5("gemma") | given
        if "dtype" not in given:
            del values["dtype"]
        values["text_config"]["torch_dtype"] = "float16"
        (source / "config.json").write_text(json.dumps(values))
        folder = tmp_path / "-".join(["new", *sorted(given)])
        convert(source, folder, "bfloat16", quiet)
        found = json.loads((folder / "config.json").read_text())
        assert {key for key in ("dtype", "torch_dtype") if key in found} == expected
        assert {found[key] for key in expected} == {"bfloat16"}
        assert found["text_config"]["torch_dtype"] == "bfloat16"
        assert "quantization" not in found and "dtype" not in found["vision_config"]


def test_everything_small_beside_the_weights_comes_along(tmp_path: Path) -> None:
    source, _ = a_source(tmp_path / "source")
    along = ["LICENSE", "added_tokens.json", "generation_config.json", "tokenizer.model"]
    for name in along:
        (source / name).write_text("{}" if name.endswith(".json") else name)
    (source / ".gitattributes").write_text("")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "model.gguf").write_text("")
    (source / "original").mkdir()
    with (source / "large.dat").open("wb") as file:
        file.truncate(2**25 + 1)
    convert(source, tmp_path / "new", "int8", quiet)
    made = ["config.json", "model.safetensors", "preprocessor_config.json"]  # which it lacked
    assert left_in(tmp_path / "new") == sorted([*along, *made])
    for name in along:
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()


def test_a_folder_of_links_is_converted_to_files(tmp_path: Path) -> None:
    blobs, config = a_source(tmp_path / "blobs")
    (blobs / "tokenizer.model").write_text("pieces")
    source = tmp_path / "snapshots" / "main"
    source.mkdir(parents=True)
    for file in blobs.iterdir():
        (source / file.name).symlink_to(file)
    convert(source, tmp_path / "new", "int8", quiet)
    assert not any(file.is_symlink() for file in (tmp_path / "new").iterdir())
    assert (tmp_path / "new" / "tokenizer.model").read_text() == "pieces"
    assert open_checkpoint(tmp_path / "new", read_config(tmp_path / "new")).keys() == (
        expected_shapes(config).keys()
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_checkpoints_are_shared_among_files_with_an_index(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = a_source(tmp_path / "source")
    (source / "model.safetensors").unlink()
    save_shards(source, tensors_of(config))
    convert(source, tmp_path / "whole", precision, quiet)
    monkeypatch.setattr(job, "SHARD_BYTES", 8000)
    convert(source, tmp_path / "shared", precision, quiet)
    files = sorted((tmp_path / "shared").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert [file.name for file in files] == names
    index = json.loads((tmp_path / "shared" / "model.safetensors.index.json").read_text())
    whole, shared = opened(tmp_path / "whole"), opened(tmp_path / "shared")
    assert {n: bits_of(w) for n, w in whole.items()} == {n: bits_of(w) for n, w in shared.items()}
    total = sum(file.stat().st_size for file in files)
    assert total - 4000 * count < index["metadata"]["total_size"] < total  # but for headers


def test_only_a_weight_that_is_larger_alone_makes_a_larger_file() -> None:
    sizes = [3, 3, 9, 1, 4, 4, 2]
    weights = [{f"w{i}": Tensor("I8", (size, 1))} for i, size in enumerate(sizes)]
    shards = shard(weights, 6)
    assert next(iter(shards)) == "model-00001-of-00004.safetensors"
    assert [[next(iter(w.values())).bytes for w in s] for s in shards.values()] == [
        [3, 3],
        [9],
        [1, 4],
        [4, 2],
    ]
    assert list(shard(weights, 26)) == ["model.safetensors"]


def test_tensors_are_written_in_any_order_and_any_memory_layout(tmp_path: Path) -> None:
    path, numbers = tmp_path / "x.safetensors", np.arange(35, dtype=np.float32).reshape(7, 5)
    tensors = {
        "bytes": Tensor("I8", (3,)),
        "numbers": Tensor("F32", (7, 5)),
        "turned": Tensor("F32", (5, 7)),
    }
    with tensor_file(path, tensors) as file:
        file.write_rows("turned", 0, numbers.T)
        file.write_rows("numbers", 4, numbers[4:])
        file.write_rows("bytes", 0, np.array([1, 2, 3], np.int8))
        file.write_rows("numbers", 0, numbers[:4])
    with safe_open(path, framework="numpy") as found:
        np.testing.assert_array_equal(found.get_tensor("numbers"), numbers)
        np.testing.assert_array_equal(found.get_tensor("turned"), numbers.T)
        np.testing.assert_array_equal(found.get_tensor("bytes"), [1, 2, 3])
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % 64 == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident pages are Linux's")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_packed_checkpoint_opens_memory_mapped(tmp_path: Path, precision: str) -> None:
    source = sparse(tmp_path / "source", intermediate_size=200_000)
    convert(source, tmp_path / "new", precision, quiet)
    before = resident_pages()
    gate = opened(tmp_path / "new")["language_model.model.layers.0.mlp.gate_proj.weight"]
    assert isinstance(gate, Int8 if precision == "int8" else Int4)
    values, scales = parts_of(gate)
    for array in (values, scales):
        assert not array.flags.owndata and not array.flags.writeable
    assert resident_pages() - before < 1000
    assert np.all(values == (0 if precision == "int8" else 0x88))  # now read: the measure sees it
    assert resident_pages() - before > 2000


# --- how it is written -------------------------------------------------------------------------


# A block has 2^20 numbers, 4 MB as float32. Rounding keeps a few such arrays at a time, packing one
# where the file holds numbers off their alignment: measured 16.9, 10.3 and 10.6 MB.
@pytest.mark.parametrize(
    ("precision", "most"), [("bfloat16", 20e6), ("int8", 13e6), ("int4", 13e6)]
)
def test_memory_holds_a_few_blocks_however_large_a_tensor_is(
    tmp_path: Path, precision: str, most: float
) -> None:
    peaks = []
    for pack in KERNELS.values():
        pack(np.zeros((1, 24), np.float32))  # compiled, which takes memory of its own
    for rows in (100_000, 400_000):
        source = sparse(tmp_path / f"source-{rows}", intermediate_size=rows)
        tracemalloc.start()
        try:
            convert(source, tmp_path / f"new-{rows}", precision, quiet)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert max(peaks) < most
    assert peaks[1] < 1.1 * peaks[0]


def test_progress_counts_up_to_all_weights_and_bytes(tmp_path: Path) -> None:
    source, config = a_source(tmp_path / "source")
    told: list[tuple[int, ...]] = []
    convert(source, tmp_path / "new", "int8", lambda *numbers: told.append(numbers))
    assert told == sorted(told) and told[0][0] == told[0][2] == 0
    done, weights, written, total = told[-1]
    assert done == weights == len(expected_shapes(config))
    assert written == total <= (tmp_path / "new" / "model.safetensors").stat().st_size


def fail_at_the_fifth(error: BaseException) -> Callable[..., None]:
    """A write_rows that works four times."""
    true, calls = TensorFile.write_rows, iter(range(5))

    def write_rows(self: TensorFile, name: str, first: int, rows: Any) -> None:
        if next(calls) == 4:
            raise error
        true(self, name, first, rows)

    return write_rows


def test_a_disk_that_fills_up_leaves_nothing_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = a_source(tmp_path / "source")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(TensorFile, "write_rows", fail_at_the_fifth(full))
    with pytest.raises(NpvlmError, match=r"new: cannot be written \(No space left on device\)"):
        convert(source, tmp_path / "new", "int8", quiet)
    assert left_in(tmp_path) == ["source"]


@pytest.mark.parametrize("there", [True, False], ids=["empty folder", "no folder"])
def test_an_interruption_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    source, _ = a_source(tmp_path / "source")
    if there:
        (tmp_path / "new").mkdir()
    monkeypatch.setattr(TensorFile, "write_rows", fail_at_the_fifth(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", "int8", quiet)
    assert left_in(tmp_path) == (["new", "source"] if there else ["source"])
    assert not there or left_in(tmp_path / "new") == []


def test_an_empty_folder_is_filled_and_has_ordinary_rights(tmp_path: Path) -> None:
    source, _ = a_source(tmp_path / "source")
    (tmp_path / "plain").mkdir()
    (tmp_path / "new").mkdir()
    convert(source, tmp_path / "new", "int8", quiet)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert left_in(tmp_path) == ["new", "plain", "source"]


# --- what is refused ---------------------------------------------------------------------------


def said_of(kind: type[NpvlmError], *arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        convert(*arguments, quiet)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_destination_that_is_no_place_for_a_new_folder_is_bad_use(tmp_path: Path) -> None:
    source, _ = a_source(tmp_path / "source")
    before = left_in(source)
    for place, says in (
        (source, "is there already, expected a new or an empty folder"),
        (source / "config.json", "lies inside"),
        (source / "new", "lies inside"),
        (tmp_path / "source" / ".." / "source" / "new", "lies inside"),
        (tmp_path / "absent" / "new", "is no folder; make it first"),
        (source.parent, "is there already"),
    ):
        assert says in said_of(UsageError, source, place, "int8")
    assert left_in(source) == before and left_in(tmp_path) == ["source"]


def test_a_source_that_is_packed_already_is_bad_use(tmp_path: Path) -> None:
    source, _ = a_source(tmp_path / "source")
    convert(source, tmp_path / "packed", "int8", quiet)
    said = said_of(UsageError, tmp_path / "packed", tmp_path / "new", "int4")
    assert "packed as int8 already; convert the original checkpoint" in said
    assert left_in(tmp_path) == ["packed", "source"]


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = a_source(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    said = said_of(NpvlmError, source, tmp_path / "new", "int8")
    assert said.startswith(f"{tmp_path} has 0.0 GB left, expected 0.0 GB")
    assert left_in(tmp_path) == ["source"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_weights_that_are_no_numbers_are_named(
    tmp_path: Path, precision: str, number: float
) -> None:
    source, config = a_source(tmp_path / "source")
    tensors: Tensors = tensors_of(config)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    dtype, shape, content = tensors[name]
    values = np.frombuffer(content, np.float32).copy()
    values[77] = number
    tensors[name] = (dtype, shape, values.tobytes())
    write(source / "model.safetensors", tensors)
    said = said_of(NpvlmError, source, tmp_path / "new", precision)
    assert said == f"{name} holds inf or nan, expected numbers; copy the model again."
    assert left_in(tmp_path) == ["source"]


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "is no model" in said_of(NpvlmError, tmp_path / "absent", tmp_path / "new", "int8")
    source, config = a_source(tmp_path / "source")
    tensors = tensors_of(config)
    tensors.pop(EMBED_TOKENS)
    write(source / "model.safetensors", tensors)
    said = said_of(NpvlmError, source, tmp_path / "new", "int8")
    assert f"1 missing ({EMBED_TOKENS})" in said
    assert left_in(tmp_path) == ["source"]


def test_packed_files_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    source, config = a_source(tmp_path / "source")
    convert(source, tmp_path / "packed", "int8", quiet)
    packed = read_config(tmp_path / "packed")
    said = refusal(tmp_path / "packed", config)
    assert "the weights are packed" in said and "unexpected" in said
    said = refusal(source, packed)
    assert "_scale" in said and "config.json says that the weights are packed" in said
    assert f"{EMBED_TOKENS} is F32, expected I8" in said


# --- loading -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model at every precision."""
    folder = tmp_path_factory.mktemp("converted")
    for precision in PRECISIONS:
        convert("shapes", folder / precision, precision, quiet)
    return {precision: folder / precision for precision in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_converted_model_answers_as_one_converted_at_load(
    converted: dict[str, Path], precision: str
) -> None:
    folder = converted[precision]
    model = npvlm.load(folder, precision, ops="numpy")
    in_memory = npvlm.load("shapes", precision, ops="numpy")
    assert model.precision == in_memory.precision == precision
    picture = draw_picture()
    scores = [m.logits(picture, "caption en", []) for m in (model, in_memory)]
    np.testing.assert_array_equal(*scores)
    assert model.generate(picture, "caption en")[0].precision == precision


def test_precisions_lose_little_and_each_more_than_the_one_before(
    converted: dict[str, Path],
) -> None:
    picture = draw_picture()

    def scores(precision: str) -> np.ndarray:
        model = npvlm.load("shapes", precision, ops="numpy")
        return model.logits(picture, "caption en", [])

    truth = scores("float32")
    errors = [np.sqrt(np.mean((scores(precision) - truth) ** 2)) for precision in PRECISIONS]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.3 * truth.std()


def test_a_folder_is_loaded_for_what_it_was_converted_to_unless_told(
    converted: dict[str, Path],
) -> None:
    loaded = {name: npvlm.load(folder).precision for name, folder in converted.items()}
    assert loaded == {"bfloat16": "float32", "int8": "int8", "int4": "int4"}
    assert npvlm.load("shapes").precision == "float32"


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "int4"])
def test_a_packed_folder_takes_no_other_precision(converted: dict[str, Path], asked: str) -> None:
    with pytest.raises(UsageError, match=f"is packed for int8, expected {asked}; name the orig"):
        npvlm.load(converted["int8"], asked)


@pytest.mark.parametrize("asked", ["int3", "", "BFLOAT16"])
def test_a_precision_that_there_is_not_is_bad_use(asked: str) -> None:
    with pytest.raises(UsageError, match="expected one of float32, bfloat16, int8, int4"):
        npvlm.load("shapes", asked)


def test_bfloat16_wraps_bfloat16_weights_without_a_copy_and_rounds_others(tmp_path: Path) -> None:
    source, _ = a_source(tmp_path / "source", dtype="BF16")
    stored = opened(source)
    for name, weight in at_precision(stored, "bfloat16", PACKERS).items():
        assert isinstance(weight, BFloat16) and isinstance(stored[name], BFloat16)
        assert weight.bits is stored[name].bits
        assert isinstance(weight, BFloat16Product) == multiplies(name, weight.shape)
    other, _ = a_source(tmp_path / "other", dtype="F32")
    stored = opened(other)
    for name, weight in at_precision(stored, "bfloat16", PACKERS).items():
        rounded = round_to_bfloat16(unpack(stored[name], np.float32))
        assert isinstance(weight, BFloat16)
        np.testing.assert_array_equal(weight.bits, rounded.bits)


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_a_folder_and_says_so_on_stderr(tmp_path: Path) -> None:
    result = run("convert", "shapes", tmp_path / "new", "--precision", "int8")
    assert (result.returncode, result.stdout) == (0, "")
    progress, end = result.stderr.splitlines()
    assert progress.startswith("141 of 141 weights, ")
    assert end == f"{tmp_path / 'new'} is written."
    picture = tmp_path / "picture.png"
    draw_picture().save(picture)
    question = ["generate", picture, "--prompt", "caption en", "--json"]
    answer = json.loads(run(*question, "--model", tmp_path / "new").stdout)
    memory = run(*question, "--precision", "int8")
    assert one_line(memory).startswith("npvlm: weights are packed as int8 in memory")
    again = json.loads(memory.stdout)
    assert answer["precision"] == again["precision"] == "int8"
    assert (answer["text"], answer["logprobs"]) == (again["text"], again["logprobs"])


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    for arguments, code in (
        (["shapes", tmp_path, "--precision", "int3"], 2),
        (["shapes"], 2),
        (["shapes", SHAPES, "--precision", "int8"], 2),
        (["absent", tmp_path / "new", "--precision", "int8"], 3),
    ):
        result = run("convert", *arguments)
        assert result.returncode == code
        one_line(result)
    result = run("generate", "x.png", "--prompt", "x", "--precision", "int2")
    assert result.returncode == 2 and "int2" in one_line(result)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    source = sparse(tmp_path / "source", vocab_size=5_000_000)
    command = [*CLI, "convert", str(source), str(tmp_path / "new"), "--precision", "int4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".new.*/new/model.safetensors")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in stderr
    assert left_in(tmp_path) == ["source"]


# --- the mask decoder --------------------------------------------------------------------------


def test_a_converted_model_still_paints_masks(tmp_path: Path) -> None:
    convert("shapes", tmp_path / "small", "int8", quiet)
    decoder = (tmp_path / "small" / "vae.safetensors").read_bytes()
    assert decoder == (SHAPES.parent / "vae.safetensors").read_bytes()
    picture = draw_picture()
    [box] = npvlm.load(tmp_path / "small").segment(picture, "red circle").boxes
    [same] = npvlm.load("shapes").segment(picture, "red circle").boxes
    assert box.painted is not None and same.painted is not None
    ours, theirs = box.painted > 0, same.painted > 0
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.8


@pytest.mark.parametrize("name", ["vae-oid.npz", "vae.safetensors"])
@pytest.mark.parametrize("beside", [False, True])
def test_the_mask_decoder_comes_along_under_its_own_name(
    tmp_path: Path, name: str, beside: bool
) -> None:
    source, _ = a_source(tmp_path / "source")
    (tmp_path / name if beside else source / name).write_text("masks")
    (tmp_path / "there").mkdir()
    convert(source, tmp_path / "there/new", "bfloat16", quiet)
    expected = sorted([name, "config.json", "model.safetensors", "preprocessor_config.json"])
    assert left_in(tmp_path / "there/new") == expected
    assert (tmp_path / "there/new" / name).read_text() == "masks"


# --- docs/format.md ----------------------------------------------------------------------------

FORMAT = (Path(npvlm.__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_code_of_the_format_page_reads_the_weights(tmp_path: Path, precision: str) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", FORMAT, re.MULTILINE | re.DOTALL)
    defined: dict[str, Any] = {}
    exec(code, defined)
    source, config = a_source(tmp_path / "source", dtype="BF16")
    convert(source, tmp_path / "new", precision, quiet)
    for name, weight in opened(tmp_path / "new").items():
        if isinstance(weight, Int8 | Int4):
            read = defined["read_int8" if isinstance(weight, Int8) else "read_int4"]
            numbers = read(*parts_of(weight), weight.block, expected_shapes(config)[name][1])
            np.testing.assert_array_equal(numbers, weight.unpack())


def test_the_format_page_has_the_blocks_and_the_entry_that_are_written(tmp_path: Path) -> None:
    rows = re.findall(r"^\| ([IBJ]) \|(.*)\|$", FORMAT, re.MULTILINE)
    width, block, padded = ([int(n) for n in cells.split("|")] for _, cells in rows)
    assert block == [rotation_block(i, 128) for i in width]
    assert padded == [i + -i % b for i, b in zip(width, block, strict=True)]
    source, _ = a_source(tmp_path / "source")
    convert(source, tmp_path / "new", "int8", quiet)
    [entry] = re.findall(r'^"quantization": (.*)$', FORMAT, re.MULTILINE)
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["quantization"] == json.loads(entry)
