"""Ctrl-C and SIGTERM become exceptions that nothing swallows.

Python prints and forgets what is raised where C calls back: in a destructor, a weak reference, or
the middle of numba's compiler, which then breaks. So signals wait for the compiler, and one that is
forgotten is sent again.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Terminated(BaseException):
    """SIGTERM arrived."""


_EXCEPTIONS: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}
_depth = 0
_arrived: type[BaseException] | None = None


def listen() -> None:
    """Take both signals from now on, but for one that whoever started us has switched off."""
    for number in _EXCEPTIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _take)
    sys.unraisablehook = _send_again


def _take(number: int, frame: FrameType | None) -> None:
    global _arrived
    _arrived = _EXCEPTIONS[number]
    if not _depth:
        _raise()


def _raise() -> None:
    global _arrived
    if _arrived is not None:
        exception, _arrived = _arrived, None
        raise exception


def _send_again(unraisable: Any) -> None:
    """In a moment: raised here, it would be forgotten once more."""
    for number, exception in _EXCEPTIONS.items():
        if isinstance(unraisable.exc_value, exception):
            threading.Timer(0.01, signal.raise_signal, [number]).start()
            return
    sys.__unraisablehook__(unraisable)


def hold() -> None:
    """Let signals wait until `release`, which is called once for each call of this."""
    global _depth
    _raise()
    _depth += 1


def release() -> None:
    """Raise what has waited: numba works in short parts, one within the other."""
    global _depth
    _depth -= 1
    _raise()
