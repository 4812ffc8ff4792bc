"""What a correction of low rank adds to products, while a block of them is in the cache.

Axis letters: T rows of inputs · O out features · r rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from npvlm.kernels.compiling import compiled
from npvlm.kernels.tiles import COLUMNS, TALL, WIDTH, mix_tile
from npvlm.kernels.vectors import LANES, pointer
from npvlm.model.weights import Adapted, Array


class Correction(NamedTuple):
    """A correction of products y [T, O], which become gain * (y + low @ up).

    low [pieces, T, WIDTH]: the rank in pieces, the rows filled up to whole tiles
    up [r, O]: O filled up to whole blocks of WIDTH
    gain [O] or empty
    """

    low: NDArray[np.float32]
    up: NDArray[np.float32]
    gain: NDArray[np.float64]


def lay_out(low: Array, w: Adapted) -> Correction:
    """Lay out for `sum_correction` what the first factor of w made of the inputs. low [T, r]"""
    (T, r), O = low.shape, len(w)
    packed = np.zeros((-(-r // WIDTH), -(-T // TALL) * TALL, WIDTH), np.float32)
    for piece, to in enumerate(packed):
        part = low[:, piece * WIDTH : (piece + 1) * WIDTH]
        to[:T, : part.shape[1]] = part
    up = np.pad(w.up.T, ((0, 0), (0, -O % WIDTH))) if O % WIDTH else w.up.T
    gain = np.empty(0) if w.gain is None else w.gain
    return Correction(packed, np.ascontiguousarray(up, np.float32), gain)


@compiled
def sum_correction(correction, row, rows, column, width):
    """Sum up low @ up for some rows and columns -> [rows filled up to whole tiles, width]

    column and width are multiples of WIDTH. A sum is a chain of up to WIDTH terms, and those of
    the pieces are added up in order, in whatever tile they are made.
    """
    r, O = correction.up.shape
    height = 1 if rows == 1 else TALL
    sums = np.zeros((-(-rows // height) * height, width), np.float32)
    for piece in range(len(correction.low)):
        begin = piece * WIDTH
        count, up = min(WIDTH, r - begin), pointer(correction.up, begin * O + column)
        for i in range(0, rows, height):
            low, to = pointer(correction.low[piece], (row + i) * WIDTH), pointer(sums, i * width)
            for at in range(0, min(width, O - column), COLUMNS * LANES):
                if height == 1:
                    mix_tile(low, up, O, O - column, 0, count, to, width, at, 1, COLUMNS)
                else:
                    mix_tile(low, up, O, O - column, 0, count, to, width, at, TALL, COLUMNS)
    return sums


@compiled
def add_correction(sums, correction, column, to):
    """Finish some columns of a row: the sums are added to them, and the gain multiplies both."""
    for j in range(len(to)):
        to[j] += sums[j]
    if len(correction.gain):
        for j in range(len(to)):
            to[j] *= correction.gain[column + j]
