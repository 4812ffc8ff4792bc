"""Known mistakes, tried at the first stage that is wrong: which one gives the port's numbers.

A suspect is convicted if the stage, computed with its mistake from what the port has before it,
comes as near to the port's numbers as rounding allows, and far nearer than the right computation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from npvlm.model.weights import Array
from npvlm.porting.stages import EXACT
from npvlm.porting.suspects_case import SLACK, Case, Context, cases, relative_error
from npvlm.porting.suspects_inputs import INPUT_SUSPECTS
from npvlm.porting.suspects_text import TEXT_SUSPECTS
from npvlm.porting.suspects_tower import TOWER_SUSPECTS
from npvlm.porting.suspects_weights import WEIGHT_SUSPECTS

# In order: of mistakes that give the same numbers, the more common is named.
SUSPECTS = (*INPUT_SUSPECTS, *TOWER_SUSPECTS, *TEXT_SUSPECTS, *WEIGHT_SUSPECTS)

BETTER = 10.0  # times nearer than the right computation


@dataclass(frozen=True)
class Finding:
    """A mistake that gives the port's numbers.

    error : of the port against the mistake, relative
    """

    id: str
    sentence: str
    error: float


def accuse(stage: str, mine: Array, context: Context) -> Finding | None:
    """Name the known mistake that makes a stage what it is in a port.

    Parameters
    ----------
    stage : the first that is wrong
    mine : the port's value in the reference's layout; of input_ids whatever length they have
    context : Context

    Returns
    -------
    The mistake that comes nearest, or None if none explains the numbers.
    """
    for case in cases(stage, mine, context):
        found = _findings(case)
        if found:
            # What is equal but for rounding is the same: the first of them is named.
            best = min(finding.error for finding in found)
            same = max(2 * best, context.floor)
            return next(finding for finding in found if finding.error <= same)
    return None


def _findings(c: Case) -> list[Finding]:
    """The mistakes that explain a stage, in the order of SUSPECTS."""
    found: list[Finding] = []
    known = [c.right.get(c.stage), c.context.reference(c.stage)]
    expected = [value for value in known if value is not None and np.isfinite(value).all()]
    if not expected:  # nothing to be better than
        return found
    ordinary = min(_error(c, value) for value in expected)
    for suspect in SUSPECTS:
        if c.concerns(suspect.globs):
            enough = max(SLACK * c.context.floor, suspect.tolerance)
            if c.stage in EXACT and not suspect.tolerance:
                enough = 0.0
            for detail, value in suspect.guesses(c):
                error = _error(c, value)
                if error <= enough and error < ordinary / BETTER:
                    said = f"{detail}; " if detail else ""
                    proof = f"({said}the numbers agree to {error:.1g})"
                    found.append(Finding(suspect.id, f"{suspect.sentence} {proof}.", error))
    return found


def _error(c: Case, value: Array | None) -> float:
    """Of the port's stage against a value, relative; infinite where the two cannot be compared."""
    if value is None or value.size != c.mine.size or not np.isfinite(value).all():
        return math.inf
    return relative_error(c.mine, value)


__all__ = ["SUSPECTS", "Context", "Finding", "accuse"]
