"""LLVM vector code, written by the intrinsics of this folder: loads, widening, products, sums.

numba has no vector type, so the innermost loops are emitted as LLVM instructions on vectors of
sixteen lanes. LLVM makes of them what the CPU has: one AVX-512 register, two of AVX2, four of NEON.
A sum always has the same sixteen lanes, each added up in order, then the tree of `fold`; there are
no flags that let LLVM reorder or contract, so float32 results are the same bits on every CPU.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
WORDS, HALVES = ir.VectorType(I16, LANES), ir.VectorType(F16, LANES)
BYTES = ir.VectorType(I8, 4 * LANES)
PAIRS = ir.VectorType(I16, 2 * LANES)

ROUND = 1.5 * 2**23  # adding it to a smaller float32 rounds that to a whole number
MOST_BYTE = 128  # what no signed byte reaches

# llvmlite has no types to check against.
Value = Any
Builder = Any


def features() -> frozenset[str]:
    """What the CPU that numba compiles for can do; NUMBA_CPU_FEATURES can make that less."""
    flags: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(flag[1:] for flag in flags.split(",") if flag.startswith("+"))


@intrinsic
def pointer(typing: Any, array: Any, offset: Any) -> Any:
    """The address of element `offset` of a C-contiguous array."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(array.dtype)(array, types.int64), codegen


@intrinsic
def pointer_as(typing: Any, array: Any, like: Any) -> Any:
    """The address of an array of bytes, as one of elements such as those of the array `like`."""
    to = types.CPointer(like.dtype)

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.bitcast(data, context.get_value_type(to))

    return to(array, like), codegen


@intrinsic
def rotate_lanes(typing: Any, address: Any) -> Any:
    """The first four levels of a Walsh-Hadamard transform, in place, on sixteen float32."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        v = load(b, args[0], FLOATS)
        for h in (1, 2, 4, 8):
            partner = lanes(b, v, v, [lane ^ h for lane in range(LANES)])
            sign = ir.Constant(FLOATS, [-1.0 if lane & h else 1.0 for lane in range(LANES)])
            v = b.fadd(partner, b.fmul(sign, v))
        store(b, v, args[0])
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic
def rotate_pair(typing: Any, first: Any, second: Any) -> Any:
    """Sixteen float32 at two places each, a and b, become a + b and a - b."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        x, y = (load(b, address, FLOATS) for address in args)
        store(b, b.fadd(x, y), args[0])
        store(b, b.fsub(x, y), args[1])
        return context.get_dummy_value()

    return types.void(first, second), codegen


@intrinsic
def copy_lanes(typing: Any, source: Any, to: Any) -> Any:
    """Sixteen float32 to another place."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        store(b, load(b, args[0], FLOATS), args[1])
        return context.get_dummy_value()

    return types.void(source, to), codegen


@intrinsic
def widen_lanes(typing: Any, source: Any, to: Any) -> Any:
    """Sixteen float16, as their bits, become float32 at another place."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        store(b, b.fpext(load(b, args[0], HALVES), FLOATS), args[1])
        return context.get_dummy_value()

    return types.void(source, to), codegen


@intrinsic
def narrow_pairs(typing: Any, source: Any, to: Any) -> Any:
    """32 float32 rounded to the nearest bfloat16, ties to even bits; a nan stays one.

    Written as their bits in order; or, to int32, as float32 again, every second one and then those
    between: pairs of bfloat16 are multiplied so where no instruction does it.
    """

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        n = load(b, args[0], ir.VectorType(I32, 2 * LANES))
        upper = b.lshr(n, splat(n.type, 16))
        tie = b.add(b.and_(upper, splat(n.type, 1)), splat(n.type, 0x7FFF))
        rounded = b.lshr(b.add(n, tie), splat(n.type, 16))
        size = b.and_(n, splat(n.type, 0x7FFFFFFF))
        nan = b.icmp_unsigned(">", size, splat(n.type, 0x7F800000))
        bits = b.select(nan, b.or_(upper, splat(n.type, 0x40)), rounded)
        if to.dtype == types.int32:
            wide = b.shl(bits, splat(n.type, 16))
            order = [*range(0, 2 * LANES, 2), *range(1, 2 * LANES, 2)]
            store(b, lanes(b, wide, wide, order), args[1])
        else:
            store(b, b.trunc(bits, PAIRS), args[1])
        return context.get_dummy_value()

    return types.void(source, to), codegen


