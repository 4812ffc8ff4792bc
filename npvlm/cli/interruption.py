"""Ctrl-C, SIGTERM and a closed terminal become one exception that nothing swallows.

Python prints and forgets what is raised where C calls back: in a destructor, a weak reference, or
the middle of numba's compiler, which then breaks. So signals wait for the compiler, and one that is
forgotten is sent again.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SAME_WISH = 2.0  # seconds in which another signal means the same: it must not break the clean-up


class Stopped(BaseException):
    """A signal arrived. What libraries do about KeyboardInterrupt is not done about this."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# What each of them is called where the command says why it ends.
SAID: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):  # which Windows has not
    SAID[signal.SIGHUP] = "the terminal was closed"
_depth = 0
_arrived: int | None = None
_raised = -SAME_WISH  # when


def listen() -> None:
    """Take the signals from now on, but for one that whoever started us has switched off."""
    for number in SAID:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _take)
    sys.unraisablehook = _send_again


def deafen() -> None:
    """Take no more signals: all is done, and Python has only to end."""
    for number in SAID:
        signal.signal(number, signal.SIG_IGN)


def _take(number: int, frame: FrameType | None) -> None:
    global _arrived
    if time.monotonic() - _raised < SAME_WISH:
        return
    _arrived = number
    if not _depth:
        _raise()


def _raise() -> None:
    global _arrived, _raised
    if _arrived is not None:
        number, _arrived, _raised = _arrived, None, time.monotonic()
        raise Stopped(number)


def _send_again(unraisable: Any) -> None:
    """In a moment: raised here, it would be forgotten once more."""
    global _raised
    if isinstance(unraisable.exc_value, Stopped):
        _raised = -SAME_WISH
        threading.Timer(0.01, signal.raise_signal, [unraisable.exc_value.number]).start()
    else:
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
