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

import numpy as np
from numpy.typing import DTypeLike, NDArray

from npvlm.model.tap import Tap
from npvlm.model.weights import (
    Adapted,
    Array,
    BFloat16,
    BFloat16Product,
    Int4,
    Int8,
    Packed,
    Weight,
    quantize,
    rotate,
    round_to_bfloat16,
    unpack,
)

Index = NDArray[np.int64]

BLOCK = 2**20  # weights widened at a time: 4 MB as float32, which stay in the cache
RUN = 64  # terms of a sum that are added one after the other


def linear(x: Array, w: Weight, bias: Weight | None = None) -> Array:
    """Map each row to the products with the rows of w, plus the bias.

    Weights are stored [out, in] and used as stored: they are widened a block of rows at a time,
    never as a whole. Products are summed in short runs, and then the runs: a long chain of float32
    additions rounds half as well again. What kind of weight it is says how exact the inputs are:
    as they come, rounded to bfloat16, or rotated and rounded to 8 bits. A correction beside a
    weight has products of its own, with inputs as they come.

    x [T, I], w [O, I], bias [O] -> [T, O]
    """
    if isinstance(w, Adapted):
        y = _corrected_products(x, w)
    elif isinstance(w, Int8 | Int4):
        y = _integer_products(x, w)
    else:
        if isinstance(w, BFloat16Product):
            x = unpack(round_to_bfloat16(x), x.dtype)
        y = np.empty((len(x), len(w)), x.dtype)
        for block in _blocks(w):
            wide = unpack(w[block], x.dtype)
            runs = range(0, x.shape[1], RUN)
            y[:, block] = sum(x[:, i : i + RUN] @ wide[:, i : i + RUN].T for i in runs)
    if bias is not None:
        y += unpack(bias, x.dtype)
    return y


def _corrected_products(x: Array, w: Adapted) -> Array:
    """The products with the weight as it is stored, and beside them those with its correction.

    x [T, I], w [O, I] -> [T, O]
    """
    y = linear(x, w.base)
    y += linear(linear(x, w.down) * w.scale, w.up)
    if w.gain is not None:
        y *= w.gain
    return y


def _integer_products(x: Array, w: Packed) -> Array:
    """Round each rotated row to 8 bits with one scale, then multiply whole numbers.

    Sums of whole numbers have no rounding, so their order is free: float64 holds the int8 ones
    exactly. Int4 multiplies the sum of each group by the group's scale and adds the groups up; in
    float64, as here, that is as good as exact, and a kernel may round on the way. The result is
    rounded to the type of x before the last multiplications, which are done in that type: by
    (scale of x * scale of w) in Int8, by the scale of x in Int4.

    x [T, I], w [O, I] -> [T, O]
    """
    values, scales = quantize(rotate(x, w.block))  # [T, J], [T]
    wide, y = values.astype(np.float64), np.empty((len(x), len(w)), x.dtype)
    for block in _blocks(w):
        part = w[block]
        if isinstance(part, Int8):
            sums = (wide @ part.values.T.astype(np.float64)).astype(x.dtype)
            y[:, block] = sums * (scales[:, None] * part.scales.astype(x.dtype))
        else:
            sums = (wide @ part.rotated().T.astype(np.float64)).astype(x.dtype)
            y[:, block] = sums * scales[:, None]
    return y


