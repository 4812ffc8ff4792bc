"""Late interaction: the twin of `ops.max_sim`, which reads an index where it is mapped.

Axis letters: T rows of a query · I width of a vector · O vectors of all pages · N pages.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from npvlm.kernels.compiling import compiled, parallel
from npvlm.kernels.functions import bits, from_bits, in_order
from npvlm.kernels.inputs import pack
from npvlm.kernels.products import finish, stored, sum_block
from npvlm.kernels.tiles import WIDTH
from npvlm.model import ops
from npvlm.model.weights import Array, Weight

LEAST, SIZE = np.int32(-(2**31)), np.int32(0x7FFFFFFF)  # below all; all bits but the sign
INFINITE = np.int32(0x7F800000)  # from these bits on, a float is inf or nan


def max_sim(q: Array, pages: Weight, size: int) -> Array:
    """Twin of ops.max_sim for float32 that never stores the products of more than a few vectors.

    A thread scores one page at a time, its products in blocks that are counted from its first
    vector, so that a score depends on nothing but the query and the page.

    q [T, I], pages [O, I] -> [N]
    """
    if q.dtype != np.float32:
        return ops.max_sim(q, pages, size)
    scores = np.empty(len(pages) // size, np.float32)
    x = pack(q, pages)
    w, like, groups, scales = stored(pages, x)
    zero = np.empty(0, np.int32 if like.dtype == np.int8 else np.float32)
    _max_sim(
        x.panels, len(q), x.height, x.steps, x.chunk, x.scales, x.offsets, like, w, groups, scales,
        zero, size, scores,
    )  # fmt: skip
    return scores


@parallel
def _max_sim(
    x, T, height, steps, chunk, row_scales, offsets, like, w, groups, scales, zero, size, scores
):
    tiles = -(-T // height)
    for page in prange(len(scores)):
        first, beyond = page * size, (page + 1) * size
        sums = np.empty((tiles * height, WIDTH), zero.dtype)
        products = np.empty(WIDTH, np.float32)
        best, furthest = np.full(T, LEAST), np.int32(0)
        for column in range(first, beyond, WIDTH):
            sum_block(
                x, len(x) // tiles, height, tiles, steps, chunk, offsets, w, like, groups, column,
                sums,
            )  # fmt: skip
            found = products[: min(WIDTH, beyond - column)]
            for i in range(T):
                finish(sums[i], row_scales, i, scales, column, found)
                most, size_of_most = _most(found)
                best[i] = max(best[i], most)
                furthest = max(furthest, size_of_most)
        total = 0.0
        for i in range(T):
            total += np.float64(from_bits(np.int32(in_order(best[i]))))
        scores[page] = total if furthest < INFINITE else np.nan


@compiled
def _most(numbers):
    """The largest of some floats, as a whole number in their order; and the bits furthest from 0.

    Whole numbers are compared many at a time; and nan, which no maximum of floats can be trusted
    with, is the furthest of all.
    """
    most, furthest = LEAST, np.int32(0)
    for j in range(len(numbers)):
        n = bits(numbers[j])
        most = max(most, in_order(n))
        furthest = max(furthest, n & SIZE)
    return most, furthest
