"""Start-up: what importing does, what the first run says, and what becomes of the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import npvlm

ROOT = Path(npvlm.__file__).parents[1]

# A kernel that is compiled in no time, for whole numbers or fractions.
TOY = """
from npvlm.kernels.compiling import compiled, kept, tell_of_compiling

with kept():

    @compiled
    def doubled(x):
        return x + x
"""
USE = "import toy, sys\ntoy.tell_of_compiling(print)\nprint(toy.doubled({}))"
COMPILES = "compiling kernels for this CPU, once each; this takes about 15 seconds."


def python(code: str, *, cwd: Path = ROOT, **environment: str) -> list[str]:
    """The lines that code prints in a process of its own, which must say nothing on stderr."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **environment},
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with the toy and an empty cache."""
    (tmp_path / "toy.py").write_text(TOY)
    return tmp_path


def use(toy: Path, value: str, before: str = "", **environment: str) -> list[str]:
    """What a process says that doubles a value with the toy."""
    settings = {"NUMBA_CACHE_DIR": str(toy / "cache"), **environment}
    return python(before + USE.format(value), cwd=toy, **settings)


# Threads as the system counts them, where it shows them.
TASKS = "len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 1"


def test_importing_npvlm_imports_nothing_else() -> None:
    heavy = ["numba", "numpy", "PIL", "click"]
    code = f"import os, sys, npvlm\nprint([m for m in {heavy} if m in sys.modules], {TASKS})"
    assert python(code) == ["[] 1"]


def test_importing_the_kernels_starts_no_thread_and_compiles_nothing(tmp_path: Path) -> None:
    code = f"""
import os
from numba.core import event
recorder = event.RecordingListener()
event.register("numba:compile", recorder)
import npvlm.kernels, npvlm.kernels.packing
print(recorder.buffer, {TASKS})
"""
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path)) == ["[] 1"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_numpy_definitions_run_without_numba() -> None:
    code = """
import sys, npvlm
from npvlm.work.demo import draw_picture
model = npvlm.load("shapes", ops="numpy")
print(model.generate(draw_picture(), "caption en", max_tokens=2)[0].stop, "numba" in sys.modules)
"""
    assert python(code) == ["length False"]


def test_the_answer_needs_no_other_inference_library() -> None:
    code = """
import sys, npvlm
from npvlm.work.demo import draw_picture
for precision in ("float32", "int8"):
    npvlm.load("shapes", precision).generate(draw_picture(), "caption en", max_tokens=2)
print([m for m in ("torch", "transformers", "tokenizers") if m in sys.modules])
"""
    assert python(code) == ["[]"]


def test_compiling_is_said_once_for_each_kind_of_arguments_and_then_read_from_disk(toy) -> None:
    assert use(toy, "1") == [COMPILES, "2"]
    assert use(toy, "1") == ["2"]
    assert use(toy, "1.5") == [COMPILES, "3.0"]
    assert use(toy, "1.5") == ["3.0"]


def test_each_cpu_has_kernels_of_its_own(toy: Path) -> None:
    other = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    for environment in ({}, other):
        assert use(toy, "1", **environment) == [COMPILES, "2"]
        assert use(toy, "1", **environment) == ["2"]
    assert len(list((toy / "cache" / "npvlm").iterdir())) == 2


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
def test_damaged_files_are_compiled_again(toy: Path, kind: str) -> None:
    use(toy, "1")
    for path in (toy / "cache").rglob(kind):
        path.write_bytes(path.read_bytes()[:60])
    assert use(toy, "1") == [COMPILES, "2"]
    assert use(toy, "1") == ["2"]


def test_code_for_other_arguments_is_not_used(toy: Path) -> None:
    """Two processes that compile at once may leave it under the name of what is asked for."""
    use(toy, "1")
    use(toy, "1.5")
    first, second = sorted((toy / "cache").rglob("*.nbc"))
    second.replace(first)
    assert use(toy, "1") == [COMPILES, "2"]
    assert use(toy, "1.5") == [COMPILES, "3.0"]
    assert [use(toy, "1"), use(toy, "1.5")] == [["2"], ["3.0"]]


def test_processes_that_fill_one_cache_at_once_disturb_none(toy: Path) -> None:
    values = ["1", "1.5"] * 2
    with ThreadPoolExecutor(len(values)) as pool:
        said = list(pool.map(lambda value: use(toy, value), values))
    assert [lines[-1] for lines in said] == ["2", "3.0"] * 2
    assert all(lines[:-1] in ([], [COMPILES]) for lines in said)
    for value in values[:2]:
        use(toy, value)  # of two that were kept under one name, the last is there
    assert [use(toy, "1"), use(toy, "1.5")] == [["2"], ["3.0"]]


# chmod would forbid nothing to a user that may write everywhere.
READ_ONLY = """
import tempfile
real = tempfile.TemporaryFile
def refused(dir):
    if str(dir).startswith({!r}):
        raise PermissionError(13, "read-only", dir)
    return real(dir=dir)
tempfile.TemporaryFile = refused
"""


def test_a_filled_folder_that_can_only_be_read_is_used(toy: Path) -> None:
    use(toy, "1")
    cache = toy / "cache"
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb?")}
    assert use(toy, "1", READ_ONLY.format(str(cache))) == ["2"]
    [said, answer] = use(toy, "1.5", READ_ONLY.format(str(cache)))
    assert f"{cache}/npvlm" in said and "cannot be written" in said and answer == "3.0"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb?")} == kept


def test_a_place_that_cannot_be_written_is_said_in_one_line(toy: Path) -> None:
    (toy / "cache").write_text("a file")
    [said, answer] = use(toy, "1")
    assert str(toy / "cache") in said and "NUMBA_CACHE_DIR" in said and answer == "2"


def test_without_a_home_nothing_is_kept(toy: Path) -> None:
    """And no folder named ~ appears."""
    nobody = """
import os, pwd
def unknown(user):
    raise KeyError(user)
pwd.getpwuid = unknown
for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
    os.environ.pop(name, None)
"""
    [said, answer] = use(toy, "1", nobody)
    assert "NUMBA_CACHE_DIR" in said and answer == "2"
    assert not (toy / "~").exists()


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_threads_of_python_may_generate_at_once(layer: str) -> None:
    """The work queue of numba ends the process where two of them start a kernel at once."""
    code = """
from concurrent.futures import ThreadPoolExecutor
import npvlm
from npvlm.work.demo import draw_picture

model, prompts = npvlm.load("shapes"), ["caption en", "answer en how many shapes?"] * 4
alone = [model.generate(draw_picture(), prompt)[0] for prompt in prompts[:2]]
with ThreadPoolExecutor(4) as threads:
    together = threads.map(lambda prompt: model.generate(draw_picture(), prompt)[0], prompts)
for i, answer in enumerate(together):
    assert answer.token_ids == alone[i % 2].token_ids
    assert answer.logprobs == alone[i % 2].logprobs
"""
    assert python(code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2") == []
