"""Models made from a PaliGemma: inside another one, a table missing or short, other sizes."""

from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npvlm
from golden import ours
from npvlm.config import parse_config, read_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.checkpoint import left_out, open_checkpoint
from npvlm.files.deduced import Heads, deduce_config
from npvlm.files.names import EMBED_TOKENS, LM_HEAD, POSITIONS, Shapes, expected_shapes, prefixes
from npvlm.files.resample import resample_positions
from npvlm.files.tokenizer import load_tokenizer, tokens_to_add
from npvlm.model.weights import Weight, unpack
from npvlm.work.convert import convert
from npvlm.work.demo import draw_picture
from npvlm.work.inspect import inspect
from npvlm.work.inspect_page import page
from npvlm.work.sources import open_source
from tests.published import configs, saved_by_transformers5
from tests.test_checkpoint import Tensors, refusal, same, tensors_of, write
from tests.test_cli import one_line, run
from tests.test_convert import a_source, bits_of, left_in, quiet, said_of
from tests.test_names import respelled

GOLDEN = Path(ours.__file__).parent
PI0 = "paligemma_with_expert.paligemma."
BESIDE: Tensors = {
    "action_in_proj.weight": ("F32", (2,), bytes(8)),
    "action_in_proj.bias": ("F32", (2,), bytes(8)),
    "paligemma_with_expert.gemma_expert.model.norm.weight": ("BF16", (4,), bytes(8)),
}


def golden_tensors(name: str = "pg2") -> Tensors:
    """The tensors of a stored random model, as the bytes of its file."""
    folder = GOLDEN / name
    found = open_checkpoint(folder, read_config(folder))
    return {
        n: ("BF16", w.shape, w.bits.tobytes())  # type: ignore[union-attr]
        for n, w in found.items()
    }


def golden_folder(place: Path, tensors: Tensors, name: str = "pg2") -> Path:
    """A stored random model with other tensors in its file."""
    shutil.copytree(GOLDEN / name, place)
    write(place / "model.safetensors", tensors)
    return place


def scores_of(folder: Path) -> np.ndarray:
    return npvlm.load(folder, ops="numpy").logits(draw_picture(), "caption en", [5, 7])


def opened(folder: Path) -> dict[str, Weight]:
    return open_checkpoint(folder, read_config(folder))


# --- inside another model ----------------------------------------------------------------------


@pytest.mark.parametrize("head_alone", [False, True])
@pytest.mark.parametrize("release", ["published", "saved by 5", "modules of 4.52", "modules of 5"])
@pytest.mark.parametrize("prefix", [PI0, f"model.{PI0}", "vlm.", "base_model.model.", "a.model.b."])
def test_a_paligemma_inside_another_model_is_found_by_its_names(
    tmp_path: Path, prefix: str, release: str, head_alone: bool
) -> None:
    config = parse_config(saved_by_transformers5("gemma2"))
    tensors = tensors_of(config)
    names = {n: LM_HEAD if head_alone and n == EMBED_TOKENS else n for n in tensors}
    inside = {prefix + respelled(names[n], release): t for n, t in tensors.items()}
    write(tmp_path / "model.safetensors", inside | BESIDE)
    assert same(open_checkpoint(tmp_path, config), tensors)


def test_it_answers_as_the_model_alone_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    inside = {PI0 + respelled(n, "modules of 5"): t for n, t in golden_tensors().items()}
    folder = golden_folder(tmp_path / "pi0", inside | BESIDE)
    assert np.array_equal(scores_of(folder), scores_of(GOLDEN / "pg2"))
    draw_picture().save(tmp_path / "picture.png")
    result = run("caption", tmp_path / "picture.png", "--model", folder, "--max-tokens", 1)
    assert result.returncode == 0
    said = (
        f"npvlm: the PaliGemma under {PI0.removesuffix('.')} is taken; what stands beside it "
        "is left out: action_in_proj.weight (1), action_in_proj.bias (1), "
        "paligemma_with_expert.gemma_expert (1)."
    )
    assert said in result.stderr.splitlines()
    quietly = run("caption", tmp_path / "picture.png", "--model", folder, "--max-tokens", 1, "-q")
    assert quietly.stderr == ""
    told = " ".join(page(inspect(str(folder))).split())
    assert "under paligemma_with_expert.paligemma, beside tensors that are no part of" in told


