"""The innermost loop of every product: a few rows of inputs times a few rows of weights.

Both are read along the inputs, so weights are used where the checkpoint's memory map holds them.
A tile of rows x columns sums stays in registers. The rows come packed: step after step, and within
a step row after row, which makes them one stream of whole cache lines. How many rows and columns a
tile has never shows in a result, since every sum has its own lanes and its own order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npvlm.kernels.vectors import (
    BYTES,
    FLOATS,
    HALVES,
    I8,
    I16,
    I64,
    INTS,
    LANES,
    PAIRS,
    WORDS,
    Builder,
    Value,
    byte_products,
    features,
    fma,
    fold,
    lanes,
    load,
    maximum,
    pair_products,
    prefetch,
    splat,
    split_pairs,
    split_products,
    spread,
    store,
    upper_halves,
    word_products,
)

HALF_BYTES = ir.VectorType(I8, 2 * LANES)
WIDTH = 64  # columns of the block of sums that tiles add to

# As many sums as the registers of the CPU hold beside the operands: 32 of 16 lanes, or 16 of 8.
TALL, MIDDLE, COLUMNS = 6, 4, 4 if "avx512f" in features() else 1

MATCHED = 12 if "avx512f" in features() else 3  # vectors that two times 16 queries are held to

BFLOAT16 = "avx512bf16" in features()  # whether bfloat16 are multiplied by each other
BYTE_PRODUCTS = "avx512vnni" in features()  # whether bytes are, those of a weight with 128 added

AHEAD = 4096  # bytes from where a row of weights is read to where memory is asked for what follows
INT4_BYTES = 192  # what 128 inputs take when packed for Int4: see `_pack_groups`


@dataclass(frozen=True)
class Kind:
    """How one step of a product is done for a pair of element types."""

    inputs: int  # elements of a packed row in a step
    weights: int  # elements of a row of weights in a step
    zero: ir.Constant
    load_inputs: Callable[[Builder, Value], Any]
    load_weights: Callable[[Builder, Value, Value], Any]  # at an address; its group scales at one
    add_products: Callable[[Builder, Value, Any, Any], Value]  # to sums: inputs, weights


def kind_of(inputs: Any, weights: Any) -> Kind:
    """Say how these element types (of packed inputs, and of weights as stored) are multiplied."""
    target = features()
    if inputs == types.float32:
        size, widen = {
            types.float32: (4, lambda b, p: load(b, p, FLOATS)),
            types.uint16: (2, lambda b, p: upper_halves(b, load(b, p, WORDS))),
            types.int16: (2, lambda b, p: b.fpext(load(b, p, HALVES), FLOATS)),
        }[weights]
        parts = float32_inputs(size) // LANES  # of a step, one vector each
        return Kind(
            inputs=parts * LANES,
            weights=parts * LANES,
            zero=splat(FLOATS, 0.0),
            load_inputs=lambda b, p: [load(b, q, FLOATS) for q in _parts(b, p, parts)],
            load_weights=lambda b, p, _: [widen(b, q) for q in _parts(b, p, parts)],
            add_products=_add_float32_products,
        )
    if inputs == types.uint16:
        return Kind(
            inputs=2 * LANES,
            weights=2 * LANES,
            zero=splat(FLOATS, 0.0),
            load_inputs=lambda b, p: load(b, p, INTS),
            load_weights=lambda b, p, _: load(b, p, INTS),
            add_products=pair_products,
        )
    if inputs == types.int32:
        return Kind(
            inputs=2 * LANES,
            weights=2 * LANES,
            zero=splat(FLOATS, 0.0),
            load_inputs=lambda b, p: [load(b, b.gep(p, [I64(at)]), FLOATS) for at in (0, LANES)],
            load_weights=lambda b, p, _: split_pairs(b, load(b, p, INTS)),
            add_products=split_products,
        )
    if weights == types.int8 and inputs == types.int16:
        return Kind(
            inputs=2 * LANES,
            weights=2 * LANES,
            zero=splat(INTS, 0),
            load_inputs=lambda b, p: load(b, p, PAIRS),
            load_weights=lambda b, p, _: b.sext(load(b, p, HALF_BYTES), PAIRS),
            add_products=lambda b, sums, x, w: b.add(sums, word_products(b, target, x, w)),
        )
    if weights == types.int8:
        return Kind(
            inputs=4 * LANES,
            weights=4 * LANES,
            zero=splat(INTS, 0),
            load_inputs=lambda b, p: load(b, p, BYTES),
            load_weights=lambda b, p, _: b.xor(load(b, p, BYTES), splat(BYTES, -128)),
            add_products=lambda b, sums, x, w: byte_products(b, target, sums, [(w, x)]),
        )
    return Kind(
        inputs=INT4_BYTES,
        weights=4 * LANES,
        zero=splat(FLOATS, 0.0),
        load_inputs=_load_int4_inputs,
        load_weights=_load_int4_weights,
        add_products=lambda b, sums, x, w: _add_int4_products(b, target, sums, x, w),
    )


def float32_inputs(size: int) -> int:
    """How many inputs a step has by the bytes of a weight: a cache line's of weights."""
    return 4 * LANES // size


