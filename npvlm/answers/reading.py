"""An answer read back in one pass: how likely the model finds each of its tokens.

Axis letters: A tokens of the answer · B tokens of the prompt · M image tokens · D width of the
decoder.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from npvlm.answers.confidence import nearby_gain
from npvlm.config import Config
from npvlm.decoding.generate import logits
from npvlm.model.cache import Rows
from npvlm.model.ops import Index
from npvlm.model.tap import Tap
from npvlm.model.weights import Array, Weights


def answer_rows(prompt: int, answer: int) -> tuple[Rows, Index]:
    """Where the tokens that are read stand, and which of them predict the answer's tokens.

    The token before each one predicts it; the last token of the answer predicts nothing here, and
    is not read.
    """
    length = prompt + answer - 1
    return Rows.of(0, prompt, range(length)), np.arange(prompt - 1, length)


def read_answer(
    prompt: Index,
    answer: Index,
    features: Array,
    w: Weights,
    config: Config,
    places: range,
    *,
    ops: ModuleType,
    tap: Tap,
) -> NDArray[np.float64]:
    """Log-probabilities of the answer's tokens, each behind those before it.

    One that is among `places`, the ids of locations, counts with those near to it.

    prompt [B], answer [A], features [M, D] -> [A]

    Raises
    ------
    NpvlmError
        Where the weights make scores that are no numbers.
    """
    first = len(prompt) - 1
    scores = logits(prompt, answer[:-1], features, w, config, ops=ops, tap=tap, first=first)
    return np.array(
        [
            float(ops.log_softmax(row)[token]) + nearby_gain(row, token, places)
            for row, token in zip(scores, answer, strict=True)  # [A, V], [A]
        ]
    )
