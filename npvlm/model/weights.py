"""Weights as they are stored: plain arrays, or small value objects with an `unpack`.

Packed to 8 or 4 bits, weights are stored with their inputs rotated, and the inputs of a product
are rotated alike: rotation leaves the product as it is, and spreads a few features far larger than
the rest over all of them, which would otherwise take the whole range of a row's one scale.

Axis letters: T rows of inputs · O out features · I in features · J in features padded to whole
blocks of the rotation · r rank of a correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

LARGEST_BLOCK = 1024  # inputs that are mixed by one rotation
GROUP = 32  # inputs that share a scale of Int4
_PIECE = 2**20  # numbers looked at at a time
LEAST = 2.0**-120  # a row whose values are all below is zero: 127 / LEAST is still a float32
# Scales that Int4 tries for a group, as shares of the one that maps its largest value to -8: a
# little less range buys finer steps. On normal weights 6 leave an error of 8.2 %, the first alone
# 8.6 %, any number of them 8.1 %.
SHARES = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True, eq=False)
class BFloat16:
    """Numbers in bfloat16, kept as their 16 bits: the upper half of a float32.

    Indexing and reshaping act on the bits, so a memory-mapped weight stays one.
    """

    bits: NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: Any) -> BFloat16:
        return type(self)(self.bits[index])

    def reshape(self, *shape: int) -> BFloat16:
        return type(self)(self.bits.reshape(*shape))

    def unpack(self) -> NDArray[np.float32]:
        """The same numbers as float32; every bfloat16 is one, so nothing is rounded."""
        return np.left_shift(self.bits, 16, dtype=np.uint32).view(np.float32)


class BFloat16Product(BFloat16):
    """Weights in bfloat16 whose products take inputs rounded to bfloat16 as well."""


@dataclass(frozen=True, eq=False)
class Int8:
    """Rotated weights in steps of one scale per row: weight = rotated back (values * scale).

    values [O, J] int8, scales [O] float32, width I
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    width: int

    smallest_block: ClassVar[int] = 64

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.values), self.width

    @property
    def block(self) -> int:
        """Inputs that are mixed by one rotation."""
        return rotation_block(self.width, self.smallest_block)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Int8:
        return Int8(self.values[rows], self.scales[rows], self.width)

    def unpack(self) -> NDArray[np.float32]:
        """The weights [O, I] as they multiply inputs that are not rotated."""
        return rotate(self.values * self.scales[:, None], self.block)[:, : self.width]


@dataclass(frozen=True, eq=False)
class Int4:
    """Rotated weights of 4 bits, each group of 32 inputs with a scale of its own.

    A group is 16 bytes: byte i has input i in its low half and input i + 16 in its high half, each
    stored as its value + 8, 0 to 15. A scale is a bfloat16 and may be negative.

    nibbles [O, J / 2] uint8, scales [O, J / 32] uint16 (the bits of bfloat16), width I
    """

    nibbles: NDArray[np.uint8]
    scales: NDArray[np.uint16]
    width: int

    smallest_block: ClassVar[int] = 128

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.nibbles), self.width

    @property
    def block(self) -> int:
        """Inputs that are mixed by one rotation."""
        return rotation_block(self.width, self.smallest_block)

    def __len__(self) -> int:
        return len(self.nibbles)

    def __getitem__(self, rows: Any) -> Int4:
        return Int4(self.nibbles[rows], self.scales[rows], self.width)

    def rotated(self) -> NDArray[np.float32]:
        """The rotated weights [O, J], value times scale; a float32 holds each exactly."""
        (O, groups), scales = self.scales.shape, BFloat16(self.scales).unpack()
        halves = self.nibbles.reshape(O, groups, GROUP // 2)
        stored = np.concatenate([halves & 15, halves >> 4], axis=2)  # [O, J / 32, 32]
        values = stored.astype(np.float32) - 8
        return (values * scales[..., None]).reshape(O, groups * GROUP)

    def unpack(self) -> NDArray[np.float32]:
        """The weights [O, I] as they multiply inputs that are not rotated."""
        return rotate(self.rotated(), self.block)[:, : self.width]


Packed = Int8 | Int4
Bare = Array | BFloat16 | Packed


@dataclass(frozen=True, eq=False)
class Adapted:
    """A weight with a correction of low rank beside it: gain * (base + scale * up @ down).

    The base stays as it is stored, packed too, and the correction as exact as it came. In a table
    `up` has a row for each entry; in a kernel over squares `down` has them flat.

    up [O, r], down [r, I], gain [O] or none
    """

    base: Bare
    down: NDArray[np.float32]
    up: NDArray[np.float32]
    scale: float
    gain: NDArray[np.float64] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, rows: Any) -> Adapted:
        gain = None if self.gain is None else self.gain[rows]
        return replace(self, base=self.base[rows], up=self.up[rows], gain=gain)

    def reshape(self, *shape: int) -> Adapted:
        """The same rows, each in another shape; packed weights have only one."""
        assert not isinstance(self.base, Int8 | Int4) and shape[0] == len(self)
        return replace(self, base=self.base.reshape(*shape))

    def unpack(self) -> NDArray[np.float64]:
        """The two merged, rounded to float64 alone."""
        merged = unpack(self.base, np.float64)
        correction = self.up.astype(np.float64) @ self.down.astype(np.float64)
        merged = merged + self.scale * correction.reshape(merged.shape)
        return merged if self.gain is None else merged * self.gain[:, None]


