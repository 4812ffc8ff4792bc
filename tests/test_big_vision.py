"""Checkpoints of big_vision become folders of the published form, with the same numbers."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import npvlm
from golden import big_vision as oracle
from golden import ours
from npvlm import opening
from npvlm.config import parse_config, read_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.big_vision import open_big_vision
from npvlm.files.checkpoint import open_checkpoint, read_header
from npvlm.files.names import EMBED_TOKENS
from npvlm.files.needs import mapped_bytes, working_bytes
from npvlm.files.pictures import open_picture, pixel_values
from npvlm.files.published import config_values
from npvlm.model.weights import BFloat16, Weight
from npvlm.opening import find_folder
from npvlm.work.convert import convert
from npvlm.work.inspect import inspect
from npvlm.work.inspect_page import page
from tests.lora import lora_tensors, save_lora
from tests.test_checkpoint import write
from tests.test_cli import one_line, run
from tests.test_convert import bits_of, quiet

GOLDEN = Path(ours.__file__).parent
FORMATS = GOLDEN / "formats"
RECORD = json.loads((GOLDEN / "formats.json").read_text())
NAMES = ["bv1", "bv2"]
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# B, I, E, h, e, patches of a side, patch; V, L, D, F, H, K, d
SIZES = {
    "gemma": ((2, 15, 22, 3, 5, 3, 4), (301, 3, 14, 26, 3, 1, 6)),
    "gemma2": ((2, 12, 25, 2, 6, 2, 5), (297, 4, 18, 29, 6, 2, 8)),
}


def arrays_of(family: str, seed: int = 0) -> oracle.Arrays:
    """Random arrays in the layout of a family, of numbers that bfloat16 and float16 have."""
    (B, I, E, h, e, side, p), (V, L, D, F, H, K, d) = SIZES[family]  # noqa: E741
    block, layers = oracle.BLOCK, oracle.LAYERS
    attention, mlp = oracle.ATTENTION, f"{oracle.BLOCK}MlpBlock_0/"
    shapes: dict[str, tuple[int, ...]] = {
        "img/embedding/kernel": (p, p, 3, I),
        "img/embedding/bias": (I,),
        "img/pos_embedding": (1, side * side, I),
        "img/Transformer/encoder_norm/scale": (I,),
        "img/Transformer/encoder_norm/bias": (I,),
        "img/head/kernel": (I, D),
        "img/head/bias": (D,),
        f"{attention}out/kernel": (B, h, e, I),
        f"{attention}out/bias": (B, I),
        f"{mlp}Dense_0/kernel": (B, I, E),
        f"{mlp}Dense_0/bias": (B, E),
        f"{mlp}Dense_1/kernel": (B, E, I),
        f"{mlp}Dense_1/bias": (B, I),
        "llm/embedder/input_embedding": (V, D),
        "llm/final_norm/scale": (D,),
        f"{layers}attn/q_einsum/w": (L, H, D, d),
        f"{layers}attn/kv_einsum/w": (L, 2, K, D, d),
        f"{layers}attn/attn_vec_einsum/w": (L, H, d, D),
        f"{layers}mlp/gating_einsum": (L, 2, D, F),
        f"{layers}mlp/linear": (L, F, D),
        f"{layers}pre_attention_norm/scale": (L, D),
        f"{layers}pre_ffw_norm/scale": (L, D),
    }
    for part in ("scale", "bias"):
        shapes |= {f"{block}LayerNorm_{i}/{part}": (B, I) for i in (0, 1)}
    for part in ("query", "key", "value"):
        shapes[f"{attention}{part}/kernel"] = (B, I, h, e)
        shapes[f"{attention}{part}/bias"] = (B, h, e)
    if family == "gemma2":
        shapes[f"{layers}post_attention_norm/scale"] = (L, D)
        shapes[f"{layers}post_ffw_norm/scale"] = (L, D)
    draw = np.random.default_rng(seed)
    return {
        name: (draw.integers(-128, 128, shape) / 256).astype(np.float32)
        for name, shape in shapes.items()
    }


def saved(
    path: Path,
    family: str = "gemma2",
    dtype: str = "bfloat16",
    prefix: str = "params/",
    **more: Any,
) -> oracle.Arrays:
    """Write an .npz; `more` arrays replace, add or, where None, take away."""
    arrays = {n: a for n, a in (arrays_of(family) | more).items() if a is not None}
    oracle.save(path, arrays, dtype, prefix)
    return arrays


def opened(folder: Path) -> dict[str, Weight]:
    return open_checkpoint(folder, read_config(folder))


def refusal(path: Path) -> str:
    with pytest.raises(NpvlmError) as caught:
        open_big_vision(path)
    said = str(caught.value)
    assert "\n" not in said and str(path) in said
    return said


# --- equal -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The stored checkpoints, each beside the tokenizer as big_vision publishes it, converted."""
    found = {}
    for name in NAMES:
        place = tmp_path_factory.mktemp(name)
        shutil.copy(FORMATS / f"{name}.npz", place)
        shutil.copy(FORMATS / f"{name}.tokenizer.model", place / "paligemma_tokenizer.model")
        convert(place / f"{name}.npz", place / "new", None, quiet)
        found[name] = place / "new"
    return found


