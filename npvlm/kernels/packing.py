"""Packing: twins of `weights.pack_int8` and `weights.pack_int4`, with the same bits.

A row is rotated and rounded while it is in the cache, and rows are shared among the threads.

Axis letters: O out features · I in features · J in features padded to whole blocks of the rotation.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from npvlm.kernels.compiling import compiled, kept, parallel
from npvlm.kernels.functions import ROUND, from_bits
from npvlm.kernels.functions import bits as bits_of
from npvlm.kernels.inputs import rotate_row
from npvlm.kernels.vectors import LANES, pointer, round_lanes
from npvlm.model.weights import (
    GROUP,
    LEAST,
    SHARES,
    Array,
    BFloat16,
    Int4,
    Int8,
    Packer,
    Weight,
    rotation_block,
    unpack,
)

HALF = GROUP // 2
MOST, SMALLEST = np.float32(127), np.float32(LEAST)
LOWEST, HIGHEST, EIGHT, ONE = np.float32(-8), np.float32(7), np.float32(8), np.float32(1)
GAINS = np.array([share / -8 for share in SHARES], np.float32)
NAN = np.uint16(0x7FC0)


def pack_int8(rows: Weight) -> Int8:
    """Twin of weights.pack_int8.

    rows [O, I] -> Int8 [O, I]
    """
    O, I = rows.shape
    block = rotation_block(I, Int8.smallest_block)
    values, scales = np.empty((O, I + -I % block), np.int8), np.empty(O, np.float32)
    _pack_int8(*_bits(rows), block, values, scales)
    return Int8(values, scales, I)


def pack_int4(rows: Weight) -> Int4:
    """Twin of weights.pack_int4.

    rows [O, I] -> Int4 [O, I]
    """
    O, I = rows.shape
    block = rotation_block(I, Int4.smallest_block)
    J = I + -I % block
    nibbles, scales = np.empty((O, J // 2), np.uint8), np.empty((O, J // GROUP), np.uint16)
    _pack_int4(*_bits(rows), block, nibbles, scales)
    return Int4(nibbles, scales, I)


PACKERS: dict[str, Packer] = {"int8": pack_int8, "int4": pack_int4}


def _bits(rows: Weight) -> tuple[Array, np.uint32]:
    """The bits of float32, or the upper ones alone, and by how many these have to be moved up."""
    if isinstance(rows, BFloat16):
        bits, shift = rows.bits.view(), 16
    else:
        bits, shift = unpack(rows, np.float32).view(np.uint32), 0
    bits = np.require(bits, requirements=["C", "A"]).view()
    bits.flags.writeable = False  # one kernel for all
    return bits, np.uint32(shift)


with kept():

    @parallel
    def _pack_int8(bits, shift, block, values, scales):
        for r in prange(len(bits)):
            row = _rotated(bits[r], shift, values.shape[1], block)
            largest = _largest(row)
            gain = MOST / largest if SMALLEST <= largest < np.inf else np.float32(0)
            scales[r] = largest / MOST
            for j in range(0, len(row), LANES):
                round_lanes(pointer(row, j), gain, pointer(values[r], j))

    @parallel
    def _pack_int4(bits, shift, block, nibbles, scales):
        for r in prange(len(bits)):
            row = _rotated(bits[r], shift, scales.shape[1] * GROUP, block)
            room = np.empty(HALF, np.float32)
            for g in range(scales.shape[1]):
                group, packed = row[g * GROUP :][:GROUP], nibbles[r, g * HALF :][:HALF]
                scales[r, g] = _pack_group(group, room, packed)

    @compiled
    def _rotated(bits, shift, padded, block):
        """A row [I] as float32 [J], rotated."""
        row = np.zeros(padded, np.float32)
        words = row.view(np.uint32)
        for j in range(len(bits)):
            words[j] = np.uint32(bits[j]) << shift
        rotate_row(row, block)
        return row

    @compiled
    def _pack_group(group, room, nibbles):
        """Choose the scale of a group and write its values; returns the bits of the scale."""
        furthest = _largest(group)
        if not furthest < np.inf:
            nibbles[:] = 0x88
            return NAN
        first = 0
        while abs(group[first]) != furthest:
            first += 1
        best, least = np.uint16(0), np.float32(np.inf)
        for gain in GAINS:
            tried = _nearest_bfloat16(group[first] * gain)
            error = _error(group, _widened(tried), room)
            if error < least:
                best, least = tried, error
        if least == np.inf:
            nibbles[:] = 0x88
            return NAN
        divisor = _divisor(_widened(best))
        for j in range(HALF):
            low = _level(group[j] / divisor) + EIGHT
            high = _level(group[j + HALF] / divisor) + EIGHT
            nibbles[j] = np.uint8(low) | np.uint8(high) << np.uint8(4)
        return best

    @compiled
    def _largest(row):
        """The largest magnitude: without their sign, floats have the order of their bits."""
        words, most = row.view(np.int32), np.int32(0)
        for j in range(len(words)):
            most = max(most, words[j] & np.int32(0x7FFFFFFF))
        return from_bits(np.int32(most))

    @compiled
    def _error(group, scale, sums):
        """The squares of what a scale misses, added up half to half as the definition does."""
        divisor = _divisor(scale)
        for j in range(HALF):
            low = _level(group[j] / divisor) * scale - group[j]
            high = _level(group[j + HALF] / divisor) * scale - group[j + HALF]
            sums[j] = low * low + high * high
        half = HALF // 2
        while half:
            for j in range(half):
                sums[j] += sums[j + half]
            half //= 2
        return sums[0]

    @compiled
    def _divisor(scale):
        return ONE if scale == 0 else scale

    @compiled
    def _level(x):
        """The nearest whole number from -8 to 7, ties to even."""
        return min(max((x + ROUND) - ROUND, LOWEST), HIGHEST)

    @compiled
    def _nearest_bfloat16(x):
        """The bits of the bfloat16 nearest to a number, ties to even bits."""
        n = bits_of(x)
        return np.uint16((n + 0x7FFF + (n >> 16 & 1)) >> 16)

    @compiled
    def _widened(n):
        return from_bits(np.int32(n << 16))
