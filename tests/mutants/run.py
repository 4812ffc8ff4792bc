"""Change one thing at a time in model/, answers/ and files/, and see whether the tests notice.

    pip install -r tests/mutants/requirements.txt
    python -m tests.mutants.run ops answers          # groups: ops, model, answers, files
    python -m tests.mutants.run files --sample 300   # so many of the group's mutants, drawn by lot
    python -m tests.mutants.run ops --again          # more tests for those that none noticed so far
    python -m tests.mutants.run                      # only write figures.md anew

mutmut makes the mutants: a sign turned, a bound moved by one, an argument dropped, a condition
forced. It is not mutmut that runs them: `mutmut run` collects the tests again for each one, which
takes ten times as long as the tests do. Here one process collects and runs the tests once, notes
which touch which function, and forks for each mutant; the child puts the mutant's code into the
function and runs the tests that touch it, the quickest first and for a second
(twelve with --again), until one fails.

A process that a test starts meets the mutant as soon as it imports the module.

Results are kept in build/mutants, so that a run that was broken off goes on. figures.md has the
counts and every mutant that survived. Outside functions mutmut makes no mutants, nor of
annotations.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import pickle
import random
import sys
import tempfile
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import pytest

from tests.mutants.exchanged import Mutant
from tests.mutants.made import PACKAGE, mutants_of
from tests.mutants.tried import Runner

ROOT = PACKAGE.parent
KEPT = ROOT / "build" / "mutants"
FIGURES = Path(__file__).with_name("figures.md")
EQUIVALENT = Path(__file__).with_name("equivalent.diff")

# The files of each group, and the tests that hold them; twins of operations hold no definition.
GROUPS = {
    "ops": (
        ["model/ops.py"],
        "ops op_goldens model goldens weights sampling adapters retrieval",
        "not kernels",
    ),
    "model": (
        ["model/[!o]*.py"],
        "model model_batch goldens op_goldens weights vqvae exactness adapters retrieval",
        "",
    ),
    "answers": (
        ["answers/*.py"],
        (
            "boxes masks outlines detection drawing explain explanation_page explanation_sheet"
            " explanation heat lines scores formats tasks words fonts api states retrieval"
        ),
        "",
    ),
    "files": (
        ["files/*.py"],
        (
            "checkpoint tokenizer pictures names output masks hub convert writer listing published"
            " weights adapters adapter_commands big_vision derivatives npz resample index embed"
            " links needs memory models features contact_sheet"
        ),
        "",
    ),
}


def keep(group: str, mutant: Mutant, result: str) -> None:
    with (KEPT / f"{group}.jsonl").open("a") as file:
        file.write(json.dumps([mutant.key, result]) + "\n")


def kept(group: str) -> dict[str, str]:
    """The last result of each mutant that was tried, by key."""
    path = KEPT / f"{group}.jsonl"
    return dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}


def mutants_of_group(group: str) -> list[Mutant]:
    """All mutants of a group; a file's are made once, as long as it stays as it is."""
    found = []
    for path in sorted(p for pattern in GROUPS[group][0] for p in PACKAGE.glob(pattern)):
        made = KEPT / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.pickle"
        if not made.exists():
            made.write_bytes(pickle.dumps(list(mutants_of(path))))
        found += pickle.loads(made.read_bytes())
    return found