def test_the_stored_files_are_those_that_the_oracle_made() -> None:
    sums = {p: hashlib.sha256((GOLDEN / p).read_bytes()).hexdigest() for p in RECORD["sha256"]}
    assert sums == RECORD["sha256"] and len(sums) == 2 * 3 + 1


@pytest.mark.parametrize("ops", ["numpy", "kernels"])
@pytest.mark.parametrize("name", NAMES)
def test_a_converted_checkpoint_is_what_transformers_makes_of_it(
    converted: dict[str, Path], name: str, ops: str
) -> None:
    model, record = npvlm.load(converted[name], ops=ops), RECORD[name]
    stored = load_file(FORMATS / f"{name}.safetensors")
    picture = Image.fromarray(stored["picture"])
    [answer] = model.generate(picture, record["prompt"], max_tokens=len(record["answer"]))
    assert answer.token_ids == record["answer"]
    pixels = pixel_values(open_picture(picture), model.preprocessor)[None]
    [steps] = ours.decode(model, [pixels], [record["ids"]], [record["answer"]])
    truth = stored["decode"]
    error = ours.rms(steps[:: ours.EVERY] - truth) / ours.rms(truth)
    assert 0 < error < 2 * record["torch_float32"] < 100 * error


@pytest.mark.parametrize("prefix", ["params/", "", "state/params/"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", SIZES)
def test_tensors_are_those_of_transformers_script_bit_for_bit(
    tmp_path: Path, family: str, dtype: str, prefix: str
) -> None:
    arrays = saved(tmp_path / "x.npz", family, dtype, prefix)
    convert(tmp_path / "x.npz", tmp_path / "new", None, quiet)
    found, expected = opened(tmp_path / "new"), oracle.to_transformers(arrays)
    assert set(found) == set(expected)
    for name, weight in found.items():
        numbers = weight.unpack() if isinstance(weight, BFloat16) else weight
        assert isinstance(weight, BFloat16) == (dtype == "bfloat16")
        assert np.array_equal(numbers, expected[name]), name
    assert json.loads((tmp_path / "new/config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("ops", ["numpy", "kernels"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_bits_of_the_same_weights_in_the_published_layout(
    converted: dict[str, Path], tmp_path: Path, name: str, ops: str
) -> None:
    """As published, with rows behind the vocabulary that big_vision's tables do not have."""
    kind, folder = RECORD[name]["recipe"]["dtype"], tmp_path / "published"
    with np.load(FORMATS / f"{name}.npz") as file:
        arrays = {n.removeprefix("params/"): file[n] for n in file.files}
    tensors = oracle.to_transformers(arrays)
    table = tensors[EMBED_TOKENS]
    tensors[EMBED_TOKENS] = np.concatenate([table, table[7:12]])
    shutil.copytree(converted[name], folder)
    write(
        folder / "model.safetensors",
        {n: (DTYPES[kind], a.shape, a.tobytes()) for n, a in tensors.items()},
    )
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["vocab_size"] += 5
    (folder / "config.json").write_text(json.dumps(values))
    picture = Image.fromarray(load_file(FORMATS / f"{name}.safetensors")["picture"])
    models = [npvlm.load(f, ops=ops) for f in (converted[name], folder)]
    short, long = (m.logits(picture, "caption en", RECORD[name]["answer"]) for m in models)
    assert short.shape[1] == long.shape[1] - 5 == len(table)
    assert np.array_equal(short, long[:, : len(table)])


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_a_precision_is_reached_from_the_file_as_from_the_folder(
    converted: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    folder = converted["bv2"]
    convert(folder.parent / "bv2.npz", tmp_path / "at once", precision, quiet)
    convert(folder, tmp_path / "after", precision, quiet)
    at_once, after = opened(tmp_path / "at once"), opened(tmp_path / "after")
    assert {n: bits_of(w) for n, w in at_once.items()} == {n: bits_of(w) for n, w in after.items()}


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "with an adapter"])
@pytest.mark.parametrize("precision", [None, "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("ops", ["numpy", "kernels"])
@pytest.mark.parametrize("name", NAMES)
def test_loaded_it_has_the_bits_of_the_folder_made_of_it(
    converted: dict[str, Path],
    tmp_path: Path,
    name: str,
    ops: str,
    precision: str | None,
    adapted: bool,
) -> None:
    folder, lora = converted[name], None
    if adapted:
        targets = ("q_proj", "up_proj", "multi_modal_projector.linear")
        lora = save_lora(tmp_path / "lora", lora_tensors(folder, targets=targets))
    picture = Image.fromarray(load_file(FORMATS / f"{name}.safetensors")["picture"])
    models = [npvlm.load(place, precision, ops, lora) for place in (folder.parent, folder)]
    one, two = (m.logits(picture, "caption en", RECORD[name]["answer"]) for m in models)
    assert np.array_equal(one, two)
    assert mapped_bytes(models[0].weights) == 0
    assert models[0].preprocessor == models[1].preprocessor


def test_it_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    source = place_with(tmp_path / "downloads")
    with pytest.raises(NpvlmError, match=r"has no tokenizer\.model or paligemma_tokenizer\.model"):
        npvlm.load(source)
    shutil.copy(FORMATS / "bv1.tokenizer.model", source.parent / "tokenizer.model")
    npvlm.load(source)
    content = bytearray(source.read_bytes())
    content[content.index(b"q_einsum") + 300] ^= 1
    source.write_bytes(content)
    with pytest.raises(NpvlmError, match="q_einsum"):
        npvlm.load(source)


def test_it_needs_the_memory_of_all_its_weights(tmp_path: Path, monkeypatch) -> None:
    source = place_with(tmp_path / "downloads", "tokenizer.model")
    asked: list[int] = []
    monkeypatch.setattr(opening, "check_memory", lambda needed, *_: asked.append(needed))
    model = npvlm.load(source)
    stored = sum(2 * math.prod(weight.shape) for weight in dict(model.weights).values())
    npvlm.load(source, "bfloat16")
    assert asked == [stored + working_bytes(model.config)] * 2


def test_arrays_in_the_order_of_fortran_are_read_as_well(tmp_path: Path) -> None:
    arrays = {n: np.asfortranarray(a) for n, a in arrays_of("gemma2").items()}
    np.savez(tmp_path / "x.npz", **arrays)
    found, expected = open_big_vision(tmp_path / "x.npz"), oracle.to_transformers(arrays)
    for name, weight in found.weights.items():
        assert np.array_equal(weight[:], expected[name])


def test_the_bits_of_bfloat16_may_be_whole_numbers(tmp_path: Path) -> None:
    saved(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        np.savez(tmp_path / "y.npz", **{n: file[n].view(np.uint16) for n in file.files})
    one, other = (open_big_vision(tmp_path / f"{n}.npz") for n in "xy")
    assert all(bits_of(w[:]) == bits_of(other.weights[n][:]) for n, w in one.weights.items())


def test_any_rows_of_a_tensor_are_had_from_the_heads_that_hold_them(tmp_path: Path) -> None:
    saved(tmp_path / "x.npz", dtype="float32")
    for weight in open_big_vision(tmp_path / "x.npz").weights.values():
        whole, rows = weight[:], weight.shape[0]
        assert whole.shape == weight.shape
        for start, stop in (
            (0, 1),
            (1, 3),
            (rows - 1, rows),
            (2, rows + 9),
            (rows // 2, rows // 2),
        ):
            assert np.array_equal(weight[start:stop], whole[start:stop])


# --- what the file does not say ----------------------------------------------------------------


def published_npz(path: Path, size: str, resolution: int) -> None:
    """An .npz as large as the published one, of zeros that take no room on the disk."""
    values = config_values(size, resolution)
    text, vision = values["text_config"], values["vision_config"]
    sizes = {
        **{"V": 257152, "L": text["num_hidden_layers"], "D": text["hidden_size"]},
        **{"F": text["intermediate_size"], "H": text["num_attention_heads"]},
        **{"K": text["num_key_value_heads"], "d": text.get("head_dim", 256)},
        **{"B": 27, "I": 1152, "E": 4304, "h": 16, "e": 72, "p": 14, "c": 3, "1": 1, "2": 2},
        "P": (vision["image_size"] // 14) ** 2,
    }
    zeros(path, {f"params/{n}": tuple(sizes[a] for a in axes) for n, axes in AXES.items()
                 if "post" not in n or text["model_type"] == "gemma2"})  # fmt: skip


_BLOCK, _LAYERS = oracle.BLOCK, oracle.LAYERS
AXES = {
    "img/embedding/kernel": "ppcI",
    "img/embedding/bias": "I",
    "img/pos_embedding": "1PI",
    "img/Transformer/encoder_norm/scale": "I",
    "img/Transformer/encoder_norm/bias": "I",
    "img/head/kernel": "ID",
    "img/head/bias": "D",
    **{f"{_BLOCK}LayerNorm_{i}/{part}": "BI" for i in (0, 1) for part in ("scale", "bias")},
    **{f"{oracle.ATTENTION}{part}/kernel": "BIhe" for part in ("query", "key", "value")},
    **{f"{oracle.ATTENTION}{part}/bias": "Bhe" for part in ("query", "key", "value")},
    f"{oracle.ATTENTION}out/kernel": "BheI",
    f"{oracle.ATTENTION}out/bias": "BI",
    f"{_BLOCK}MlpBlock_0/Dense_0/kernel": "BIE",
    f"{_BLOCK}MlpBlock_0/Dense_0/bias": "BE",
    f"{_BLOCK}MlpBlock_0/Dense_1/kernel": "BEI",
    f"{_BLOCK}MlpBlock_0/Dense_1/bias": "BI",
    "llm/embedder/input_embedding": "VD",
    "llm/final_norm/scale": "D",
    f"{_LAYERS}attn/q_einsum/w": "LHDd",
    f"{_LAYERS}attn/kv_einsum/w": "L2KDd",
    f"{_LAYERS}attn/attn_vec_einsum/w": "LHdD",
    f"{_LAYERS}mlp/gating_einsum": "L2DF",
    f"{_LAYERS}mlp/linear": "LFD",
    **{
        f"{_LAYERS}{norm}/scale": "LD"
        for norm in ("pre_attention_norm", "pre_ffw_norm", "post_attention_norm", "post_ffw_norm")
    },
}


def zeros(path: Path, shapes: dict[str, tuple[int, ...]], sums: bool = False) -> None:
    """Write an .npz of zeros in bfloat16 as holes; with no `sums` those in the file are wrong."""
    directory = []
    with path.open("wb") as file:
        for name, shape in shapes.items():
            text = f"{{'descr': '|V2', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
            head = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
            size, at, member = len(head) + 2 * math.prod(shape), file.tell(), f"{name}.npy".encode()
            crc = zlib.crc32(bytes(size - len(head)), zlib.crc32(head)) if sums else 0
            extra = struct.pack("<HHQQ", 1, 16, size, size)
            fixed = (45, 0, 0, 0, 0, crc, 2**32 - 1, 2**32 - 1, len(member))
            file.write(b"PK\3\4" + struct.pack("<HHHHHIIIHH", *fixed, len(extra)) + member + extra)
            file.write(head)
            file.seek(size - len(head), 1)
            extra = struct.pack("<HHQQQ", 1, 24, size, size, at)
            rest = struct.pack("<HHHHII", len(extra), 0, 0, 0, 0, 2**32 - 1)
            entry = b"PK\1\2" + struct.pack("<HHHHHHIIIH", 45, *fixed) + rest
            directory.append(entry + member + extra)
        start, length = file.tell(), sum(map(len, directory))
        file.write(b"".join(directory))
        counts = (len(directory), len(directory), length, start)
        file.write(b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *counts))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, start + length, 1))
        file.write(
            b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, *(2**16 - 1,) * 2, *(2**32 - 1,) * 2, 0)
        )


@pytest.mark.parametrize(
    ("size", "resolution"),
    [("paligemma-3b", 224), ("paligemma-3b", 896), ("paligemma2-3b", 448),
     ("paligemma2-10b", 224), ("paligemma2-28b", 896)],
)  # fmt: skip
def test_the_config_of_a_published_checkpoint_is_told_from_its_shapes(
    tmp_path: Path, size: str, resolution: int
) -> None:
    """A 28B's file is 55 GB, one of its arrays 31 GB: opening it reads nothing of them."""
    published_npz(tmp_path / "x.npz", size, resolution)
    tracemalloc.start()
    found = open_big_vision(tmp_path / "x.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    values = config_values(size, resolution)
    values["text_config"] = values["text_config"] | {"vocab_size": 257152}
    assert found.known and parse_config(found.config) == parse_config(values)
    assert found.config["image_token_index"] == 257152
    last = found.weights[f"language_model.model.layers.{max_layer(values)}.mlp.up_proj.weight"]
    rows = last[last.shape[0] - 1 :]
    assert isinstance(rows, BFloat16) and not rows.unpack().any()


def max_layer(values: dict[str, Any]) -> int:
    layers: int = values["text_config"]["num_hidden_layers"]
    return layers - 1


def test_sizes_that_are_not_published_are_said_and_their_scale_follows_from_the_heads(
    tmp_path: Path,
) -> None:
    saved(tmp_path / "x.npz")
    said: list[str] = []
    convert(tmp_path / "x.npz", tmp_path / "new", None, quiet, say=said.append)
    assert any("no published decoder has these sizes" in line for line in said)
    assert any("does not tell the soft-caps: those of Google" in line for line in said)
    text = read_config(tmp_path / "new").text_config
    assert (text.query_pre_attn_scalar, text.head_dim) == (8, 8)
    assert (text.attn_logit_softcapping, text.final_logit_softcapping) == (50, 30)
    assert text.sliding_window == 4096


def test_the_rows_that_the_table_lacks_are_said(tmp_path: Path) -> None:
    saved(tmp_path / "x.npz")
    said: list[str] = []
    convert(tmp_path / "x.npz", tmp_path / "new", None, quiet, say=said.append)
    assert any("has 297 rows: none for <image> (297), which is never looked up" in s for s in said)
    config = read_config(tmp_path / "new")
    assert config.image_token_index == config.text_config.vocab_size == 297


def test_other_trees_of_the_file_are_left_out_and_said(tmp_path: Path) -> None:
    path, said = tmp_path / "x.npz", list[str]()
    arrays = {f"params/{n}": a for n, a in arrays_of("gemma").items()}
    others = {f"opt/0/mu/{n}": a[:1] for n, a in arrays_of("gemma").items()}
    np.savez(path, **arrays, **others, **{"params/t": np.ones(1), "chrono/steps": np.array([7])})
    convert(path, tmp_path / "new", None, quiet, say=said.append)
    [line] = [line for line in said if "left out" in line]
    assert f"opt ({len(others)}), t (1), chrono (1)" in line
    expected = oracle.to_transformers(arrays)
    assert all(np.array_equal(w, expected[n]) for n, w in opened(tmp_path / "new").items())


def test_names_may_be_parted_by_backslashes(tmp_path: Path) -> None:
    arrays = {f"params/{n}".replace("/", "\\"): a for n, a in arrays_of("gemma").items()}
    np.savez(tmp_path / "x.npz", **arrays)
    assert len(open_big_vision(tmp_path / "x.npz").weights) > 50


# --- the tokenizer -----------------------------------------------------------------------------


def place_with(folder: Path, *tokenizers: str) -> Path:
    folder.mkdir()
    shutil.copy(FORMATS / "bv1.npz", folder / "pt_224.bf16.npz")
    for name in tokenizers:
        shutil.copy(FORMATS / "bv1.tokenizer.model", folder / name)
    return folder / "pt_224.bf16.npz"


@pytest.mark.parametrize("name", ["tokenizer.model", "paligemma_tokenizer.model"])
def test_the_tokenizer_beside_the_file_comes_along(tmp_path: Path, name: str) -> None:
    source = place_with(tmp_path / "downloads", name)
    convert(source, tmp_path / "new", None, quiet)
    expected = (FORMATS / "bv1.tokenizer.model").read_bytes()
    assert (tmp_path / "new/tokenizer.model").read_bytes() == expected
    assert json.loads((tmp_path / "new/added_tokens.json").read_text()) == {"<image>": 331}
    assert npvlm.load(tmp_path / "new").tokenizer.image_id == 331


def test_without_a_tokenizer_it_is_said_how_to_add_one(tmp_path: Path) -> None:
    said: list[str] = []
    source = place_with(tmp_path / "downloads")
    convert(source, tmp_path / "new", None, quiet, say=said.append)
    [line] = [line for line in said if "--tokenizer" in line]
    assert "paligemma_tokenizer.model" in line and "as tokenizer.model" in line
    shutil.copy(FORMATS / "bv1.tokenizer.model", tmp_path / "new/tokenizer.model")
    npvlm.load(tmp_path / "new")


def test_the_tokenizer_of_another_model_is_refused_by_its_name_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source, other = place_with(tmp_path / "downloads"), tmp_path / "other.model"
    shutil.copy(GOLDEN / "pg1/tokenizer.model", other)
    with pytest.raises(NpvlmError, match=rf"{other} has 397 pieces, expected at most 331"):
        convert(source, tmp_path / "new", None, quiet, tokenizer=other)
    other.write_text("no vocabulary")
    with pytest.raises(NpvlmError, match=f"{other} is no SentencePiece model"):
        convert(source, tmp_path / "new", None, quiet, tokenizer=other)
    with pytest.raises(NpvlmError, match=r"absent is no file"):
        convert(source, tmp_path / "new", None, quiet, tokenizer=tmp_path / "absent")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["downloads", "other.model"]


# --- what is refused ---------------------------------------------------------------------------

Change = Callable[[oracle.Arrays], dict[str, Any]]
GATES, TABLE = f"{_LAYERS}mlp/gating_einsum", "llm/embedder/input_embedding"
WRONG: dict[str, tuple[Change, str]] = {
    "no table": (lambda a: {TABLE: None}, f"has no array {TABLE}"),
    "one missing": (lambda a: {GATES: None}, rf"1 missing \(params/{GATES}\)"),
    "one too many": (
        lambda a: {f"{_LAYERS}attn/qkv_einsum/w": a[GATES]},
        r"1 unexpected \(params/llm/layers/attn/qkv_einsum/w\)",
    ),
    "a layer less": (
        lambda a: {GATES: a[GATES][1:]},
        rf"params/{GATES} is \[3, 2, 18, 29\], expected \[4, 2, 18, F\]|expected \[4, 2, 18, 29\]",
    ),
    "axes turned": (
        lambda a: {GATES: a[GATES].transpose(0, 1, 3, 2)},
        rf"{GATES} is \[4, 2, 29, 18\], expected \[4, 2, 18, ",
    ),
    "an axis less": (lambda a: {GATES: a[GATES][0]}, rf"{GATES} is \[2, 18, 29\]"),
    "nothing in it": (lambda a: {TABLE: a[TABLE][:0]}, rf"{TABLE} is \[0, 18\]"),
    "no square of patches": (
        lambda a: {"img/pos_embedding": a["img/pos_embedding"][:, :3]},
        "has 3 rows, expected a square number",
    ),
    "patches that are no squares": (
        lambda a: {"img/embedding/kernel": a["img/embedding/kernel"][:, :4]},
        "patches of 5 x 4",
    ),
    "four colours": (
        lambda a: {"img/embedding/kernel": np.ones((5, 5, 4, 12), np.float32)},
        r"is \[5, 5, 4, 12\], expected \[p, q, 3, I\]|expected \[5, 5, 3, I\]|\[5, 5, 3, 12\]",
    ),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_arrays_that_make_no_paligemma_are_named(tmp_path: Path, change: Change, says: str) -> None:
    saved(tmp_path / "x.npz", dtype="float32", **change(arrays_of("gemma2")))
    said = refusal(tmp_path / "x.npz")
    assert re.search(says, said), said


def test_more_layers_than_any_model_has_are_refused(tmp_path: Path) -> None:
    shapes = {n: a.shape for n, a in arrays_of("gemma").items()}
    many = {n: (70_000, *s[1:]) if n.startswith(_LAYERS) else s for n, s in shapes.items()}
    zeros(tmp_path / "x.npz", many)
    assert "has 70000 layers, expected at most 1000" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<i4", "<c8", "|b1", "|V4", "|S2", "|u1"])
def test_numbers_of_other_types_are_refused(tmp_path: Path, dtype: str) -> None:
    arrays = {f"params/{n}": a for n, a in arrays_of("gemma").items()}
    name = "params/img/head/bias"
    values = np.zeros(14, dtype) if dtype[1] in "VS" else arrays[name].astype(dtype)
    np.savez(tmp_path / "x.npz", **arrays | {name: values})
    assert f"{name} is " in refusal(tmp_path / "x.npz")


def test_several_models_in_one_file_are_refused_unless_one_is_in_params(tmp_path: Path) -> None:
    arrays = arrays_of("gemma")
    trees = {f"{p}/{n}": a for p in ("ema", "params") for n, a in arrays.items()}
    np.savez(tmp_path / "x.npz", **trees)
    assert open_big_vision(tmp_path / "x.npz").others == {"ema": len(arrays)}
    np.savez(tmp_path / "y.npz", **{n.replace("params", "raw"): a for n, a in trees.items()})
    assert "holds 2 models (ema/, raw/), expected one" in refusal(tmp_path / "y.npz")


def test_a_damaged_file_leaves_nothing_behind(tmp_path: Path) -> None:
    source = place_with(tmp_path / "downloads")
    whole = source.read_bytes()
    for changed in (whole[:-1], whole[: len(whole) // 2], whole[:30_000] + b"x" + whole[30_001:]):
        source.write_bytes(changed)
        with pytest.raises(NpvlmError, match="copy"):
            convert(source, tmp_path / "new", None, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


def test_numbers_that_are_none_are_refused_by_the_name_of_the_tensor(tmp_path: Path) -> None:
    arrays = arrays_of("gemma")
    arrays[f"{_LAYERS}mlp/linear"][1, 3, 4] = np.nan
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(NpvlmError, match=r"layers\.1\.mlp\.down_proj\.weight holds inf or nan"):
        convert(tmp_path / "x.npz", tmp_path / "new", None, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


# A block has 2^20 numbers, and a few such arrays are kept at a time: measured 9 MB.
def test_memory_holds_a_few_blocks_however_large_an_array_is(tmp_path: Path) -> None:
    peaks = []
    arrays = arrays_of("gemma")
    for inner in (160_000, 480_000):
        shapes = {n: a.shape for n, a in arrays.items()}
        shapes[GATES], shapes[f"{_LAYERS}mlp/linear"] = (3, 2, 14, inner), (3, inner, 14)
        zeros(tmp_path / f"{inner}.npz", shapes, sums=True)
        tracemalloc.start()
        convert(tmp_path / f"{inner}.npz", tmp_path / f"new-{inner}", None, quiet)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 12e6
    assert peaks[1] < 1.1 * peaks[0]


# --- how a person meets it ---------------------------------------------------------------------


@pytest.mark.parametrize("named", ["the file", "its folder"])
def test_what_needs_a_folder_says_the_command_that_makes_one(tmp_path: Path, named: str) -> None:
    source = place_with(tmp_path / "my downloads", "paligemma_tokenizer.model")
    model = source if named == "the file" else source.parent
    with pytest.raises(NpvlmError, match="a checkpoint of big_vision becomes one by") as caught:
        find_folder(model)
    command = shlex.split(str(caught.value).partition("becomes one by ")[2])
    assert command == ["npvlm", "convert", str(source), "pt_224"]
    result = run(*command[1:-1], tmp_path / command[-1])
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.splitlines()[-1] == f"{tmp_path / 'pt_224'} is written."
    assert npvlm.load(tmp_path / "pt_224").config.image_token_index == 331


def test_a_command_answers_with_the_file_and_says_how_to_load_it_faster(tmp_path: Path) -> None:
    source = place_with(tmp_path / "downloads", "paligemma_tokenizer.model")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    asked = ("caption", tmp_path / "red.png", "--max-tokens", 3, "--json", "--model")
    result = run(*asked, source)
    assert result.returncode == 0
    said = f"a folder maps them: npvlm convert {source} pt_224"
    assert said in result.stderr
    convert(source, tmp_path / "new", None, quiet)
    records = [json.loads(text) for text in (result.stdout, run(*asked, tmp_path / "new").stdout)]
    assert records[0].pop("model") == str(source) and records[1].pop("model")
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]
    said = run("tokens", "caption en", "--model", source.parent)
    assert said.returncode == 0 and said.stdout == run(*said.args[2:-1], tmp_path / "new").stdout


def test_a_trace_of_the_file_is_one_of_the_folder_made_of_it(tmp_path: Path) -> None:
    source = place_with(tmp_path / "downloads", "tokenizer.model")
    convert(source, tmp_path / "new", None, quiet)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    for name, model in (("one", source), ("two", tmp_path / "new")):
        given = (
            "--prompt",
            "caption en",
            "--model",
            model,
            "--save",
            tmp_path / f"{name}.safetensors",
        )
        assert run("trace", tmp_path / "red.png", *given).returncode == 0
    traces = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    assert run("compare", *traces).returncode == 0
    assert run("compare", *traces, "--model", source).returncode == 0
    notes = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert notes[0]["config"] == notes[1]["config"]


def test_the_command_takes_a_folder_with_one_file_and_refuses_one_with_two(tmp_path: Path) -> None:
    source = place_with(tmp_path / "downloads", "tokenizer.model")
    result = run("convert", source.parent, tmp_path / "new", "--precision", "bfloat16")
    assert result.returncode == 0 and npvlm.load(tmp_path / "new").tokenizer.image_id == 331
    shutil.copy(source, source.parent / "pt_448.npz")
    result = run("convert", source.parent, tmp_path / "again")
    assert result.returncode == 3
    assert "holds 2 .npz files (pt_224.bf16.npz, pt_448.npz); name one" in one_line(result)


def test_a_folder_that_holds_the_new_one_is_no_obstacle_and_the_file_itself_is(
    tmp_path: Path,
) -> None:
    source = place_with(tmp_path / "downloads", "tokenizer.model")
    convert(source, source.parent / "pt_224", None, quiet)
    npvlm.load(source.parent / "pt_224")
    with pytest.raises(UsageError, match="is there already"):
        convert(source, source, None, quiet)


def test_the_mask_decoder_s_file_is_no_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "vae-oid.npz", x=np.zeros(3))
    with pytest.raises(NpvlmError, match=r"config\.json is missing"):
        npvlm.load(tmp_path)


def test_inspect_says_what_the_file_holds_and_what_to_do(tmp_path: Path) -> None:
    source = place_with(tmp_path / "downloads", "paligemma_tokenizer.model")
    found = inspect(str(source))
    said = page(found)
    assert f"or once for all: npvlm convert {source} pt_224" in " ".join(said.split())
    for words in (
        "PaliGemma 1, of no published size",
        "15 px, 9 image tokens",
        "pt_224.bf16.npz, 75,968 bytes",
        "names       those of big_vision",
        "stored      BF16: 32 tensors, ",
        "paligemma_tokenizer.model (SentencePiece), 331 pieces",
        "load        would open it",
    ):
        assert words in said, words
    assert not found.problems
    result = run("inspect", source.parent, "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["sizes"]["resolution"] == 15


def test_inspect_says_why_a_file_is_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "dump.npz", x=np.zeros(3))
    found = inspect(str(tmp_path / "dump.npz"))
    assert "has no array llm/embedder/input_embedding" in found.problems["weights"]
    assert "PaliGemma as big_vision saves it" in " ".join(page(found).split())
    (tmp_path / "dump.npz").write_bytes(b"no zip")
    assert "is no .npz file" in " ".join(page(inspect(str(tmp_path / "dump.npz"))).split())


# --- beside others -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "int8"])
def test_an_adapter_is_merged_as_into_the_folder_made_of_the_file(
    tmp_path: Path, precision: str | None
) -> None:
    source = place_with(tmp_path / "downloads", "tokenizer.model")
    convert(source, tmp_path / "plain", None, quiet)
    targets = ("q_proj", "up_proj", "multi_modal_projector.linear")
    lora = save_lora(tmp_path / "lora", lora_tensors(tmp_path / "plain", targets=targets))
    convert(source, tmp_path / "one", precision, quiet, lora)
    convert(tmp_path / "plain", tmp_path / "two", precision, quiet, lora)
    one, two, plain = (stored_in(tmp_path / name) for name in ("one", "two", "plain"))
    assert one == two != plain
    assert read_config(tmp_path / "one") == read_config(tmp_path / "two")


def stored_in(folder: Path) -> dict[str, bytes]:
    tensors = read_header(folder / "model.safetensors")
    return {tensor.name: tensor.bytes().tobytes() for tensor in tensors}


def test_an_adapter_of_another_model_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = place_with(tmp_path / "downloads", "tokenizer.model")
    lora = save_lora(tmp_path / "lora", lora_tensors(GOLDEN / "pg2"))
    with pytest.raises(NpvlmError, match="does not fit the model"):
        convert(source, tmp_path / "new", None, quiet, lora)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "paligemma_tokenizer.model", "vae-oid.npz"])
@pytest.mark.parametrize("named", ["the file", "its folder"])
def test_what_lies_beside_is_no_link_to_elsewhere(tmp_path: Path, name: str, named: str) -> None:
    source = place_with(tmp_path / "downloads")
    (tmp_path / "private").write_bytes(b"secret")
    (source.parent / name).symlink_to(tmp_path / "private")
    place = source if named == "the file" else source.parent
    for work in (
        lambda: convert(place, tmp_path / "new", None, quiet),
        lambda: inspect(str(place)),
    ):
        with pytest.raises(NpvlmError, match=f"{re.escape(name)} is a link to .*private"):
            work()
    assert not (tmp_path / "new").exists()


def test_a_link_to_the_file_is_followed_where_it_is_named_and_not_where_it_is_found(
    tmp_path: Path,
) -> None:
    source = place_with(tmp_path / "downloads", "tokenizer.model")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "mine.npz"
    link.symlink_to(source)
    convert(link, tmp_path / "new", None, quiet, tokenizer=source.parent / "tokenizer.model")
    npvlm.load(tmp_path / "new")
    with pytest.raises(NpvlmError, match=r"mine\.npz is a link to"):
        convert(link.parent, tmp_path / "other", None, quiet)
