"""Linear layers: twins of `ops.linear`, `ops.gated` and `ops.patch_embed`.

Axis letters: T rows of inputs · O, I out and in features.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from npvlm.kernels.compiling import compiled, parallel
from npvlm.kernels.functions import gelu
from npvlm.kernels.inputs import NOTHING, Inputs, numbers_of, pack
from npvlm.kernels.tiles import COLUMNS, MIDDLE, TALL, WIDTH, add_tile
from npvlm.kernels.vectors import pointer, pointer_as
from npvlm.model import ops
from npvlm.model.tap import Tap
from npvlm.model.weights import Array, BFloat16, Int4, Int8, Weight, unpack

CHUNK = 4096  # bytes of a packed row that are summed before the sum is added to the others
ROWS = 192  # rows of inputs that share a block of weights while it is in the cache: 32 x 6, 48 x 4
NO_BYTES = np.empty((0, 0), np.uint8)
NO_BYTES.flags.writeable = False
NO_SCALES = np.empty(0, np.uint16)


def linear(x: Array, w: Weight, bias: Weight | None = None) -> Array:
    """Twin of ops.linear for float32: weights are widened in registers, straight from the file.

    x [T, I], w [O, I], bias [O] -> [T, O]
    """
    if x.dtype != np.float32:
        return ops.linear(x, w, bias)
    y = np.empty((len(x), len(w)), np.float32)
    flat = NOTHING if bias is None else np.ascontiguousarray(unpack(bias, np.float32))
    _multiply(pack(x, w), (w, w), flat, y, False)
    return y


def gated(x: Array, gate: Weight, up: Weight, *, tap: Tap) -> Array:
    """Twin of ops.gated that never stores the two wide products; it shows the tap nothing.

    x [T, I], gate [O, I], up [O, I] -> [T, O]
    """
    if x.dtype != np.float32 or not _are_alike(gate, up):
        return ops.gated(x, gate, up, tap=tap)
    y = np.empty((len(x), len(gate)), np.float32)
    _multiply(pack(x, gate), (gate, up), NOTHING, y, True)
    return y


def patch_embed(pixel_values: Array, w: Array | BFloat16, bias: Weight) -> Array:
    """Twin of ops.patch_embed.

    pixel_values [N, C, R, R], w [D, C, p, p], bias [D] -> [N, P, D]
    """
    (D, C, p, _), squares = w.shape, ops.squares(pixel_values, w.shape[-1])  # [N, P, I]
    flat = squares.reshape(-1, squares.shape[-1])
    return linear(flat, w.reshape(D, C * p * p), bias).reshape(*squares.shape[:2], D)


def _are_alike(w: Weight, other: Weight) -> bool:
    """Whether two weights are stored in the same form, so that one kernel can read both."""
    if isinstance(w, np.ndarray) and isinstance(other, np.ndarray):
        return w.dtype == other.dtype
    return type(w) is type(other)


def _stored(w: Weight, x: Inputs) -> tuple[Array, Array, Array, Array]:
    """The bytes of a weight, what its elements are, its group scales, and its row scales."""
    if isinstance(w, Int8):
        return _bytes(w.values), np.empty(0, np.int8), NO_BYTES, w.scales
    if isinstance(w, Int4):
        return _bytes(w.nibbles), np.empty(0, np.uint8), _bytes(w.scales), NOTHING
    values = numbers_of(w)
    if values.dtype == np.float16:
        values = values.view(np.int16)
    step = len(x.panels) // (x.steps * x.tiles * x.height)
    if values.shape[1] < step:
        values = np.pad(values, ((0, 0), (0, step - values.shape[1])))
    return _bytes(values), np.empty(0, values.dtype), NO_BYTES, NOTHING


def _bytes(values: Array) -> NDArray[np.uint8]:
    """An array [O, I] as bytes, which need no alignment."""
    flat = np.ascontiguousarray(values).view(np.uint8)
    flat.flags.writeable = False
    return flat


def _multiply(x: Inputs, weights: tuple[Weight, Weight], bias: Array, y: Array, gate: bool) -> None:
    """Write the products of packed rows with weights to y [T, O], of two weights if they gate."""
    w, like, groups, scales = _stored(weights[0], x)
    w2, _, groups2, scales2 = _stored(weights[1], x) if gate else (w, like, groups, scales)
    zero = np.empty(0, np.int32 if like.dtype == np.int8 else np.float32)
    _products(
        x.panels, x.height, x.steps, x.scales, x.offsets, like, w, groups, scales,
        w2, groups2, scales2, zero, bias, y, gate,
    )  # fmt: skip


@parallel
def _products(
    x, height, steps, row_scales, offsets, like, w, groups, scales,
    w2, groups2, scales2, zero, bias, y, gate,
):  # fmt: skip
    """One block of WIDTH columns and at most ROWS rows at a time, whose sums stay in the cache."""
    T, O = y.shape
    size = x.size // -(-T // height)  # elements of a packed tile
    parts = -(-T // ROWS)
    for item in prange(-(-O // WIDTH) * parts):
        column, row = item // parts * WIDTH, item % parts * ROWS
        rows, columns = min(ROWS, T - row), min(WIDTH, O - column)
        tiles = -(-rows // height)
        panels, start = x[row // height * size :], offsets[row:]
        sums = np.empty((tiles * height, WIDTH), zero.dtype)
        _sum_block(panels, size, height, tiles, steps, start, w, like, groups, column, sums)
        if gate:
            ups = np.empty((tiles * height, WIDTH), zero.dtype)
            _sum_block(panels, size, height, tiles, steps, start, w2, like, groups2, column, ups)
            for i in range(rows):
                for j in range(columns):
                    left = _scaled(sums[i, j], row_scales, row + i, scales, column + j)
                    right = _scaled(ups[i, j], row_scales, row + i, scales2, column + j)
                    y[row + i, column + j] = gelu(left) * right
        else:
            for i in range(rows):
                for j in range(columns):
                    value = _scaled(sums[i, j], row_scales, row + i, scales, column + j)
                    if len(bias):
                        value += bias[column + j]
                    y[row + i, column + j] = value


@compiled
def _scaled(total, row_scales, i, scales, j):
    """A sum as a float32, times the scales of its row and column where they have any."""
    value = np.float32(total)
    if len(row_scales):
        value *= row_scales[i] * scales[j] if len(scales) else row_scales[i]
    return value


@compiled
def _sum_block(panels, size, height, tiles, steps, offsets, w, like, groups, first, sums):
    """Sum the products of packed rows with rows `first` and following of w.

    Many tiles take a chunk of all the columns at a time, which stay in the cache for the next
    tile; one tile alone takes a few columns to their end, as they lie in memory. Either way a sum
    is made of the same chunks in the same order.
    """
    length, most = w.shape[1] // like.itemsize, w.shape[0] - 1
    weights, scales = pointer_as(w, like), pointer_as(groups, NO_SCALES)
    for i in range(len(sums)):
        start = -offsets[i] if i < len(offsets) else 0
        for j in range(WIDTH):
            sums[i, j] = start
    alone = 1 if panels.itemsize == 4 else COLUMNS  # what reads memory fastest for one row
    group = WIDTH if tiles > 1 else alone if height == 1 else COLUMNS
    chunk = CHUNK // (size // (steps * height) * panels.itemsize)
    for left in range(0, min(WIDTH, most + 1 - first), group):
        for begin in range(0, steps, chunk):
            end = min(begin + chunk, steps)
            for tile in range(tiles):
                x = pointer(panels, tile * size)
                for j in range(left, min(left + group, most + 1 - first), min(group, COLUMNS)):
                    at, place = first + j, pointer(sums, tile * height * WIDTH + j)
                    if height == TALL:
                        add_tile(
                            x, weights, length, length, scales, at, most, begin, end, place,
                            TALL, COLUMNS,
                        )  # fmt: skip
                    elif height == MIDDLE:
                        add_tile(
                            x, weights, length, length, scales, at, most, begin, end, place,
                            MIDDLE, COLUMNS,
                        )  # fmt: skip
                    elif alone == 1:
                        add_tile(
                            x, weights, length, length, scales, at, most, begin, end, place, 1, 1
                        )
                    else:
                        add_tile(
                            x, weights, length, length, scales, at, most, begin, end, place,
                            1, COLUMNS,
                        )  # fmt: skip