@intrinsic
def round_lanes(typing: Any, source: Any, gain: Any, to: Any) -> Any:
    """Sixteen float32 times a gain as whole numbers of 8 or 16 bits, ties to even.

    Zero for what is no number and for what no byte holds.
    """
    kind = {types.int8: I8, types.int16: I16}[to.dtype]

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        x = b.fmul(load(b, args[0], FLOATS), spread(b, args[1]))
        whole = b.fsub(b.fadd(x, splat(FLOATS, ROUND)), splat(FLOATS, ROUND))
        above = b.fcmp_ordered(">", x, splat(FLOATS, -MOST_BYTE))
        below = b.fcmp_ordered("<", x, splat(FLOATS, MOST_BYTE))
        held = b.select(b.and_(above, below), whole, splat(FLOATS, 0.0))
        numbers = b.fptosi(held, INTS)
        store(b, b.trunc(numbers, ir.VectorType(kind, LANES)), args[2])
        return context.get_dummy_value()

    return types.void(source, types.float32, to), codegen


@intrinsic
def sum_bytes(typing: Any, source: Any, sums: Any) -> Any:
    """Add 64 signed bytes to sixteen int32, four to each."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        source, sums = args
        total = load(b, sums, INTS)
        ones, numbers = splat(BYTES, 1), load(b, source, BYTES)
        total = byte_products(b, features(), total, [(ones, numbers)])
        store(b, total, sums)
        return context.get_dummy_value()

    return types.void(source, sums), codegen


def load(b: Builder, address: Value, kind: ir.VectorType) -> Value:
    """A vector from any address, aligned or not."""
    return b.load(b.bitcast(address, kind.as_pointer()), align=1)


def prefetch(b: Builder, address: Value, ahead: int) -> None:
    """Ask for the memory `ahead` bytes behind an address; nothing happens where there is none."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    call = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
    place = b.gep(b.bitcast(address, I8.as_pointer()), [I64(ahead)])
    b.call(call, [place, I32(0), I32(3), I32(1)])  # to read, to keep, data


def store(b: Builder, value: Value, address: Value) -> None:
    """A vector to any address, aligned or not."""
    b.store(value, b.bitcast(address, value.type.as_pointer()), align=1)


def splat(kind: ir.VectorType, number: float) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(kind, [number] * kind.count)


def spread(b: Builder, number: Value) -> Value:
    """A vector of one float32 that is known when the kernel runs."""
    first = b.insert_element(ir.Constant(FLOATS, ir.Undefined), number, I32(0))
    return lanes(b, first, first, [0] * LANES)


def lanes(b: Builder, first: Value, second: Value, order: list[int]) -> Value:
    """Lanes picked from two vectors, those of the second counted on from the first's."""
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(order)), order))


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once, lane by lane."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    call = cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v16f32")
    return b.call(call, [x, y, z])


