"""Attention: the twin of `ops.attend`, which never stores the scores of more than a block of keys.

Axis letters: T tokens in this call · S rows of the cache · H query heads · K key/value heads ·
d width of a head.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from npvlm.kernels.compiling import compiled, parallel
from npvlm.kernels.functions import bits, exp, from_bits, in_order, tanh
from npvlm.kernels.products import NO_SCALES
from npvlm.kernels.tiles import COLUMNS, MIDDLE, TALL, WIDTH, add_tile, mix_tile
from npvlm.kernels.vectors import LANES, pointer
from npvlm.model import ops
from npvlm.model.ops import Index
from npvlm.model.weights import Array

QUERIES = 48  # rows (a token and a head) that share a block of keys while it is in the cache
HEADS = 4  # of a group, that are taken together: the rest may go to another thread
NEVER, LEAST = np.float32(-np.inf), -(2**31)


def attend(
    q: Array,
    k: Array,
    v: Array,
    start: Index,
    first: Index,
    last: Index,
    scale: float,
    cap: float | None = None,
) -> Array:
    """Twin of ops.attend for float32 that never stores the scores.

    Keys are walked in blocks of WIDTH, counted from the beginning of a token's own sequence, with a
    running maximum: what is summed up so far shrinks whenever a larger score appears. A row's
    result therefore depends on that row and on the keys it sees, and on nothing beside them.

    q [T, H, d], k [S, K, d], v [S, K, d], start [T], first [T], last [T] -> [T, H, d]
    Source: online softmax, arXiv 1805.02867; blocks of keys, arXiv 2205.14135.
    """
    if q.dtype != np.float32:
        return ops.attend(q, k, v, start, first, last, scale, cap)
    d = q.shape[-1]
    if d < LANES:
        q, k, v = (np.pad(a, ((0, 0), (0, 0), (0, LANES - d))) for a in (q, k, v))
    q, k, v = (np.ascontiguousarray(a) for a in (q, k, v))
    mixed = np.empty_like(q)
    sees = np.stack([start, first, last], axis=1)
    _attend(q, k, v, sees, np.float32(scale), np.float32(cap or 0), mixed)
    return mixed[..., :d]


@parallel
def _attend(q, k, v, sees, scale, cap, mixed):
    H, K = q.shape[1], k.shape[1]
    G = H // K
    parts = -(-G // HEADS)
    most = max(1, QUERIES // min(G, HEADS))
    runs = _runs(sees, most)
    for item in prange(len(runs) * K * parts):
        run, head = item // (K * parts), item % (K * parts)
        tokens = runs[run, 1] - runs[run, 0]
        first = head % parts * HEADS
        heads = min(HEADS, G - first)
        _attend_run(
            q, k, v, sees, scale, cap, mixed, runs[run, 0], tokens, head // parts, first, heads
        )


@compiled
def _runs(sees, most):
    """Split the tokens into runs [first, beyond the last] of one sequence, `most` at a time."""
    runs = np.empty((len(sees), 2), np.int64)
    count = begin = 0
    for t in range(1, len(sees) + 1):
        if t == len(sees) or t - begin == most or sees[t, 0] != sees[begin, 0]:
            runs[count, 0], runs[count, 1] = begin, t
            count, begin = count + 1, t
    return runs[:count]


@compiled
def _attend_run(q, k, v, sees, scale, cap, mixed, token, tokens, group, first, heads):
    """Attend with `heads` query heads of a group, for some tokens of one sequence."""
    H, d = q.shape[1:]
    K = k.shape[1]
    rows, steps = tokens * heads, -(-d // LANES)
    height = MIDDLE if rows <= MIDDLE else TALL
    tiles, size, stride = -(-rows // height), steps * LANES, K * d
    head = group * (H // K) + first

    panels = np.zeros((tiles, steps, height, LANES), np.float32)
    for row in range(rows):
        query = q[token + row // heads, head + row % heads]
        for step in range(steps):
            at = min(step * LANES, d - LANES)
            for lane in range(step * LANES - at, LANES):
                panels[row // height, step, row % height, lane] = query[at + lane]

    begins, ends = sees[token : token + tokens, 1], sees[token : token + tokens, 2]
    begin, end, start = begins.min(), ends.max(), sees[token, 0]
    largest = np.full(tiles * height, NEVER, np.float32)
    totals = np.zeros((tiles * height, LANES), np.float32)
    sums = np.zeros((tiles * height, size), np.float32)
    weights = np.empty((height, WIDTH), np.float32)

    block = start + (begin - start) // WIDTH * WIDTH
    while block < end:
        left, right = max(begin - block, 0), min(end - block, WIDTH)
        for tile in range(tiles):
            weights[:] = 0
            panel = pointer(panels, tile * height * size)
            _score(panel, height, pointer(k, group * d), stride, d, block, left, right, weights)
            for i in range(min(height, rows - tile * height)):
                row = tile * height + i
                seen = row // heads
                own_begin, own_end = max(begins[seen], block), min(ends[seen], block + WIDTH)
                if own_begin < own_end:
                    _soften(
                        weights, i, own_begin - block, own_end - block, scale, cap,
                        largest, totals, sums, row,
                    )  # fmt: skip
                else:
                    weights[i] = 0
            place = pointer(sums, tile * height * size)
            _mix(
                pointer(weights, 0), height, pointer(v, block * stride + group * d), stride, d,
                left, right, place, size,
            )  # fmt: skip
        block += WIDTH

    for row in range(rows):
        total = _tree(totals[row])
        out = mixed[token + row // heads, head + row % heads]
        for step in range(steps):
            at = min(step * LANES, d - LANES)
            for lane in range(step * LANES - at, LANES):
                out[at + lane] = sums[row, step * LANES + lane] / total


@compiled
def _score(panel, height, keys, stride, d, block, left, right, weights):
    """Multiply packed queries with the keys `left` to `right` of a block."""
    steps, most = -(-d // LANES), block + right - 1
    for j in range(left // COLUMNS * COLUMNS, right, COLUMNS):
        place, at, none = pointer(weights, j), block + j, pointer(NO_SCALES, 0)
        if height == TALL:
            add_tile(panel, keys, stride, d, none, at, most, 0, steps, place, TALL, COLUMNS)
        else:
            add_tile(panel, keys, stride, d, none, at, most, 0, steps, place, MIDDLE, COLUMNS)


@compiled
def _mix(weights, height, values, stride, d, left, right, sums, size):
    """Add the values `left` to `right` of a block to sums [height, size], weighed."""
    at = 0
    while at < size:
        wide = size - at >= COLUMNS * LANES
        if height == TALL:
            if wide:
                mix_tile(weights, values, stride, d, left, right, sums, size, at, TALL, COLUMNS)
            else:
                mix_tile(weights, values, stride, d, left, right, sums, size, at, TALL, 1)
        elif wide:
            mix_tile(weights, values, stride, d, left, right, sums, size, at, MIDDLE, COLUMNS)
        else:
            mix_tile(weights, values, stride, d, left, right, sums, size, at, MIDDLE, 1)
        at += COLUMNS * LANES if wide else LANES


@compiled
def _soften(weights, i, begin, end, scale, cap, largest, totals, sums, row):
    """Turn the scores of a block into weights; what was summed before shrinks to match.

    Entries outside begin to end get exactly zero.
    """
    for j in range(WIDTH):
        weights[i, j] *= scale
    if cap > 0:
        for j in range(WIDTH):
            weights[i, j] = cap * tanh(weights[i, j] / cap)
    for j in range(begin):
        weights[i, j] = NEVER
    for j in range(end, WIDTH):
        weights[i, j] = NEVER

    most = np.int32(LEAST)
    for j in range(WIDTH):
        most = max(most, in_order(bits(weights[i, j])))
    best = from_bits(np.int32(in_order(np.int32(most))))
    if best > largest[row]:
        shrunk = exp(largest[row] - best)
        largest[row] = best
        for lane in range(LANES):
            totals[row, lane] *= shrunk
        for lane in range(sums.shape[1]):
            sums[row, lane] *= shrunk
    best = largest[row]
    for j in range(WIDTH):
        weights[i, j] = exp(weights[i, j] - best)
    for lane in range(LANES):
        total = totals[row, lane]
        for j in range(0, WIDTH, LANES):
            total += weights[i, j + lane]
        totals[row, lane] = total


@compiled
def _tree(values):
    """Add up sixteen lanes: i and i + 8, then i + 4, i + 2, i + 1."""
    half = LANES // 2
    while half:
        for lane in range(half):
            values[lane] += values[lane + half]
        half //= 2
    return values[0]
