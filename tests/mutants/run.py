"""Change one thing at a time in model/, answers/ and files/, and see whether the tests notice.

    pip install -r tests/mutants/requirements.txt
    python -m tests.mutants.run ops answers          # groups: ops, model, answers, files
    python -m tests.mutants.run files --sample 300   # so many of the group's mutants, drawn by lot
    python -m tests.mutants.run ops --again          # those once more that no test noticed
    python -m tests.mutants.run                      # only write figures.md anew

mutmut makes the mutants: a sign turned, a bound moved by one, an argument dropped, a condition
forced. It is not mutmut that runs them: `mutmut run` collects the tests again for each one, which
takes ten times as long as the tests do. Here one process collects and runs the tests once, notes
which touch which function, and forks for each mutant; the child puts the mutant's code into the
function and runs the tests that touch it, the quickest first, until one fails.

Results are kept in build/mutants, so that a run that was broken off goes on. figures.md has the
counts and every mutant that survived. Outside functions mutmut makes no mutants, nor of
annotations.
"""

from __future__ import annotations
import __future__

import argparse
import ast
import ctypes
import difflib
import functools
import gc
import hashlib
import importlib
import json
import math
import os
import pickle
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "mutants"
FIGURES = Path(__file__).with_name("figures.md")
EQUIVALENT = Path(__file__).with_name("equivalent.diff")

# The files of each group, and the tests that hold them; twins of operations hold no definition.
GROUPS = {
    "ops": (["model/ops.py"], "ops op_goldens model goldens weights sampling", "not kernels"),
    "model": (
        ["model/[!o]*.py"],
        "model model_batch goldens op_goldens weights vqvae exactness trace",
        "not kernels",
    ),
    "answers": (
        ["answers/*.py"],
        "boxes masks detection drawing explain scores words formats tasks fonts api",
        "",
    ),
    "files": (
        ["files/*.py"],
        "checkpoint tokenizer pictures names output masks hub convert listing published weights",
        "",
    ),
}
# A test that takes more CPU seconds is shown no mutant; nor is one that starts a process, which
# would run the sources as they are.
SLOW = 1.5
ENOUGH = 1.0  # CPU seconds of tests that a mutant is shown, the cheapest first


@dataclass(frozen=True)
class Mutant:
    """One function with one change."""

    file: str  # below npvlm/
    function: str  # its qualified name
    line: int  # where the change begins
    diff: str  # the lines taken away and put in
    source: str  # the function or its class, changed, on the lines where it stands

    @property
    def key(self) -> str:
        """The same for the same change of the same function, wherever the function stands."""
        return f"{self.file} {self.function} {hashlib.sha256(self.diff.encode()).hexdigest()[:12]}"