def _blocks(w: Weight) -> Iterator[slice]:
    """Runs of rows that are few enough to be widened together."""
    O, I = w.shape
    rows = max(1, BLOCK // I)
    for start in range(0, O, rows):
        yield slice(start, start + rows)


def patch_embed(pixel_values: Array, w: Array | BFloat16 | Adapted, bias: Weight) -> Array:
    """Cut each picture into squares and map each square to a vector.

    A convolution whose stride is its kernel is a linear layer over the squares, taken row by row;
    inside a square the colour channel comes first, then y, then x.

    pixel_values [N, C, R, R], w [D, C, p, p], bias [D] -> [N, P, D]
    Source: An Image is Worth 16x16 Words, arXiv 2010.11929.
    """
    cut = squares(pixel_values, w.shape[-1])  # [N, P, I]
    (N, P, I), D = cut.shape, len(w)
    return linear(cut.reshape(N * P, I), w.reshape(D, I), bias).reshape(N, P, D)


def squares(pixel_values: Array, p: int) -> Array:
    """Cut each picture into squares of p x p pixels; what does not fill a square is left out.

    pixel_values [N, C, R, R] -> [N, P, I]
    """
    N, C, R, _ = pixel_values.shape
    side = R // p
    cut = pixel_values[:, :, : side * p, : side * p].reshape(N, C, side, p, side, p)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(N, side * side, C * p * p)


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


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """Natural logarithms of the weights that softmax gives, in float64 whatever the logits are.

    logits [V] -> [V]
    """
    shifted = logits.astype(np.float64) - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def attend(
    q: Array,
    k: Array,
    v: Array,
    start: Index,
    first: Index,
    last: Index,
    scale: float,
    cap: float | None = None,
) -> Array:
    """Weigh the values by how well each query matches the keys it may see.

    Token t belongs to the sequence that begins at row start[t], and sees the rows first[t] up to,
    not including, last[t]. Query head h reads key/value head h // (H // K). The order is scale,
    soft-cap, mask, softmax. One head of one sequence is scored at a time, so a long sequence never
    has the scores of all heads in memory.

    q [T, H, d], k [S, K, d], v [S, K, d], start [T], first [T], last [T] -> [T, H, d]
    Source: Attention Is All You Need, arXiv 1706.03762; grouped queries, arXiv 2305.13245.
    """
    (H, K), mixed = (q.shape[1], k.shape[1]), np.empty_like(q)
    edges = [0, *(np.flatnonzero(np.diff(start)) + 1), len(q)]
    for rows in map(slice, edges, edges[1:]):
        low, high = first[rows].min(), last[rows].max()
        at = np.arange(low, high)
        visible = (first[rows, None] <= at) & (at < last[rows, None])  # [T, S]
        for h in range(H):
            group = h // (H // K)
            scores = q[rows, h] @ k[low:high, group].T * scale  # [T, S]
            if cap is not None:
                scores = soft_cap(scores, cap)
            weights = softmax(np.where(visible, scores, -np.inf))
            mixed[rows, h] = weights @ v[low:high, group]
    return mixed


def gelu_tanh(x: Array) -> Array:
    """The smooth gate x * Phi(x), in its tanh form.

    Both towers use this form; the exact one (erf) drifts by 1e-3 a layer.

    x [...] -> [...]
    Source: Gaussian Error Linear Units, arXiv 1606.08415, section 2.
    """
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + np.tanh(inner))


def gated(x: Array, gate: Weight, up: Weight, *, tap: Tap) -> Array:
    """Widen twice and let one half, bent, gate the other.

    The two products are shown to the tap as gate_proj and up_proj.

    x [T, I], gate [O, I], up [O, I] -> [T, O]
    Source: GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    left = tap("gate_proj", linear(x, gate))
    right = tap("up_proj", linear(x, up))
    return gelu_tanh(left) * right


def unit(x: Array) -> Array:
    """Scale each row to length 1, so that the product of two rows is the cosine between them.

    There is no eps: a row of zeros has no direction and becomes nan.

    x [..., D] -> [..., D]
    Source: ColPali, arXiv 2407.01449.
    """
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True))


def max_sim(q: Array, pages: Weight, size: int) -> Array:
    """Score pages for a query: each row of q takes its best product with a row of the page, summed.

    Every `size` rows of `pages` are a page. What a page scores depends on that page alone. All rows
    of a query count, those of its padding tokens too.

    q [T, I], pages [O, I] -> [N]
    Source: late interaction, ColBERT, arXiv 2004.12832.
    """
    scores = np.empty(len(pages) // size, q.dtype)
    for n in range(len(scores)):
        products = linear(q, pages[n * size : (n + 1) * size])  # [T, size]
        scores[n] = np.sum(np.max(products, axis=1), dtype=np.float64)
    return scores
