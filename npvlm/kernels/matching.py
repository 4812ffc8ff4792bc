"""Late interaction: the twin of `ops.max_sim`, which reads an index where it is mapped.

Axis letters: T rows of a query · I width of a vector · O vectors of all pages · N pages ·
S vectors of a page.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from npvlm.kernels.compiling import compiled, parallel
from npvlm.kernels.functions import bits, from_bits, in_order
from npvlm.kernels.inputs import pack
from npvlm.kernels.products import finish, stored, sum_block
from npvlm.kernels.tiles import MATCHED, WIDTH, best_tile
from npvlm.kernels.vectors import LANES, pointer, pointer_as, widen_lanes
from npvlm.model import ops
from npvlm.model.weights import Array, Int8, Weight

LEAST = np.int32(-(2**31))


def max_sim(q: Array, pages: Weight, size: int) -> Array:
    """Twin of ops.max_sim for float32 that never stores the products of more than a few vectors.

    A thread scores one page at a time. Each product has an order of its own, and of the products
    only the best is kept, so that a score depends on nothing but the query and the page.

    q [T, I], pages [O, I] -> [N]
    """
    scores = np.empty(len(pages) // size, np.float32)
    if q.dtype != np.float32 or q.shape[1] < LANES:
        return ops.max_sim(q, pages, size)
    if isinstance(pages, Int8):
        x = pack(q, pages)
        w, like, _, scales = stored(pages, x)
        _match_bytes(
            x.panels, len(q), x.height, x.steps, x.chunk, x.scales, x.offsets, like, w, scales,
            size, scores,
        )  # fmt: skip
        return scores
    if not isinstance(pages, np.ndarray) or pages.dtype not in (np.float32, np.float16):
        return ops.max_sim(q, pages, size)
    flat = np.ascontiguousarray(pages).reshape(-1).view(np.uint8)
    flat.flags.writeable = False
    like = np.empty(0, np.float32 if pages.dtype == np.float32 else np.int16)
    height = 1 if len(q) <= LANES else 2
    _match_floats(_side_by_side(q, height), len(q), height, like, flat, size, scores)
    return scores


def _side_by_side(q: Array, height: int) -> Array:
    """Queries as lanes, height x 16 at a time, the last filled up with zeros.

    q [T, I] -> [groups, I, height, 16]
    """
    filled = np.pad(q, ((0, -len(q) % (height * LANES)), (0, 0)))
    lanes = filled.reshape(-1, height, LANES, q.shape[1])
    return np.ascontiguousarray(lanes.transpose(0, 3, 1, 2))


@parallel
def _match_floats(x, T, height, like, w, size, scores):
    groups, width = x.shape[:2]
    for page in prange(len(scores)):
        best = np.full((groups, height * LANES), np.float32(-np.inf))
        wide = np.empty(MATCHED * width, np.float32)
        for first in range(page * size, (page + 1) * size, MATCHED):
            count = min(MATCHED, (page + 1) * size - first)
            if like.itemsize == 4:
                _match_some(x, height, pointer_as(w, x), first, count, best)
            else:
                _widen(w, like, first * width, count * width, wide)
                _match_some(x, height, pointer(wide, 0), 0, count, best)
        scores[page] = _sum(best.reshape(-1)[:T])
        wide[0] = 0  # numba frees an array behind its last use, and pointers are none


@compiled
def _match_some(x, height, vectors, first, count, best):
    """Hold all queries to a few vectors, `first` and following."""
    groups, width = x.shape[:2]
    for group in range(groups):
        queries = pointer(x, group * width * height * LANES)
        place, most = pointer(best, group * height * LANES), first + count - 1
        if height == 1:
            best_tile(queries, vectors, width, first, most, place, 1, MATCHED)
        else:
            best_tile(queries, vectors, width, first, most, place, 2, MATCHED)


@compiled
def _widen(w, like, start, count, wide):
    """Some float16 as float32; the last sixteen are taken from the end."""
    for at in range(0, count, LANES):
        place = min(at, count - LANES)
        widen_lanes(pointer_as(w[2 * (start + place) :], like), pointer(wide, place))


@parallel
def _match_bytes(x, T, height, steps, chunk, row_scales, offsets, like, w, scales, size, scores):
    tiles = -(-T // height)
    panel = len(x) // tiles
    for page in prange(len(scores)):
        beyond = (page + 1) * size
        sums = np.empty((tiles * height, WIDTH), np.int32)
        products, best = np.empty(WIDTH, np.float32), np.full(T, LEAST)
        for column in range(page * size, beyond, WIDTH):
            sum_block(x, panel, height, tiles, T, steps, chunk, offsets, w, like, w, column, sums)
            found = products[: min(WIDTH, beyond - column)]
            for i in range(T):
                finish(sums[i], row_scales, i, scales, column, found)
                best[i] = max(best[i], _most(found))
        tops = np.empty(T, np.float32)
        for i in range(T):
            tops[i] = from_bits(np.int32(in_order(best[i])))
        damaged = False
        for scale in scales[page * size : beyond]:  # a maximum of whole numbers overlooks nan
            damaged |= not abs(scale) < np.inf
        scores[page] = np.nan if damaged else _sum(tops)


@compiled
def _most(numbers):
    """The largest of some floats, as a whole number in their order: many are compared at a time."""
    most = LEAST
    for j in range(len(numbers)):
        most = max(most, in_order(bits(numbers[j])))
    return most


@compiled
def _sum(numbers):
    """Numbers added up in their order, in float64."""
    total = 0.0
    for number in numbers:
        total += np.float64(number)
    return total
