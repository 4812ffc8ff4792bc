"""Beam searches by transformers, in float32 and in float64, for those of npvlm to be held against.

Random models hardly ever say `<eos>`; so that answers end at all, and at different lengths, tokens
that come near to being said are given to both programs as ids that end an answer.

Axis letters: T tokens · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PaliGemmaForConditionalGeneration

from golden import oracle
from golden.oracle import STEPS, Case

BEAMS = (2, 3, 5)
EOS = 1
NEAR = ((4, 1), (9, 2), (14, 3))  # a greedy step, and which of its likeliest tokens ends answers
# The third likeliest, where two beams are: an end that would often win and must not count.
THIRD = (4, 2)


@dataclass(frozen=True)
class Search:
    """One beam search, and what transformers finds by it."""

    prompt: int  # of the checkpoint's cases
    beams: int
    ends: list[int]
    answer: list[int]  # in float64, as is the next
    score: float
    torchs: list[int]  # in float32


def searches(
    cases: list[Case],
    float32: PaliGemmaForConditionalGeneration,
    float64: PaliGemmaForConditionalGeneration,
) -> list[Search]:
    """For each prompt several widths with near tokens as ends, and others with few ends."""
    near = [EOS, *(end for case in cases for end in ends_near(case, NEAR))]
    asked = [(n, beams, list(dict.fromkeys(near))) for n in range(len(cases)) for beams in BEAMS]
    asked += [(n, BEAMS[n % len(BEAMS)], [EOS]) for n in range(len(cases))]
    asked += [(n, 2, [EOS, *ends_near(case, [THIRD])]) for n, case in enumerate(cases)]
    return [search(n, cases[n], beams, ends, float32, float64) for n, beams, ends in asked]


def search(
    prompt: int,
    case: Case,
    beams: int,
    ends: list[int],
    float32: PaliGemmaForConditionalGeneration,
    float64: PaliGemmaForConditionalGeneration,
) -> Search:
    """One search in both precisions."""
    asked = case.pixels, case.ids, STEPS, beams, ends
    torchs, _ = oracle.beam_search(float32, *asked)
    with oracle.lifted():
        answer, score = oracle.beam_search(float64, *asked)
    return Search(prompt, beams, ends, answer, score, torchs)


def ends_near(case: Case, places: Iterable[tuple[int, int]]) -> list[int]:
    """Tokens that have these places among the likeliest of greedy steps."""
    likely = np.argsort(-case.scores, axis=-1, kind="stable")
    return [int(likely[step, place]) for step, place in places if step < len(likely)]


def logits_off(case: Case) -> float:
    """By how much torch's float32 misses a logit of the greedy steps, at most."""
    truth = case.truth["language_model.logits"][len(case.ids) - 1 : -1]
    return float(np.max(np.abs(truth - case.scores)))
