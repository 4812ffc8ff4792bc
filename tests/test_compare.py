"""Another program's dump held against a trace: what is wrong first, how, and by how much."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm.api import Model
from npvlm.errors import UsageError
from npvlm.model.weights import Array
from npvlm.porting.altered import altered
from npvlm.porting.compare import LIMIT, compare
from npvlm.porting.dumps import save_trace
from npvlm.porting.floors import floors, to_bfloat16, to_float16
from npvlm.porting.report import page, table
from npvlm.porting.trace import Trace, run, trace

ROOT = Path(__file__).resolve().parent.parent
TOWER = "vision_tower.vision_model.encoder.layers"
TEXT = "language_model.model.layers"
Stages = dict[str, Array]


@pytest.fixture(scope="module", params=["pg1", "pg2"])
def model(request: pytest.FixtureRequest) -> Model:
    return npvlm.load(ROOT / "golden" / request.param, ops="numpy")


@pytest.fixture(scope="module")
def traced(model: Model) -> Trace:
    numbers = np.random.default_rng(3).integers(0, 256, (31, 45, 3), np.uint8)
    return trace(model, Image.fromarray(numbers), "caption en")


@pytest.fixture(scope="module")
def saved(traced: Trace, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference; beside it a compact one."""
    folder, found = tmp_path_factory.mktemp("reference"), floors(traced, model)
    save_trace(traced, folder / "full.safetensors", found)
    save_trace(traced, folder / "compact.json", found, compact=True)
    return folder


@pytest.fixture
def dump(tmp_path: Path) -> Callable[[Stages], Path]:
    def write(stages: Stages) -> Path:
        np.savez(tmp_path / "mine.npz", **stages)
        return tmp_path / "mine.npz"

    return write


def changed(traced: Trace, stage: str, change: Callable[[Array], Array]) -> Stages:
    return {**traced.stages, stage: change(traced.stages[stage])}


# What is the same


@pytest.mark.parametrize("reference", ["full.safetensors", "compact.json"])
def test_the_reference_is_the_same_as_itself(
    saved: Path, traced: Trace, dump: Callable[[Stages], Path], reference: str
) -> None:
    report = compare(saved / reference, dump(traced.stages), complete=True)
    assert report.verdict.same
    assert [row.stage for row in report.rows] == list(traced.stages)
    assert {row.status for row in report.rows} == {"OK"}
    assert max(row.error or 0.0 for row in report.rows) < 1e-7  # sketches have eight digits


def test_kernels_are_the_same_and_miss_what_they_fuse(
    saved: Path, model: Model, traced: Trace, dump: Callable[[Stages], Path]
) -> None:
    other = npvlm.load(model.name, ops="kernels")
    numbers = Image.fromarray(traced.inputs.rgb)
    found = trace(other, numbers, "caption en").stages
    report = compare(saved / "full.safetensors", dump(found))
    assert report.verdict.same
    missing = [row.stage for row in report.rows if row.status == "MISSING"]
    assert missing and all(name.endswith((".gate_proj", ".up_proj")) for name in missing)
    strict = compare(saved / "full.safetensors", dump(found), complete=True).verdict
    assert (strict.same, strict.kind, strict.stage) == (False, "missing", missing[0])


@pytest.mark.parametrize(("precision", "to"), [("bfloat16", to_bfloat16), ("float16", to_float16)])
def test_rounded_numbers_are_the_same_for_who_claims_that_precision(
    saved: Path,
    traced: Trace,
    dump: Callable[[Stages], Path],
    precision: str,
    to: Callable[[Array], Array],
) -> None:
    mine = {name: to(v) if v.dtype == np.float32 else v for name, v in traced.stages.items()}
    path = dump(mine)
    assert compare(saved / "full.safetensors", path, precision=precision).verdict.same
    verdict = compare(saved / "full.safetensors", path, precision="float32").verdict
    assert not verdict.same
    assert f"--as {precision}" in verdict.sentence


