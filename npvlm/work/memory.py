"""How much memory this process holds, and the most it held while something ran."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from npvlm.files.memory import proc_bytes

_STATUS = Path("/proc/self/status")
INTERVAL = 0.02  # seconds between two looks


@dataclass(frozen=True)
class Memory:
    """Bytes: `anonymous` is what the process made itself, `resident` has its mapped files too."""

    anonymous: int
    resident: int


def memory_now() -> Memory | None:
    """What the process holds at this moment; None where the system does not say."""
    held = proc_bytes(_STATUS)
    if "RssAnon" not in held or "VmRSS" not in held:
        return None
    return Memory(held["RssAnon"], held["VmRSS"])


def peak_memory() -> int | None:
    """The most bytes that were resident so far, mapped files with them."""
    return proc_bytes(_STATUS).get("VmHWM")


class PeakMemory:
    """The most memory held since it was begun, looked at every 20 ms by a thread.

    with PeakMemory() as peak:
        ...
    peak.memory
    """

    def __init__(self) -> None:
        self.memory = memory_now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self.memory = larger(self.memory, memory_now())


def larger(one: Memory | None, other: Memory | None) -> Memory | None:
    """The larger of each figure; None where nothing is known."""
    if one is None or other is None:
        return one or other
    return Memory(max(one.anonymous, other.anonymous), max(one.resident, other.resident))
