"""What porters hand in: damaged dumps, manifests by hand, names that are no stage's, other runs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import npvlm
from npvlm.api import Model
from npvlm.cli.compare import compare as command
from npvlm.cli.options import CLAIMS
from npvlm.errors import NpvlmError, UsageError
from npvlm.porting.compare import compare
from npvlm.porting.dumps import open_dump, save_trace
from npvlm.porting.floors import floors, to_bfloat16
from npvlm.porting.port import replay_stage
from npvlm.porting.report import page, table
from npvlm.porting.trace import Trace, trace

ROOT = Path(__file__).resolve().parent.parent
TOWER = "vision_tower.vision_model.encoder.layers"
TEXT = "language_model.model.layers"
GELU = f"{TOWER}.0.mlp.gelu"
NOTHING: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="module")
def model() -> Model:
    return npvlm.load(ROOT / "golden" / "pg1", ops="numpy")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (31, 45, 3), np.uint8))


@pytest.fixture(scope="module")
def traced(model: Model, picture: Image.Image) -> Trace:
    return trace(model, picture, "caption en")


@pytest.fixture(scope="module")
def reference(traced: Trace, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "full.safetensors"
    save_trace(traced, path, floors(traced, model))
    return path


def npz(path: Path, stages: dict[str, Any]) -> Path:
    np.savez(path / "mine.npz", **stages)
    return path / "mine.npz"


# Dumps


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, 'no list "stages"'),
        ({"stages": [{"dtype": "F32", "shape": [2], "offset": 0}]}, "has no name"),
        ({"stages": [{"name": "x", "shape": [2], "offset": 0}]}, "dtype None"),
        ({"stages": [{"name": "x", "dtype": "f4", "shape": [2], "offset": 0}]}, "dtype 'f4'"),
        ({"stages": [{"name": "x", "dtype": "F32", "shape": "2", "offset": 0}]}, "shape '2'"),
        ({"stages": [{"name": "x", "dtype": "F32", "shape": [1.5], "offset": 0}]}, "[1.5]"),
        ({"stages": [{"name": "x", "dtype": "F32", "shape": [2]}]}, "offset None"),
        ({"stages": [{"name": "x", "dtype": "F32", "shape": [2], "offset": 1.5}]}, "offset 1.5"),
        ({"stages": ["x"]}, "has no name"),
    ],
)
def test_a_list_for_raw_numbers_that_lacks_something_is_refused_by_name(
    tmp_path: Path, index: dict[str, Any], said: str
) -> None:
    (tmp_path / "mine.bin").write_bytes(bytes(8))
    (tmp_path / "mine.json").write_text(json.dumps(index))
    with pytest.raises(NpvlmError) as refused:
        open_dump(tmp_path / "mine.bin")
    assert said in str(refused.value) and "mine.json" in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"shape": [1] * 80}, "cannot be read"),
        ({"shape": [0, 2**70]}, "cannot be read"),
        ({"shape": [2**62, 4]}, "but the file has 16"),
        ({"offset": 2**70}, "but the file has 16"),
        ({"offset": -8}, "but the file has 16"),
    ],
)
def test_a_place_or_shape_that_no_file_has_is_refused_by_name(
    tmp_path: Path, entry: dict[str, Any], says: str
) -> None:
    stage = {"name": "x", "dtype": "F32", "shape": [1], "offset": 0} | entry
    (tmp_path / "mine.bin").write_bytes(bytes(16))
    (tmp_path / "mine.json").write_text(json.dumps({"stages": [stage]}))
    dump = open_dump(tmp_path / "mine.bin")
    with pytest.raises(NpvlmError, match=says):
        dump.read("x")
    (tmp_path / "mine.json").write_text(json.dumps({"stages": [stage] * 2}))
    with pytest.raises(NpvlmError, match="is there twice"):
        open_dump(tmp_path / "mine.bin")


def test_an_archive_of_arrays_is_read_when_asked_and_held_to_its_headers(tmp_path: Path) -> None:
    stages = {"norm": np.arange(6.0).reshape(2, 3).T, "ids": np.arange(4)}
    dump = open_dump(npz(tmp_path, stages))
    assert dump.dtypes == {"norm": "F64", "ids": "I64"}
    assert all(np.array_equal(dump.read(name), value) for name, value in stages.items())
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        content = b"\x93NUMPY\x01\x00" + bytes([len(header), 0]) + header
        archive.writestr("norm.npy", content)
    with pytest.raises(NpvlmError, match="has not the size that its shape"):
        open_dump(tmp_path / "mine.npz")


def test_a_changed_number_in_an_archive_is_found_when_it_is_read(tmp_path: Path) -> None:
    values = np.arange(50.0)
    path = npz(tmp_path, {"norm": values})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(values.tobytes(), (values + 1).tobytes()))
    dump = open_dump(path)
    with pytest.raises(NpvlmError, match=r"norm cannot be read \(Bad CRC-32"):
        dump.read("norm")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-8],
        lambda data: b"\x93NUMPY\x01\x00nonsense",
        lambda data: b"PK\x03\x04",  # how an archive begins
        lambda data: b"\x80\x04.",  # a pickle
    ],
)
def test_a_damaged_npy_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    np.save(tmp_path / "positions.npy", np.arange(9))
    file = tmp_path / "positions.npy"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(NpvlmError, match=r"positions\.npy cannot be read as \.npy"):
        open_dump(tmp_path)


EDITS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("image is 7", lambda m: m.update(image=7)),
    ("is there twice", lambda m: m["stages"].append(m["stages"][0])),
    ("config", lambda notes: notes.pop("config")),
    ("config", lambda notes: notes.update(config=3)),
    ("model", lambda notes: notes.update(model=None)),
    ("step", lambda notes: notes.update(step="0")),
    ("answer", lambda notes: notes.pop("answer")),
    ("ids", lambda notes: notes.pop("ids")),
    ("ids", lambda notes: notes.update(ids=["1"])),
    ("stage 2 has no name", lambda notes: notes["stages"][2].pop("name")),
    ("shape", lambda notes: notes["stages"][2].update(shape=None)),
    ("rms", lambda notes: notes["stages"][2].update(rms="1")),
    ("sketch", lambda notes: notes["stages"][2].update(sketch=[1.0])),
    ("floors", lambda notes: notes["stages"][2].update(floors={"float32": -1})),
    ("floors", lambda notes: notes["stages"][2].update(floors="x")),
    ("stage 1 has no name", lambda notes: notes["stages"].__setitem__(1, 7)),
]


@pytest.mark.parametrize(("said", "edit"), EDITS)
def test_a_manifest_edited_to_nonsense_is_refused_in_one_sentence(
    reference: Path, tmp_path: Path, said: str, edit: Callable[[dict[str, Any]], object]
) -> None:
    notes = json.loads(reference.with_suffix(".json").read_text())
    edit(notes)
    (tmp_path / "edited.json").write_text(json.dumps(notes))
    with pytest.raises(NpvlmError) as refused:
        compare(tmp_path / "edited.json", reference)
    assert said in str(refused.value) and str(refused.value).count("\n") == 0


def test_arrays_beside_the_manifest_of_another_run_are_refused(
    model: Model, picture: Image.Image, reference: Path, tmp_path: Path
) -> None:
    save_trace(trace(model, picture, "caption en, please"), tmp_path / "mine.safetensors", NOTHING)
    (tmp_path / "mine.json").write_text(reference.with_suffix(".json").read_text())
    with pytest.raises(NpvlmError, match="of two runs"):
        open_dump(tmp_path / "mine.safetensors")


@pytest.mark.parametrize(
    ("stage", "shape", "name"),
    [
        ("positions", [3, 3], "positions"),
        ("pixel_values", [1, 3, 28, 29], "pixel_values"),
        ("positions", None, "positions.not_a_stage"),
    ],
)
def test_a_manifest_whose_stages_do_not_fit_its_config_is_refused(
    reference: Path, tmp_path: Path, stage: str, shape: list[int] | None, name: str
) -> None:
    notes = json.loads(reference.with_suffix(".json").read_text())
    entry = next(entry for entry in notes["stages"] if entry["name"] == stage)
    entry |= {"name": name, "shape": shape or entry["shape"]}
    (tmp_path / "changed.json").write_text(json.dumps(notes))
    with pytest.raises(NpvlmError, match=r"which no stage is in a model of the config"):
        compare(tmp_path / "changed.json", reference)


def test_a_manifest_is_not_written_over_that_of_another_file(traced: Trace, tmp_path: Path) -> None:
    save_trace(traced, tmp_path / "t.safetensors", NOTHING)
    with pytest.raises(UsageError, match=r"t\.json is there already"):
        save_trace(traced, tmp_path / "t.bin", NOTHING)
    save_trace(traced, tmp_path / "t.safetensors", NOTHING)  # anew


def test_a_json_beside_a_port_that_is_no_manifest_is_let_be(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    save_trace(traced, tmp_path / "mine.safetensors", NOTHING)
    for text in ("{}", "not json", '{"schema": 7, "stages": []}'):
        (tmp_path / "mine.json").write_text(text)
        assert compare(reference, tmp_path / "mine.safetensors").verdict.same


# Names


def test_arrays_that_no_stage_has_are_said_with_what_they_may_be(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    stages = {("mine.layer.foo" if n == "positions" else n): v for n, v in traced.stages.items()}
    stages[f"{GELU}u"] = stages.pop(GELU)
    report = compare(reference, npz(tmp_path, stages))
    assert report.unread[f"{GELU}u"] == GELU and "mine.layer.foo" in report.unread
    assert f"not read   {GELU}u (is that {GELU}?)" in table(report)
    page(report, tmp_path / "page.html")
    assert f"{GELU}u (is that {GELU}?)" in (tmp_path / "page.html").read_text()
    assert report.to_dict()["unread"] == list(report.unread)


def test_a_second_array_for_a_stage_is_said(traced: Trace, reference: Path, tmp_path: Path) -> None:
    stages = traced.stages | {f"model.{GELU}": traced.stages[GELU] + 1}
    assert list(compare(reference, npz(tmp_path, stages)).unread) == [f"model.{GELU}"]


def test_stages_that_are_there_but_not_asked_for_are_no_unknown_names(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    mine = npz(tmp_path, {"pixel_values": traced.stages["pixel_values"]})
    with pytest.raises(UsageError, match="holds 1 stages, such as pixel_values, but none of those"):
        compare(reference, mine, only=GELU)


def test_a_map_for_layers_needs_only_some_of_them(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    mine = npz(tmp_path, {"act_0": traced.stages[GELU]})
    named = {f"{TOWER}.{i}.mlp.gelu": f"act_{i}" for i in range(40)}
    report = compare(reference, mine, names=named)
    assert [row.stage for row in report.rows if row.status == "OK"] == [GELU]
    with pytest.raises(UsageError, match="has no 'deed_0'"):
        compare(reference, mine, names={GELU: "deed_0"})


def test_what_llama_cpp_calls_norm_before_its_weights_is_not_the_last_norm(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    last = traced.stages["language_model.model.norm"]
    names = {"result_norm": last, "norm": last * 3, "norm-0": last * 5}
    report = compare(reference, npz(tmp_path, names))
    assert report.verdict.same
    assert [row.name for row in report.rows if row.status == "OK"] == ["result_norm"]


# Verdicts


def test_traces_of_two_runs_are_told_apart(
    model: Model, picture: Image.Image, reference: Path, tmp_path: Path
) -> None:
    other = trace(model, picture, "ocr")
    save_trace(other, tmp_path / "mine.safetensors", NOTHING)
    said = compare(reference, tmp_path / "mine.safetensors").verdict.sentence
    assert said.startswith("These are two runs: prompt 'caption en' and 'ocr'.")
    other = trace(model, Image.new("RGB", (9, 9)), "caption en")
    save_trace(other, tmp_path / "mine.safetensors", NOTHING)
    said = compare(reference, tmp_path / "mine.safetensors").verdict.sentence
    assert said.startswith("These are runs on two pictures.")


def test_a_stage_of_zeros_in_the_reference_gives_valid_json(
    model: Model, picture: Image.Image, tmp_path: Path
) -> None:
    black = trace(model, Image.new("RGB", (20, 20)), "caption en")
    save_trace(black, tmp_path / "black.safetensors", floors(black, model))
    save_trace(trace(model, picture, "caption en"), tmp_path / "mine.safetensors", NOTHING)
    report = compare(tmp_path / "black.safetensors", tmp_path / "mine.safetensors")
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["stages"][0]["error"] is None


def test_one_array_in_16_bits_does_not_loosen_the_others(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    stages = dict(traced.stages)
    stages[f"{TOWER}.0"] = stages[f"{TOWER}.0"] * np.float32(1.0005)
    stages["language_model.logits"] = stages["language_model.logits"].astype(np.float16)
    report = compare(reference, npz(tmp_path, stages))
    assert report.precision == "float32" and report.verdict.stage == f"{TOWER}.0"
    assert report.rows[-1].status == "OK"


def test_colours_from_0_to_255_are_not_taken_for_rounding(
    traced: Trace, reference: Path, model: Model, tmp_path: Path
) -> None:
    pixels = (traced.stages["pixel_values"] + 1) * np.float32(127.5)
    report = compare(reference, npz(tmp_path, {"pixel_values": np.rint(pixels)}), model=model)
    assert report.verdict.cause == "range_other" and "bfloat16" not in report.verdict.sentence


def test_a_compact_reference_is_enough_for_a_cause(
    traced: Trace, model: Model, tmp_path: Path
) -> None:
    save_trace(traced, tmp_path / "compact.json", floors(traced, model), compact=True)
    stages = {n: traced.stages[n].copy() for n in ("multi_modal_projector", "inputs_embeds")}
    images = model.config.vision_config.num_patches
    stages["inputs_embeds"][:images] /= np.sqrt(stages["inputs_embeds"].shape[1])
    report = compare(tmp_path / "compact.json", npz(tmp_path, stages), model=model)
    assert report.verdict.cause == "image_divided_by_sqrt", report.verdict.sentence


def test_a_broken_number_is_called_by_its_name_and_place(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    gelu = traced.stages[GELU].copy()
    gelu[1, 2], gelu[2, 0] = np.inf, np.nan
    said = compare(reference, npz(tmp_path, traced.stages | {GELU: gelu})).verdict.sentence
    assert f"1 nan and 1 infinite among {gelu.size:,} numbers, the first at [1, 2]" in said


def test_every_stage_that_is_wrong_by_itself_is_named_with_replay(
    traced: Trace, reference: Path, model: Model, tmp_path: Path
) -> None:
    stages = dict(traced.stages)
    norm = f"{TEXT}.0.input_layernorm"
    stages[GELU], stages[norm] = stages[GELU] * 2, stages[norm] + 1
    only = f"{GELU},{norm}"  # their inputs are read all the same
    report = compare(reference, npz(tmp_path, stages), model=model, replayed=True, only=only)
    assert report.verdict.stage == GELU
    assert report.verdict.sentence.count(f"Wrong by themselves, too: {norm}.") == 1
    assert "own: x floor of what the stage itself adds" in table(report)


def test_without_the_model_it_is_said_that_not_every_cause_was_tried(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    fc1 = f"{TOWER}.0.mlp.fc1"
    noise = np.random.default_rng(0).standard_normal(traced.stages[fc1].shape)
    stages = {fc1: (traced.stages[fc1] + noise).astype(np.float32)}
    said = compare(reference, npz(tmp_path, stages)).verdict.sentence
    assert "Causes that only weights can show were not tried" in said


# Steps of decoding, and replay


@pytest.fixture(scope="module")
def step(model: Model, picture: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = trace(model, picture, "caption en", step=1)
    path = tmp_path_factory.mktemp("step") / "step.safetensors"
    save_trace(found, path, floors(found, model))
    assert all(not line.startswith("npvlm/porting") for line in found.sources.values())
    return path


def test_a_decoding_step_is_not_replayed(step: Path, model: Model) -> None:
    assert compare(step, step).verdict.same
    with pytest.raises(UsageError, match="decoding step 1, whose layers read the cache"):
        compare(step, step, model=model, replayed=True)
    with pytest.raises(UsageError, match="a decoding step, whose layers read the cache"):
        replay_stage(f"{TEXT}.0.mlp", step, model, None, None)


@pytest.mark.parametrize("stage", ["pixel_values", "input_ids", "positions"])
def test_what_a_run_begins_with_is_not_replayed(reference: Path, model: Model, stage: str) -> None:
    with pytest.raises(UsageError, match="is what a run begins with"):
        replay_stage(stage, reference, model, None, None)


def test_replay_judges_by_the_precision_and_reads_any_layout(
    traced: Trace, model: Model, tmp_path: Path
) -> None:
    stages: dict[str, Any] = {n: v for n, v in traced.stages.items() if n.startswith(TOWER)}
    mine = npz(tmp_path, {n: to_bfloat16(v) for n, v in stages.items()})
    said, same = replay_stage(f"{TOWER}.1.mlp", mine, model, None, None)
    assert not same and "times the float32 floor" in said
    said, same = replay_stage(f"{TOWER}.1.mlp", mine, model, None, None, "bfloat16")
    assert same and "times the bfloat16 floor" in said
    stages = dict(traced.stages)
    rope = f"{TEXT}.0.self_attn.q_rope"
    q = stages[rope]
    half = q.shape[-1] // 2
    stages[rope] = np.stack([q[..., :half], q[..., half:]], -1).reshape(q.shape)
    assert replay_stage(rope, npz(tmp_path, stages), model, None, None)[1]


def test_common_names_of_precisions_are_known(reference: Path) -> None:
    for name in ("bf16", "fp16", "fp32", "bfloat16"):
        done = CliRunner().invoke(command, [str(reference), str(reference), "--as", name])
        assert done.exit_code == 0, done.output
        assert f"times the {CLAIMS[name]} floor" in done.output


def test_a_run_of_missing_stages_takes_one_line(
    traced: Trace, reference: Path, tmp_path: Path
) -> None:
    mine = npz(tmp_path, {"pixel_values": traced.stages["pixel_values"]})
    shown = table(compare(reference, mine)).splitlines()
    assert sum(line.startswith("MISSING") for line in shown) <= 4
    assert len(shown) < 12