# --- what mutmut makes --------------------------------------------------------------------------


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant that mutmut makes of a file, and those of decorated functions.

    mutmut leaves these out, since it wraps the functions; here their code is exchanged.
    """
    import libcst as cst
    from libcst.metadata import MetadataWrapper
    from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    class Visitor(MutationVisitor):
        def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
            return not isinstance(node, cst.FunctionDef) and super()._skip_node_and_children(node)

    visitor = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module = MetadataWrapper(cst.parse_module(path.read_text())).visit(visitor)
    at = {}  # function -> (qualified name, statement of the module, its code, lines before it)
    above = sum(module.code_for_node(line).count("\n") for line in module.header)
    for node in module.body:
        code = module.code_for_node(node)
        inner = node.body.body if isinstance(node, cst.ClassDef) else [node]
        prefix = f"{node.name.value}." if isinstance(node, cst.ClassDef) else ""
        for function in inner:
            if isinstance(function, cst.FunctionDef):
                at[function] = prefix + function.name.value, node, code, above
        above += code.count("\n")
    seen = Counter[str]()
    for mutation in visitor.mutations:
        if mutation.contained_by_top_level_function not in at:
            continue
        name, node, code, above = at[mutation.contained_by_top_level_function]
        changed = module.code_for_node(
            deep_replace(node, mutation.original_node, mutation.mutated_node)
        )
        lines = difflib.unified_diff(code.splitlines(), changed.splitlines(), n=0, lineterm="")
        _, _, where, *lines = lines
        line = above + int(where.split()[1].lstrip("-").split(",")[0])
        diff = "\n".join(" ".join(text.split()) for text in lines if not text.startswith("@@"))
        seen[name + diff] += 1  # one change can be made in two places of a function
        if seen[name + diff] > 1:
            diff += f"  ({seen[name + diff]})"
        file = str(path.relative_to(ROOT / "npvlm"))
        yield Mutant(file, name, line, diff, "\n" * above + changed)


# --- the sources as they are loaded ---------------------------------------------------------------


def loaded(file: str, function: str) -> FunctionType:
    """The function of the loaded module, whatever its decorators made of it."""
    found: Any = importlib.import_module("npvlm." + file.removesuffix(".py").replace("/", "."))
    for part in function.split("."):
        found = vars(found)[part]
    while not isinstance(found, FunctionType) or hasattr(found, "__wrapped__"):
        wrapped = (
            getattr(found, name, None) for name in ("__wrapped__", "__func__", "fget", "func")
        )
        found = next(inner for inner in wrapped if inner)
    return found


def codes(code: CodeType) -> Iterator[CodeType]:
    """A piece of compiled code, and all that lie in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def exchange(mutant: Mutant) -> None:
    """Put the mutant's code and defaults into the function as it is loaded."""
    function = loaded(mutant.file, mutant.function)
    flags = __future__.annotations.compiler_flag
    tree = ast.parse(mutant.source)
    compiled = compile(tree, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    function.__code__ = next(c for c in codes(compiled) if c.co_qualname == mutant.function)
    name = mutant.function.rpartition(".")[2]
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)

    def value(default: ast.expr) -> Any:
        return eval(compile(ast.Expression(default), "default", "eval"), function.__globals__)

    function.__defaults__ = tuple(map(value, node.args.defaults)) or None
    named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    function.__kwdefaults__ = {a.arg: value(d) for a, d in named if d is not None} or None


# --- the tests, collected once ------------------------------------------------------------------


class Runner:
    """A pytest plugin: in the place of one run of the tests, one for each mutant."""

    def __init__(self, group: str, mutants: list[Mutant]) -> None:
        self.group, self.mutants = group, mutants
        self.reports: list[Any] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)
        if report.failed:
            print(report.nodeid, report.longreprtext)
        if report.when == "setup" and report.passed:
            self.after_setup()

    def after_setup(self) -> None:
        pass

    def pytest_runtestloop(self, session: Any) -> bool:
        tests = self.watched(session.items)
        caches = [o for o in gc.get_objects() if isinstance(o, functools._lru_cache_wrapper)]
        caches = [c for c in caches if c.__module__.split(".")[0] in ("npvlm", "tests", "golden")]
        every = {item: cost for found in tests.values() for item, cost in found.items()}
        if self.tried(None, in_order(every), caches) != "survived":
            raise AssertionError("a test fails in a child whose sources are unchanged")
        for number, mutant in enumerate(self.mutants):
            if number % 50 == 0:
                print(
                    f"{time.strftime('%T')} {self.group} {number}/{len(self.mutants)}", flush=True
                )
            found = tests.get(f"{mutant.file} {mutant.function}")
            result = self.tried(mutant, in_order(found, ENOUGH), caches) if found else "untested"
            keep(self.group, mutant, result)
        return True

    def passes(self, items: list[Any]) -> bool:
        """Run tests here, until one fails."""
        self.reports.clear()
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if any(report.failed for report in self.reports):
                return False
        return True

    def watched(self, items: list[Any]) -> dict[str, dict[Any, float]]:
        """Run all tests and note those that touch a function, each with its CPU seconds.

        A fixture may be set up once for many tests: what it touches is noted for its whole file.
        """
        names = {}
        for file, function in {(m.file, m.function) for m in self.mutants}:
            for code in codes(loaded(file, function).__code__):
                names[code] = f"{file} {function}"
        hit: set[str] = set()
        started: list[bool] = []  # whether a test started a process
        sys.addaudithook(lambda event, _: event == "subprocess.Popen" and started.append(True))
        shared: dict[Path, set[str]] = defaultdict(set)
        slow_path = KEPT / f"slow-{self.group}.json"
        slow = set(json.loads(slow_path.read_text())) if slow_path.exists() else set()
        items = [item for item in items if item.nodeid not in slow]
        touched, cost = {}, {}

        def watch(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code in names:
                hit.add(names[frame.f_code])

        for item, following in zip(items, [*items[1:], None], strict=True):
            hit.clear()
            started.clear()
            self.reports.clear()
            self.after_setup = lambda path=item.path: shared[path].update(hit)
            start = time.process_time()
            sys.setprofile(watch)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.setprofile(None)
            cost[item] = time.process_time() - start
            touched[item] = set(hit)
            if any(report.failed for report in self.reports):
                print("fails without a mutant, and is left out:", item.nodeid)
                slow.add(item.nodeid)
            elif cost[item] > SLOW or started:
                slow.add(item.nodeid)
        del self.after_setup
        slow_path.write_text(json.dumps(sorted(slow), indent=0))
        found: dict[str, dict[Any, float]] = defaultdict(dict)
        for item in items:
            if item.nodeid not in slow:
                for name in touched[item] | shared[item.path]:
                    found[name][item] = cost[item]
        print(f"{len(found)} functions, {len(items)} tests, {sum(cost.values()):.0f} s", flush=True)
        return found

    def tried(self, mutant: Mutant | None, tests: dict[Any, float], caches: list[Any]) -> str:
        """Run the tests on a mutant, or none, in a child, and say how that ended."""
        place = tempfile.mkdtemp(prefix="mutant-")
        seconds = 3 * sum(tests.values()) + 3
        sys.stdout.flush()
        if not (child := os.fork()):
            try:
                os.setsid()
                silent = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2) if mutant else ():
                    os.dup2(silent, stream)
                tempfile.tempdir = place
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds + 1), int(seconds + 2)))
                resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
                for cached in caches:
                    cached.cache_clear()
                if mutant:
                    exchange(mutant)
                items = list(tests)
                items[0].config._tmp_path_factory._basetemp = Path(place)
                os._exit(0 if self.passes(items) else 1)
            except BaseException as error:
                print(f"{error!r}"[:500], file=sys.stderr)
                os._exit(1)
        watched = os.pidfd_open(child)
        if not select.select([watched], [], [], 20 * seconds + 60)[0]:
            os.killpg(child, signal.SIGKILL)
        os.close(watched)
        _, status = os.waitpid(child, 0)
        shutil.rmtree(place, ignore_errors=True)
        if os.WIFEXITED(status):
            return "survived" if os.WEXITSTATUS(status) == 0 else "killed"
        limits = (signal.SIGXCPU, signal.SIGKILL)
        return "timed out" if os.WTERMSIG(status) in limits else "killed"