def test_convert_takes_it_out(tmp_path: Path) -> None:
    tensors = golden_tensors()
    inside = {PI0 + respelled(n, "modules of 5"): t for n, t in tensors.items()}
    said: list[str] = []
    folder = golden_folder(tmp_path / "pi0", inside | BESIDE)
    convert(folder, tmp_path / "new", None, quiet, say=said.append)
    assert set(load_names(tmp_path / "new")) == set(tensors)
    assert same(opened(tmp_path / "new"), tensors)
    assert len(said) == 1 and "is left out: action_in" in said[0]


def load_names(folder: Path) -> list[str]:
    header = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    return [name for name in json.loads(header[8 : 8 + length]) if name != "__metadata__"]


def test_tensors_of_the_model_itself_that_are_unknown_are_still_refused(tmp_path: Path) -> None:
    config = parse_config(saved_by_transformers5("gemma"))
    inside = {PI0 + n: t for n, t in tensors_of(config).items()}
    write(tmp_path / "model.safetensors", inside | {f"{PI0}extra.weight": ("F32", (1,), bytes(4))})
    assert f"1 unexpected ({PI0}extra.weight)" in refusal(tmp_path, config)
    write(tmp_path / "model.safetensors", tensors_of(config) | BESIDE)
    assert "3 unexpected" in refusal(tmp_path, config)


def test_two_paligemmas_in_one_file_are_refused(tmp_path: Path) -> None:
    config = parse_config(saved_by_transformers5("gemma"))
    tensors = tensors_of(config)
    both = {f"{p}{n}": t for p in ("left.", "right.") for n, t in tensors.items()}
    write(tmp_path / "model.safetensors", both)
    assert "holds 2 PaliGemmas, under 'left.', 'right.', expected one" in refusal(tmp_path, config)


@pytest.mark.parametrize(
    ("start", "expected"),
    [("", [""]), ("model.", [""]), ("a.", ["a."]), ("a.model.", ["a."]), ("a_model.", ["a_model."]),
     ("a.b.model.", ["a.b."]), ("a", []), ("other_", [])],
)  # fmt: skip
def test_a_prefix_ends_at_a_dot_and_has_no_model_at_its_end(
    start: str, expected: list[str]
) -> None:
    assert prefixes([f"{start}multi_modal_projector.linear.weight", "x.y"]) == expected


@pytest.mark.parametrize("start", ["vlm.", "vlm.model.", "model.", "model.model.", ""])
@pytest.mark.parametrize("projection", ["embedding_proj_layer", "model.custom_text_proj"])
def test_a_colpali_is_no_paligemma_inside_another_model(start: str, projection: str) -> None:
    names = [f"{start}multi_modal_projector.linear.weight", f"{projection}.weight"]
    assert prefixes(names) == [""]


def test_a_colpali_is_converted_whole_and_for_another_size(tmp_path: Path) -> None:
    source, said = GOLDEN / "colpali", list[str]()
    convert(source, tmp_path / "same", None, quiet, say=said.append)
    assert not said and left_out(source) is None
    assert {n: bits_of(w) for n, w in opened(tmp_path / "same").items()} == {
        n: bits_of(w) for n, w in opened(source).items()
    }
    before = read_config(source).vision_config
    convert(source, tmp_path / "new", None, quiet, image_size=before.image_size * 2)
    after = npvlm.load_retriever(tmp_path / "new").model.config
    assert after.embedding_dim == read_config(source).embedding_dim
    assert after.vision_config.num_patches == 4 * before.num_patches


# --- whose config.json is another's ------------------------------------------------------------


@pytest.mark.parametrize("name", configs())
def test_the_config_of_a_published_model_is_told_from_its_shapes(name: str) -> None:
    expected = parse_config(configs()[name])
    values, known = deduce_config(expected_shapes(expected), None, "bfloat16")
    found = parse_config(values)
    assert known
    assert (found.text_config, found.vision_config) == (
        expected.text_config,
        expected.vision_config,
    )
    assert found.image_token_index == expected.image_token_index == 257152


