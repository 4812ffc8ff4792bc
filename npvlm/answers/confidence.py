"""How sure the model was of a part of its answer, such as a box and its label.

The exact location token out of 1,024 is seldom likely, even where the model is sure of a place: its
neighbours share the chance. So a location counts with all those that lie within a hundredth of the
picture's side, which nobody would call another place.

Axis letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from npvlm.decoding.prompt import TextStream, Tokenizer
from npvlm.model.weights import Array

Span = tuple[int, int]

NEAR = 10  # locations on each side, of 1,024
_FIRST, _LAST = "<loc0000>", "<loc1023>"


class PlaceWatch:
    """Chooses a token as another chooser does, and notes how likely its neighbours made it.

    gains : for each chosen token what its log-probability grows by when locations near to it count,
        too; 0 for a token that is no location
    """

    def __init__(self, choose: Callable[[Array], int], tokenizer: Tokenizer) -> None:
        self._choose = choose
        self._places = locations(tokenizer)
        self.gains: list[float] = []

    def __call__(self, logits: Array) -> int:
        """The id of the next token.

        logits [V] -> an id below V
        """
        chosen = self._choose(logits)
        self.gains.append(nearby_gain(logits, chosen, self._places))
        return chosen


def nearby_gain(logits: Array, chosen: int, places: range) -> float:
    """What a token's log-probability grows by when places near to it count, too.

    logits [V]
    """
    if chosen not in places:
        return 0.0
    first, last = max(places.start, chosen - NEAR), min(places.stop, chosen + NEAR + 1)
    near = logits[first:last].astype(np.float64)
    return math.log(np.exp(near - float(logits[chosen])).sum())


def locations(tokenizer: Tokenizer) -> range:
    """The ids of the location tokens, if there are those and in a row."""
    first, last = tokenizer.encode(_FIRST), tokenizer.encode(_LAST)
    in_a_row = len(first) == len(last) == 1 and last[0] - first[0] == 1023
    return range(first[0], last[0] + 1) if in_a_row else range(0)


def token_spans(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Span]:
    """The characters of the answer's text that each token wrote, first and one past the last.

    Tokens that spell one character together share it; special tokens write nothing.
    """
    stream, spans = TextStream(tokenizer), []
    at, waiting = 0, 0
    for token in ids:
        waiting += 1
        if text := stream.add(token):
            spans += [(at, at + len(text))] * waiting
            at, waiting = at + len(text), 0
    return spans + [(at, at + len(stream.finish()))] * waiting


def confidence(parts: Sequence[Span], spans: Sequence[Span], logprobs: Sequence[float]) -> float:
    """How likely the model thought parts of its answer: the product of their tokens' chances.

    spans and logprobs are those of all its tokens.
    """
    own = [
        logprob
        for (first, last), logprob in zip(spans, logprobs, strict=True)
        if any(first < end and start < last for start, end in parts)
    ]
    return math.exp(min(0.0, math.fsum(own)))
