"""Twins of the operations that mix no rows: norms, gates, rotations, softmax.

A row is summed in float64, in an order that only its length decides, and the results are rounded to
float32 once, at the end: the bits of a row depend on nothing but the row, and are nearer to the
truth than the definition's. What is not float32 is handed to the definition.

Axis letters: T rows · D width of a row · H heads · d width of a head · V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from npvlm.kernels.compiling import compiled, parallel
from npvlm.kernels.functions import exp, exp_64, fma, gelu, log_64, sin_cos, tanh
from npvlm.model import ops as definitions
from npvlm.model.ops import Index
from npvlm.model.weights import Array, Weight, unpack

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

FEW = 2**16  # numbers that one thread is done with before a second has joined


def layer_norm(x: Array, weight: Weight, bias: Weight, eps: float) -> Array:
    """Twin of ops.layer_norm that rounds each number once.

    x [..., D], weight [D], bias [D] -> [..., D]
    """
    if x.dtype != np.float32:
        return definitions.layer_norm(x, weight, bias, eps)
    y = np.empty(x.shape, np.float32)
    _layer_norm(_rows(x), _gain(weight), _gain(bias), float(eps), _rows(y))
    return y


def rms_norm(x: Array, weight: Weight, eps: float) -> Array:
    """Twin of ops.rms_norm that rounds each number once.

    x [..., D], weight [D] -> [..., D]
    """
    if x.dtype != np.float32:
        return definitions.rms_norm(x, weight, eps)
    y = np.empty(x.shape, np.float32)
    _rms_norm(_rows(x), _gain(weight), float(eps), _rows(y))
    return y


def rope(x: Array, positions: Index, theta: float) -> Array:
    """Twin of ops.rope that computes the sines of a token once for all its heads.

    x [T, H, d], positions [T] -> [T, H, d]
    """
    if x.dtype != np.float32:
        return definitions.rope(x, positions, theta)
    y = np.empty(x.shape, np.float32)
    _rope(_plain(x), _plain(np.asarray(positions, np.int64)), float(theta), y)
    return y


def soft_cap(x: Array, cap: float) -> Array:
    """Twin of ops.soft_cap with a tanh that becomes vector code.

    x [...] -> [...]
    """
    if x.dtype != np.float32:
        return definitions.soft_cap(x, cap)
    y = np.empty(x.shape, np.float32)
    _soft_cap(_plain(x).reshape(-1), np.float32(cap), y.reshape(-1))
    return y


def softmax(x: Array) -> Array:
    """Twin of ops.softmax; a row's sum does not depend on where the row stands.

    x [..., S] -> [..., S]
    """
    if x.dtype != np.float32:
        return definitions.softmax(x)
    y = np.empty(x.shape, np.float32)
    _softmax(_rows(x), np.max(_rows(x), axis=-1), _rows(y))  # a maximum is exact in any order
    return y


def log_softmax(logits: Array) -> Doubles:
    """Twin of ops.log_softmax, in float64 whatever it is given.

    logits [V] -> [V]
    """
    y = np.empty(logits.shape, np.float64)
    _log_softmax(_plain(np.asarray(logits, np.float64)), float(np.max(logits)), y)
    return y


def gelu_tanh(x: Array) -> Array:
    """Twin of ops.gelu_tanh that becomes vector code and keeps its digits where x is negative.

    x [...] -> [...]
    """
    if x.dtype != np.float32:
        return definitions.gelu_tanh(x)
    y = np.empty(x.shape, np.float32)
    _gelu_tanh(_plain(x).reshape(-1), y.reshape(-1))
    return y


def unit(x: Array) -> Array:
    """Twin of ops.unit that rounds each number once.

    x [..., D] -> [..., D]
    """
    if x.dtype != np.float32:
        return definitions.unit(x)
    y = np.empty(x.shape, np.float32)
    _unit(_rows(x), _rows(y))
    return y


def _plain(x: Array) -> Array:
    """The same numbers as an array of the one kind that the kernels are compiled for."""
    return x if x.flags.carray else np.require(x, requirements=("C", "A", "W"))


def _rows(x: Array) -> Floats:
    return _plain(x).reshape(-1, x.shape[-1])


def _gain(weight: Weight) -> Floats:
    return _plain(unpack(weight, np.float32))


@parallel
def _layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float, y: Floats) -> None:
    if x.size < FEW:
        for t in range(len(x)):
            _layer_norm_row(x[t], weight, bias, eps, y[t])
    else:
        for t in prange(len(x)):
            _layer_norm_row(x[t], weight, bias, eps, y[t])


@compiled
def _layer_norm_row(x: Floats, weight: Floats, bias: Floats, eps: float, y: Floats) -> None:
    D, terms = len(x), np.empty(len(x), np.float64)
    for i in range(D):
        terms[i] = x[i]
    mean = _total(terms) / D
    for i in range(D):
        centred = x[i] - mean
        terms[i] = centred * centred
    scale = 1.0 / np.sqrt(_total(terms) / D + eps)
    for i in range(D):
        y[i] = fma((x[i] - mean) * scale, np.float64(weight[i]), np.float64(bias[i]))


@parallel
def _rms_norm(x: Floats, weight: Floats, eps: float, y: Floats) -> None:
    if x.size < FEW:
        for t in range(len(x)):
            _rms_norm_row(x[t], weight, eps, y[t])
    else:
        for t in prange(len(x)):
            _rms_norm_row(x[t], weight, eps, y[t])


@compiled
def _rms_norm_row(x: Floats, weight: Floats, eps: float, y: Floats) -> None:
    D, terms = len(x), np.empty(len(x), np.float64)
    for i in range(D):
        terms[i] = np.float64(x[i]) * x[i]
    scale = 1.0 / np.sqrt(_total(terms) / D + eps)
    for i in range(D):
        y[i] = x[i] * scale * (1.0 + np.float64(weight[i]))


@compiled
def _total(terms: Doubles) -> float:
    """Add up numbers, writing over them: the second half onto the first until one is left.

    Nothing else fixes the order, so it becomes vector code and is the same on every CPU.
    """
    n = len(terms)
    while n > 1:
        half = (n + 1) // 2
        for i in range(n - half):
            terms[i] += terms[half + i]
        n = half
    return terms[0]


@parallel
def _unit(x: Floats, y: Floats) -> None:
    if x.size < FEW:
        for t in range(len(x)):
            _unit_row(x[t], y[t])
    else:
        for t in prange(len(x)):
            _unit_row(x[t], y[t])


@compiled
def _unit_row(x: Floats, y: Floats) -> None:
    terms = np.empty(len(x), np.float64)
    for i in range(len(x)):
        terms[i] = np.float64(x[i]) * x[i]
    scale = 1.0 / np.sqrt(_total(terms))
    for i in range(len(x)):
        y[i] = x[i] * scale


@parallel
def _rope(x: Floats, positions: Index, theta: float, y: Floats) -> None:
    half = x.shape[2] // 2
    frequencies = np.empty(half, np.float64)
    for j in range(half):
        frequencies[j] = exp_64(-j / half * log_64(theta))
    if x.size < FEW:
        for t in range(len(x)):
            _rope_row(x[t], np.float64(positions[t]), frequencies, y[t])
    else:
        for t in prange(len(x)):
            _rope_row(x[t], np.float64(positions[t]), frequencies, y[t])


@compiled
def _rope_row(x: Floats, position: float, frequencies: Doubles, y: Floats) -> None:
    half = len(frequencies)
    sin, cos = np.empty(half, np.float64), np.empty(half, np.float64)
    for j in range(half):
        sin[j], cos[j] = sin_cos(position * frequencies[j])
    for h in range(len(x)):
        for j in range(half):
            left, right = np.float64(x[h, j]), np.float64(x[h, half + j])
            y[h, j] = left * cos[j] - right * sin[j]
            y[h, half + j] = right * cos[j] + left * sin[j]


@compiled
def _soft_cap(x: Floats, cap: np.float32, y: Floats) -> None:
    for i in range(len(x)):
        y[i] = cap * tanh(x[i] / cap)


@compiled
def _softmax(x: Floats, top: Floats, y: Floats) -> None:
    terms = np.empty(x.shape[1], np.float64)
    for t in range(len(x)):
        for i in range(len(terms)):
            y[t, i] = exp(x[t, i] - top[t])
            terms[i] = y[t, i]
        scale = 1.0 / _total(terms)
        for i in range(len(terms)):
            y[t, i] = y[t, i] * scale


@compiled
def _log_softmax(logits: Doubles, top: float, y: Doubles) -> None:
    for i in range(len(logits)):
        y[i] = exp_64(logits[i] - top)
    log_total = log_64(_total(y))
    for i in range(len(logits)):
        y[i] = logits[i] - top - log_total


@parallel
def _gelu_tanh(x: Floats, y: Floats) -> None:
    if x.size < FEW:
        for i in range(len(x)):
            y[i] = gelu(x[i])
    else:
        for i in prange(len(x)):
            y[i] = gelu(x[i])
