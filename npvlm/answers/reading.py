"""An answer read back in one pass: how likely the model finds each of its tokens.

Axis letters: A tokens of the answer · B tokens of the prompt · M image tokens · D width of the
decoder.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from npvlm.config import Config
from npvlm.decoding.passes import finite
from npvlm.model import gemma, paligemma
from npvlm.model.cache import Rows, new_cache
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
    *,
    ops: ModuleType,
    tap: Tap,
) -> NDArray[np.float64]:
    """Log-probabilities of the answer's tokens, each behind those before it.

    prompt [B], answer [A], features [M, D] -> [A]

    Raises
    ------
    NpvlmError
        Where the weights make scores that are no numbers.
    """
    text = w.scope("language_model")
    rows, wanted = answer_rows(len(prompt), len(answer))
    x = paligemma.embed(prompt, features, w, config, ops=ops, tap=tap)
    tail = gemma.embed(answer[:-1], text, config.text_config, features.dtype, ops=ops)
    x = np.concatenate([x, tail])
    cache = new_cache(config.text_config, len(x), x.dtype)
    scores = finite(paligemma.forward(x, w, config, cache, rows, wanted, ops=ops, tap=tap))
    pairs = zip(scores, answer, strict=True)  # [A, V], [A]
    return np.array([ops.log_softmax(row)[token] for row, token in pairs])
