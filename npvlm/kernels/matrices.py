"""Products in a CPU's matrix unit (AMX): sixteen rows of weights times sixteen rows of inputs.

A tile register holds sixteen rows of 64 bytes: int8, or bfloat16. One instruction multiplies two of
them and adds to a third. Whole numbers add up to the bits that `tiles` makes. Sums of bfloat16 have
an order of their own, so that a weight which the unit multiplies is never multiplied elsewhere.
Weights are read where the checkpoint's memory map holds them; of packed inputs, words of four bytes
lie crosswise.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npvlm.kernels.compiling import compiled
from npvlm.kernels.vectors import I8, I64, Builder, Value, features, pointer, prefetch
from npvlm.model.weights import Bare, BFloat16Product, Int8

SIDE = 16  # rows of a tile register
STEP = 64  # bytes of each
CHUNK = 32  # steps that are summed before the sum is added to the others
AHEAD = 512  # bytes from where a row of weights is read to where memory is asked for what follows
_NEEDED = {"amx-int8", "amx-bf16", "avx512bf16", "avx512vnni"}  # the last two: to pack inputs so
UNIT = features() >= _NEEDED and sys.platform == "linux"

_REQUEST, _STATE = 0x1023, 18  # of arch_prctl: leave to use a part of the registers; which one
_SYSTEM_CALL = 158


@cache
def has_matrices() -> bool:
    """Whether there is such a unit, and the system lets this process use it: it has to be asked."""
    if not UNIT:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    return bool(library.syscall(_SYSTEM_CALL, _REQUEST, _STATE) == 0)


def takes(w: Bare, rows: int) -> bool:
    """Whether the unit multiplies this weight with so many rows of inputs.

    Sums of float32 depend on their order, so with bfloat16 it does so for any number of rows.
    """
    if isinstance(w, Int8):
        fits = w.values.shape[1] % STEP == 0 and rows >= SIDE
    else:
        fits = isinstance(w, BFloat16Product) and 2 * w.shape[1] >= STEP
    return fits and len(w) % SIDE == 0 and has_matrices()


def _call(b: Builder, name: str, *arguments: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


@intrinsic
def begin_matrices(typing: Any) -> Any:
    """Give every tile register sixteen rows of 64 bytes, for this thread."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        rows = [1] + 15 * [0] + 8 * [STEP, 0] + 16 * [0] + 8 * [SIDE] + 8 * [0]
        kind = ir.ArrayType(I8, len(rows))
        place = cgutils.alloca_once(b, kind)
        b.store(ir.Constant(kind, rows), place)
        _call(b, "llvm.x86.ldtilecfg", b.bitcast(place, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def end_matrices(typing: Any) -> Any:
    """Clear the tile registers, which the system would save at each change of threads."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        _call(b, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def multiply_squares(
    typing: Any, w: Any, stride: Any, start: Any, x: Any, size: Any, steps: Any, to: Any, ws: Any,
    xs: Any,
) -> Any:  # fmt: skip
    """Write the products of ws (1 or 2) times 16 rows of weights with xs times 16 of inputs.

    w points to the bytes of rows, `stride` apart, of which those from `start` on are taken, `steps`
    times 64; a last step that is not full is moved back to end with the row. x points to packed
    tiles, `size` elements apart; to to [ws, xs, 16, 16]: a row for each of weights, a column for
    each of inputs. x and to are int8 and int32, or uint16 (bits of bfloat16) and float32.
    """
    high, wide = ws.literal_value, xs.literal_value
    product = "llvm.x86.tdpbssd" if x.dtype == types.int8 else "llvm.x86.tdpbf16ps"
    elements = STEP // (x.dtype.bitwidth // 8)  # of a packed row in a step

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        w, stride, start, x, size, steps, to, _, _ = args
        number, last = [ir.Constant(I8, n) for n in range(8)], b.sub(stride, I64(STEP))
        for slot in range(high * wide):
            _call(b, "llvm.x86.tilezero", number[slot])
        with cgutils.for_range_slice(b, I64(0), steps, I64(1), inc=True) as (step, _):
            at = b.add(start, b.mul(step, I64(STEP)))
            at = b.select(b.icmp_signed("<", at, last), at, last)
            for i in range(high):
                row = b.gep(w, [b.add(b.mul(stride, I64(SIDE * i)), at)])
                for line in range(SIDE) if wide == 1 else ():
                    prefetch(b, b.gep(row, [b.mul(stride, I64(line))]), AHEAD)
                _call(b, "llvm.x86.tileloadd64", number[4 + i], row, stride)
            for j in range(wide):
                place = b.add(b.mul(size, I64(j)), b.mul(step, I64(SIDE * elements)))
                place = b.bitcast(b.gep(x, [place]), I8.as_pointer())
                _call(b, "llvm.x86.tileloadd64", number[6 + j], place, I64(STEP))
            for i in range(high):
                for j in range(wide):
                    _call(b, product, number[i * wide + j], number[4 + i], number[6 + j])
        for slot in range(high * wide):
            place = b.bitcast(b.gep(to, [I64(slot * SIDE * SIDE)]), I8.as_pointer())
            _call(b, "llvm.x86.tilestored64", number[slot], place, I64(STEP))
        return context.get_dummy_value()

    integers = [types.int64] * 2
    return types.void(w, *integers, x, *integers, to, ws, xs), codegen


@compiled
def cross_words(panel):
    """Turn every step of a packed tile: row i, word k becomes row k, word i. panel flat"""
    words = panel.view(np.int32)
    for start in range(0, len(words), SIDE * SIDE):
        for i in range(SIDE):
            for k in range(i):
                one, other = start + i * SIDE + k, start + k * SIDE + i
                words[one], words[other] = words[other], words[one]


@compiled
def add_squares(panels, size, tiles, steps, rows, w, first, sums):
    """Add the products of packed inputs with rows `first` and following of w to sums [T, O].

    panels: `tiles` of 16 rows, `size` elements each, their words turned; `rows` of them all are
    there. w uint8 [O, bytes of a row], O a multiple of 16
    """
    O, length = w.shape
    columns, step = min(sums.shape[1], O - first), size // steps
    found = np.empty(4 * SIDE * SIDE, sums.dtype)
    to = pointer(found, 0)
    # Many tiles take a chunk of all the columns, which stay in the cache for the next; one alone
    # takes sixteen columns to their end, as they lie in memory. Sums are the same either way.
    across = SIDE if tiles == 1 else 2 * SIDE
    group = columns if tiles > 2 else across
    begin_matrices()
    for side in range(0, columns, group):
        for begin in range(0, steps, CHUNK):
            count, start = min(CHUNK, steps - begin), begin * STEP
            for tile in range(0, tiles, 2):
                x, wide = pointer(panels, tile * size + begin * step), min(2, tiles - tile)
                for left in range(side, min(side + group, columns), across):
                    weights = pointer(w, (first + left) * length)
                    high = min(across, columns - left) // SIDE
                    if high == 2 and wide == 2:
                        multiply_squares(weights, length, start, x, size, count, to, 2, 2)
                    elif high == 2:
                        multiply_squares(weights, length, start, x, size, count, to, 2, 1)
                    elif wide == 2:
                        multiply_squares(weights, length, start, x, size, count, to, 1, 2)
                    else:
                        multiply_squares(weights, length, start, x, size, count, to, 1, 1)
                    for square in range(high * wide):
                        top, at = (tile + square % wide) * SIDE, left + square // wide * SIDE
                        _add_square(
                            found[square * SIDE * SIDE :],
                            sums[top : min(top + SIDE, rows), at : at + SIDE],
                        )
    end_matrices()


@compiled
def _add_square(found, sums):
    """Add a square whose rows are those of weights to sums, whose rows are those of inputs."""
    for t in range(len(sums)):
        for o in range(SIDE):
            sums[t, o] += found[o * SIDE + t]
