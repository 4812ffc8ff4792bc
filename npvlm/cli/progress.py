"""One line on a terminal that says how far a long job is."""

from __future__ import annotations

import sys
import time

INTERVAL = 0.1  # seconds at least between two looks of the line


class ProgressLine:
    """How many things are done, how fast, and how long the rest takes; nothing off a terminal."""

    def __init__(self, things: str, quiet: bool = False) -> None:
        self._things = things
        self._shown = not quiet and sys.stderr.isatty()
        self._began = self._last = time.perf_counter()
        self._width = 0

    def show(self, done: int, total: int, kept: int = 0, errors: int = 0) -> None:
        """Say it; `kept` of those done were so before this began."""
        now = time.perf_counter()
        if not self._shown or (now - self._last < INTERVAL and done < total):
            return
        self._last = now
        rate = (done - kept) / max(now - self._began, 1e-9)
        parts = [f"{done} of {total} {self._things}"]
        if rate:
            parts += [f"{rate:.1f}/s", f"{clock((total - done) / rate)} left"]
        if errors:
            parts.append(counted(errors, "error"))
        self._write(" · ".join(parts))

    def clear(self) -> None:
        """Leave an empty line."""
        if self._width:
            self._write("")
            self._put("\r")

    def _write(self, text: str) -> None:
        self._put(f"\r{text.ljust(self._width)}")
        self._width = len(text)

    def _put(self, text: str) -> None:
        """Write to the terminal itself: the stream would spell out what moves the cursor."""
        sys.stderr.buffer.write(text.encode())
        sys.stderr.flush()


def counted(number: int, thing: str) -> str:
    """A number of things: 1 error, 2 errors."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