def try_group(group: str, again: bool, sample: int | None) -> None:
    """Show the mutants of a group that have no result yet to its tests."""
    results, mutants = kept(group), mutants_of_group(group)
    if sample:
        mutants = random.Random(6).sample(mutants, len(mutants))[:sample]
    wanted = (None, "survived", "untested") if again else (None,)
    mutants = [m for m in mutants if results.get(m.key) in wanted]
    hopeless = equivalent() if again else {}
    mutants = [m for m in mutants if (m.file, m.diff) not in hopeless]
    if not mutants:
        return
    _, names, only = GROUPS[group]
    tests = [ROOT / "tests" / f"test_{name}.py" for name in names.split()]
    options = ["-s", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-k", only or "test"]
    runner = Runner(
        mutants, KEPT / f"slow-{group}.json", partial(keep, group), 12.0 if again else 1.0
    )
    with tempfile.TemporaryDirectory() as place:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = place
        pytest.main([*options, *(str(path) for path in tests if path.exists())], plugins=[runner])


def equivalent() -> dict[tuple[str, str], str]:
    """The mutants that no test can notice, by file and change, and why; from equivalent.diff."""
    found = {}
    for block in EQUIVALENT.read_text().split("\n# ")[1:]:
        head, diff = block.rstrip().split("\n", 1)
        file, reason = head.split(": ", 1)
        found[file, diff] = reason
    return found


def figures() -> str:
    """The counts of every file, and every mutant that survived, as Markdown."""
    rows, survivors, reasons = [], [], equivalent()
    whole = Counter[str]()
    for group in GROUPS:
        results, total = kept(group), Counter[str]()
        by_file: dict[str, Counter[str]] = defaultdict(Counter)
        for mutant in mutants_of_group(group):
            result = results.get(mutant.key, "not tried")
            by_file[mutant.file][result] += 1
            if result in ("survived", "untested"):
                reason = reasons.get((mutant.file, mutant.diff))
                by_file[mutant.file]["equivalent"] += bool(reason)
                said = reason or ("" if result == "survived" else "touched by no test")
                survivors.append(f"# {mutant.file}:{mutant.line} {said}".rstrip())
                survivors.append(mutant.diff)
        for file, counts in by_file.items():
            rows.append(row(file, counts))
            total += counts
        if len(by_file) > 1:
            rows.append(row(f"**{group}**", total))
        whole += total
    head = "file | mutants | tried | killed | timed out | survived | of them equivalent | noticed"
    return "\n".join(
        [
            "# Mutants",
            "",
            "Written by `python -m tests.mutants.run`, whose docstring says what is counted. The",
            "last column is killed and timed out, of all that were tried, equivalent ones too.",
            "",
            f"| {head} |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            row("**all**", whole),
            "",
            "The survivors; behind some, why no test can notice them.",
            "",
            "```diff",
            *survivors,
            "```",
            "",
        ]
    )


def row(name: str, counts: Counter[str]) -> str:
    killed, timed_out = counts["killed"], counts["timed out"]
    survived = counts["survived"] + counts["untested"]
    tried = killed + timed_out + survived
    made = tried + counts["not tried"]
    share = f"{100 * (killed + timed_out) / tried:.1f} %" if tried else ""
    cells = [name, made, tried, killed, timed_out, survived, counts["equivalent"], share]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "groups", nargs="*", choices=[*GROUPS, []], metavar="GROUP", help="what to change"
    )
    parser.add_argument("--sample", type=int, help="so many of the group's mutants, drawn by lot")
    parser.add_argument("--again", action="store_true", help="those that no test noticed so far")
    asked = parser.parse_args()
    os.chdir(ROOT)
    KEPT.mkdir(parents=True, exist_ok=True)
    # One thread each, in a layer that survives a fork: a kernel runs here before the children do.
    os.environ |= {"NUMBA_THREADING_LAYER": "tbb", "NUMBA_NUM_THREADS": "1"}
    os.environ |= {"OPENBLAS_NUM_THREADS": "1"}
    libraries = Path(sys.prefix) / "lib"
    os.environ["LD_LIBRARY_PATH"] = str(libraries)  # for the processes that tests start
    ctypes.CDLL(str(libraries / "libtbb.so.12"), ctypes.RTLD_GLOBAL)
    for group in asked.groups:
        if not (child := os.fork()):  # a group changes nothing for the next
            try_group(group, asked.again, asked.sample)
            os._exit(0)
        os.waitpid(child, 0)
    FIGURES.write_text(figures())


if __name__ == "__main__":
    main()
