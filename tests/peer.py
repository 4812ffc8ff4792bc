"""A program to be measured against: it answers at once, and misbehaves where it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npvlm.work.peers.process import Round, serve


def load(settings: dict[str, Any]) -> tuple[str, Callable[[], Round]]:
    print("a library that likes to talk")

    def run() -> Round:
        print("while it works, too")
        if settings["fails"]:
            raise RuntimeError("this worker fails when it is told to")
        return Round(1.0, 2.0, 3.0, 4.0, [5])

    return "a test's own program", run


if __name__ == "__main__":
    serve(load)
