"""How probable given answers are: the prefix is read once, whatever the number of answers.

Axis letters: T tokens of an answer · D width of the decoder · V vocabulary · M image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from npvlm.config import Config
from npvlm.decoding.passes import extend, prefill
from npvlm.model import gemma
from npvlm.model.cache import Rows, fork, new_cache
from npvlm.model.ops import Index
from npvlm.model.tap import Tap
from npvlm.model.weights import Array, Weights

# What answers that are read together may take: each has a copy of the prefix in the cache, and
# each of their tokens a score for every entry of the vocabulary.
PACKED_ROWS, PACKED_TOKENS = 4096, 256


def score(
    prompt: Index,
    answers: Sequence[Index],
    features: Array,
    w: Weights,
    config: Config,
    *,
    ops: ModuleType,
    tap: Tap,
) -> list[NDArray[np.float64]]:
    """The log-probability of each token of each answer, behind one prompt.

    An answer is complete with the id that ends it: without one, "1" could not lose to "12".

    Parameters
    ----------
    prompt : ids of the prefix, image ids included
    answers : one or more, each of at least one id
    features : image features [M, D]

    Returns
    -------
    for each answer [T], float64

    Raises
    ------
    NpvlmError
        Where the weights make scores that are no numbers.
    """
    prefix = len(prompt)
    width = prefix + max(map(len, answers)) - 1  # the last token is not read
    packs = list(_packs(answers, width))
    runs = [i * width for i in range(max(map(len, packs)))]
    cache = new_cache(config.text_config, width * len(runs), features.dtype)
    text = w.scope("language_model")
    [first] = prefill([prompt], features, [0], cache, w, config, ops=ops, tap=tap)  # [V]
    fork(cache, 0, runs[1:], range(prefix))

    # An answer of one token needs no pass, as what comes first is known.
    firsts = ops.log_softmax(first)
    scored: list[NDArray[np.float64]] = []
    for pack in packs:
        ids = np.concatenate([answer[:-1] for answer in pack])
        rows = Rows.pack(
            [
                Rows.of(run, prefix, range(prefix, prefix + len(answer) - 1))
                for run, answer in zip(runs, pack, strict=False)
            ]
        )
        x = gemma.embed(ids, text, config.text_config, features.dtype, ops=ops)
        scores = extend(x, rows, cache, w, config, ops=ops, tap=tap) if len(x) else x
        behind = iter(scores)
        for answer in pack:
            later = [ops.log_softmax(next(behind))[i] for i in answer[1:]]
            scored.append(np.array([firsts[answer[0]], *later]))
    return scored


def _packs(answers: Sequence[Index], width: int) -> Iterator[list[Index]]:
    """Neighbours that fit together; one alone may be longer."""
    pack: list[Index] = []
    for answer in answers:
        tokens = sum(len(a) for a in [*pack, answer])
        if pack and (width * (len(pack) + 1) > PACKED_ROWS or tokens > PACKED_TOKENS):
            yield pack
            pack = []
        pack.append(answer)
    yield pack
