"""Given answers and how probable the model finds each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from npvlm.answers.lines import json_line
from npvlm.errors import UsageError

RANKINGS = ("total", "mean")


@dataclass(frozen=True)
class Candidate:
    """One given answer.

    text : as it was given
    token_ids : its tokens, and the `<eos>` that completes it
    logprobs : for each of them the natural logarithm of the model's own probability
    total : their sum, the log-probability of the answer
    mean : per token, which a longer answer is not worse for; what beams are ranked by
    share : its probability among the answers given, e**total over the sum of all; an answer that
        is given twice counts twice
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    total: float
    mean: float
    share: float


@dataclass(frozen=True)
class Scores:
    """How probable given answers to a prompt about a picture (or several at once) are.

    image : the picture as it was given, a list where one was given
    prompt : as it was given
    candidates : the answers, in the order given
    prompt_token_ids : everything the decoder read before an answer, image ids included
    model : the model as it was named
    precision : "float32", "bfloat16", "int8" or "int4"
    """

    image: str | list[str]
    prompt: str
    candidates: list[Candidate]
    prompt_token_ids: list[int]
    model: str
    precision: str

    def ranked(self, by: str = "total") -> list[Candidate]:
        """The candidates, likeliest first, by "total" or "mean"; of equals the first given.

        Raises
        ------
        UsageError
            For any other word.
        """
        if by not in RANKINGS:
            raise UsageError(f"by is {by!r}, expected {' or '.join(map(repr, RANKINGS))}.")
        return sorted(self.candidates, key=lambda c: -getattr(c, by))

    def to_json(self) -> str:
        """One line of JSON with these fields, from which every number reads back the same."""
        return json_line(asdict(self))


def candidates(
    texts: Sequence[str], ids: Sequence[list[int]], logprobs: Sequence[list[float]]
) -> list[Candidate]:
    """Sum up what the tokens of each answer have, an `<eos>` at least."""
    totals = [math.fsum(own) for own in logprobs]
    weights = [math.exp(total - max(totals)) for total in totals]
    return [
        Candidate(text, own_ids, own, total, total / len(own), weight / math.fsum(weights))
        for text, own_ids, own, total, weight in zip(
            texts, ids, logprobs, totals, weights, strict=True
        )
    ]