def in_order(tests: dict[Any, float], most: float = math.inf) -> dict[Any, float]:
    """The cheapest file first, and in it the cheapest test, until they take too long together.

    File by file, because fixtures serve a file's tests once.
    """
    files = Counter[Path]()
    for item, cost in tests.items():
        files[item.path] += cost
    chosen: dict[Any, float] = {}
    for item, cost in sorted(tests.items(), key=lambda t: (files[t[0].path], t[0].path, t[1])):
        if sum(chosen.values()) < most:
            chosen[item] = cost
    return chosen


# --- what is kept and shown ---------------------------------------------------------------------


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
    for path in sorted(p for pattern in GROUPS[group][0] for p in (ROOT / "npvlm").glob(pattern)):
        made = KEPT / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.pickle"
        if not made.exists():
            made.write_bytes(pickle.dumps(list(mutants_of(path))))
        found += pickle.loads(made.read_bytes())
    return found


def try_group(group: str, again: bool, sample: int | None) -> None:
    """Show the mutants of a group that have no result yet to its tests."""
    import pytest

    results, mutants = kept(group), mutants_of_group(group)
    if sample:
        mutants = random.Random(6).sample(mutants, min(sample, len(mutants)))
    wanted = ("survived", "untested") if again else (None,)
    mutants = [m for m in mutants if results.get(m.key) in wanted]
    if not mutants:
        return
    _, names, only = GROUPS[group]
    tests = [ROOT / "tests" / f"test_{name}.py" for name in names.split()]
    options = ["-s", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-k", only or "test"]
    runner = Runner(group, mutants)
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
    ctypes.CDLL(str(Path(sys.prefix) / "lib" / "libtbb.so.12"), ctypes.RTLD_GLOBAL)
    for group in asked.groups:
        if not (child := os.fork()):  # a group changes nothing for the next
            try_group(group, asked.again, asked.sample)
            os._exit(0)
        os.waitpid(child, 0)
    FIGURES.write_text(figures())


if __name__ == "__main__":
    main()
