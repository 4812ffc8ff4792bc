"""Beam searches by transformers, in float32 and in float64, for those of npvlm to be held against.

Random models hardly ever say `<eos>`; so that answers end at all, and at different lengths, tokens
that come near to being said are given to both programs as ids that end an answer.

Axis letters: T tokens · V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PaliGemmaForConditionalGeneration

from golden import oracle
from golden.oracle import STEPS, Case

BEAMS = (2, 3, 5)
EOS = 1
NEAR = ((4, 1), (9, 2), (14, 3))  # a greedy step, and which of its likeliest tokens ends answers


@dataclass(frozen=True)
class Search:
    """One beam search, and what transformers finds by it."""

    prompt: int  # of the checkpoint's cases
    beams: int
    ends: list[int]
    answer: list[int]  # in float64, as is the next
    score: float
    torchs: list[int]  # in float32, as is the next
    torchs_score: float


def searches(
    cases: list[Case],
    float32: PaliGemmaForConditionalGeneration,
    float64: PaliGemmaForConditionalGeneration,
) -> list[Search]:
    """Several widths for every prompt, with near tokens as ends; one of them with `<eos>` alone."""
    near = near_ends(cases)
    asked = [(n, beams, near) for n in range(len(cases)) for beams in BEAMS]
    asked += [(n, BEAMS[n % len(BEAMS)], [EOS]) for n in range(len(cases))]
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
    torchs, torchs_score = oracle.beam_search(float32, *asked)
    with oracle.lifted():
        answer, score = oracle.beam_search(float64, *asked)
    return Search(prompt, beams, ends, answer, score, torchs, torchs_score)


def near_ends(cases: list[Case]) -> list[int]:
    """`<eos>`, and for each prompt tokens that are second, third and fourth at some greedy step."""
    found = [EOS]
    for case in cases:
        likely = np.argsort(-case.scores, axis=-1, kind="stable")
        found += [int(likely[step, place]) for step, place in NEAR if step < len(likely)]
    return list(dict.fromkeys(found))


def logits_off(case: Case) -> float:
    """By how much torch's float32 misses a logit of the greedy steps, at most."""
    truth = case.truth["language_model.logits"][len(case.ids) - 1 : -1]
    return float(np.max(np.abs(truth - case.scores)))