def test_a_dump_that_is_stored_in_16_bits_is_judged_as_such(
    saved: Path, traced: Trace, dump: Callable[[Stages], Path]
) -> None:
    mine = {
        name: v.astype(np.float16) if v.dtype == np.float32 else v
        for name, v in traced.stages.items()
    }
    report = compare(saved / "full.safetensors", dump(mine))
    assert report.precision == "float16" and report.verdict.same


def test_a_compact_trace_can_be_compared_too(saved: Path) -> None:
    report = compare(saved / "full.safetensors", saved / "compact.json")
    assert report.verdict.same
    assert compare(saved / "compact.json", saved / "compact.json").verdict.same


# In which way it is wrong

WIDE = f"{TOWER}.1.mlp.fc1"


def _with_nan(value: Array) -> Array:
    broken = value.copy()
    broken[2, 3] = np.nan
    return broken


KINDS: dict[str, tuple[str, Callable[[Array], Array], str]] = {
    "scale": (WIDE, lambda v: v * np.float32(0.5), "0.5 times"),
    "constant": (WIDE, np.zeros_like, "every number is 0"),
    "nan": (WIDE, _with_nan, "1 nan among"),
    "shape": (WIDE, lambda v: v[:-1, :-1], "expected ["),
    "dtype": (WIDE, lambda v: np.round(v * 10).astype(np.int32), "I32"),
    "permutation": (WIDE, lambda v: v[::-1].copy(), "rows are"),
    "numeric": (WIDE, lambda v: v + np.float32(0.01) * np.sin(v * 77), "largest difference"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_difference_is_told(
    saved: Path, traced: Trace, dump: Callable[[Stages], Path], kind: str
) -> None:
    stage, change, said = KINDS[kind]
    verdict = compare(saved / "full.safetensors", dump(changed(traced, stage, change))).verdict
    assert (verdict.same, verdict.stage, verdict.kind) == (False, stage, kind), verdict.sentence
    assert said in verdict.sentence


def test_columns_in_another_order_are_told(
    saved: Path, traced: Trace, dump: Callable[[Stages], Path]
) -> None:
    verdict = compare(
        saved / "full.safetensors", dump(changed(traced, WIDE, lambda v: v[:, ::-1].copy()))
    ).verdict
    assert verdict.kind == "permutation" and "columns are" in verdict.sentence


def test_a_stage_that_holds_another_is_told(
    saved: Path, traced: Trace, dump: Callable[[Stages], Path]
) -> None:
    other = f"{TOWER}.0.mlp.fc1"
    verdict = compare(
        saved / "full.safetensors", dump(changed(traced, WIDE, lambda v: traced.stages[other]))
    ).verdict
    assert verdict.kind == "order" and other in verdict.sentence


def test_a_known_factor_is_named(
    saved: Path, traced: Trace, model: Model, dump: Callable[[Stages], Path]
) -> None:
    D = model.config.text_config.hidden_size
    mine = changed(traced, "inputs_embeds", lambda v: v / np.float32(math.sqrt(D)))
    for reference in ("full.safetensors", "compact.json"):
        verdict = compare(saved / reference, dump(mine)).verdict
        assert verdict.kind == "scale" and f"1/sqrt({D})" in verdict.sentence, verdict.sentence


@pytest.mark.parametrize("reference", ["full.safetensors", "compact.json"])
def test_the_first_of_several_wrong_stages_is_named(
    saved: Path, traced: Trace, dump: Callable[[Stages], Path], reference: str
) -> None:
    mine = changed(traced, f"{TEXT}.1.mlp", lambda v: v * np.float32(1.01))
    mine[f"{TEXT}.0.self_attn"] = mine[f"{TEXT}.0.self_attn"] * np.float32(1.01)
    verdict = compare(saved / reference, dump(mine)).verdict
    assert verdict.stage == f"{TEXT}.0.self_attn"
    only = compare(saved / reference, dump(mine), only=f"{TEXT}.1.*").verdict
    assert only.stage == f"{TEXT}.1.mlp"


# Local and inherited


def test_a_replay_blames_the_layer_that_is_wrong_and_no_other(
    saved: Path, traced: Trace, model: Model, dump: Callable[[Stages], Path]
) -> None:
    """A port whose decoder's GeLU is the exact one: every layer is wrong, each at one stage."""
    exact = np.vectorize(math.erf)
    other = altered(gelu_tanh=lambda x: (0.5 * x * (1 + exact(x / math.sqrt(2)))).astype(x.dtype))
    mine = {name: traced.stages[name] for name in list(traced.stages)[:5]}
    run(
        traced.inputs,
        model.weights,
        model.config,
        ops=other,
        tap=lambda name, value: mine.setdefault(name, value),
    )
    report = compare(saved / "full.safetensors", dump(mine), model=model, replayed=True)
    own = [row.stage for row in report.rows if (row.local_over or 0) > LIMIT]
    assert report.verdict.stage == f"{TOWER}.0.mlp.gelu"
    assert own and all(name.endswith((".gelu", ".gated")) for name in own)
    inherited = [row for row in report.rows if row.status == "DIFF" and row.stage not in own]
    assert len(inherited) > len(own)


def test_a_replay_needs_the_model(
    saved: Path, traced: Trace, dump: Callable[[Stages], Path]
) -> None:
    with pytest.raises(UsageError, match="--model"):
        compare(saved / "full.safetensors", dump(traced.stages), replayed=True)


# Reports


def test_the_page_and_the_table_say_the_verdict(
    saved: Path, traced: Trace, dump: Callable[[Stages], Path], tmp_path: Path
) -> None:
    mine = changed(traced, WIDE, lambda v: v * np.float32(2))
    report = compare(saved / "full.safetensors", dump(mine))
    lines = table(report).splitlines()
    assert lines[-1] == report.verdict.sentence
    assert [line.split()[0] for line in lines[1:-2]] == [row.status for row in report.rows]
    page(report, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert report.verdict.sentence in text
    assert text.count('<tr id="s') == len(report.rows)
    assert "http://" not in text and "https://" not in text  # nothing is fetched
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["verdict"]["stage"] == WIDE


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_answers_with_its_exit_code(
    saved: Path, traced: Trace, model: Model, dump: Callable[[Stages], Path], tmp_path: Path
) -> None:
    full = str(saved / "full.safetensors")
    same = run_command("compare", full, str(dump(traced.stages)))
    assert same.returncode == 0 and same.stdout.rstrip().endswith("floor."), same.stderr
    wrong = str(dump(changed(traced, WIDE, lambda v: v * np.float32(2))))
    differs = run_command("compare", full, wrong, "--json", "--html", str(tmp_path / "p.html"))
    assert differs.returncode == 1, differs.stderr
    assert json.loads(differs.stdout)["verdict"]["kind"] == "scale"
    assert (tmp_path / "p.html").is_file()
    np.savez(tmp_path / "alien.npz", quux=np.zeros(3))
    for arguments, word in (
        ([full, str(tmp_path / "alien.npz")], "quux"),
        ([wrong, full], "expected a trace"),
        ([full, wrong, "--only", "nothing"], "names no stage"),
    ):
        refused = run_command("compare", *arguments)
        assert refused.returncode == 2 and word in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1


def test_replay_tells_a_stage_from_what_it_was_handed(
    traced: Trace, model: Model, dump: Callable[[Stages], Path], tmp_path: Path
) -> None:
    stage = f"{TEXT}.1.mlp.gated"
    before = f"{TEXT}.0"
    mine = changed(traced, before, lambda v: v * np.float32(1.5))
    arguments = ["replay", stage, "--input", str(dump(mine)), "--model", str(model.name)]
    own = run_command(*arguments, "--save", str(tmp_path / "x.npy"))
    # Its inputs, gate_proj and up_proj, are in the dump and right.
    assert own.returncode == 0 and "the same" in own.stdout, own.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), traced.stages[stage])
    arguments[1] = f"{TEXT}.1"  # of which the changed layer 0 is an input
    handed = run_command(*arguments)
    assert handed.returncode == 1 and "not what the reference makes" in handed.stdout
    unknown = run_command("replay", "nothing", *arguments[2:])
    assert unknown.returncode == 2 and "no stage" in unknown.stderr