def test_shapes_that_tell_no_heads_need_a_config() -> None:
    shapes = expected_shapes(parse_config(saved_by_transformers5("gemma2")))
    with pytest.raises(
        NpvlmError, match=r"3 layers of 24 are no published .* put the config\.json"
    ):
        deduce_config(shapes, None, "float32")
    values, known = deduce_config(shapes, Heads(4, 2, 10, 3), "float32")
    assert not known and values["text_config"]["query_pre_attn_scalar"] == 10
    tower = configs()["paligemma-3b-pt-224"]
    other = tower | {"vision_config": tower["vision_config"] | {"num_hidden_layers": 5}}
    with pytest.raises(NpvlmError, match="5 layers of 1152, is that of no published"):
        deduce_config(expected_shapes(parse_config(other)), None, "float32")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"type": "pi0", "n_obs_steps": 1},
            r"config\.json is no PaliGemma's \('pi0'\), and 3 layers",
        ),
        (
            {"model_type": "llama"},
            r"config\.json is no PaliGemma's \('llama'\), and 3 layers of 24",
        ),
        (None, r"config\.json is missing, and 3 layers of 24"),
    ],
)
def test_a_config_that_cannot_be_told_is_asked_for(
    tmp_path: Path, content: dict[str, Any] | None, says: str
) -> None:
    source, _ = a_source(tmp_path / "source")
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(NpvlmError, match=says):
        convert(source, tmp_path / "new", None, quiet)
    assert left_in(tmp_path) == ["source"]


@pytest.mark.parametrize("name", ["paligemma-3b-pt-224", "paligemma2-10b-pt-448"])
def test_a_policy_as_large_as_published_becomes_a_folder_of_its_paligemma(
    tmp_path: Path, name: str
) -> None:
    """As lerobot writes them: no embedding table but the head, no row for <image>, no config."""
    values = configs()[name] | {"tie_word_embeddings": True}
    shapes = expected_shapes(parse_config(values))
    table = shapes.pop(EMBED_TOKENS)
    shapes[LM_HEAD] = (257152, table[1])
    inside = {PI0 + respelled(n, "modules of 5"): shape for n, shape in shapes.items()}
    holes(tmp_path / "model.safetensors", inside | {"state_proj.weight": (32, 1024)})
    (tmp_path / "config.json").write_text('{"type": "pi0", "n_action_steps": 50}')
    said: list[str] = []
    source = open_source(tmp_path, None, None, said.append)
    expected = parse_config(values)
    text = replace(expected.text_config, vocab_size=257152)
    assert (source.config.text_config, source.config.vision_config) == (
        text,
        expected.vision_config,
    )
    assert source.weights.keys() == expected_shapes(source.config).keys()
    assert json.loads(source.files["preprocessor_config.json"])["size"]["height"] == int(name[-3:])
    for words in (
        "is left out: state_proj.weight (1)",
        "config.json is no PaliGemma's ('pi0'); one is written",
    ):
        assert any(words in line for line in said), said
    assert any("has 257,152 rows: none for <image> (257152)" in line for line in said)


