"""Where the command line begins and ends: its streams, its signals and its exit code.

What it imports is little: a signal may come at any moment, and is heard from here on.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from typing import Any, NoReturn

from npvlm.cli.interruption import SAID, Stopped, deafen, listen

_BYTES: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 (from a checkout, nothing else asks)
        found = f"is Python {sys.version.split()[0]}, expected 3.11 to 3.13"
        sys.exit(_no_python(found, "use one of these, such as .venv/bin/python"))
    try:
        listen()
        _open_streams()
        from npvlm.cli.commands import run

        code = run()
        deafen()
    except ModuleNotFoundError as error:
        if (error.name or "npvlm").partition(".")[0] == "npvlm":
            raise
        found = f"has no module {error.name}, which npvlm needs"
        install = f"{sys.executable} -m pip install -r requirements.txt"
        code = _no_python(found, f"use .venv/bin/python, or run {install}")
    except BaseException as error:
        if (number := _signal_behind(error)) is None:
            raise
        deafen()
        with contextlib.suppress(Exception):  # imports may have been broken off
            begin = "\n" if sys.stderr.isatty() else ""  # behind ^C, or a line of progress
            print(f"{begin}npvlm: {SAID[number]}.", file=sys.stderr)
        code = 128 + number
    sys.exit(code)


def _no_python(why: str, do: str) -> int:
    """Say why this Python cannot run npvlm; the exit code."""
    print(f"npvlm: {sys.executable} {why}; {do}.", file=sys.stderr)
    return 3


def _signal_behind(error: BaseException | None) -> int | None:
    """Which signal an error stands for: Python wraps what ends the making of a class, say."""
    while error is not None and not isinstance(error, Stopped | KeyboardInterrupt):
        error = error.__cause__
    if isinstance(error, Stopped):
        return error.number
    return None if error is None else signal.SIGINT  # KeyboardInterrupt: before `listen`


class _Remarks(io.FileIO):
    """Where stderr goes. Whoever read it may leave, or its disk be full: the work goes on."""

    def write(self, data: Any) -> int:
        """Write what can be written; the rest is lost."""
        with contextlib.suppress(OSError):
            super().write(data)
        return len(memoryview(data).cast("B"))


def _open_streams() -> None:
    """Let all three streams be there, in UTF-8, and stderr end nothing.

    Those that the shell closed lead nowhere: else the next file would be opened as stdout. A path
    or a line need not be UTF-8; its bytes come out as they went in, but for what drives a terminal.
    """
    from npvlm.cli.lines import HarmlessOutput

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))
    sys.stdin.reconfigure(**_BYTES)  # type: ignore[union-attr]
    given: Any = sys.stdout
    at_once = given.line_buffering
    sys.stdout = HarmlessOutput(given.detach(), line_buffering=at_once, **_BYTES)
    remarks = io.BufferedWriter(_Remarks(sys.stderr.fileno(), "wb", closefd=False))
    sys.stderr = HarmlessOutput(remarks, line_buffering=True, write_through=True, **_BYTES)
