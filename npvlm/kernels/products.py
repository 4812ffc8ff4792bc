"""Linear layers: twins of `ops.linear`, `ops.gated`, `ops.patch_embed` and `ops.embed`.

Axis letters: T rows of inputs · O, I out and in features · V vocabulary · D width.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads, prange
from numpy.typing import DTypeLike, NDArray

from npvlm.kernels.compiling import compiled, parallel
from npvlm.kernels.corrections import Correction, add_correction, lay_out, sum_correction
from npvlm.kernels.elementwise import gelu_tanh
from npvlm.kernels.functions import gelu
from npvlm.kernels.inputs import NOTHING, Inputs, numbers_of, pack
from npvlm.kernels.matrices import SIDE, UNIT, add_squares, takes
from npvlm.kernels.tiles import COLUMNS, MIDDLE, TALL, WIDTH, add_tile
from npvlm.kernels.vectors import pointer, pointer_as
from npvlm.model import ops
from npvlm.model.ops import Index
from npvlm.model.tap import Tap
from npvlm.model.weights import Adapted, Array, Bare, BFloat16, Int4, Int8, Weight, unpack

SHARES = 4  # blocks of columns for each thread where there is one row: the fewer, the faster
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
    y, base = np.empty((len(x), len(w)), np.float32), _bare(w)
    flat = NOTHING if bias is None else np.ascontiguousarray(unpack(bias, np.float32))
    packed = pack(x, base, takes(base, len(x)))
    _multiply(packed, (base, base), (_correction(x, w), None), flat, y, False)
    return y


def gated(x: Array, gate: Weight, up: Weight, *, tap: Tap) -> Array:
    """Twin of ops.gated that never stores the two wide products; it shows the tap nothing.

    x [T, I], gate [O, I], up [O, I] -> [T, O]
    """
    if x.dtype != np.float32:
        return ops.gated(x, gate, up, tap=tap)
    weights = _bare(gate), _bare(up)
    if not _are_alike(*weights):
        return gelu_tanh(linear(x, gate)) * linear(x, up)
    y = np.empty((len(x), len(gate)), np.float32)
    packed = pack(x, weights[0], takes(weights[0], len(x)))
    _multiply(packed, weights, (_correction(x, gate), _correction(x, up)), NOTHING, y, True)
    return y


def patch_embed(pixel_values: Array, w: Array | BFloat16 | Adapted, bias: Weight) -> Array:
    """Twin of ops.patch_embed.

    pixel_values [N, C, R, R], w [D, C, p, p], bias [D] -> [N, P, D]
    """
    (D, C, p, _), squares = w.shape, ops.squares(pixel_values, w.shape[-1])  # [N, P, I]
    flat = squares.reshape(-1, squares.shape[-1])
    return linear(flat, w.reshape(D, C * p * p), bias).reshape(*squares.shape[:2], D)


def embed(ids: Index, table: Weight, scale: float, dtype: DTypeLike) -> Array:
    """Twin of ops.embed whose rows have the same bits in any company, corrected ones too.

    ids [T], table [V, D] -> [T, D]
    """
    if not isinstance(table, Adapted) or dtype != np.float32:
        return ops.embed(ids, table, scale, dtype)
    x = ops.embed(ids, table.base, scale, dtype)
    x += linear(table.up[ids] * (scale * table.scale), table.down.T)
    if table.gain is not None:
        x *= table.gain[ids, None]
    return x


def _bare(w: Weight) -> Bare:
    return w.base if isinstance(w, Adapted) else w


def _correction(x: Array, w: Weight) -> Correction | None:
    """What stands beside a weight, made ready for the products with x."""
    if not isinstance(w, Adapted):
        return None
    return lay_out(linear(x, w.down) * np.float32(w.scale), w)


def _are_alike(w: Bare, other: Bare) -> bool:
    """Whether two weights are stored in the same form, so that one kernel can read both."""
    if isinstance(w, np.ndarray) and isinstance(other, np.ndarray):
        return w.dtype == other.dtype
    return type(w) is type(other)


def stored(w: Bare, x: Inputs) -> tuple[Array, Array, Array, Array]:
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


def _multiply(
    x: Inputs,
    weights: tuple[Bare, Bare],
    corrections: tuple[Correction | None, Correction | None],
    bias: Array,
    y: Array,
    gate: bool,
) -> None:
    """Write the products of packed rows with weights to y [T, O], of two weights if they gate."""
    w, like, groups, scales = stored(weights[0], x)
    w2, _, groups2, scales2 = stored(weights[1], x) if gate else (w, like, groups, scales)
    zero = np.empty(0, np.int32 if like.dtype == np.int8 else np.float32)
    O, shares = y.shape[1], SHARES * get_num_threads()
    width = -(-O // (WIDTH * shares)) * WIDTH if x.height == 1 else WIDTH
    _products(
        x.panels, x.height, x.steps, x.chunk, x.scales, x.offsets, like, w, groups, scales,
        w2, groups2, scales2, *corrections, zero, width, bias, y, gate,
    )  # fmt: skip


@parallel
def _products(
    x, height, steps, chunk, row_scales, offsets, like, w, groups, scales,
    w2, groups2, scales2, correction, correction2, zero, width, bias, y, gate,
):  # fmt: skip
    """One block of `width` columns and at most ROWS rows at a time: its sums stay in the cache."""
    T, O = y.shape
    size = x.size // -(-T // height)  # elements of a packed tile
    parts = -(-T // ROWS)
    for item in prange(-(-O // width) * parts):
        column, row = item // parts * width, item % parts * ROWS
        rows, columns = min(ROWS, T - row), min(width, O - column)
        tiles = -(-rows // height)
        panels, start = x[row // height * size :], offsets[row:]
        sums = np.empty((tiles * height, width), zero.dtype)
        sum_block(
            panels, size, height, tiles, rows, steps, chunk, start, w, like, groups, column, sums
        )
        if gate:
            ups = np.empty((tiles * height, width), zero.dtype)
            sum_block(
                panels, size, height, tiles, rows, steps, chunk, start, w2, like, groups2, column,
                ups,
            )  # fmt: skip
            other = np.empty(columns, np.float32)
        if correction is not None:
            added = sum_correction(correction, row, rows, column, width)
        if correction2 is not None:
            added2 = sum_correction(correction2, row, rows, column, width)
        for i in range(rows):
            to = y[row + i, column : column + columns]
            finish(sums[i], row_scales, row + i, scales, column, to)
            if correction is not None:
                add_correction(added[i], correction, column, to)
            if gate:
                finish(ups[i], row_scales, row + i, scales2, column, other)
                if correction2 is not None:
                    add_correction(added2[i], correction2, column, other)
                for j in range(columns):
                    to[j] = gelu(to[j]) * other[j]
            elif len(bias):
                for j in range(columns):
                    to[j] += bias[column + j]


@compiled
def finish(sums, row_scales, i, scales, column, to):
    """Sums of row i as float32, times the scales of their row and columns where they have any."""
    if len(scales):
        for j in range(len(to)):
            to[j] = np.float32(sums[j]) * (row_scales[i] * scales[column + j])
    elif len(row_scales):
        for j in range(len(to)):
            to[j] = sums[j] * row_scales[i]
    else:
        for j in range(len(to)):
            to[j] = sums[j]


@compiled
def sum_block(
    panels, size, height, tiles, rows, steps, chunk, offsets, w, like, groups, first, sums
):
    """Sum the products of packed rows with rows `first` and following of w.

    Many tiles take a chunk of all the columns at a time, which stay in the cache for the next
    tile; one tile alone takes a few columns to their end, as they lie in memory. Either way a sum
    is made of the same chunks in the same order.
    """
    length, most = w.shape[1] // like.itemsize, w.shape[0] - 1
    weights, scales = pointer_as(w, like), pointer_as(groups, NO_SCALES)
    for i in range(len(sums)):
        sums[i, :] = -offsets[i] if i < len(offsets) else 0
    if UNIT:  # noqa: SIM102 (numba leaves out what a constant rules out, not what `and` does)
        if height == SIDE:
            add_squares(panels, size, tiles, steps, rows, w, first, sums)
            return
    width = sums.shape[1]
    columns = 1 if height == 1 else COLUMNS  # one row reads memory fastest one column at a time
    group = width if tiles > 1 else columns
    for left in range(0, min(width, most + 1 - first), group):
        for begin in range(0, steps, chunk):
            end = min(begin + chunk, steps)
            for tile in range(tiles):
                x = pointer(panels, tile * size)
                for j in range(left, min(left + group, most + 1 - first), columns):
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
                    else:
                        add_tile(
                            x, weights, length, length, scales, at, most, begin, end, place, 1, 1
                        )
