"""Traces: every stage in its order, written in several forms, and read back the same."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm.api import Model
from npvlm.errors import NpvlmError, UsageError
from npvlm.model.weights import BFloat16
from npvlm.porting.dumps import open_dump, save_trace
from npvlm.porting.floors import LEAST, PRECISIONS, floors
from npvlm.porting.replay import replay
from npvlm.porting.stages import is_fused, shape_of, stages
from npvlm.porting.statistics import BUCKETS, describe, rms, sketch
from npvlm.porting.trace import Trace, trace

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [ROOT / "golden" / "pg1", ROOT / "golden" / "pg2"]
FORMS = ["x.safetensors", "x.bin", "folder"]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def model(request: pytest.FixtureRequest) -> Model:
    return npvlm.load(request.param, ops="numpy")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    numbers = np.random.default_rng(3).integers(0, 256, (31, 45, 3), np.uint8)
    return Image.fromarray(numbers)


@pytest.fixture(scope="module")
def traced(model: Model, picture: Image.Image) -> Trace:
    return trace(model, picture, "caption en")


# Stages


def test_a_trace_has_every_stage_in_order_with_the_shape_that_its_axes_say(
    model: Model, traced: Trace
) -> None:
    known = stages(model.config)
    assert list(traced.stages) == [stage.name for stage in known]
    for stage in known:
        value = traced.stages[stage.name]
        if stage.name != "image.rgb":  # two sides that nothing says
            assert shape_of(stage, model.config, value.size) == value.shape, stage.name
        assert value.ndim == len(stage.axes)


def test_the_document_lists_the_stages_of_the_code(model: Model) -> None:
    text = (ROOT / "docs" / "stages.md").read_text()
    for stage in stages(model.config):
        name = re.sub(r"\.layers\.\d+", ".layers.{i}", stage.name)
        row = f"| `{name}` | {' '.join(stage.axes)} | {stage.meaning} |"
        assert row in text, row


def test_every_source_is_a_line_that_makes_or_shows_the_stage(traced: Trace) -> None:
    for name, source in traced.sources.items():
        path, number = source.split(":")
        line = (ROOT / path).read_text().splitlines()[int(number) - 1]
        assert "tap(" in line or line.lstrip().startswith("def "), (name, line)


def test_kernels_show_all_but_the_stages_inside_fused_operations(
    model: Model, traced: Trace, picture: Image.Image
) -> None:
    other = npvlm.load(model.name, ops="kernels")
    found = trace(other, picture, "caption en").stages
    assert [name for name in traced.stages if name not in found] == [
        name for name in traced.stages if is_fused(name)
    ]
    for name, value in found.items():
        expected = traced.stages[name]
        # Both are within torch's own error of the truth: see the goldens.
        assert rms(value - expected) <= 1e-5 * rms(expected), name


def test_only_keeps_what_its_globs_name(model: Model, picture: Image.Image) -> None:
    found = trace(model, picture, "x", only="pixel_values, *.layers.1.mlp.*")
    assert next(iter(found.stages)) == "pixel_values"
    assert all(".layers.1.mlp." in name for name in list(found.stages)[1:])
    assert len(found.stages) > 4
    with pytest.raises(UsageError, match="names no stage"):
        trace(model, picture, "x", only="nothing")


def test_a_step_is_one_token_and_equals_the_pass_without_a_cache(
    model: Model, picture: Image.Image
) -> None:
    found = trace(model, picture, "caption en", step=2)
    answer = list(found.inputs.answer)
    assert len(answer) == 2
    T = len(found.inputs.ids)
    assert found.stages["positions"].tolist() == [T + 2]
    whole = model.logits(picture, "caption en", answer)
    error = rms(found.stages["language_model.logits"] - whole[-1:]) / rms(whole[-1:])
    assert error < 1e-5  # float32, in another order
    assert found.stages["language_model.model.layers.0"].shape[0] == 1
    with pytest.raises(UsageError, match="expected 0"):
        trace(model, picture, "x", step=-1)


# Statistics


def test_a_sketch_tells_how_large_a_difference_is() -> None:
    rng = np.random.default_rng(0)
    value = rng.standard_normal((40, 300))
    ratios = []
    for size in (1e-6, 1e-3, 1.0):
        other = value + size * rng.standard_normal(value.shape)
        told = np.linalg.norm(sketch(other) - sketch(value))
        ratios.append(told / np.linalg.norm(other - value))
    # The square of such a ratio varies by sqrt(2 / 64) = 0.18.
    assert all(abs(ratio - 1) < 4 * 0.5 * math.sqrt(2 / BUCKETS) for ratio in ratios), ratios
    np.testing.assert_allclose(sketch(value) + sketch(value), sketch(2 * value))


def test_a_sketch_is_what_the_document_says_it_is() -> None:
    value = np.array([3.0, 5.0, -7.0, 11.0])
    expected = np.zeros(64)
    for i, number in enumerate(value):
        z = (i + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        expected[z & 63] += -number if z >> 63 else number
    np.testing.assert_array_equal(sketch(value), expected)


def test_a_description_is_of_the_numbers() -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    notes = describe(value)
    assert (notes["mean"], notes["min"], notes["max"]) == (5.5, 0.0, 11.0)
    assert notes["first"] == list(range(8))
    assert notes["slice"] == list(range(12))
    assert describe(value.T)["sha256"] != notes["sha256"]
    assert describe(value.T.T)["sha256"] == notes["sha256"]


# Floors


def test_floors_grow_with_the_coarseness_of_a_precision(model: Model, traced: Trace) -> None:
    found = floors(traced, model)
    assert set(found) == set(traced.stages)
    for name, floor in found.items():
        assert set(floor) == set(PRECISIONS)
        if name in ("image.rgb", "image.resized", "input_ids", "positions"):
            assert set(floor.values()) == {0.0}
            continue
        assert 0.99 * LEAST < floor["float32"] < 1e-5, name  # written with three digits
        # bfloat16 has 8 bits of a number, float16 has 11: 8 times as fine.
        assert 2 < floor["bfloat16"] / floor["float16"] < 32, (name, floor)
        assert 2.0**-11 < floor["bfloat16"] < 0.3, (name, floor)


# Files


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_trace_reads_back_the_same(tmp_path: Path, traced: Trace, form: str) -> None:
    path = tmp_path / form
    save_trace(traced, path, {})
    dump = open_dump(path)
    assert dump.manifest is not None
    assert list(dump.described()) == list(traced.stages)
    for name, value in traced.stages.items():
        found = dump.read(name)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
    assert dump.manifest["prompt"] == "caption en"
    assert dump.manifest["config"]["model_type"] == "paligemma"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "x.bin"])
def test_what_is_no_trace_is_not_replaced(tmp_path: Path, traced: Trace, name: str) -> None:
    (tmp_path / name).write_text('{"stages": 3}')
    with pytest.raises(UsageError, match="is there already, and no trace; name another file"):
        save_trace(traced, tmp_path / name, {}, compact=name.endswith(".json"))
    assert (tmp_path / name).read_text() == '{"stages": 3}'


@pytest.mark.parametrize("name", ["t.safetensors", "t.json", "t.bin"])
def test_a_trace_takes_the_place_of_another(tmp_path: Path, traced: Trace, name: str) -> None:
    for _ in range(2):
        save_trace(traced, tmp_path / name, {}, compact=name.endswith(".json"))
    assert open_dump(tmp_path / name).manifest is not None


def test_a_compact_trace_is_small_whatever_the_model(tmp_path: Path, traced: Trace) -> None:
    with pytest.raises(UsageError, match="compact"):
        save_trace(traced, tmp_path / "x.safetensors", {}, compact=True)
    every = {name: dict.fromkeys(PRECISIONS, 1.23e-7) for name in traced.stages}
    save_trace(traced, tmp_path / "x.json", every, compact=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    size = (tmp_path / "x.json").stat().st_size
    # A 3B of PaliGemma 2 has 27 x 11 + 26 x 16 + 12 = 725 stages.
    assert size / len(traced.stages) * 725 < 1e6
    assert open_dump(tmp_path / "x.json").dtypes == {}


def test_bfloat16_arrays_are_read_as_numbers(tmp_path: Path) -> None:
    values = np.array([[1.0, -2.5], [3.140625, 0.0]], np.float32)
    bits = BFloat16((values.view(np.uint32) >> 16).astype(np.uint16)).bits
    header = {"x": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bits.tobytes()
    )
    dump = open_dump(tmp_path / "x.safetensors")
    assert dump.dtypes == {"x": "BF16"} and dump.manifest is None
    np.testing.assert_array_equal(dump.read("x"), values)


def test_arrays_of_other_programs_are_read(tmp_path: Path) -> None:
    value = np.arange(6, dtype=np.float16).reshape(2, 3)
    np.savez(tmp_path / "x.npz", a=value)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "a.npy", np.asfortranarray(value))
    (tmp_path / "x.bin").write_bytes(b"????" + value.tobytes())
    listed = {"stages": [{"name": "a", "dtype": "F16", "shape": [2, 3], "offset": 4}]}
    (tmp_path / "x.json").write_text(json.dumps(listed))
    for name in ("x.npz", "folder", "x.bin"):
        dump = open_dump(tmp_path / name)
        assert dump.dtypes == {"a": "F16"}
        np.testing.assert_array_equal(dump.read("a"), value)


def _damaged(folder: Path) -> dict[str, str]:
    """Files that are no dumps, and a word of what is said of each."""
    (folder / "cut.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{}")
    (folder / "text.npz").write_text("hello")
    np.savez(folder / "pickled.npz", a=np.array([{}], object))
    (folder / "lone.bin").write_bytes(b"1234")
    (folder / "short.bin").write_bytes(b"1234")
    entry = {"name": "a", "dtype": "F32", "shape": [9], "offset": 0}
    (folder / "short.json").write_text(json.dumps({"stages": [entry]}))
    (folder / "odd.bin").write_bytes(b"1234")
    (folder / "odd.json").write_text(json.dumps({"stages": [entry | {"dtype": "Q4"}]}))
    (folder / "other.json").write_text("{}")
    (folder / "empty").mkdir()
    (folder / "a.txt").write_text("")
    return {
        "cut.safetensors": "no whole safetensors file",
        "text.npz": "is no .npz file",
        "pickled.npz": "cannot be read",
        "lone.bin": "has no lone.json",
        "short.bin": "ends at byte 36",
        "odd.bin": "Q4",
        "other.json": "no manifest",
        "empty": "holds no .npy",
        "a.txt": "is no dump",
        "none.npz": "is not there",
    }


def test_what_is_no_dump_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for name, word in _damaged(tmp_path).items():
        with pytest.raises(NpvlmError, match=re.escape(word)):
            dump = open_dump(tmp_path / name)
            dump.read("a")


# Replays


def test_a_replay_of_the_reference_itself_is_the_reference(model: Model, traced: Trace) -> None:
    found = replay(traced.stages, model.weights, model.config, ops=model.ops)
    made = [name for name in traced.stages if name not in list(traced.stages)[:5]]
    assert list(found) == made
    for name, value in found.items():
        np.testing.assert_array_equal(value.reshape(traced.stages[name].shape), traced.stages[name])


def test_a_replay_goes_on_with_what_is_given(model: Model, traced: Trace) -> None:
    text = "language_model.model.layers"
    given = {f"{text}.0": traced.stages[f"{text}.0"]}
    wanted = f"{text}.1.mlp.gated"
    found = replay(given, model.weights, model.config, wanted, ops=model.ops)
    np.testing.assert_array_equal(found[wanted], traced.stages[wanted])
    assert all(name.startswith(f"{text}.1") for name in found)
    given[f"{text}.1.mlp.gate_proj"] = np.zeros_like(traced.stages[f"{text}.1.mlp.gate_proj"])
    found = replay(given, model.weights, model.config, wanted, ops=model.ops)
    assert not found[wanted].any()
    # What was computed in the given value's place is shown as it was.
    np.testing.assert_array_equal(
        found[f"{text}.1.mlp.gate_proj"], traced.stages[f"{text}.1.mlp.gate_proj"]
    )


def test_a_replay_without_inputs_makes_nothing(model: Model) -> None:
    assert replay({}, model.weights, model.config, ops=model.ops) == {}


# The command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "trace", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_the_journey_and_saves_it(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "p.png")
    common = [str(tmp_path / "p.png"), "--prompt", "caption en", "--model", str(FOLDERS[0])]
    shown = run(*common)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    model = npvlm.load(FOLDERS[0], ops="numpy")
    assert len(lines) == 3 + len(stages(model.config))
    assert lines[0].endswith("'caption en': picture and prompt read at once")
    assert lines[2].startswith("image.rgb") and "31x45x3" in lines[2]
    assert lines[-2].endswith(".py:" + lines[-2].rpartition(":")[2])
    answer = model.generate(picture, "caption en", max_tokens=1)[0]
    assert lines[-1] == f"next token: {answer.token_ids[0]}, {answer.text!r}"
    saved = run(*common, "--save", str(tmp_path / "t.safetensors"))
    assert saved.returncode == 0 and saved.stdout == shown.stdout, saved.stderr
    assert open_dump(tmp_path / "t.safetensors").described()["pixel_values"]["floors"]
    for wrong, word in (
        (["--compact"], "--compact"),
        (["--only", "nothing"], "names no stage"),
        (["--save", str(tmp_path)], "is there already"),
    ):
        refused = run(*common, *wrong)
        assert refused.returncode == 2 and word in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") <= 2
