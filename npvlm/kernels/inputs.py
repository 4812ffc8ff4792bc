"""Rows of inputs as `add_tile` reads them: rounded as the weights ask for, and packed in tiles.

Axis letters: T rows of inputs · I in features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numpy.typing import NDArray

from npvlm.kernels.compiling import compiled, parallel
from npvlm.kernels.functions import from_bits
from npvlm.kernels.matrices import SIDE, cross_words
from npvlm.kernels.tiles import (
    BFLOAT16,
    BYTE_PRODUCTS,
    INT4_BYTES,
    MIDDLE,
    TALL,
    float32_inputs,
)
from npvlm.kernels.vectors import (
    LANES,
    copy_lanes,
    narrow_pairs,
    pointer,
    rotate_lanes,
    rotate_pair,
    round_lanes,
    sum_bytes,
)
from npvlm.model.weights import LEAST, Array, Bare, BFloat16, BFloat16Product, Int4, Int8

MOST, SMALLEST = np.float32(127), np.float32(LEAST)
CHUNK = 4096  # bytes of a packed row that are summed before the sum is added to the others
NOTHING = np.empty(0, np.float32)


class Inputs(NamedTuple):
    """Rows packed for `add_tile`: tiles of `height` rows, the last filled up with zeros.

    panels [tiles, steps, height, elements of a step], flat; with the words of a step turned where
        the matrix unit takes them, in tiles of 16 rows
    chunk: steps that are summed before the sum is added to the others
    scales [T]: of rows rounded to 8 bits; empty otherwise
    offsets [T]: 128 times the sum of a row, if the products of Int8 have that too much; else empty
    """

    panels: Array
    tiles: int
    height: int
    steps: int
    chunk: int
    scales: NDArray[np.float32]
    offsets: NDArray[np.int32]


def tile_height(rows: int) -> int:
    """The fewest rows a tile can have without making more tiles than needed."""
    share = -(-rows // -(-rows // TALL))
    return 1 if share == 1 else MIDDLE if share <= MIDDLE else TALL


def pack(x: Array, w: Bare, squares: bool = False) -> Inputs:
    """Prepare rows x [T, I] for products with weights like w: rounded as w asks, and in tiles.

    squares : for the matrix unit, which has to take w (`matrices.takes`)
    """
    x = np.ascontiguousarray(x)
    T, I = x.shape
    height = SIDE if squares else tile_height(T)
    tiles = -(-T // height)
    kind: Any
    if isinstance(w, Int8 | Int4):
        shifted = isinstance(w, Int8) and BYTE_PRODUCTS and not squares
        if isinstance(w, Int4):
            inputs, elements, kind = 8 * LANES, INT4_BYTES, np.int8
        elif BYTE_PRODUCTS:
            inputs, elements, kind = 4 * LANES, 4 * LANES, np.int8
        else:
            inputs, elements, kind = 2 * LANES, 2 * LANES, np.int16
        steps = -(-I // w.block) * w.block // inputs
        panels = _aligned(tiles * steps * height * elements, kind)
        scales, offsets = np.empty(T, np.float32), np.empty(T if shifted else 0, np.int32)
        _pack_integers(x, height, w.block, steps, inputs, elements, panels, scales, offsets)
        chunk = CHUNK // (elements * panels.itemsize)
        return Inputs(panels, tiles, height, steps, chunk, scales, offsets)
    pairs = isinstance(w, BFloat16Product)
    elements = 2 * LANES if pairs else float32_inputs(numbers_of(w).dtype.itemsize)
    steps = -(-I // elements)
    if elements > I:
        x = np.pad(x, ((0, 0), (0, elements - I)))
    kind = (np.uint16 if BFLOAT16 else np.int32) if pairs else np.float32
    panels = _aligned(tiles * steps * height * elements, kind)
    if pairs:
        _pack_bfloat16(x, height, steps, panels)
    else:
        _pack_float32(x, height, steps, elements, panels)
    chunk = CHUNK // (elements * (2 if pairs else 4))  # split pairs count as if they were not
    return Inputs(panels, tiles, height, steps, chunk, NOTHING, np.empty(0, np.int32))


def _aligned(size: int, dtype: Any) -> Array:
    """Room for vectors that each lie in one cache line."""
    room = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + len(room) - 64].view(dtype)


def numbers_of(w: Array | BFloat16) -> Array:
    """The numbers of a weight as they are multiplied: float64 has no kernel and is rounded."""
    values = w.bits if isinstance(w, BFloat16) else w
    return values.astype(np.float32) if values.dtype == np.float64 else values


@parallel
def _pack_float32(x, height, steps, width, panels):
    tiles = -(-len(x) // height)
    if tiles == 1:  # one tile is packed before another thread is awake
        _pack_float32_tile(x, np.int64(0), height, steps, width, panels)
    else:
        for tile in prange(tiles):
            _pack_float32_tile(x, np.int64(tile), height, steps, width, panels)


@compiled
def _pack_float32_tile(x, tile, height, steps, width, panels):
    T, I = x.shape
    size = height * steps * width
    panel = panels[tile * size : (tile + 1) * size]
    for i in range(height):
        for step in range(steps):
            to = (step * height + i) * width
            at = min(step * width, I - width)
            if tile * height + i < T:
                for lane in range(0, width, LANES):
                    copy_lanes(
                        pointer(x, (tile * height + i) * I + at + lane), pointer(panel, to + lane)
                    )
            _clear(panel, to, width if tile * height + i >= T else step * width - at)


@parallel
def _pack_bfloat16(x, height, steps, panels):
    tiles = -(-len(x) // height)
    if tiles == 1:
        _pack_bfloat16_tile(x, np.int64(0), height, steps, panels)
    else:
        for tile in prange(tiles):
            _pack_bfloat16_tile(x, np.int64(tile), height, steps, panels)


@compiled
def _pack_bfloat16_tile(x, tile, height, steps, panels):
    T, I = x.shape
    width = 2 * LANES
    size = height * steps * width
    panel = panels[tile * size : (tile + 1) * size]
    part = np.empty(width, np.float32)
    for i in range(height):
        t = tile * height + i
        for step in range(steps):
            to = pointer(panel, (step * height + i) * width)
            at = min(step * width, I - width)
            counted = step * width - at
            if t < T and counted == 0:
                narrow_pairs(pointer(x, t * I + at), to)
            else:
                part[:] = 0
                for j in range(counted, width if t < T else 0):
                    part[j] = x[t, at + j]
                narrow_pairs(pointer(part, 0), to)
    if height == SIDE:
        cross_words(panel)


@compiled
def _clear(panel, start, count):
    """Write zeros: for rows there are none of, and where a last step meets what was counted."""
    for j in range(start, start + count):
        panel[j] = 0


@parallel
def _pack_integers(x, height, block, steps, inputs, elements, panels, scales, offsets):
    tiles = -(-len(x) // height)
    if tiles == 1:
        _pack_integers_tile(
            x, np.int64(0), height, block, steps, inputs, elements, panels, scales, offsets
        )
    else:
        for tile in prange(tiles):
            _pack_integers_tile(
                x, np.int64(tile), height, block, steps, inputs, elements, panels, scales, offsets
            )


@compiled
def _pack_integers_tile(x, tile, height, block, steps, inputs, elements, panels, scales, offsets):
    """Rotate rows and round each to whole steps of its own scale: see `weights.quantize`.

    Offsets are asked for where the weights of Int8 are multiplied with 128 added: 128 times the sum
    of a row. Int4 has its own beside each 128 inputs.
    """
    T, I = x.shape
    size = height * steps * elements
    panel = panels[tile * size : (tile + 1) * size]
    row = np.zeros(steps * inputs, np.float32)
    bits = row.view(np.int32)
    for i in range(height):
        t = tile * height + i
        if t >= T:
            for step in range(steps):
                _clear(panel, (step * height + i) * elements, elements)
            continue
        for j in range(I):
            row[j] = x[t, j]
        _clear(row, I, len(row) - I)
        rotate_row(row, block)
        most = np.int32(0)
        # As integers, floats without their sign have the same order; nan is last.
        for j in range(len(bits)):
            most = max(most, bits[j] & np.int32(0x7FFFFFFF))
        largest = from_bits(np.int32(most))
        scales[t] = largest / MOST
        gain = MOST / largest if SMALLEST <= largest < np.inf else np.float32(0)
        sums = np.zeros(LANES, np.int32)
        for step in range(steps):
            to = (step * height + i) * elements
            if elements == INT4_BYTES:
                _pack_groups(row, step * inputs, gain, panel, to)
                continue
            for j in range(0, inputs, LANES):
                round_lanes(pointer(row, step * inputs + j), gain, pointer(panel, to + j))
            if len(offsets):
                sum_bytes(pointer(panel, to), pointer(sums, 0))
        if len(offsets):
            offsets[t] = 128 * sums.sum()
    if height == SIDE:
        cross_words(panel)


@compiled
def _pack_groups(row, start, gain, panel, to):
    """128 inputs of Int4: the first halves of four groups, their second halves, and lane starts.

    Weights are stored with 8 added; what that makes a lane too large is where it starts below zero.
    """
    starts = panel[to + 8 * LANES : to + INT4_BYTES].view(np.int32)
    _clear(starts, 0, LANES)
    for half in range(2):
        place = to + half * 4 * LANES
        for group in range(4):
            source = pointer(row, start + (2 * group + half) * LANES)
            round_lanes(source, gain, pointer(panel, place + group * LANES))
        sum_bytes(pointer(panel, place), pointer(starts, 0))
    for lane in range(LANES):
        starts[lane] *= -8


@compiled
def rotate_row(row, block):
    """Twin of weights.rotate for one row, in place: the same additions in the same order."""
    for begin in range(0, len(row), block):
        for start in range(begin, begin + block, LANES):
            rotate_lanes(pointer(row, start))
        h = LANES
        while h < block:
            for start in range(begin, begin + block, 2 * h):
                for j in range(start, start + h, LANES):
                    rotate_pair(pointer(row, j), pointer(row, j + h))
            h *= 2
    gain = np.float32(1 / np.sqrt(block))
    for j in range(len(row)):
        row[j] *= gain