def _parts(b: Builder, address: Value, parts: int) -> list[Value]:
    return [b.gep(address, [I64(part * LANES)]) for part in range(parts)]


def _add_float32_products(b: Builder, sums: Value, x: Any, w: Any) -> Value:
    for inputs, weights in zip(x, w, strict=True):
        sums = fma(b, inputs, weights, sums)
    return sums


def _load_int4_inputs(b: Builder, address: Value) -> tuple[Value, Value, Value]:
    """128 inputs, the first and the second halves of four groups, and what their lanes begin at."""
    low, high, start = (b.gep(address, [I64(at)]) for at in (0, 4 * LANES, 8 * LANES))
    return load(b, low, BYTES), load(b, high, BYTES), load(b, start, INTS)


def _load_int4_weights(b: Builder, address: Value, scales: Value) -> tuple[Value, Value, Value]:
    """128 weights + 8, the first and second halves of four groups, and the scale of each lane."""
    nibbles = load(b, address, BYTES)
    four = upper_halves(b, load(b, scales, ir.VectorType(I16, 4)))
    scale = lanes(b, four, four, [lane // 4 for lane in range(LANES)])
    return b.and_(nibbles, splat(BYTES, 15)), b.lshr(nibbles, splat(BYTES, 4)), scale


def _add_int4_products(b: Builder, target: frozenset[str], sums: Value, x: Any, w: Any) -> Value:
    """A lane multiplies eight inputs of one group, so that it has one scale."""
    (x_low, x_high, start), (w_low, w_high, scale) = x, w
    total = byte_products(b, target, start, [(w_low, x_low), (w_high, x_high)])
    return fma(b, b.sitofp(total, FLOATS), scale, sums)


@intrinsic(prefer_literal=True)
def add_tile(
    typing: Any,
    x: Any,
    w: Any,
    stride: Any,
    length: Any,
    scales: Any,
    first: Any,
    most: Any,
    begin: Any,
    end: Any,
    sums: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """Add a tile of products to sums [rows, WIDTH].

    x points to the packed rows, w to the weights: rows of `length` elements, `stride` apart. The
    tile's columns are rows `first` and following of w, the last of them repeated beyond `most`.
    Steps begin to end of the rows are taken. A last step that is not full is moved back to end with
    the row; the packed rows have zeros where it meets what was counted before.

    x and w are float32 and float32, uint16 (bits of bfloat16) or int16 (bits of float16); uint16
    and uint16, or the same with x split (int32); int16 and int8; int8 and int8, where each sum has
    128 times its inputs too much; or int8 and uint8, two weights a byte, with the bits of a
    bfloat16 scale for 32 of them.
    """
    kind = kind_of(x.dtype, w.dtype)
    height, width = rows.literal_value, columns.literal_value

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        x, w, stride, length, scales, first, most, begin, end, sums, _, _ = args
        weights, gains = [], []
        for j in range(width):
            row = b.add(first, I64(j))
            row = b.mul(stride, b.select(b.icmp_signed("<", row, most), row, most))
            weights.append(b.gep(w, [row]))
            gains.append(b.gep(scales, [b.sdiv(row, I64(16))]))
        last = b.sub(length, I64(kind.weights))
        accumulators = _accumulators(b, height * width, kind.zero)
        with cgutils.for_range_slice(b, begin, end, I64(1), inc=True) as (step, _):
            at = b.mul(step, I64(kind.weights))
            at = b.select(b.icmp_signed("<", at, last), at, last)
            gain = b.sdiv(at, I64(16))
            columns = []
            for row, own in zip(weights, gains, strict=True):
                address = b.gep(row, [at])
                if height == 1:
                    prefetch(b, address, AHEAD)
                columns.append(kind.load_weights(b, address, b.gep(own, [gain])))
            packed = b.gep(x, [b.mul(step, I64(height * kind.inputs))])
            for i in range(height):
                row = kind.load_inputs(b, b.gep(packed, [I64(i * kind.inputs)]))
                for j in range(width):
                    slot = accumulators[i * width + j]
                    b.store(kind.add_products(b, b.load(slot), row, columns[j]), slot)
        _add_to_block(b, accumulators, sums, width)
        return context.get_dummy_value()

    integers = [types.int64] * 2
    signature = types.void(x, w, *integers, scales, *integers, *integers, sums, rows, columns)
    return signature, codegen


@intrinsic(prefer_literal=True)
def mix_tile(
    typing: Any,
    weights: Any,
    v: Any,
    stride: Any,
    length: Any,
    begin: Any,
    end: Any,
    sums: Any,
    size: Any,
    at: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """Add weighed values to sums [rows, size]: from `at`, LANES x columns of them.

    Attention weighs those of keys, a low-rank correction the rows of its second factor. They are
    summed up before they are added: one sum over all of them would round more.

    weights points to [rows, WIDTH] float32, of which entries begin to end are taken in order, v to
    the values of entry 0, `length` of them; those of the next lie `stride` further. Lanes beyond
    the end are moved back to end there: they hold the last values.
    """
    height, width = rows.literal_value, columns.literal_value

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        weights, v, stride, length, begin, end, sums, size, at, _, _ = args
        last = b.sub(length, I64(LANES))
        starts = [b.add(at, I64(j * LANES)) for j in range(width)]
        places = [
            b.gep(sums, [b.add(b.mul(size, I64(i)), start)])
            for i in range(height)
            for start in starts
        ]
        starts = [b.select(b.icmp_signed("<", start, last), start, last) for start in starts]
        accumulators = _accumulators(b, height * width, splat(FLOATS, 0.0))
        with cgutils.for_range_slice(b, begin, end, I64(1), inc=True) as (step, _):
            row = b.gep(v, [b.mul(step, stride)])
            values = [load(b, b.gep(row, [start]), FLOATS) for start in starts]
            for i in range(height):
                weight = b.load(b.gep(weights, [b.add(step, I64(i * WIDTH))]))
                weight = spread(b, weight)
                for j in range(width):
                    slot = accumulators[i * width + j]
                    b.store(fma(b, weight, values[j], b.load(slot)), slot)
        for slot, place in zip(accumulators, places, strict=True):
            store(b, b.fadd(load(b, place, FLOATS), b.load(slot)), place)
        return context.get_dummy_value()

    integers = [types.int64] * 2
    signature = types.void(weights, v, *integers, *integers, sums, *integers, rows, columns)
    return signature, codegen


@intrinsic(prefer_literal=True)
def best_tile(
    typing: Any,
    x: Any,
    w: Any,
    width: Any,
    first: Any,
    most: Any,
    best: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """Multiply a few times 16 queries with a few vectors; keep the best product of each query.

    A query is a lane, so that no sum is ever folded: each is one chain of additions, from the first
    number of a vector to the last.

    x points to [width, rows, LANES] float32, w to vectors of `width` float32: `first` and those
    behind it, the last of them repeated beyond `most`; best to [rows, LANES].
    """
    height, count = rows.literal_value, columns.literal_value

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        x, w, width, first, most, best, _, _ = args
        vectors = []
        for j in range(count):
            row = b.add(first, I64(j))
            row = b.select(b.icmp_signed("<", row, most), row, most)
            vectors.append(b.gep(w, [b.mul(row, width)]))
        accumulators = _accumulators(b, height * count, splat(FLOATS, 0.0))
        with cgutils.for_range_slice(b, I64(0), width, I64(1), inc=True) as (step, _):
            packed = b.gep(x, [b.mul(step, I64(height * LANES))])
            queries = [load(b, q, FLOATS) for q in _parts(b, packed, height)]
            for j, vector in enumerate(vectors):
                number = spread(b, b.load(b.gep(vector, [step]), align=1))
                for i, query in enumerate(queries):
                    slot = accumulators[j * height + i]
                    b.store(fma(b, query, number, b.load(slot)), slot)
        for i, place in enumerate(_parts(b, best, height)):
            top = load(b, place, FLOATS)
            for j in range(count):
                top = maximum(b, top, b.load(accumulators[j * height + i]))
            store(b, top, place)
        return context.get_dummy_value()

    integers = [types.int64] * 3
    return types.void(x, w, *integers, best, rows, columns), codegen


def _accumulators(b: Builder, count: int, zero: ir.Constant) -> list[Value]:
    slots = [cgutils.alloca_once(b, zero.type) for _ in range(count)]
    for slot in slots:
        b.store(zero, slot)
    return slots


def _add_to_block(b: Builder, accumulators: list[Value], sums: Value, width: int) -> None:
    """Fold every accumulator and add the tile [rows, width] to its place in sums [rows, WIDTH]."""
    values = [b.load(slot) for slot in accumulators]
    for start in range(0, len(values), LANES):
        folded = fold(b, values[start : start + LANES])
        for lane in range(0, min(LANES, len(values) - start), width):
            row = lanes(b, folded, folded, list(range(lane, lane + width)))
            place = b.gep(sums, [I64((start + lane) // width * WIDTH)])
            before = load(b, place, row.type)
            add = b.fadd if folded.type == FLOATS else b.add
            store(b, add(before, row), place)
