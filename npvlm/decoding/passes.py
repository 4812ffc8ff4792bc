"""The two passes through the decoder: prefixes come first, then whatever stands behind them.

Axis letters: N sequences · T tokens in this call · D width of the decoder · V vocabulary · M image
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from npvlm.config import Config
from npvlm.errors import NpvlmError
from npvlm.model import paligemma
from npvlm.model.cache import LayerCache, Rows
from npvlm.model.ops import Index
from npvlm.model.tap import Tap
from npvlm.model.weights import Array, Weights, is_finite

# A score that the soft-cap leaves so near to its bound was eight times as large or more.
_SATURATED = 1 - 1e-6


def prefill(
    prompts: Sequence[Index],
    features: Array,
    starts: Sequence[int] | Index,
    cache: Sequence[LayerCache],
    w: Weights,
    config: Config,
    *,
    ops: ModuleType,
    tap: Tap,
) -> Array:
    """Read the prefixes of several sequences into the cache; score what may come behind each.

    Parameters
    ----------
    prompts : for each sequence its ids, image ids included
    features : image features [M, D] of all sequences, in their order
    starts : for each sequence the first of its rows of the cache

    Returns
    -------
    scores [N, V], after the soft-cap

    Raises
    ------
    NpvlmError
        Where the weights make scores that are no numbers.
    """
    lengths = [len(ids) for ids in prompts]
    x = paligemma.embed(np.concatenate(prompts), features, w, config, ops=ops, tap=tap)
    rows = Rows.pack([Rows.of(s, n, range(n)) for s, n in zip(starts, lengths, strict=False)])
    wanted = np.cumsum(lengths) - 1
    scores = paligemma.forward(x, w, config, cache, rows, wanted, ops=ops, tap=tap)
    return trusted(scores, w, config)


def extend(
    x: Array,
    rows: Rows,
    cache: Sequence[LayerCache],
    w: Weights,
    config: Config,
    *,
    ops: ModuleType,
    tap: Tap,
) -> Array:
    """Read tokens of answers into the cache; score what may come behind each of them.

    Errors are those of `prefill`.

    x [T, D] -> [T, V]
    """
    every = np.arange(len(x))
    scores = paligemma.forward(x, w, config, cache, rows, every, ops=ops, tap=tap)
    return trusted(scores, w, config)


def trusted(scores: Array, w: Weights, config: Config) -> Array:
    """The same scores, if they are numbers that finite weights can make. scores [...] -> [...]

    Weights are mapped, so nobody has looked at them before. inf and nan in one of them reach every
    score, but the soft-cap of Gemma 2 makes plain numbers of infinite ones: its own bounds. So the
    weights are searched where scores are no numbers, and where they lie at the bounds.

    Raises
    ------
    NpvlmError
        Naming the tensor that holds inf or nan; or for scores that overflow by themselves.
    """
    cap = config.text_config.final_logit_softcapping
    whole = bool(np.isfinite(scores).all())
    if whole and (cap is None or np.max(np.abs(scores), initial=0) < cap * _SATURATED):
        return scores
    for name, weight in w.items():
        if not is_finite(weight):
            raise NpvlmError(
                f"{name} holds inf or nan, expected numbers: the model's weights are damaged; copy "
                "them again."
            )
    if not whole:
        raise NpvlmError(
            "the model's scores are not finite, expected numbers, although its weights are; does "
            "config.json belong to them?"
        )
    return scores
