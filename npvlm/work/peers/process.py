"""A program in a process of its own that runs one round whenever it is told to.

The two sides talk in lines of JSON: the worker says once what it is, then answers every line that
it reads with a round. It ends when its input does, so it cannot outlive whoever started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from npvlm.errors import NpvlmError
from npvlm.work.memory import Memory, PeakMemory, memory_now

PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Round:
    """One answer, or a batch of them: seconds by part, and the first token of each.

    `first_token` is the whole way to it, picture included; it and `image` are None for a program
    without an image tower. `decode` is the seconds of all later tokens.
    """

    image: float | None
    prefill: float
    first_token: float | None
    decode: float
    tokens: list[int]


@dataclass(frozen=True)
class Worker:
    """A running worker: what it is, how long loading took, what it held before and holds now."""

    name: str
    load: float
    before: Memory | None
    _process: subprocess.Popen[str]
    _said: IO[str]

    def round(self) -> tuple[Round, Memory | None]:
        """Let it run one round; the memory is the most that it held meanwhile."""
        answer = _ask(self._process, self._said, self.name, "round\n")
        return Round(**answer["round"]), _memory(answer["peak"])


@contextmanager
def worker(
    module: str, name: str, settings: dict[str, Any], threads: int, scratch: Path
) -> Iterator[Worker]:
    """Start a worker module and end its process when the work is done, or anything goes wrong.

    Parameters
    ----------
    module : the dotted name of a module that calls `serve`
    name : what it is called in errors
    settings : what its `load` gets
    threads : how many threads its libraries may use
    scratch : its temporary folder, for whatever its libraries leave behind

    Raises
    ------
    NpvlmError
        Where it ends before its time; with the last line that it said.
    """
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    places = {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(scratch)}
    environment = os.environ | counts | places
    environment.pop("GOMP_SPINCOUNT", None)  # how npvlm's own threads wait; others have their way
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
        )
        try:
            hello = _ask(process, said, name, "")
            before = _memory(hello["before"])
            yield Worker(hello["name"], hello["load"], before, process, said)
        finally:
            process.kill()
            process.communicate()


def _ask(process: subprocess.Popen[str], said: IO[str], name: str, line: str) -> dict[str, Any]:
    """Send a line and wait for the answer."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        process.wait()
        said.seek(0)
        last = [text.strip() for text in said.read().splitlines() if text.strip()][-1:]
        reason = last[0][:300] if last else f"exit code {process.returncode}"
        raise NpvlmError(f"{name} ended early ({reason}); leave out --against to measure npvlm.")
    return dict(json.loads(answer))


def serve(load: Callable[[dict[str, Any]], tuple[str, Callable[[], Round]]]) -> None:
    """The worker's side: load, then run a round for every line read.

    `load` takes the settings and gives the program's name and a function that runs one round.
    """
    # What the libraries print must not come between the lines of the conversation.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    began = time.perf_counter()
    name, run = load(json.loads(sys.argv[1]))
    hello = {"name": name, "load": time.perf_counter() - began, "before": _fields(memory_now())}
    print(json.dumps(hello), file=answers, flush=True)
    for _ in sys.stdin:
        with PeakMemory() as peak:
            done = run()
        answer = {"round": asdict(done), "peak": _fields(peak.memory)}
        print(json.dumps(answer), file=answers, flush=True)


def _fields(memory: Memory | None) -> dict[str, int] | None:
    return None if memory is None else asdict(memory)


def _memory(fields: dict[str, int] | None) -> Memory | None:
    return None if fields is None else Memory(**fields)
