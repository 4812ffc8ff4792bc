"""The loop: read the prefixes of several sequences together, then write them token by token.

Axis letters: T tokens in this call · D width of the decoder · V vocabulary · M image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from npvlm.config import Config
from npvlm.decoding.passes import extend, prefill, trusted
from npvlm.model import gemma, paligemma
from npvlm.model.cache import Rows, new_cache
from npvlm.model.ops import Index
from npvlm.model.tap import Tap
from npvlm.model.weights import Array, Weights


@dataclass(frozen=True)
class Token:
    """A generated token: whose it is, its id, and the log-probability the model gave it."""

    sequence: int
    id: int
    logprob: float


def generate(
    prompts: Sequence[Index],
    features: Array,
    w: Weights,
    config: Config,
    choosers: Sequence[Callable[[Array], int]],
    max_tokens: Sequence[int],
    *,
    ops: ModuleType,
    tap: Tap,
) -> Iterator[list[Token]]:
    """Yield the next token of every unfinished sequence, one step at a time.

    Sequences of any lengths are packed end to end; each keeps its own rows of the cache.

    Parameters
    ----------
    prompts : for each sequence its ids [T], image ids included
    features : image features [M, D] of all sequences, in their order
    choosers : for each sequence a function from logits [V] to an id
    max_tokens : for each sequence, at least 1; it ends there or with one of config.eos_token_ids

    Raises
    ------
    NpvlmError
        Where the weights make scores that are no numbers.
    """
    lengths = [len(ids) for ids in prompts]
    rows_of = [n + m - 1 for n, m in zip(lengths, max_tokens, strict=True)]
    starts = np.cumsum([0, *rows_of])  # the last token is not read
    cache = new_cache(config.text_config, int(starts[-1]), features.dtype)
    text = w.scope("language_model")

    scores = prefill(prompts, features, starts, cache, w, config, ops=ops, tap=tap)  # [live, V]
    live = list(range(len(prompts)))

    for step in range(max(max_tokens)):
        tokens = []
        for i, row in zip(live, scores, strict=True):
            chosen = choosers[i](row)
            tokens.append(Token(i, chosen, float(ops.log_softmax(row)[chosen])))
        yield tokens

        tokens = [
            token
            for token in tokens
            if token.id not in config.eos_token_ids and step + 1 < max_tokens[token.sequence]
        ]
        if not tokens:
            return
        live = [token.sequence for token in tokens]
        ids = np.array([token.id for token in tokens])
        x = gemma.embed(ids, text, config.text_config, features.dtype, ops=ops)
        at = [lengths[i] + step for i in live]
        rows = Rows.pack(
            [Rows.of(starts[i], lengths[i], range(n, n + 1)) for i, n in zip(live, at, strict=True)]
        )
        scores = extend(x, rows, cache, w, config, ops=ops, tap=tap)


def logits(
    prompt: Index,
    answer: Index,
    features: Array,
    w: Weights,
    config: Config,
    *,
    ops: ModuleType,
    tap: Tap,
    first: int = 0,
) -> Array:
    """Score a whole sequence in one pass: a row for each token from `first` on, of what may follow.

    prompt [A], answer [B], features [M, D] -> [T, V]

    Raises
    ------
    NpvlmError
        Where the weights make scores that are no numbers.
    """
    x = paligemma.embed(prompt, features, w, config, ops=ops, tap=tap)
    text = w.scope("language_model")
    tail = gemma.embed(answer, text, config.text_config, features.dtype, ops=ops)
    x = np.concatenate([x, tail])
    cache = new_cache(config.text_config, len(x), x.dtype)
    rows = Rows.of(0, len(prompt), range(len(x)))
    wanted = np.arange(first, len(x))
    scores = paligemma.forward(x, w, config, cache, rows, wanted, ops=ops, tap=tap)
    return trusted(scores, w, config)
