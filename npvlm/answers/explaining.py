"""From what the tokens of an answer looked at, or need, to its words.

Axis letters: A tokens of the answer · P patches of the picture, a square of g x g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from npvlm.answers.explanation import Word
from npvlm.answers.words import split_words
from npvlm.decoding.prompt import Tokenizer

# A word's heat from its tokens': attention is shared out among patches, what odds fall by adds up.
TOGETHER: dict[str, Callable[..., NDArray[np.float64]]] = {
    "attention": np.mean,
    "occlusion": np.sum,
}


def words_of(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    logprobs: NDArray[np.float64],
    heats: NDArray[np.float64],
    method: str,
) -> list[Word]:
    """The words of an answer, each with the heat of its tokens together.

    logprobs [A], heats [A, P]
    """
    side = math.isqrt(heats.shape[1])
    words = []
    for span in split_words(tokenizer, ids):
        tokens = slice(span.start, span.stop)
        heat = TOGETHER[method](heats[tokens], axis=0).reshape(side, side)
        probability = math.exp(min(0.0, float(logprobs[tokens].sum())))
        words.append(Word(span.text, list(ids[tokens]), probability, heat))
    return words
