"""The readers of a kit, run: they pass what is the same and name the first number that differs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npvlm
from npvlm.model.weights import Array
from npvlm.porting.compare import LIMIT
from npvlm.porting.dumps import open_dump, save_trace
from npvlm.porting.kit import PROMPT, kit
from npvlm.porting.stages import EXACT
from npvlm.porting.trace import trace

Run = Callable[..., subprocess.CompletedProcess[str]]

# How each reader becomes something to run; {out} is a new file.
BUILDS = {
    "c": "cc -std=c99 -O1 -Wall -Wextra -Wpedantic -o {out} {source} -lm",
    "rs": "rustc --edition 2021 -o {out} {source}",
    "mjs": "",
}
TOOLS = {"c": "cc", "rs": "rustc", "mjs": "node"}
STAGE = "vision_tower.vision_model.encoder.layers.1.self_attn"
DIFFERS = re.compile(
    r"DIFFERENT: (\S+) at number (\d+): expected (\S+), found (\S+), relative error (\S+)\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "kit"
    kit(None, folder, lambda what: None)
    return folder


@pytest.fixture(scope="module", params=list(BUILDS))
def run(
    request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """One reader, built from the kit."""
    language = request.param
    tool = shutil.which(TOOLS[language])
    if tool is None:
        pytest.skip(f"{TOOLS[language]} is not installed")
    source = made / "readers" / f"read_golden.{language}"
    out = tmp_path_factory.mktemp("readers") / "read_golden"
    if BUILDS[language]:
        build = BUILDS[language].format(out=out, source=source).split()
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no warnings either
    start = [str(out)] if BUILDS[language] else [tool, str(source)]

    def reader(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*start, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return reader


@pytest.fixture(scope="module")
def golden(made: Path) -> Path:
    return made / "goldens" / "pg2" / "prefill.safetensors"


def changed(golden: Path, path: Path, stage: str, change: Callable[[Array], Array]) -> Path:
    """A golden's arrays with one of them changed, as another file."""
    arrays = load_file(golden)
    arrays[stage] = np.ascontiguousarray(change(arrays[stage]))
    save_file(arrays, path)
    return path


def bump(value: Array, at: int, by: float) -> Array:
    """A copy with one number changed by some part of the root mean square."""
    bumped = value.copy()
    bumped.reshape(-1)[at] += by * np.sqrt(np.mean(np.square(value)))
    return bumped


def test_a_golden_is_the_same_as_itself(run: Run, golden: Path) -> None:
    done = run(golden, golden)
    count = len(open_dump(golden).dtypes)
    assert done.stdout == f"OK: {count} of the golden's {count} stages compared, all the same\n"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["pg1", "pg2", "shapes"])
def test_a_correct_port_in_float32_is_the_same(
    run: Run, made: Path, name: str, tmp_path: Path
) -> None:
    model = npvlm.load(made / "models" / name)  # the kernels: other sums than the goldens'
    found = trace(model, made / "pictures" / "photo.png", PROMPT)
    save_trace(found, tmp_path / "mine.safetensors", {})
    done = run(made / "goldens" / name / "prefill.safetensors", tmp_path / "mine.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    said = r"OK: (\d+) of the golden's (\d+) stages compared, all the same\n"
    assert re.fullmatch(said, done.stdout)


def test_their_limit_is_above_that_of_compare_in_float32(made: Path) -> None:
    limits = {
        float(re.search(r"LIMIT\b[^=\n]*= (\S+?);", path.read_text())[1])  # type: ignore[index]
        for path in (made / "readers").iterdir()
    }
    assert len(limits) == 1
    floors = [
        entry["floors"]["float32"]
        for path in made.glob("goldens/*/prefill.json")
        for entry in open_dump(path).described().values()
    ]
    # One number of many may be further off than their root mean square: three to five times.
    assert 5 * LIMIT * max(floors) <= limits.pop() < 100 * LIMIT * max(floors)


def test_the_first_number_that_differs_is_named(run: Run, golden: Path, tmp_path: Path) -> None:
    truth = open_dump(golden).read(STAGE)
    mine = changed(golden, tmp_path / "mine.safetensors", STAGE, lambda v: bump(v, 17, 1e-3))
    done = run(golden, mine)
    assert done.returncode == 1
    found = DIFFERS.fullmatch(done.stdout)
    assert found is not None, done.stdout
    assert found[1] == STAGE
    assert int(found[2]) == 17
    assert float(found[3]) == pytest.approx(float(truth.reshape(-1)[17]), rel=1e-8)
    assert float(found[5]) == pytest.approx(1e-3, rel=0.01)  # three digits are printed


def test_whole_numbers_have_to_be_equal(run: Run, golden: Path, tmp_path: Path) -> None:
    for stage in EXACT:
        mine = changed(golden, tmp_path / "mine.safetensors", stage, lambda v: v + (v == v.max()))
        done = run(golden, mine)
        assert done.returncode == 1
        assert done.stdout.startswith(f"DIFFERENT: {stage} at number ")


def test_a_nan_differs(run: Run, golden: Path, tmp_path: Path) -> None:
    mine = changed(golden, tmp_path / "mine.safetensors", STAGE, lambda v: bump(v, 3, np.nan))
    done = run(golden, mine)
    assert done.returncode == 1
    assert done.stdout.startswith(f"DIFFERENT: {STAGE} at number 3: ")


def test_another_count_of_numbers_differs(run: Run, golden: Path, tmp_path: Path) -> None:
    mine = changed(golden, tmp_path / "mine.safetensors", STAGE, lambda v: v[1:])
    rows, width = open_dump(golden).read(STAGE).shape
    done = run(golden, mine)
    assert done.returncode == 1
    said = f"DIFFERENT: {STAGE}: expected {rows * width} numbers, found {(rows - 1) * width}\n"
    assert done.stdout == said


def test_raw_float32_is_read_for_one_stage(run: Run, golden: Path, tmp_path: Path) -> None:
    truth = open_dump(golden).read(STAGE)
    raw = tmp_path / "mine.f32"
    raw.write_bytes(truth.tobytes())
    done = run(golden, STAGE, raw)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("OK: 1 of ")
    raw.write_bytes(truth.T.tobytes())
    assert run(golden, STAGE, raw).returncode == 1


def test_misuse_is_one_sentence_and_exit_code_2(run: Run, golden: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(golden.read_bytes()[:-1])
    short = tmp_path / "short.safetensors"
    short.write_bytes(b"\x10")
    text = tmp_path / "text.safetensors"
    text.write_text("this is no file of tensors at all, but it is long enough for a header")
    odd = tmp_path / "odd.f32"
    odd.write_bytes(b"12345")
    other = tmp_path / "other.safetensors"
    save_file({"something": np.zeros(3, np.float32)}, other)
    half = tmp_path / "half.safetensors"
    save_file({STAGE: np.zeros(3, np.float16)}, half)
    for arguments in (
        [],
        [golden],
        [golden, cut],
        [golden, short],
        [golden, text],
        [golden, other],
        [golden, half],
        [golden, tmp_path / "missing.safetensors"],
        [golden, STAGE, odd],
        [golden, "no.such.stage", golden],
        [golden, golden, golden, golden],
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
