"""Run a parser on millions of inputs that a coverage-guided fuzzer makes, and note what was found.

    pip install -r tests/fuzz/requirements.txt
    python tests/fuzz/run.py answers --runs 1000000

Inputs that reach something new are kept in tests/fuzz/corpus, the smallest set of them that reaches
it all; an input that breaks a promise is kept in tests/fuzz/crashes. The test suite replays both,
without atheris. Runs add up in tests/fuzz/figures.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIGURES = HERE / "figures.json"
MEMORY = Path("/dev/shm")  # where files are in memory, on Linux
LONGEST = {"answers": 32, "config": 2048, "header": 1024, "manifest": 1024}  # bytes of an input
# What each target is about: its lines and branches are counted.
MODULES = {
    "answers": ("npvlm.answers.boxes", "npvlm.answers.formats"),
    "config": ("npvlm.config",),
    "header": ("npvlm.files.checkpoint", "npvlm.files.names"),
    "manifest": ("npvlm.porting.dumps",),
}


def main() -> None:
    """Fuzz, keep what is new, measure, and note the figures; or do one of these in a process."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("target", choices=MODULES)
    asked.add_argument("--runs", type=int, default=1_000_000)
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    asked.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = asked.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.inside is not None:
        fuzz(options.target, options.inside)
    elif options.measure:
        print(json.dumps(measure(options.target)))
    else:
        sys.exit(run(options.target, options.runs, options.seed))


def run(target: str, runs: int, seed: int) -> int:
    """Fuzz in a process of its own; 1 where an input broke a promise."""
    corpus, crashes = HERE / "corpus" / target, HERE / "crashes" / target
    crashes.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    with tempfile.TemporaryDirectory() as work:
        grown, least = Path(work, "grown"), Path(work, "least")
        grown.mkdir()
        least.mkdir()
        limits = (
            f"-max_len={LONGEST[target]}",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-mutate_depth=1",
        )
        started = time.monotonic()
        ended, said = call(
            target,
            *(f"-seed={seed}", f"-runs={runs}", *limits, "-print_final_stats=1"),
            *(f"-artifact_prefix={crashes}/", grown, corpus),
        )
        seconds = time.monotonic() - started
        call(target, "-merge=1", "-use_counters=0", *limits, least, grown, corpus)
        assert any(least.iterdir())
        for file in corpus.iterdir():
            file.unlink()
        for file in least.iterdir():
            shutil.copy(file, corpus)
    counts = {key: int(n) for key, n in re.findall(r"(cov|ft): (\d+)", said)}
    executed = re.findall(r"^#(\d+)\s|number_of_executed_units: (\d+)", said, re.MULTILINE)
    done = max((int(a or b) for a, b in executed), default=0)
    found = len(set(crashes.iterdir()) - before)
    note(target, done, seconds, counts, seed, found)
    if ended:
        print(said[-6000:], file=sys.stderr)
    return int(found > 0)


def call(target: str, *arguments: str | Path) -> tuple[int, str]:
    """Start libFuzzer in a process and a folder of its own: its exit code, and what it says."""
    command = [sys.executable, __file__, target, "--inside", *map(str, arguments)]
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, cwd=place
        )
    return ended.returncode, ended.stderr


def fuzz(target: str, arguments: list[str]) -> None:
    """Hand a target over to libFuzzer, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["npvlm"]):
        from tests.fuzz.targets import TARGETS

    check, change = TARGETS[target]

    chance = random.Random(arguments[0]).random

    def pick(count: int) -> int:
        return int(chance() * count)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if not pick(4):
            return atheris.Mutate(data, most)
        for _ in range(1 + pick(2) * pick(3)):
            data = change(data, pick)
        return data[:most]

    again = f"{sys.executable} {__file__} {target} --inside"  # how a merge starts itself
    atheris.Setup([again, *arguments], check, custom_mutator=mutate)
    atheris.Fuzz()


def measure(target: str) -> dict[str, Any]:
    """Lines and branches of a target's modules that its corpus reaches."""
    import coverage

    watch = coverage.Coverage(branch=True, source=list(MODULES[target]), data_file=None)
    with watch.collect():
        from tests.fuzz.targets import TARGETS

        for file in sorted((HERE / "corpus" / target).iterdir()):
            TARGETS[target][0](file.read_bytes())
    reached = {}
    for name in MODULES[target]:
        found = watch._analyze(sys.modules[name].__file__ or "").numbers
        reached[name] = {
            "lines": f"{found.n_executed} of {found.n_statements}",
            "branches": f"{found.n_executed_branches} of {found.n_branches}",
        }
    return reached


def note(
    target: str, done: int, seconds: float, counts: dict[str, int], seed: int, found: int
) -> None:
    """Add a run to the figures."""
    command = [sys.executable, __file__, target, "--measure"]
    with tempfile.TemporaryDirectory() as place:
        ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=place)
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    before = figures.get(target, {})
    executions = before.get("executions", 0) + done
    total = before.get("seconds", 0) + round(seconds)
    figures[target] = {
        "executions": executions,
        "seconds": total,
        "executions_per_second": round(executions / max(total, 1)),
        "runs": before.get("runs", 0) + 1,
        "seeds": sorted({*before.get("seeds", []), seed}),
        "crashes_found": before.get("crashes_found", 0) + found,
        "edges": counts.get("cov", 0),
        "features": counts.get("ft", 0),
        "corpus": len(list((HERE / "corpus" / target).iterdir())),
        "reached": json.loads(ended.stdout),
    }
    FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
