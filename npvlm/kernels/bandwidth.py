"""How fast this machine reads memory: what the speed of a decoding step is held against."""

from __future__ import annotations

import time

import numpy as np
from numba import get_num_threads, prange
from numpy.typing import NDArray

from npvlm.kernels.compiling import compiled, kept, parallel

BYTES = 2**30
ROW = 2**12  # words in a row: 32 KB, a share of the work small enough to even out busy cores


with kept():

    @compiled
    def _sum_words(words: NDArray[np.uint64]) -> np.uint64:
        """Add up words. Whole numbers may be added in any order, so these are wide vector loads."""
        total = np.uint64(0)
        for i in range(words.size):
            total += words[i]
        return total

    @parallel
    def _sum_rows(rows: NDArray[np.uint64]) -> np.uint64:
        """Read every word of an array once, with all threads."""
        total = np.uint64(0)
        for i in prange(rows.shape[0]):
            total += _sum_words(rows[i])
        return total


def read_bandwidth(times: int = 5) -> float:
    """Read an array of 1 GB several times and return the best rate, in bytes per second."""
    rows = np.ones((BYTES // 8 // ROW, ROW), np.uint64)
    _sum_rows(rows[:1])  # compiled before the clock starts
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        _sum_rows(rows)
        seconds.append(time.perf_counter() - began)
    return BYTES / min(seconds)


def threads() -> int:
    """How many threads the kernels use."""
    return get_num_threads()
