"""Scalar functions whose results are the same bits on every CPU with fused multiply-add.

No mathematical library is called, since each has its own last bits: every function here is a
reduction of its argument, a polynomial and a few operations that IEEE 754 rounds correctly. There
is no branch and no table, so a plain loop over an array becomes vector code. The polynomials are
fits of least maximal error (Remez exchange in 60 digits, coefficients then rounded). "Within n ulp"
is what was measured against the exact value, in units of the last place of the result's type.
"""

from __future__ import annotations

from math import copysign
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from npvlm.kernels import vectors
from npvlm.kernels.compiling import compiled
from npvlm.kernels.vectors import Builder, Value

# Adding 1.5 * 2**23 (in float64 2**52) rounds to a whole number, which then fills the low bits.
ROUND, ROUND_64 = np.float32(vectors.ROUND), 1.5 * 2**52
ROUND_BITS, ROUND_BITS_64 = 0x4B400000, 0x4338000000000000

# What is taken off n times comes as its nearest float and the rest of it.
LN_2, LN_2_REST = np.float32(0.6931471805599453), np.float32(-1.904654299957768e-09)
LN_2_64, LN_2_REST_64 = 0.6931471805599453, 2.3190468138462996e-17
HALF_PI, HALF_PI_REST = 1.5707963267948966, 6.123233995736766e-17
PER_LN_2, PER_LN_2_64, PER_HALF_PI = np.float32(1.4426950408889634), 1.4426950408889634, 2 / np.pi
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD

ONE, TWO = np.float32(1), np.float32(2)

# Beyond these the results are 0, infinite or 1 (the last: 0 a little before it has to be).
EXP_IS_ZERO, EXP_IS_INFINITE, TANH_IS_ONE = np.float32(-104), np.float32(89), np.float32(10)
EXP_IS_ZERO_64 = -709.0

TANH_BY_EXP = np.float32(0.55)  # from here on; below, the polynomial

# gelu_tanh(x) = x / (1 + e**-u), u = GELU_1 x + GELU_3 x**3: 2 sqrt(2 / pi) and 0.044715 times it.
GELU_1, GELU_3 = 1.5957691216057308, 0.07135481627260025

# Polynomials, highest power first.
# (e**r - 1 - r) / r**2 for |r| <= ln(2) / 2: e**r within 2**-27 and 2**-64.
EXP = tuple(map(np.float32, (0.0013946439, 0.0083665885, 0.041666284, 0.16666543, 0.5)))
EXP_64 = (
    2.0826720055500577e-09,
    2.511205862901348e-08,
    2.755758126779153e-07,
    2.7557234891684385e-06,
    2.4801586928520422e-05,
    0.00019841269896232224,
    0.0013888888889113066,
    0.008333333333317164,
    0.04166666666666611,
    0.16666666666666682,
    0.5,
)
# (tanh(x) / x - 1) / x**2 in x**2, for |x| <= 0.55: tanh within 2**-30.
TANH = tuple(map(np.float32, (-0.006287559, 0.021081738, -0.053854953, 0.13332614, -0.3333332)))
# (sin(r) / r - 1) / r**2 and (cos(r) - 1 + r**2 / 2) / r**4 in r**2, for |r| <= pi / 4.
SIN = (
    1.589669784264957e-10,
    -2.5050756983239583e-08,
    2.75573136891535e-06,
    -0.00019841269829817002,
    0.008333333333322457,
    -0.16666666666666632,
)
COS = (
    -1.1361091253865405e-11,
    2.087575414147182e-09,
    -2.7557314606897056e-07,
    2.480158729048639e-05,
    -0.0013888888888875998,
    0.041666666666666616,
)
# (2 atanh(s) - 2 s) / s**3 in s**2, for |s| <= (sqrt(2) - 1) / (sqrt(2) + 1).
LOG = (
    0.1475952564062988,
    0.1531795468713677,
    0.1818339918951874,
    0.22222202054000656,
    0.2857142870457602,
    0.39999999999609354,
    0.66666666666667,
)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    if not (isinstance(a, types.Float) and a == b == c):
        return None

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        return builder.fma(*args)

    return a(a, b, c), codegen


@intrinsic
def bits(typing: Any, x: Any) -> Any:
    """The bits of a float, as a whole number of its width."""
    return _bitcast(x, types.Integer.from_bitwidth(x.bitwidth))


@intrinsic
def from_bits(typing: Any, n: Any) -> Any:
    """The float of these bits."""
    return _bitcast(n, {32: types.float32, 64: types.float64}[n.bitwidth])


def _bitcast(given: Any, to: Any) -> Any:
    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        return builder.bitcast(args[0], context.get_value_type(to))

    return to(given), codegen


