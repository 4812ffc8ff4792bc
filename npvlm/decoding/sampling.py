"""Choosing the next token: the likeliest, or a draw from a filtered distribution.

Axis letters: V vocabulary.
"""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.random import default_rng  # at once: a fork beside a thread that imports it would hang

from npvlm.errors import UsageError
from npvlm.model.weights import Array


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Greedy unless a temperature above 0, a top_k or a top_p is given.

    temperature : 0 is greedy whatever else is given; 1 where only a filter is given
    top_k : keep the k likeliest tokens (and those that tie with the last of them)
    top_p : keep the fewest likeliest tokens whose probabilities reach p together
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        for name, value, kinds in (
            ("temperature", t, (int, float)),
            ("top-k", k, (int,)),
            ("top-p", p, (int, float)),
        ):
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise UsageError(f"{name} is {value!r}, expected a number.")
        if t is not None and not 0 <= t <= sys.float_info.max:
            raise UsageError(f"temperature is {t}, expected 0 (greedy) or a finite number above.")
        if k is not None and k < 1:
            raise UsageError(f"top-k is {k}, expected a whole number of at least 1.")
        if p is not None and not 0 < p <= 1:
            raise UsageError(f"top-p is {p}, expected a number above 0 and up to 1.")

    @property
    def greedy(self) -> bool:
        if self.temperature is None:
            return self.top_k is None and self.top_p is None
        return self.temperature == 0

    def probabilities(self, logits: Array, *, ops: ModuleType) -> Array:
        """The distribution that is drawn from: temperature, then top-k, then top-p.

        logits [V] -> [V], in their dtype
        Source: transformers' logits processors, in their order. Which of several equal logits
        top-p drops is left open there; here it is the first ones.
        """
        scores = logits - np.max(logits)
        if self.temperature is not None:
            with np.errstate(over="ignore"):  # a tiny temperature leaves the largest alone
                scores = (scores.astype(np.float64) / self.temperature).astype(logits.dtype)
        if self.top_k is not None and self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(scores, kind="stable")  # unlikely first
            reached = np.cumsum(ops.softmax(scores)[order], dtype=np.float64)
            unlikely = order[reached <= 1 - self.top_p]
            scores[np.setdiff1d(unlikely, order[-1:])] = -np.inf
        return ops.softmax(scores)


class Chooser:
    """Chooses the tokens of one answer, with a random generator of its own.

    One number is drawn per token, so an answer depends on its seed and never on what else runs.
    """

    def __init__(self, sampling: Sampling, seed: int | None, *, ops: ModuleType) -> None:
        self._sampling, self._ops = sampling, ops
        self._random = default_rng(seed)

    def __call__(self, logits: Array) -> int:
        """The id of the next token; of equally likely ones the first.

        logits [V] -> an id below V
        """
        if self._sampling.greedy:
            return int(np.argmax(logits))
        weights = self._sampling.probabilities(logits, ops=self._ops)
        reached = np.cumsum(weights, dtype=np.float64)
        drawn = self._random.random() * reached[-1]
        return int(np.searchsorted(reached, drawn, side="right"))


def draw_seed() -> int:
    """A seed for those who named none."""
    return secrets.randbelow(2**32)
