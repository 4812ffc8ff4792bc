"""Everything PaliGemma computes, one operation at a time: THE DEFINITIONS, in plain NumPy.

Read from top to bottom, this is the list of what a port has to get right. Every operation returns
the dtype it was given: float32 for use, float64 for truth.

Axis letters: T tokens (or patches) in this call · S tokens that can be seen, by row of the cache ·
N pictures · P patches of a picture · C colour channels · R picture side · D width · F inner width
of the MLP · H query heads · K key/value heads · d width of a head · V vocabulary · O, I out and in
features of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import DTypeLike, NDArray

from npvlm.model.weights import Array, Weight, unpack

Index = NDArray[np.int64]

BLOCK = 2**20  # weights widened at a time: 4 MB as float32, which stay in the cache
RUN = 128  # terms of a sum that are added one after the other


def linear(x: Array, w: Weight, bias: Weight | None = None) -> Array:
    """Map each row to the products with the rows of w, plus the bias.

    Weights are stored [out, in] and used as stored: 16-bit ones are widened a block of rows at a
    time, never as a whole. Products are summed in short runs, and then the runs: a long chain of
    float32 additions rounds half as well again.

    x [T, I], w [O, I], bias [O] -> [T, O]
    """
    (O, I), y = w.shape, np.empty((len(x), w.shape[0]), x.dtype)
    rows = max(1, BLOCK // I)
    for start in range(0, O, rows):
        block = slice(start, start + rows)
        wide = unpack(w[block], x.dtype)
        y[:, block] = sum(x[:, i : i + RUN] @ wide[:, i : i + RUN].T for i in range(0, I, RUN))
    if bias is not None:
        y += unpack(bias, x.dtype)
    return y


def patch_embed(pixel_values: Array, w: Weight, bias: Weight) -> Array:
    """Cut each picture into squares and map each square to a vector.

    A convolution whose stride is its kernel is a linear layer over the squares, taken row by row;
    inside a square the colour channel comes first, then y, then x.

    pixel_values [N, C, R, R], w [D, C, p, p], bias [D] -> [N, P, D]
    Source: An Image is Worth 16x16 Words, arXiv 2010.11929.
    """
    (N, C, R, _), (D, _, p, _) = pixel_values.shape, w.shape
    side = R // p
    squares = pixel_values[:, :, : side * p, : side * p].reshape(N, C, side, p, side, p)
    squares = squares.transpose(0, 2, 4, 1, 3, 5).reshape(N * side * side, C * p * p)
    return linear(squares, w.reshape(D, C * p * p), bias).reshape(N, side * side, D)


def embed(ids: Index, table: Weight, scale: float, dtype: DTypeLike) -> Array:
    """Look up the row of each id and multiply it by scale.

    Gemma's scale is sqrt(D), and it is for text alone: image features enter the decoder unscaled.

    ids [T], table [V, D] -> [T, D]
    """
    return (unpack(table[ids], np.float64) * scale).astype(dtype)


def layer_norm(x: Array, weight: Weight, bias: Weight, eps: float) -> Array:
    """Shift each row to mean 0, scale it to variance 1, then apply gain and bias.

    The variance is the mean square (divided by D, not D - 1); SigLIP's eps is 1e-6.

    x [..., D], weight [D], bias [D] -> [..., D]
    Source: Layer Normalization, arXiv 1607.06450.
    """
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred / np.sqrt(variance + eps)
    return normed * unpack(weight, x.dtype) + unpack(bias, x.dtype)


def rms_norm(x: Array, weight: Weight, eps: float) -> Array:
    """Scale each row to unit root mean square, then by 1 + weight.

    Gemma stores the gain as its distance from one: a zero weight changes nothing.

    x [..., D], weight [D] -> [..., D]
    Source: Gemma report, arXiv 2403.08295; RMSNorm, arXiv 1910.07467.
    """
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * (1.0 + unpack(weight, x.dtype))


def rope(x: Array, positions: Index, theta: float) -> Array:
    """Turn each pair of dimensions by an angle that grows with the position.

    Dimension j is paired with j + d/2 (halves, not neighbours). The angles are float64 whatever x
    is: at position 4,000 a float32 angle is off by 1e-4.

    x [T, H, d], positions [T] -> [T, H, d]
    Source: RoFormer, arXiv 2104.09864; the pairing of halves is the reference implementation's.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    angles = positions[:, None, None] * frequencies  # [T, 1, d/2]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def soft_cap(x: Array, cap: float) -> Array:
    """Squeeze values smoothly into (-cap, cap).

    x [...] -> [...]
    Source: Gemma 2 report, arXiv 2408.00118.
    """
    return cap * np.tanh(x / cap)


def softmax(x: Array) -> Array:
    """Turn each row into weights that sum to one; -inf gets exactly zero.

    x [..., S] -> [..., S]
    """
    grown = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return grown / np.sum(grown, axis=-1, keepdims=True)


def attend(
    q: Array,
    k: Array,
    v: Array,
    first: Index,
    last: Index,
    scale: float,
    cap: float | None = None,
) -> Array:
    """Weigh the values by how well each query matches the keys it may see.

    Token t sees the rows first[t] up to, not including, last[t]. Query head h reads key/value head
    h // (H // K). The order is scale, soft-cap, mask, softmax. One head of one sequence is scored
    at a time, so a long sequence never has the scores of all heads in memory.

    q [T, H, d], k [S, K, d], v [S, K, d], first [T], last [T] -> [T, H, d]
    Source: Attention Is All You Need, arXiv 1706.03762; grouped queries, arXiv 2305.13245.
    """
    (H, K), mixed = (q.shape[1], k.shape[1]), np.empty_like(q)
    for rows in sequences(first, last):
        start, stop = first[rows].min(), last[rows].max()
        at = np.arange(start, stop)
        visible = (first[rows, None] <= at) & (at < last[rows, None])  # [T, S]
        for h in range(H):
            group = h // (H // K)
            scores = q[rows, h] @ k[start:stop, group].T * scale  # [T, S]
            if cap is not None:
                scores = soft_cap(scores, cap)
            weights = softmax(np.where(visible, scores, -np.inf))
            mixed[rows, h] = weights @ v[start:stop, group]
    return mixed


def sequences(first: Index, last: Index) -> Iterator[slice]:
    """The runs of tokens that belong together: neighbours that can see a common row."""
    apart = (first[1:] >= last[:-1]) | (last[1:] <= first[:-1])
    edges = [0, *(np.flatnonzero(apart) + 1), len(first)]
    for start, stop in pairwise(edges):
        yield slice(start, stop)


def gelu_tanh(x: Array) -> Array:
    """The smooth gate x * Phi(x), in its tanh form.

    Both towers use this form; the exact one (erf) drifts by 1e-3 a layer.

    x [...] -> [...]
    Source: Gaussian Error Linear Units, arXiv 1606.08415, section 2.
    """
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + np.tanh(inner))
