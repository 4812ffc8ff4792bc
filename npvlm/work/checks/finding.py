"""What one check of the doctor found, and how any failure of it becomes a finding too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from npvlm.errors import NpvlmError

OK, WRONG, NOTE = "ok", "WRONG", "note"


@dataclass(frozen=True)
class Finding:
    """A check's name, its verdict (ok, WRONG, or note: worth knowing), and a line of figures."""

    name: str
    verdict: str
    says: str


Check = Callable[[], Finding]


def settle(name: str, fine: bool, says: str) -> Finding:
    """A finding that is ok or WRONG."""
    return Finding(name, OK if fine else WRONG, says)


def run_check(name: str, check: Check) -> Finding:
    """Make a check; one that breaks has found something wrong, whatever it breaks with."""
    try:
        return check()
    except NpvlmError as error:
        return Finding(name, WRONG, str(error))
    except Exception as error:  # a kernel that is broken may raise anything
        said = " ".join(str(error).split())[:200]
        return Finding(name, WRONG, f"the check broke with {type(error).__name__}: {said}")
