"""Hypothesis strategies for what parsers read: valid input with a few places in it changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from npvlm.answers.boxes import Box
from tests.fuzz.changes import Pick, damaged
from tests.fuzz.targets import Change

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[T]], T]


@st.composite
def mutated(draw: Draw[int], change: Change, *bases: bytes) -> bytes:
    """One of some valid files, with up to four changes."""
    pick = picking(draw)
    data = bases[pick(len(bases))]
    for _ in range(pick(5)):
        data = (change if pick(6) else damaged)(data, pick)
    return data


def picking(draw: Draw[int]) -> Pick:
    """Choices among n things, as hypothesis draws them."""
    return lambda count: draw(st.integers(0, count - 1))


def noise() -> st.SearchStrategy[bytes]:
    """Bytes that are of no kind."""
    return st.binary(max_size=200)


def any_text() -> st.SearchStrategy[str]:
    """Text with every character that there is, halves of characters too."""
    return st.text(
        st.characters(codec=None, categories=None) | st.sampled_from(AWKWARD), max_size=20
    )


AWKWARD = (
    "\0",
    "\n",
    "\r",
    "\t",
    "\x1b",
    '"',
    ",",
    ";",
    "\\",
    "\ud800",
    "\udcff",
    "\u2028",
    "\ufeff",
)


@st.composite
def boxes(draw: Draw[Any], width: int, height: int, bins: int = 1024) -> Box:
    """A box as an answer has it, with area; its label is as it is read, without an end."""
    pick = picking(draw)
    y0, x0 = pick(1023), pick(1023)
    y1, x1 = y0 + 1 + pick(1023 - y0), x0 + 1 + pick(1023 - x0)
    x0, y0, x1, y1 = x0 / bins * width, y0 / bins * height, x1 / bins * width, y1 / bins * height
    codes = tuple(pick(128) for _ in range(16)) if pick(2) else ()
    return Box(draw(any_text()).replace(";", "").strip(), x0, y0, x1, y1, codes=codes)


def fields() -> st.SearchStrategy[NDArray[np.float32]]:
    """Masks as they are decoded, small ones: rough, flat, and with the ends of the scale."""
    numbers = st.floats(-3, 3, width=32) | st.sampled_from([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
    return hnp.arrays(np.float32, shapes, elements=numbers)


def arrays(shapes: Sequence[tuple[int, ...]]) -> st.SearchStrategy[NDArray[np.generic]]:
    """What a port may dump for a stage: some numbers, in some shape near to those."""
    kinds = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_])
    return kinds.flatmap(lambda kind: hnp.arrays(kind, st.sampled_from(shapes)))
