"""A run of pytest in which every mutant meets the tests that touch it, each in a child."""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.mutants.exchanged import (
    Mutant,
    codes,
    exchange,
    exchange_in_processes,
    loaded,
    note_in_processes,
)

SLOW = 3.0  # a test that takes more CPU seconds, with its processes, is shown no mutant
UNTESTED = 77  # the exit code of a child that could not make its mutant


class Runner:
    """A pytest plugin: in the place of one run of the tests, one for each mutant."""

    def __init__(
        self,
        mutants: list[Mutant],
        slow: Path,
        keep: Callable[[Mutant, str], None],
        enough: float,  # CPU seconds of tests that a mutant is shown
    ) -> None:
        self.mutants, self.slow, self.keep, self.enough = mutants, slow, keep, enough
        self.reports: list[Any] = []

    def pytest_sessionstart(self) -> None:
        """A test may be slow on a busy machine without being wrong."""
        from hypothesis import settings

        settings.register_profile("mutants", deadline=None)
        settings.load_profile("mutants")

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
        none = Counter[Any]()
        if self.tried(None, in_order(every, none), caches, none) != "survived":
            raise AssertionError("a test fails in a child whose sources are unchanged")
        kills: dict[str, Counter[Any]] = defaultdict(Counter)  # by function: what each test noticed
        for number, mutant in enumerate(self.mutants):
            if number % 50 == 0:
                print(f"{time.strftime('%T')} {number} of {len(self.mutants)}", flush=True)
            name, result = f"{mutant.file} {mutant.function}", "untested"
            if found := tests.get(name):
                chosen = in_order(found, kills[name], self.enough)
                result = self.tried(mutant, chosen, caches, kills[name])
            self.keep(mutant, result)
        return True

    def failing(self, items: list[Any]) -> int | None:
        """Run tests here, until one fails; its number."""
        self.reports.clear()
        for number, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True)):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if any(report.failed for report in self.reports):
                return number
        return None

    def watched(self, items: list[Any]) -> dict[str, dict[Any, float]]:
        """Run all tests and note those that touch a function, each with its CPU seconds.

        A fixture may be set up once for many tests: what it touches is noted for its whole file.
        """
        names = {}
        wanted = {f"{m.file} {m.function}" for m in self.mutants}
        for name in wanted:
            for code in codes(loaded(*name.split()).__code__):
                names[code] = name
        hit: set[str] = set()
        place = Path(tempfile.mkdtemp(prefix="watched-"))
        calls = note_in_processes(place)
        shared: dict[Path, set[str]] = defaultdict(set)
        slow = set(json.loads(self.slow.read_text())) if self.slow.exists() else set()
        items = [item for item in items if item.nodeid not in slow]
        touched, cost = {}, {}

        def watch(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code in names:
                hit.add(names[frame.f_code])

        for item, following in zip(items, [*items[1:], None], strict=True):
            hit.clear()
            calls.write_text("")
            self.reports.clear()
            self.after_setup = lambda path=item.path: shared[path].update(hit)
            start = sum(os.times()[:4])  # of processes that it waited for, too
            sys.setprofile(watch)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.setprofile(None)
            cost[item] = sum(os.times()[:4]) - start
            touched[item] = hit | wanted.intersection(calls.read_text().splitlines())
            if any(report.failed for report in self.reports):
                print("fails without a mutant, and is left out:", item.nodeid)
                slow.add(item.nodeid)
            elif cost[item] > SLOW:
                slow.add(item.nodeid)
        del self.after_setup
        del os.environ["PYTHONPATH"]
        shutil.rmtree(place)
        self.slow.write_text(json.dumps(sorted(slow), indent=0))
        found: dict[str, dict[Any, float]] = defaultdict(dict)
        for item in items:
            if item.nodeid not in slow:
                for name in touched[item] | shared[item.path]:
                    found[name][item] = cost[item]
        print(f"{len(found)} functions, {len(items)} tests, {sum(cost.values()):.0f} s", flush=True)
        return found

    def tried(
        self,
        mutant: Mutant | None,
        tests: dict[Any, float],
        caches: list[Any],
        kills: Counter[Any],
    ) -> str:
        """Run the tests on a mutant, or none, in a child; say how that ended, and count by what."""
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
                resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
                for cached in caches:
                    cached.cache_clear()
                items = list(tests)
                items[0].config._tmp_path_factory._basetemp = Path(place)
                if mutant:
                    exchange(mutant)
                    exchange_in_processes(mutant, Path(place) / "processes")
            except BaseException:
                os._exit(UNTESTED)
            try:
                if (number := self.failing(items)) is None:
                    os._exit(0)
                (Path(place) / "by").write_text(str(number))
                os._exit(1)
            except BaseException:  # a mutant may stop pytest itself
                os._exit(1)
        watched = os.pidfd_open(child)
        if not select.select([watched], [], [], 5 * seconds + 20)[0]:
            os.killpg(child, signal.SIGKILL)
        os.close(watched)
        _, status = os.waitpid(child, 0)
        if (by := Path(place) / "by").exists():
            kills[list(tests)[int(by.read_text())]] += 1
        shutil.rmtree(place, ignore_errors=True)
        if os.WIFEXITED(status):
            return {0: "survived", UNTESTED: "untested"}.get(os.WEXITSTATUS(status), "killed")
        limits = (signal.SIGXCPU, signal.SIGKILL)
        return "timed out" if os.WTERMSIG(status) in limits else "killed"


def in_order(
    tests: dict[Any, float], kills: Counter[Any], most: float = math.inf
) -> dict[Any, float]:
    """The tests that noticed most, then the cheapest file's, until they take too long together.

    File by file, because fixtures serve a file's tests once.
    """
    files = Counter[Path]()
    for item, cost in tests.items():
        files[item.path] += cost
    chosen: dict[Any, float] = {}
    for item in sorted(tests, key=lambda t: (-kills[t], files[t.path], t.path, tests[t])):
        if sum(chosen.values()) < most:
            chosen[item] = tests[item]
    return chosen