@compiled
def in_order(n: Any) -> Any:
    """Bits of float32 as whole numbers that are in the floats' own order; also the way back."""
    return n ^ ((n >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled
def polynomial(x: Any, coefficients: Any) -> Any:
    """Horner's rule; the loop is gone once it is compiled."""
    y = coefficients[0]
    for c in coefficients[1:]:
        y = fma(y, x, c)
    return y


@compiled
def power_of_two(n: int) -> np.float32:
    """2**n in float32, for n from -126 to 127; 0 for -127."""
    return from_bits(np.int32((n + 127) << 23))


@compiled
def power_of_two_64(n: int) -> float:
    """2**n in float64, for n from -1022 to 1023; 0 for -1023."""
    return from_bits((n + 1023) << 52)


@compiled
def exp_less_one(r: np.float32) -> np.float32:
    """e**r - 1 for |r| up to ln(2) / 2."""
    return fma(r * r, polynomial(r, EXP), r)


@compiled
def exp(x: np.float32) -> np.float32:
    """e**x in float32, within 1.05 ulp; exactly 1 at 0, 0 at -inf and inf at inf.

    2**n comes in two factors, which are normal floats where 2**n is none.
    """
    x = EXP_IS_ZERO if x < EXP_IS_ZERO else x
    x = EXP_IS_INFINITE if x > EXP_IS_INFINITE else x
    rounded = fma(x, PER_LN_2, ROUND)
    n = rounded - ROUND
    r = fma(n, -LN_2_REST, fma(n, -LN_2, x))
    whole = np.int32(bits(rounded) - ROUND_BITS)
    half = np.int32(whole >> 1)
    return (ONE + exp_less_one(r)) * power_of_two(half) * power_of_two(whole - half)


@compiled
def tanh(x: np.float32) -> np.float32:
    """The hyperbolic tangent in float32, within 1.38 ulp; odd, and exactly 1 from 10 on.

    1 - 2 / (e**2x + 1) loses its digits near 0, so a polynomial serves there.
    """
    a = abs(x)
    squared = a * a
    near = fma(a * squared, polynomial(squared, TANH), a)

    twice = TWO * (TANH_IS_ONE if a > TANH_IS_ONE else a)
    rounded = fma(twice, PER_LN_2, ROUND)
    n = rounded - ROUND
    r = fma(n, -LN_2_REST, fma(n, -LN_2, twice))
    scale = power_of_two(bits(rounded) - ROUND_BITS)
    far = ONE - TWO / fma(scale, exp_less_one(r), scale + ONE)
    return np.float32(copysign(far if a > TANH_BY_EXP else near, x))


@compiled
def gelu(x: np.float32) -> np.float32:
    """x * Phi(x) in its tanh form in float32, within 1.15 ulp.

    1 + tanh would cancel where x is negative; x / (1 + e**-u) does not. Most of it is float64: any
    error of u is multiplied by u, and results may be too small for a normal float32.
    """
    wide = np.float64(x)
    u = wide * fma(GELU_3, wide * wide, GELU_1)
    below = -abs(u)
    below = EXP_IS_ZERO_64 if below < EXP_IS_ZERO_64 else below
    rounded = fma(below, PER_LN_2_64, ROUND_64)
    r = np.float32(fma(rounded - ROUND_64, -LN_2_64, below))
    e = (1.0 + np.float64(exp_less_one(r))) * power_of_two_64(bits(rounded) - ROUND_BITS_64)
    return np.float32((wide if u >= 0.0 else wide * e) / (1.0 + e))


@compiled
def exp_64(x: float) -> float:
    """e**x in float64 for x up to 709, within 0.95 ulp; exactly 1 at 0, and 0 below -708.8."""
    x = EXP_IS_ZERO_64 if x < EXP_IS_ZERO_64 else x
    rounded = fma(x, PER_LN_2_64, ROUND_64)
    n = rounded - ROUND_64
    r = fma(n, -LN_2_REST_64, fma(n, -LN_2_64, x))
    scale = power_of_two_64(bits(rounded) - ROUND_BITS_64)
    return (1.0 + fma(r * r, polynomial(r, EXP_64), r)) * scale


@compiled
def log_64(x: float) -> float:
    """The natural logarithm of a normal float64 above 0, within 2 ulp; inf and nan stay."""
    n = (bits(x) - SQRT_HALF_BITS) >> 52
    m = from_bits(bits(x) - (n << 52))  # from sqrt(1 / 2) to sqrt(2)
    s = (m - 1.0) / (m + 1.0)
    squared = s * s
    rest = fma(np.float64(n), LN_2_REST_64, s * squared * polynomial(squared, LOG))
    y = fma(np.float64(n), LN_2_64, fma(2.0, s, rest))
    return y if x < np.inf else x


@compiled
def sin_cos(x: float) -> tuple[float, float]:
    """Sine and cosine of an angle up to 10**6, in float64, within 2**-52."""
    rounded = fma(x, PER_HALF_PI, ROUND_64)
    n = rounded - ROUND_64
    quarter = bits(rounded) & 3
    r = fma(n, -HALF_PI_REST, fma(n, -HALF_PI, x))
    squared = r * r
    s = fma(r * squared, polynomial(squared, SIN), r)
    c = fma(squared * squared, polynomial(squared, COS), fma(-0.5, squared, 1.0))
    sine = c if quarter & 1 else s
    cosine = s if quarter & 1 else c
    return -sine if quarter & 2 else sine, -cosine if (quarter + 1) & 2 else cosine
