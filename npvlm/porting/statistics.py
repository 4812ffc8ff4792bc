"""What is noted of a stage, so that another run can be held against it without the numbers.

Axis letters: B buckets of a sketch.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npvlm.model.weights import Array

BUCKETS = 64
SHOWN = 8  # first values that are noted
SLICED = 16  # values noted at even distances

DTYPES = {"float32": "F32", "float64": "F64", "uint8": "U8", "int64": "I64"}


def describe(value: Array) -> dict[str, Any]:
    """Shape, type, moments, a few values, a sketch and a checksum of a stage, for JSON.

    The checksum is of the bytes as they lie in a file: little-endian, C order.
    """
    flat = np.ascontiguousarray(value).reshape(-1)
    wide = flat.astype(np.float64)
    places = np.linspace(0, len(flat) - 1, min(SLICED, len(flat))).astype(np.int64)
    moments = np.array([np.mean(wide), np.std(wide), np.min(wide), np.max(wide), rms(value)])
    return {
        "shape": list(value.shape),
        "dtype": DTYPES[value.dtype.name],
        **dict(zip(("mean", "std", "min", "max", "rms"), _rounded(moments), strict=True)),
        "first": _rounded(wide[:SHOWN], 6),
        "slice": _rounded(wide[places], 6),
        "sketch": _rounded(sketch(flat)),
        "sha256": hashlib.sha256(flat.astype(flat.dtype.newbyteorder("<")).tobytes()).hexdigest(),
    }


def rms(value: Array) -> float:
    """Root mean square."""
    return math.sqrt(float(np.mean(np.square(value, dtype=np.float64))))


def sketch(value: Array) -> NDArray[np.float64]:
    """Fixed random projections [B] of a stage.

    Each number goes, with a random sign, into one of B buckets. The sketch of a difference is the
    difference of the sketches, and its norm is on average the norm of the difference: two runs
    can be held against each other, to within some 10 %, by these numbers alone.

    value [...] -> [B]
    Source: count sketch, Charikar, Chen and Farach-Colton 2002.
    """
    flat = value.reshape(-1).astype(np.float64)
    buckets, signs = _places(1 << max(len(flat) - 1, 1).bit_length())
    summed = np.bincount(buckets[: len(flat)], flat * signs[: len(flat)], BUCKETS)
    return summed.astype(np.float64)


@cache
def _places(count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The bucket and the sign of each number."""
    mixed = _splitmix(np.arange(count, dtype=np.uint64))
    signs = np.where(mixed >> np.uint64(63), -1.0, 1.0)
    return (mixed & np.uint64(BUCKETS - 1)).astype(np.int64), signs


def _splitmix(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 of each number, modulo 2**64 throughout.

    Source: Steele, Lea and Flood 2014.
    """
    z = number + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _rounded(values: NDArray[np.float64], digits: int = 8) -> list[float]:
    """Numbers in a few digits; eight are a tenth of what float32 rounds off, six are to look at."""
    return [float(f"{value:.{digits}g}") for value in values]
