"""What the decoder remembers, and where each token of a call stands in it.

Axis letters: T tokens in this call · C rows of the cache · K key/value heads · d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import DTypeLike

from npvlm.config import TextConfig
from npvlm.model.ops import Index
from npvlm.model.weights import Array


@dataclass(frozen=True)
class LayerCache:
    """The keys (already rotated) and values of one layer, one slab [C, K, d] each.

    Every sequence owns a run of rows in it, allocated once and filled in place.
    """

    keys: Array
    values: Array

    def write(self, slots: Index, k: Array, v: Array) -> tuple[Array, Array]:
        """Store the keys and values of new tokens; return the whole slabs.

        slots [T], k [T, K, d], v [T, K, d] -> [C, K, d], [C, K, d]
        """
        self.keys[slots] = k
        self.values[slots] = v
        return self.keys, self.values


def new_cache(config: TextConfig, rows: int, dtype: DTypeLike) -> list[LayerCache]:
    """Empty slabs for every layer, with room for `rows` tokens of all sequences together."""
    shape = (rows, config.num_key_value_heads, config.head_dim)
    return [
        LayerCache(np.zeros(shape, dtype), np.zeros(shape, dtype))
        for _ in range(config.num_hidden_layers)
    ]


def fork(cache: Sequence[LayerCache], start: int, forks: Sequence[int], tokens: range) -> None:
    """Copy the tokens numbered `tokens` of the sequence at row `start` to those at rows `forks`.

    A prefix that several answers share is computed once and copied, so that what a token of any of
    them sees is still one interval of rows.
    """
    for layer in cache:
        for slab in (layer.keys, layer.values):
            for fork in forks:
                slab[fork + tokens.start : fork + tokens.stop] = slab[
                    start + tokens.start : start + tokens.stop
                ]


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a call stand: all that attention and RoPE need to know of them.

    positions [T]  place in the sequence, counted from 1 as the reference implementation does
    slots [T]      row of the cache that the token's key and value go to
    start [T]      the first row of its sequence
    first [T], last [T]  the rows it sees: first, first + 1, ... last - 1
    prefix [T]     whether it belongs to the picture and prompt, which all see each other
    """

    positions: Index
    slots: Index
    start: Index
    first: Index
    last: Index
    prefix: np.ndarray

    @classmethod
    def of(cls, start: int, prefix: int, tokens: range) -> Rows:
        """The tokens numbered `tokens` of a sequence that owns the cache from row `start`.

        Its first `prefix` tokens see the whole prefix; each later one sees all before and itself.
        """
        number = np.arange(tokens.start, tokens.stop)
        return cls(
            positions=number + 1,
            slots=start + number,
            start=np.full(len(number), start),
            first=np.full(len(number), start),
            last=start + np.maximum(number + 1, prefix),
            prefix=number < prefix,
        )

    @classmethod
    def pack(cls, parts: Sequence[Rows]) -> Rows:
        """Several sequences end to end, with no padding between them."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def at(self, wanted: Index | slice) -> Rows:
        """Some of the tokens."""
        return Rows(*(getattr(self, f.name)[wanted] for f in fields(Rows)))

    def sliding(self, window: int | None) -> Rows:
        """The same tokens in a layer with a window: an answer token sees the last `window` rows.

        The prefix stays visible to itself as a whole, however long it is. None is no window.
        """
        if window is None:
            return self
        oldest = np.where(self.prefix, self.first, self.slots - window + 1)
        return replace(self, first=np.maximum(self.first, oldest))