def maximum(b: Builder, x: Value, y: Value) -> Value:
    """The larger, lane by lane; nan where one of the two is."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 2)
    call = cgutils.get_or_insert_function(b.module, kind, "llvm.maximum.v16f32")
    return b.call(call, [x, y])


def upper_halves(b: Builder, bits: Value) -> Value:
    """Sixteen bfloat16, in 16-bit lanes, as float32: a bfloat16 is the upper half of one."""
    wide = ir.VectorType(I32, bits.type.count)
    shifted = b.shl(b.zext(bits, wide), splat(wide, 16))
    return b.bitcast(shifted, ir.VectorType(F32, bits.type.count))


def fold(b: Builder, sums: list[Value]) -> Value:
    """Add up the lanes of up to sixteen vectors: lane n of the result is the sum of vector n.

    Always the same tree: lane i and i + 8, then i and i + 4, i + 2, i + 1. Two vectors are folded
    into one at every level, which takes a third of the instructions that one by one would.
    """
    add = b.fadd if sums[0].type == FLOATS else b.add
    half = LANES // 2
    while half:
        keep = [i for i in range(LANES) if not i & half]  # of the first, then of the second
        left = keep + [LANES + i for i in keep]
        right = [i + half for i in left]
        pairs = [(sums[i], sums[min(i + 1, len(sums) - 1)]) for i in range(0, len(sums), 2)]
        sums = [add(lanes(b, *pair, left), lanes(b, *pair, right)) for pair in pairs]
        half //= 2
    return sums[0]


def byte_products(
    b: Builder, target: frozenset[str], total: Value, factors: list[tuple[Value, Value]]
) -> Value:
    """Add to each lane of `total` the products of its four unsigned and four signed bytes.

    There may be one pair of factors or two. Without the instruction for it, products are summed in
    16 bits first, so unsigned factors have to be below 16: four products stay below 4 x 15 x 128.
    """
    if "avx512vnni" in target:
        kind = ir.FunctionType(INTS, [INTS] * 3)
        call = _function(b, "llvm.x86.avx512.vpdpbusd.512", kind)
        for u, s in factors:
            total = b.call(call, [total, b.bitcast(u, INTS), b.bitcast(s, INTS)])
        return total
    sums = [_pairs(b, target, u, s) for u, s in factors]
    narrow = sums[0] if len(sums) == 1 else b.add(*sums)
    return b.add(total, word_products(b, target, narrow, splat(PAIRS, 1)))


def _pairs(b: Builder, target: frozenset[str], u: Value, s: Value) -> Value:
    """The products of 64 unsigned and signed bytes, summed two by two in 16 bits."""
    if "avx2" in target:
        kind = ir.FunctionType(WORDS, [ir.VectorType(I8, 2 * LANES)] * 2)
        call = _function(b, "llvm.x86.avx2.pmadd.ub.sw", kind)
        parts = [list(range(start, start + 2 * LANES)) for start in (0, 2 * LANES)]
        halves = [b.call(call, [lanes(b, v, v, part) for v in (u, s)]) for part in parts]
        return lanes(b, *halves, list(range(2 * LANES)))
    wide = ir.VectorType(I16, 4 * LANES)
    return _neighbours(b, b.mul(b.zext(u, wide), b.sext(s, wide)))


def word_products(b: Builder, target: frozenset[str], x: Value, y: Value) -> Value:
    """The products of two times 32 numbers of 16 bits, summed two by two in 32 bits."""
    if "avx2" in target:
        kind = ir.FunctionType(ir.VectorType(I32, LANES // 2), [WORDS] * 2)
        call = _function(b, "llvm.x86.avx2.pmadd.wd", kind)
        parts = [list(range(start, start + LANES)) for start in (0, LANES)]
        halves = [b.call(call, [lanes(b, v, v, part) for v in (x, y)]) for part in parts]
        return lanes(b, *halves, list(range(LANES)))
    wide = ir.VectorType(I32, 2 * LANES)
    return _neighbours(b, b.mul(b.sext(x, wide), b.sext(y, wide)))


def _neighbours(b: Builder, v: Value) -> Value:
    """The sums of lanes 0 and 1, 2 and 3, and so on."""
    even = list(range(0, v.type.count, 2))
    return b.add(lanes(b, v, v, even), lanes(b, v, v, [i + 1 for i in even]))


def pair_products(b: Builder, total: Value, x: Value, y: Value) -> Value:
    """Add to each lane of `total` the products of its two pairs of bfloat16, given as 32 bits.

    By the instruction for it, which takes numbers below 2**-126 as zero.
    """
    kind = ir.FunctionType(FLOATS, [FLOATS, INTS, INTS])
    return b.call(_function(b, "llvm.x86.avx512bf16.dpbf16ps.512", kind), [total, x, y])


def split_pairs(b: Builder, bits: Value) -> tuple[Value, Value]:
    """Pairs of bfloat16, given as 32 bits, as float32: the first of each pair, and the second."""
    first, second = b.shl(bits, splat(INTS, 16)), b.and_(bits, splat(INTS, -65536))
    return b.bitcast(first, FLOATS), b.bitcast(second, FLOATS)


def split_products(b: Builder, total: Value, x: Any, y: Any) -> Value:
    """The same as `pair_products` of pairs that are split: in the instruction's own order."""
    return fma(b, x[0], y[0], fma(b, x[1], y[1], total))


def _function(b: Builder, name: str, kind: ir.FunctionType) -> Value:
    return cgutils.get_or_insert_function(b.module, kind, name)