def holes(path: Path, shapes: Shapes) -> None:
    """Write a safetensors file of zeros in bfloat16 that takes no room on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_weights_of_another_kind_of_model_are_said_to_be_none(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", BESIDE)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    said = said_of(NpvlmError, tmp_path, tmp_path.parent / "new", None)
    assert "is no PaliGemma's ('llama'), and" in said and "are they a PaliGemma's?" in said


def test_loading_such_a_folder_names_convert(tmp_path: Path) -> None:
    source, _ = a_source(tmp_path / "source")
    (source / "config.json").write_text('{"type": "pi0"}')
    with pytest.raises(NpvlmError, match=r"`npvlm convert` takes one out of another model"):
        npvlm.load(source)


def test_the_part_of_a_config_that_is_a_paligemma_s_is_taken(tmp_path: Path) -> None:
    tensors, said = golden_tensors(), list[str]()
    folder = golden_folder(tmp_path / "vlm", {f"vlm.{n}": t for n, t in tensors.items()})
    values = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "policy", "vlm_config": values, "action_dim": 7}
    (folder / "config.json").write_text(json.dumps(whole))
    convert(folder, tmp_path / "new", None, quiet, say=said.append)
    assert json.loads((tmp_path / "new/config.json").read_text()) == values
    assert np.array_equal(scores_of(tmp_path / "new"), scores_of(GOLDEN / "pg2"))
    assert any("a PaliGemma inside" in line for line in said)


def test_a_folder_without_settings_for_pictures_gets_them_and_a_vocabulary_is_asked_for(
    tmp_path: Path,
) -> None:
    folder = golden_folder(tmp_path / "bare", golden_tensors())
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    said = list[str]()
    convert(folder, tmp_path / "new", None, quiet, say=said.append)
    assert any("there is no tokenizer.model in" in line for line in said)
    tokenizer = GOLDEN / "pg2" / "tokenizer.model"
    convert(folder, tmp_path / "newer", None, quiet, tokenizer=tokenizer)
    assert np.array_equal(scores_of(tmp_path / "newer"), scores_of(GOLDEN / "pg2"))


def test_a_tokenizer_that_is_not_there_is_said_before_the_weights_are_read(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(NpvlmError, match="absent is no file, expected a SentencePiece model"):
        convert(GOLDEN / "pg2", tmp_path / "new", None, quiet, tokenizer=absent)


# --- a shorter table ---------------------------------------------------------------------------


def cut(tensors: Tensors, rows: int) -> Tensors:
    dtype, shape, content = tensors[EMBED_TOKENS]
    each = len(content) // shape[0]
    return tensors | {EMBED_TOKENS: (dtype, (rows, shape[1]), content[: rows * each])}


@pytest.mark.parametrize("named", [EMBED_TOKENS, "lm_head.weight"])
@pytest.mark.parametrize("rows", [396, 399])
def test_a_table_without_untrained_rows_serves_under_a_config_that_has_them(
    tmp_path: Path, rows: int, named: str
) -> None:
    """pg2 has 401 rows, and <image> is 396."""
    tensors = {named if n == EMBED_TOKENS else n: t for n, t in cut(golden_tensors(), rows).items()}
    folder, said = golden_folder(tmp_path / "short", tensors), list[str]()
    model = npvlm.load(folder)
    assert model.config.text_config.vocab_size == rows
    expected = scores_of(GOLDEN / "pg2")[:, :rows]
    assert np.array_equal(scores_of(folder), expected)
    with pytest.raises(UsageError, match=f"ids from 0 to {rows - 1}"):
        model.logits(draw_picture(), "caption en", [rows])
    convert(folder, tmp_path / "new", None, quiet, say=said.append)
    values = json.loads((tmp_path / "new/config.json").read_text())
    assert values["vocab_size"] == values["text_config"]["vocab_size"] == rows
    assert np.array_equal(scores_of(tmp_path / "new"), expected)
    assert any("never looked up" in line for line in said) == (rows == 396)
    assert inspect(str(folder)).refusal is None


@pytest.mark.parametrize("rows", [1, 395, 400])
def test_any_other_number_of_rows_is_refused(tmp_path: Path, rows: int) -> None:
    values = json.loads((GOLDEN / "pg2/config.json").read_text())
    if rows == 400:  # more than the config says
        values["text_config"]["vocab_size"] = 399
    folder = golden_folder(tmp_path / "short", cut(golden_tensors(), rows))
    (folder / "config.json").write_text(json.dumps(values))
    assert f"is [{rows}, 54], expected [" in refusal(folder, read_config(folder))


def test_a_token_whose_row_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = golden_folder(tmp_path / "short", cut(golden_tensors(), 398))
    (folder / "added_tokens.json").write_text('{"<image>": 396, "<new>": 399}')
    with pytest.raises(NpvlmError, match=r"'<new>' is 399, expected less than 398"):
        npvlm.load(folder)


# --- the vocabulary of Gemma itself ------------------------------------------------------------


def test_gemma_s_own_vocabulary_lacks_locations_and_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads((GOLDEN / "pg2/config.json").read_text())
    path = GOLDEN / "pg2/tokenizer.model"  # of 396 pieces
    values |= {"image_token_index": 396 + 1152, "vocab_size": 396 + 1216}
    values["text_config"]["vocab_size"] = 396 + 1216
    config = parse_config(values)
    added = tokens_to_add(path, config)
    assert len(added) == 1153
    assert added["<loc0000>"] == 396 and added["<loc1023>"] == 396 + 1023
    assert added["<seg000>"] == 396 + 1024 and added["<seg127>"] + 1 == added["<image>"]
    shutil.copy(path, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    ids = load_tokenizer(tmp_path, config).encode("<seg127><loc0100>")
    assert ids == [396 + 1024 + 127, 396 + 100]
    assert tokens_to_add(path, read_config(GOLDEN / "pg2")) == {"<image>": 396}


def test_a_named_tokenizer_takes_the_place_of_all_that_the_folder_has(tmp_path: Path) -> None:
    folder = golden_folder(tmp_path / "source", golden_tensors())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text('{"added_tokens_decoder": {"5": {"content": "<image>"}}}')
    vocabulary = GOLDEN / "pg2/tokenizer.model"
    convert(folder, tmp_path / "new", None, quiet, tokenizer=vocabulary)
    assert left_in(tmp_path / "new") == sorted(
        [*(p.name for p in (GOLDEN / "pg2").iterdir()), "added_tokens.json"]
    )
    assert npvlm.load(tmp_path / "new").tokenizer.image_id == 396


# --- pictures of another size ------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("side", [3, 4, 7])
def test_positions_are_resampled_when_asked(
    tmp_path: Path, side: int, precision: str | None
) -> None:
    """pg2 has pictures of 20 pixels in patches of 5."""
    folder, new = GOLDEN / "pg2", tmp_path / "new"
    convert(folder, new, precision, quiet, image_size=5 * side)
    config, found, before = read_config(new), opened(new), opened(folder)
    assert config.vision_config.image_size == 5 * side
    table = resample_positions(unpack(before[POSITIONS], np.float32), side)
    made = unpack(found[POSITIONS], np.float32)
    assert made.shape == (side * side, 57)
    np.testing.assert_allclose(made, table, rtol=2**-8 if precision == "bfloat16" else 0)
    others = [n for n in before if n != POSITIONS]
    if precision is None:
        assert all(bits_of(found[n]) == bits_of(before[n]) for n in others)
    model = npvlm.load(new)
    assert model.preprocessor.height == model.preprocessor.width == 5 * side
    assert model.look(draw_picture()) is not None
    values = json.loads((new / "preprocessor_config.json").read_text())
    assert values["image_seq_length"] == side * side


def test_numbers_that_follow_from_the_size_follow(tmp_path: Path) -> None:
    folder = golden_folder(tmp_path / "source", golden_tensors())
    values = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        values[part]["num_image_tokens"] = 16
    (folder / "config.json").write_text(json.dumps(values))
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": pictures}))
    convert(folder, tmp_path / "new", None, quiet, image_size=30)
    found = json.loads((tmp_path / "new/config.json").read_text())
    assert [found[p]["num_image_tokens"] for p in ("text_config", "vision_config")] == [36, 36]
    pictures = json.loads((tmp_path / "new/processor_config.json").read_text())["image_processor"]
    assert pictures["size"] == {"height": 30, "width": 30} and pictures["image_seq_length"] == 36
    assert npvlm.load(tmp_path / "new").preprocessor.height == 30


def test_a_table_of_another_size_than_the_config_says_is_refused_until_asked(
    tmp_path: Path,
) -> None:
    folder = golden_folder(tmp_path / "source", golden_tensors())
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["image_size"] = 35
    (folder / "config.json").write_text(json.dumps(values))
    said = refusal(folder, read_config(folder))
    assert "position_embedding.weight is [16, 57], expected [49, 57]" in said
    assert "`npvlm convert SRC DST --image-size N`" in said
    assert "is [16, 57]" in said_of(NpvlmError, folder, tmp_path / "new", None)
    for size, rows in ((35, 49), (20, 16), (15, 9)):
        new = tmp_path / f"new-{size}"
        convert(folder, new, None, quiet, image_size=size)
        assert unpack(opened(new)[POSITIONS], np.float32).shape == (rows, 57)
        npvlm.load(new)
    assert bits_of(opened(tmp_path / "new-20")[POSITIONS]) == bits_of(
        opened(GOLDEN / "pg2")[POSITIONS]
    )


@pytest.mark.parametrize("size", [1, 4, 19, 23, 5 * 91, 10**6])
def test_sizes_that_make_no_whole_patches_or_too_many_are_bad_use(
    tmp_path: Path, size: int
) -> None:
    with pytest.raises(UsageError, match=f"--image-size is {size}, expected a multiple of 5"):
        convert(GOLDEN / "pg2", tmp_path / "new", None, quiet, image_size=size)
    assert left_in(tmp_path) == []


def test_the_command_takes_a_size_and_a_file_of_big_vision_at_once(tmp_path: Path) -> None:
    result = run(
        *("convert", GOLDEN / "formats/bv2.npz", tmp_path / "new", "--image-size", 24),
        *("--tokenizer", GOLDEN / "formats/bv2.tokenizer.model"),
    )
    assert result.returncode == 0, result.stderr
    model = npvlm.load(tmp_path / "new")
    assert model.config.vision_config.num_patches == 36 == len(model.look(draw_picture()).features)
    for arguments, code in ((["--image-size", "0"], 2), (["--image-size", "30"], 2)):
        result = run("convert", GOLDEN / "formats/bv2.npz", tmp_path / "other", *arguments)
        assert result.returncode == code


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_settings_that_are_to_be_changed_and_are_none_are_named(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = golden_folder(tmp_path / "source", golden_tensors())
    (folder / name).write_bytes(content.encode("latin1"))
    said = said_of_size(folder, tmp_path / "new")
    assert said == f"{name} is no JSON object; copy it again."


def said_of_size(folder: Path, new: Path, size: int = 30) -> str:
    with pytest.raises(NpvlmError) as caught:
        convert(folder, new, None, quiet, image_size=size)
    assert left_in(new.parent) == [folder.name]
    return str(caught.value)


def test_a_part_that_is_left_out_is_not_made_up(tmp_path: Path) -> None:
    values = {k: v for k, v in configs()["paligemma-3b-pt-224"].items() if k != "vision_config"}
    values["vision_config"] = None
    config = parse_config(values)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    holes(folder / "model.safetensors", expected_shapes(config))
    said = said_of_size(folder, tmp_path / "new", 42)
    assert said == "config.json has no vision_config, expected one; write it out in full."


def test_names_that_cannot_be_printed_are_said_in_one_line(tmp_path: Path) -> None:
    tensors = {f"a\nb.{n}": t for n, t in golden_tensors().items()}
    odd = {"\x1b[31mred\n.x.y": ("F32", (1,), bytes(4)), "é" * 500: ("F32", (1,), bytes(4))}
    folder = golden_folder(tmp_path / "source", tensors | odd)
    said = left_out(folder)
    assert said is not None and said.isprintable() and len(said) < 400


def test_a_packed_folder_is_not_converted_again_for_another_size(tmp_path: Path) -> None:
    convert(GOLDEN / "pg2", tmp_path / "packed", "int8", quiet)
    with pytest.raises(UsageError, match="packed as int8 already"):
        convert(tmp_path / "packed", tmp_path / "new", None, quiet, image_size=30)


def test_as_stored_is_the_default_and_changes_no_number(tmp_path: Path) -> None:
    result = run("convert", GOLDEN / "pg2-f16-sharded", tmp_path / "new")
    assert result.returncode == 0
    before, after = opened(GOLDEN / "pg2-f16-sharded"), opened(tmp_path / "new")
    assert {n: bits_of(w) for n, w in before.items()} == {n: bits_of(w) for n, w in after.items()}
    assert (tmp_path / "new/config.json").read_text().rstrip() == json.dumps(
        json.loads((GOLDEN / "pg2-f16-sharded/config.json").read_text()), indent=2
    )
    assert "model.safetensors" in left_in(tmp_path / "new")
    assert one_line(run("convert", "shapes", tmp_path / "new")).endswith(
        "expected a new or an empty folder."
    )
