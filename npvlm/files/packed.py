"""The file form of packed weights: which tensors stand for one weight, and how they are joined.

docs/format.md says the same for other programs.

Axis letters: O out features · I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from npvlm.config import PACKED
from npvlm.files.names import multiplies
from npvlm.model.weights import (
    GROUP,
    Array,
    BFloat16,
    BFloat16Product,
    Int4,
    Int8,
    Packed,
    Packer,
    Weight,
    rotation_block,
    round_to_bfloat16,
    unpack,
)

LAYERS = "language_model.model.layers."  # how the names of the decoder's layers begin
BLOCK = 2**20  # weights packed at a time: a few milliseconds of work, a few MB in memory


class Rows(Protocol):
    """A weight that can be had a few rows at a time, as any weight can."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Weight: ...


def packing(name: str, shape: tuple[int, ...], precision: str | None) -> str | None:
    """Say how a tensor is packed in a model of a precision: as "int8", as "int4" or not.

    In int4 the layers of the decoder have 4 bits and all other matrices 8: the image tower, the
    projector and the tables are a third of a 3B's weights, and would make more than half the loss.
    """
    if precision not in PACKED or not multiplies(name, shape):
        return None
    return precision if name.startswith(LAYERS) else "int8"


def part_names(name: str) -> tuple[str, str]:
    """Name the tensors of a packed weight: its values, under its own name, and its scales."""
    return name, f"{name}_scale"


def part_tensors(
    name: str, shape: tuple[int, ...], kind: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Say the type and shape of each tensor that stands for a packed weight [O, I]."""
    rows, width = shape
    smallest = Int8.smallest_block if kind == "int8" else Int4.smallest_block
    padded = width + -width % rotation_block(width, smallest)
    values, scales = part_names(name)
    if kind == "int8":
        return {values: ("I8", (rows, padded)), scales: ("F32", (rows,))}
    return {values: ("U8", (rows, padded // 2)), scales: ("BF16", (rows, padded // GROUP))}


def parts_of(packed: Packed) -> tuple[Array, Array]:
    """Take a packed weight apart: the numbers of its two tensors."""
    values = packed.values if isinstance(packed, Int8) else packed.nibbles
    return values, packed.scales


def join_parts(values: Array, scales: Array, width: int, kind: str) -> Packed:
    """Put a packed weight together from its two tensors, without a copy."""
    return Int8(values, scales, width) if kind == "int8" else Int4(values, scales, width)


def blocks_of(weight: Rows) -> Iterator[slice]:
    """Runs of rows that are few enough to be packed together."""
    size = int(np.prod(weight.shape[1:]))
    rows = max(1, BLOCK // size)
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def at_precision(
    weights: Mapping[str, Weight], precision: str, packers: Mapping[str, Packer]
) -> dict[str, Weight]:
    """Make of weights as published what a precision computes with, in memory.

    float32 takes them as they are. bfloat16 rounds those that are not stored so, and marks those
    whose products take rounded inputs. int8 and int4 pack the weights of linear layers.

    Parameters
    ----------
    packers : for "int8" and "int4" the function that packs rows [O, I]
    """
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        if precision == "bfloat16":
            bits = weight.bits if isinstance(weight, BFloat16) else _rounded(weight)
            linear = multiplies(name, weight.shape)
            found[name] = BFloat16Product(bits) if linear else BFloat16(bits)
        elif kind := packing(name, weight.shape, precision):
            found[name] = _packed(weight, kind, packers[kind])
        else:
            found[name] = weight
    return found


def _rounded(weight: Weight) -> NDArray[np.uint16]:
    """The bits of a weight rounded to bfloat16."""
    bits = np.empty(weight.shape, np.uint16)
    for rows in blocks_of(weight):
        bits[rows] = round_to_bfloat16(unpack(weight[rows], np.float32)).bits
    return bits


def _packed(weight: Weight, kind: str, pack: Packer) -> Packed:
    """A weight packed block by block into arrays of its own."""
    arrays: list[Array] = []
    for rows in blocks_of(weight):
        parts = parts_of(pack(weight[rows]))
        arrays = arrays or [np.empty((len(weight), *p.shape[1:]), p.dtype) for p in parts]
        for array, part in zip(arrays, parts, strict=True):
            array[rows] = part
    values, scales = arrays
    return join_parts(values, scales, weight.shape[1], kind)