Weight = Bare | Adapted


def unpack(weight: Weight, dtype: DTypeLike) -> Array:
    """The numbers of a weight as an array of `dtype`; no copy where it is one already."""
    values = weight if isinstance(weight, np.ndarray) else weight.unpack()
    return values.astype(dtype, copy=False)


def is_finite(weight: Weight) -> bool:
    """Whether a weight holds no inf and no nan; a packed one would hold them in its scales."""
    if isinstance(weight, Adapted):
        return all(map(is_finite, (weight.base, weight.down, weight.up)))
    if isinstance(weight, Int4):
        weight = BFloat16(weight.scales)
    elif isinstance(weight, Int8):
        weight = weight.scales
    numbers = weight.reshape(-1)
    pieces = (numbers[at : at + _PIECE] for at in range(0, len(numbers), _PIECE))
    return all(np.isfinite(unpack(piece, np.float32)).all() for piece in pieces)


def round_to_bfloat16(values: Array) -> BFloat16:
    """Round float32 numbers (others as float32) to the nearest bfloat16, ties to even bits."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40  # a nan stays one, whatever its bits
    return BFloat16(np.where(np.isnan(values), quiet, rounded).astype(np.uint16))


def rotation_block(width: int, smallest: int) -> int:
    """The largest power of two, up to 1024, that pads the inputs by no more than 1/32."""
    block = LARGEST_BLOCK
    while block > smallest and -width % block * 32 > width:
        block //= 2
    return block


def rotate(x: Array, block: int) -> Array:
    """Mix each block of inputs by a Walsh-Hadamard transform, padding with zeros to whole blocks.

    It is its own inverse and keeps every product: rotate(x) @ rotate(w).T == x @ w.T but for
    rounding. A kernel that adds in this order gets these bits: for h = 1, 2, 4, ... up to half a
    block, inputs j and j + h become a + b and a - b, wherever j has no bit h; at the end each is
    multiplied once by 1 / sqrt(block), rounded to the type of x.

    x [T, I] -> [T, J]
    Source: QuaRot, arXiv 2404.00456, for rotating what is quantised.
    """
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block)))
    mixed = np.ascontiguousarray(padded.reshape(-1, block).T)  # [block, ...]: adds run over rows
    h = 1
    while h < block:
        pairs = mixed.reshape(block // (2 * h), 2, -1)
        a, b = pairs[:, 0], pairs[:, 1]
        mixed = np.stack([a + b, a - b], axis=1)
        h *= 2
    mixed = mixed.reshape(block, -1) * x.dtype.type(1 / math.sqrt(block))
    return np.ascontiguousarray(mixed.T).reshape(padded.shape)


def quantize(x: Array) -> tuple[NDArray[np.int8], Array]:
    """Round each row to whole steps of a scale of its own, -127 to 127 of them.

    All in the type of x, in this order: amax = max |x|; scale = amax / 127; value = x * (127 /
    amax), rounded to the nearest, ties to even. A row of zeros has zeros; one that holds inf or nan
    has zeros with such a scale, so that whatever is made of it is no number either.

    x [T, J] -> [T, J] int8, [T]
    """
    most = x.dtype.type(127)
    amax = np.max(np.abs(x), axis=1)
    usable = (amax >= LEAST) & (amax < np.inf)
    steps = most / np.where(usable, amax, 1)
    values = np.rint(np.where(usable[:, None], x, 0) * steps[:, None])
    return values.astype(np.int8), amax / most


def pack_int8(rows: Weight) -> Int8:
    """Pack weights [O, I]: rotated, then quantized row by row as inputs are."""
    width = rows.shape[1]
    block = rotation_block(width, Int8.smallest_block)
    return Int8(*quantize(rotate(unpack(rows, np.float32), block)), width)


def pack_int4(rows: Weight) -> Int4:
    """Pack weights [O, I]: rotated, then each group with the scale that errs least.

    The first scale maps the value furthest from zero to -8, the end of the range that reaches
    further; the others are SHARES of it. Each is rounded to bfloat16 before values are chosen for
    it, and of equally good ones the earlier is taken.
    """
    width = rows.shape[1]
    block = rotation_block(width, Int4.smallest_block)
    groups = rotate(unpack(rows, np.float32), block).reshape(len(rows), -1, GROUP)
    finite: NDArray[np.bool_] = np.all(np.isfinite(groups), axis=2)
    tamed = np.where(finite[..., None], groups, 0)
    furthest = np.argmax(np.abs(tamed), axis=2)[..., None]
    extreme = np.take_along_axis(tamed, furthest, axis=2)[..., 0]  # [O, J / 32]

    scales = np.zeros(extreme.shape, np.uint16)
    values = np.zeros(groups.shape, np.float32)
    least = np.full(extreme.shape, np.inf, np.float32)
    for share in SHARES:
        tried = round_to_bfloat16(extreme * np.float32(share / -8))
        scale = tried.unpack()[..., None]
        fitted = np.clip(np.rint(tamed / np.where(scale == 0, 1, scale)), -8, 7)
        error = _sum_of_squares(fitted * scale - tamed)
        better = error < least
        scales[better] = tried.bits[better]
        values[better] = fitted[better]
        least[better] = error[better]

    scales[~finite | np.isinf(least)] = 0x7FC0  # nan: what damaged weights make is no number
    stored = (values + 8).astype(np.uint8)
    nibbles = stored[..., : GROUP // 2] + stored[..., GROUP // 2 :] * np.uint8(16)
    return Int4(nibbles.reshape(len(rows), -1), scales, width)


def _sum_of_squares(x: Array) -> Array:
    """Add up squares along the last axis, its second half to its first until one number is left.

    An order of its own, for the sum decides between scales: it must not depend on the CPU.
    """
    squares = x * x
    while squares.shape[-1] > 1:
        half = squares.shape[-1] // 2
        squares = squares[..., :half] + squares[..., half:]
    return squares[..., 0]


Packer = Callable[[Weight], Packed]

PACKERS: dict[str, Packer] = {"int8": pack_int8, "int4": pack_int4}


class Weights(dict[str, Weight]):
    """Tensors under their published names; `scope` narrows them to one module.

    `w.scope("layers.3.self_attn")["q_proj.weight"]` is `w["layers.3.self_attn.q_proj.weight"]`.
    A scope is made once and kept, so that a decoding step spends no time on names.
    """

    def __init__(self, tensors: dict[str, Weight]) -> None:
        super().__init__(tensors)
        self._scopes: dict[str, Weights] = {}

    def scope(self, module: str) -> Weights:
        if module not in self._scopes:
            start = module + "."
            inner = {name[len(start) :]: w for name, w in self.items() if name.startswith(start)}
            self._scopes[module] = Weights(inner)
        return self._scopes[module]
