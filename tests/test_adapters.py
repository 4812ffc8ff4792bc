"""Adapters: as PEFT applies them, beside weights of any precision or merged; or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import npvlm
from golden import ours
from npvlm.api import Model
from npvlm.config import read_config, read_json
from npvlm.decoding.generate import logits
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.adapters import open_adapter, same_name
from npvlm.files.checkpoint import open_checkpoint
from npvlm.files.writer import Tensor, tensor_file
from npvlm.model import paligemma
from npvlm.model.tap import closed
from npvlm.model.weights import Adapted, Array, BFloat16, round_to_bfloat16, unpack
from npvlm.work.convert import convert
from tests.lora import PREFIX, SPELLINGS, lora_tensors, save_lora
from tests.retriever import build_retriever

GOLDEN = Path(ours.__file__).parent
STORED = json.loads((GOLDEN / "adapters" / "adapters.json").read_text())["cases"]
BASE = GOLDEN / "pg1"
LM_HEAD = "language_model.lm_head.weight"
EMBED_TOKENS = "language_model.model.embed_tokens.weight"


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def scores(model: Model) -> Array:
    """The logits of one pass."""
    return model.logits(picture(), "caption en", [7, 8])


def run(model: Model, pixels: Array, ids: list[int], answer: list[int]) -> Array:
    w, config, ops = model.weights, model.config, model.ops
    features = paligemma.image_features(pixels[None], w, config, ops=ops, tap=closed)[0]
    given = np.array(ids, np.int64), np.array(answer, np.int64)
    return logits(*given, features, w, config, ops=ops, tap=closed)


def off(found: Array, truth: Array) -> float:
    return ours.rms(found - truth) / ours.rms(truth)


# --- as PEFT does --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(("ops", "dtype"), [("numpy", "f8"), ("numpy", "f4"), ("kernels", "f4")])
def test_logits_are_those_of_peft(name: str, ops: str, dtype: str) -> None:
    record, tensors = STORED[name], load_file(GOLDEN / "adapters" / f"{name}.safetensors")
    model = npvlm.load(GOLDEN / record["checkpoint"], ops=ops, adapter=GOLDEN / "adapters" / name)
    pixels = model.prepare(Image.fromarray(tensors["picture"])).pixels.astype(dtype)
    found = run(model, pixels, record["ids"], record["answer"])[-len(tensors["truth"]) :]
    torchs = record["torch_float32_error"]
    limit = ours.limit_float64(torchs) if dtype == "f8" else ours.limit_float32(torchs)
    assert limit / 100 < off(found, tensors["truth"]) <= limit


@pytest.mark.parametrize("name", STORED)
def test_answers_are_those_of_peft(name: str) -> None:
    record, tensors = STORED[name], load_file(GOLDEN / "adapters" / f"{name}.safetensors")
    model = npvlm.load(GOLDEN / record["checkpoint"], adapter=GOLDEN / "adapters" / name)
    shown = Image.fromarray(tensors["picture"])
    [answer] = model.generate(shown, record["prompt"], max_tokens=len(record["answer"]))
    assert (answer.prompt_token_ids, answer.token_ids) == (record["ids"], record["answer"])
    assert answer.model == f"{GOLDEN / record['checkpoint']}+{GOLDEN / 'adapters' / name}"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_names_is_the_same_adapter(tmp_path: Path, spelling: str) -> None:
    # Both patterns fit the end of a name; a name has the same end in all spellings.
    patterns = {"alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3, "q_proj": 5.5}}
    model = npvlm.load(
        BASE, adapter=save_lora(tmp_path / "a", lora_tensors(BASE), spelling, **patterns)
    )
    expected = npvlm.load(BASE, adapter=save_lora(tmp_path / "b", lora_tensors(BASE), **patterns))
    np.testing.assert_array_equal(scores(model), scores(expected))
    assert off(scores(model), scores(npvlm.load(BASE))) > 0.01


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 8 / 4),
        ({"lora_alpha": 6}, 6 / 4),
        ({"use_rslora": True}, 8 / 2),
        ({"alpha_pattern": {"q_proj": 12}}, 12 / 4),
        ({"alpha_pattern": {"language_model.*q_proj": 12}}, 12 / 4),
        ({"alpha_pattern": {"language_model.model.layers.0.self_attn.q_proj": 12}}, 12 / 4),
        # In a spelling that the file has not, it did nothing in training either.
        ({"alpha_pattern": {"model.language_model.layers.0.self_attn.q_proj": 12}}, 8 / 4),
        ({"alpha_pattern": {"_proj": 12, "q_proj": 16}}, 16 / 4),  # a part of a word fits nothing
        ({"alpha_pattern": {"q_proj": 16, ".*_proj": 12}}, 16 / 4),  # the first one counts
        ({"r": 9, "rank_pattern": {"q_proj|up_proj": 4, "linear": 4}}, 8 / 4),
        ({"lora_dropout": 0.1, "fan_in_fan_out": True, "init_lora_weights": "gaussian"}, 8 / 4),
    ],
)
def test_the_scale_is_what_the_settings_say(
    tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    adapter = open_adapter(save_lora(tmp_path, lora_tensors(BASE), **settings))
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert adapter.corrections[name].scale == scale


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_tensors_of_16_bits_are_as_exact_as_they_are(tmp_path: Path, dtype: str) -> None:
    wide: dict[str, Array] = {}
    narrow: dict[str, Array] = {}
    for name, w in lora_tensors(BASE).items():
        narrow[name] = w.astype(np.float16) if dtype == "F16" else round_to_bfloat16(w).bits
        wide[name] = unpack(narrow[name] if dtype == "F16" else BFloat16(narrow[name]), np.float32)
    folders = [save_lora(tmp_path / kind, wide) for kind in ("narrow", "wide")]
    layout = {PREFIX + name: Tensor(dtype, w.shape) for name, w in wide.items()}
    with tensor_file(folders[0] / "adapter_model.safetensors", layout) as file:
        for name, w in narrow.items():
            file.write_rows(PREFIX + name, 0, w)
    found = [npvlm.load(BASE, adapter=folder) for folder in folders]
    np.testing.assert_array_equal(*map(scores, found))


# --- beside weights, and merged ------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_a_packed_folder_takes_an_adapter_as_its_origin_does(
    tmp_path: Path, precision: str
) -> None:
    adapter = save_lora(tmp_path / "lora", lora_tensors(BASE))
    convert(BASE, tmp_path / "packed", precision, lambda *_: None)
    packed = npvlm.load(tmp_path / "packed", precision, adapter=adapter)
    np.testing.assert_array_equal(
        scores(packed), scores(npvlm.load(BASE, precision, adapter=adapter))
    )
    assert off(scores(packed), scores(npvlm.load(tmp_path / "packed", precision))) > 0.01


def test_a_correction_stays_as_it_is_where_weights_are_packed(tmp_path: Path) -> None:
    model = npvlm.load(BASE, "int4", adapter=save_lora(tmp_path, lora_tensors(BASE)))
    corrected = {name for name, w in model.weights.items() if isinstance(w, Adapted)}
    assert len(corrected) == len(lora_tensors(BASE)) / 2
    assert all(model.weights[name].up.dtype == np.float32 for name in corrected)


@pytest.mark.parametrize("name", STORED)
def test_a_merged_weight_is_rounded_once_to_the_type_that_it_is_stored_in(
    tmp_path: Path, name: str
) -> None:
    base, adapter = GOLDEN / STORED[name]["checkpoint"], GOLDEN / "adapters" / name
    convert(base, tmp_path / "merged", None, lambda *_: None, adapter)
    beside, merged = npvlm.load(base, adapter=adapter), npvlm.load(tmp_path / "merged")
    changed = 0
    for key, weight in merged.weights.items():
        apart = beside.weights[key]
        if isinstance(apart, Adapted):
            assert isinstance(weight, BFloat16) == isinstance(apart.base, BFloat16)
            wide = unpack(apart, np.float32)
            apart = round_to_bfloat16(wide) if isinstance(weight, BFloat16) else wide
            changed += 1
        np.testing.assert_array_equal(unpack(weight, np.float32), unpack(apart, np.float32))
    assert changed
    assert merged.weights.keys() == beside.weights.keys()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packing_is_done_after_the_merge(tmp_path: Path, precision: str) -> None:
    adapter = save_lora(tmp_path / "lora", lora_tensors(BASE))
    convert(BASE, tmp_path / "merged", precision, lambda *_: None, adapter)
    merged, beside = npvlm.load(tmp_path / "merged"), npvlm.load(BASE, adapter=adapter)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    true = unpack(beside.weights[name], np.float64)
    limit = 0.02 if precision == "int8" else 0.15
    assert off(unpack(merged.weights[name], np.float64), true) < limit
    assert off(true, unpack(npvlm.load(BASE).weights[name], np.float64)) > 2 * limit


@pytest.mark.parametrize("name", ["pg1-moved", "pg1-patterns", "pg2-dora"])
def test_a_merge_for_other_pictures_is_the_merge_and_then_the_pictures(tmp_path, name) -> None:
    base, adapter = GOLDEN / STORED[name]["checkpoint"], GOLDEN / "adapters" / name
    side = 2 * read_config(base).vision_config.image_size
    convert(base, tmp_path / "merged", None, lambda *_: None, adapter)
    convert(tmp_path / "merged", tmp_path / "both", None, lambda *_: None, image_size=side)
    convert(base, tmp_path / "once", None, lambda *_: None, adapter, image_size=side)
    both, once = (npvlm.load(tmp_path / place) for place in ("both", "once"))
    assert both.config == once.config
    np.testing.assert_array_equal(scores(both), scores(once))


def test_a_correction_of_the_positions_is_merged_before_they_are_resampled(tmp_path) -> None:
    base, adapter = GOLDEN / STORED["pg2-tables"]["checkpoint"], GOLDEN / "adapters" / "pg2-tables"
    with pytest.raises(UsageError, match=r"changes the table of positions.*merge it first"):
        convert(base, tmp_path / "out", None, lambda *_: None, adapter, image_size=30)


@pytest.mark.parametrize("name", ["pg1-trained", "pg2-tables"])
def test_a_merge_that_changes_one_of_two_tied_tables_unties_them(tmp_path: Path, name: str) -> None:
    base, adapter = GOLDEN / STORED[name]["checkpoint"], GOLDEN / "adapters" / name
    convert(base, tmp_path / "merged", None, lambda *_: None, adapter)
    values = read_json(tmp_path / "merged" / "config.json")
    assert values["tie_word_embeddings"] is values["text_config"]["tie_word_embeddings"] is False
    head = npvlm.load(tmp_path / "merged").weights[LM_HEAD]
    old = npvlm.load(base).weights[EMBED_TOKENS]
    np.testing.assert_array_equal(unpack(head, np.float32), unpack(old, np.float32))


def test_a_merge_that_leaves_the_tables_alone_changes_no_setting(tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "lora", lora_tensors(BASE))
    convert(BASE, tmp_path / "merged", None, lambda *_: None, adapter)
    assert read_json(tmp_path / "merged" / "config.json") == read_json(BASE / "config.json")


def test_a_merge_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    base = GOLDEN / "pg2-f16-sharded"
    adapter = save_lora(tmp_path / "lora", lora_tensors(base), lora_alpha=1e6)
    with pytest.raises(NpvlmError, match="inf"):
        convert(base, tmp_path / "merged", None, lambda *_: None, adapter)
    assert not (tmp_path / "merged").exists()


def test_a_packed_model_is_not_merged_into(tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "lora", lora_tensors(BASE))
    convert(BASE, tmp_path / "packed", "int8", lambda *_: None)
    with pytest.raises(UsageError, match="convert the original"):
        convert(tmp_path / "packed", tmp_path / "merged", None, lambda *_: None, adapter)


def test_an_adapter_of_nothing_leaves_the_bits(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE)
    zeros = {name: w * np.float32("lora_A" in name) for name, w in tensors.items()}
    model = npvlm.load(BASE, adapter=save_lora(tmp_path, zeros))
    plain = scores(npvlm.load(BASE))
    assert off(scores(model), plain) < 1e-6  # the gate is another kernel's, and rounds once more


# --- refused -------------------------------------------------------------------------------------

Q = "language_model.model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Array]], object]


def dropped(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: Array) -> Change:
    return lambda tensors: tensors.update({name: value})


WRONG: dict[str, tuple[Change, str]] = {
    "no B": (dropped(f"{Q}.lora_B.weight"), rf"{Q}.lora_A.weight has no lora_B beside it"),
    "no A": (dropped(f"{Q}.lora_A.weight"), rf"{Q}.lora_B.weight has no lora_A beside it"),
    "no tensor": (lambda tensors: tensors.clear(), "holds no tensor"),
    "ranks that differ": (
        put(f"{Q}.lora_B.weight", np.ones((30, 3), np.float32)),
        r"are \[4, 45\] and \[30, 3\], of no one rank",
    ),
    "another rank than the settings have": (
        lambda t: t.update(
            {
                f"{Q}.lora_A.weight": np.ones((5, 45), "f4"),
                f"{Q}.lora_B.weight": np.ones((30, 5), "f4"),
            }
        ),
        "is of rank 5, but adapter_config.json says 4",
    ),
    "a factor with one axis": (
        put(f"{Q}.lora_A.weight", np.ones(45, np.float32)),
        "of no one rank",
    ),
    "an empty factor": (
        lambda t: t.update(
            {
                f"{Q}.lora_A.weight": np.ones((0, 45), "f4"),
                f"{Q}.lora_B.weight": np.ones((30, 0), "f4"),
            }
        ),
        "of no one rank",
    ),
    "another width": (
        put(f"{Q}.lora_A.weight", np.ones((4, 46), np.float32)),
        rf"1 of another shape \({Q} is for \[30, 46\], which is \[30, 45\] here\)",
    ),
    "a module that there is not": (
        lambda t: t.update(
            {
                f"{Q}x.lora_A.weight": np.ones((4, 45), "f4"),
                f"{Q}x.lora_B.weight": np.ones((30, 4), "f4"),
            }
        ),
        rf"1 that it does not have \({Q}x\)",
    ),
    "a tensor of no kind that is known": (
        put(f"{Q}.lora_C.weight", np.ones((4, 45), np.float32)),
        rf"1 that it does not have \({Q}.lora_C.weight\)",
    ),
    "trainable tokens": (
        put(
            "language_model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            np.ones((2, 45), "f4"),
        ),
        "trainable_tokens_delta",
    ),
    "a bias inside": (put(f"{Q}.lora_B.bias", np.ones(30, np.float32)), "lora_bias"),
    "nan": (
        put(f"{Q}.lora_A.weight", np.full((4, 45), np.nan, np.float32)),
        rf"{Q}.lora_A.weight holds inf or nan",
    ),
    "inf in a whole tensor": (
        put("language_model.model.norm.weight", np.full(45, np.inf, np.float32)),
        "norm.weight holds inf or nan",
    ),
    "whole numbers": (put(f"{Q}.lora_A.weight", np.ones((4, 45), np.int8)), "is I8, expected F32"),
    "lengths without DoRA": (
        put(f"{Q}.lora_magnitude_vector", np.ones(30, np.float32)),
        "has a lora_magnitude_vector beside it, but use_dora is false",
    ),
    "two adapters in one file": (
        put(f"{Q}.lora_A.other.weight", np.ones((4, 45), np.float32)),
        "are the same tensor; save one adapter alone",
    ),
    "a module twice": (
        lambda t: t.update(
            {
                "language_model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 45), "f4"),
                "language_model.layers.0.self_attn.q_proj.lora_B.weight": np.ones((30, 4), "f4"),
            }
        ),
        "are the same module",
    ),
    "a whole tensor of another shape": (
        put("multi_modal_projector.linear.bias", np.ones(46, np.float32)),
        r"multi_modal_projector.linear.bias is for \[46\], which is \[45\] here",
    ),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_wrong_tensors_are_refused_by_name(tmp_path: Path, change: Change, says: str) -> None:
    tensors = lora_tensors(BASE)
    change(tensors)
    folder = save_lora(tmp_path, tensors)
    with pytest.raises(NpvlmError, match=says) as refused:
        npvlm.load(BASE, adapter=folder)
    assert str(folder) in str(refused.value)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "of type 'PROMPT_TUNING', expected LORA"),
    "no type": ({"peft_type": None}, "of type None, expected LORA"),
    "another base at the start": ({"init_lora_weights": "pissa"}, "began as 'pissa'"),
    "replicated layers": ({"layer_replication": [[0, 1], [0, 2]]}, "sets layer_replication"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "sets alora_invocation_tokens"),
    "what comes after today": ({"use_something_new": True}, "sets use_something_new"),
    "trainable tokens": ({"trainable_token_indices": [3]}, "sets trainable_token_indices"),
    "a rank of 0": ({"r": 0}, "r is 0, expected a whole number from 1"),
    "a rank in words": ({"r": "eight"}, 'r is "eight"'),
    "an alpha that is no number": ({"lora_alpha": [1]}, r"lora_alpha is \[1\], expected a number"),
    "an alpha beyond all numbers": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "an alpha of nan": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "an alpha of true": ({"lora_alpha": True}, "lora_alpha is True"),
    "a pattern's alpha": ({"alpha_pattern": {"q_proj": "x"}}, "lora_alpha is 'x'"),
    "patterns in a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
    "no pattern": ({"alpha_pattern": {"q_proj(": 4}}, "'q_proj\\(' is no pattern"),
    "a flag in words": ({"use_rslora": "yes"}, "use_rslora is"),
    "DoRA without lengths": ({"use_dora": True}, "has no lora_magnitude_vector beside it"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_are_not_known_are_refused(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    folder = save_lora(tmp_path, lora_tensors(BASE), **settings)
    with pytest.raises(NpvlmError, match=says) as refused:
        npvlm.load(BASE, adapter=folder)
    assert str(folder) in str(refused.value)


def test_tables_that_shall_stay_tied_are_refused(tmp_path: Path) -> None:
    table = {EMBED_TOKENS: np.ones((402, 45), np.float32)}
    saved = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    folder = save_lora(tmp_path, lora_tensors(BASE) | table, **saved)
    with pytest.raises(NpvlmError, match="ensure_weight_tying"):
        npvlm.load(BASE, adapter=folder)


def test_a_row_without_length_is_refused(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE, targets=("linear",))
    name = "multi_modal_projector.linear"
    weight = unpack(npvlm.load(BASE).weights[f"{name}.weight"], np.float32).copy()
    weight[3] = 0
    tensors[f"{name}.lora_B.weight"][3] = 0
    tensors |= {f"{name}.weight": weight, f"{name}.lora_magnitude_vector": np.ones(45, "f4")}
    folder = save_lora(tmp_path, tensors, use_dora=True)
    with pytest.raises(NpvlmError, match=f"a row of {name} has no length"):
        npvlm.load(BASE, adapter=folder)


def test_an_adapter_of_another_model_is_refused_with_all_that_does_not_fit(tmp_path: Path) -> None:
    other = GOLDEN / "pg2"
    settings = {"base_model_name_or_path": "google/paligemma2-3b-pt-224"}
    folder = save_lora(tmp_path, lora_tensors(other), **settings)
    with pytest.raises(NpvlmError) as refused:
        npvlm.load(BASE, adapter=folder)
    for part in (
        "layers.{0-2}.self_attn.q_proj is for [84, 54], which is [30, 45] here",
        "that it does not have (language_model.model.layers.3.",
        "it was made for google/paligemma2-3b-pt-224",
    ):
        assert part in str(refused.value)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "adapter_model.bin, a pickle",
    ),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "no settings": (
        lambda f: (f / "adapter_config.json").unlink(),
        "has no adapter_config.json, expected",
    ),
    "a model": (
        lambda f: (f / "adapter_config.json").rename(f / "config.json"),
        "is a model, expected a folder with adapter_config.json",
    ),
    "settings that are no JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "is no JSON",
    ),
    "half a file": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-100]
        ),
        "is no whole safetensors file",
    ),
    "a pointer": (
        lambda f: (f / "adapter_model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
        "git LFS",
    ),
}


@pytest.mark.parametrize(("change", "says"), FOLDERS.values(), ids=FOLDERS)
def test_wrong_folders_are_refused(
    tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    change(save_lora(tmp_path, lora_tensors(BASE)))
    with pytest.raises(NpvlmError, match=re.escape(says)):
        npvlm.load(BASE, adapter=tmp_path)


@pytest.mark.parametrize("place", ["absent", "file"])
def test_what_is_no_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NpvlmError, match=r"expected a folder with adapter_config\.json"):
        npvlm.load(BASE, adapter=tmp_path / place)


def test_an_adapter_in_place_of_a_model_is_told_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(NpvlmError, match="name its base as the model, and this folder with --adap"):
        npvlm.load(save_lora(tmp_path, lora_tensors(BASE)))


def test_a_hundred_damaged_adapters_are_each_refused_in_a_sentence_or_applied(
    tmp_path: Path,
) -> None:
    rng, outcomes = np.random.default_rng(0), {True: 0, False: 0}
    whole = save_lora(tmp_path / "whole", lora_tensors(BASE), "modules of transformers 5")
    files = {name: (whole / name).read_bytes() for name in
             ("adapter_config.json", "adapter_model.safetensors")}  # fmt: skip
    (tmp_path / "damaged").mkdir()
    for number in range(100):
        name = list(files)[number % 2]
        for file, content in files.items():
            damaged = bytearray(content)
            if file == name:
                for at in rng.integers(0, min(len(damaged), 3000), rng.integers(1, 4)):
                    damaged[at] = rng.integers(256)
            (tmp_path / "damaged" / file).write_bytes(damaged)
        try:
            npvlm.load(BASE, ops="numpy", adapter=tmp_path / "damaged")
            outcomes[True] += 1
        except NpvlmError as error:
            assert str(error).count("\n") == 0
            outcomes[False] += 1
    assert outcomes[False] > 50


@cache
def published(name: str) -> Path:
    return Path("hub", "models--google--paligemma-3b-pt-224", "snapshots", name)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    names = {"lora_A.weight": "lora_A.{}.weight", "lora_B.weight": "lora_B.{}.weight"}
    tensors = {}
    for name, w in lora_tensors(BASE).items():
        module, part = name[: -len("lora_A.weight")], name[-len("lora_A.weight") :]
        tensors[module + names[part].format("one" if "q_proj" in name else "two")] = w
    with pytest.raises(NpvlmError, match="holds the adapters 'one', 'two'; save one alone"):
        open_adapter(save_lora(tmp_path, tensors))


@pytest.mark.parametrize("saved", [[], ["embed_tokens"]])
def test_a_table_that_was_not_trained_alone_is_both_of_two_tied_ones(
    tmp_path: Path, saved: list[str]
) -> None:
    table = 2 * unpack(npvlm.load(BASE).weights[EMBED_TOKENS], np.float32)
    tensors = lora_tensors(BASE) | {EMBED_TOKENS: table}
    adapter = save_lora(tmp_path, tensors, modules_to_save=saved)
    weights = npvlm.load(BASE, adapter=adapter).weights
    assert np.array_equal(unpack(weights[EMBED_TOKENS], np.float32), table)
    assert (LM_HEAD in weights) == bool(saved)


def test_a_colpali_has_no_head_to_correct(tmp_path: Path) -> None:
    retriever = build_retriever(tmp_path / "colpali")
    tensors = lora_tensors(retriever, targets=("q_proj",))
    size = 4, read_config(retriever).text_config.hidden_size
    head = {"lora_A": np.ones(size, np.float32), "lora_B": np.ones((512, 4), np.float32)}
    tensors |= {f"language_model.lm_head.{part}.weight": w for part, w in head.items()}
    adapter = save_lora(tmp_path / "lora", tensors)
    with pytest.raises(NpvlmError, match="that it does not have"):
        convert(retriever, tmp_path / "out", None, lambda *_: None, adapter)


@pytest.mark.parametrize(
    ("base", "model", "folder", "same"),
    [
        ("google/paligemma-3b-pt-224", "paligemma-3b-pt-224", published("ab"), True),
        ("google/paligemma-3b-pt-224", "google/paligemma-3b-pt-224@bf16", published("ab"), True),
        ("google/paligemma-3b-pt-224", str(published("ab")), published("ab"), True),
        ("/home/me/Base/", "base", Path("base"), True),
        (r"C:\models\base", "base", Path("base"), True),
        ("google/paligemma-3b-pt-224", "paligemma-3b-mix-224", published("ab").parents[1], True),
        ("google/paligemma-3b-pt-224", "small", Path("small"), False),
        ("google/paligemma-3b-pt-224", "shapes", Path("shapes"), False),
    ],
)
def test_a_base_is_known_by_the_last_part_of_its_name(
    base: str, model: str, folder: Path, same: bool
) -> None:
    assert same_name(base, model, folder) is same


def test_what_is_not_changed_stays_mapped(tmp_path: Path) -> None:
    model = npvlm.load(BASE, adapter=save_lora(tmp_path, lora_tensors(BASE)))
    stored = open_checkpoint(BASE, model.config)
    for name, weight in stored.items():
        own = model.weights[name]
        base = own.base if isinstance(own, Adapted) else own
        assert isinstance(base, BFloat16) and isinstance(weight, BFloat16)
        assert not base.bits.flags.writeable
