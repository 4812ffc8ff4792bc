"""The mask decoder: sixteen `<seg...>` tokens become a small picture of where a thing is.

Pictures have their channels last here, so that a pixel is a row and a convolution a linear layer.

Axis letters: N masks · h, w sides of a picture · u, v of one twice as large · C, O channels in and
out · k side of a kernel · E width of a code.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike

from npvlm.model.ops import Index
from npvlm.model.weights import Array, Weights, unpack

CODEBOOK = "_vq_vae._embedding"
GRID = 4  # a mask is GRID x GRID codes, row by row


def decode_masks(codes: Index, w: Weights, dtype: DTypeLike, *, ops: ModuleType) -> Array:
    """Paint masks from their codes: above 0 inside of the thing, about -1 to 1.

    codes [N, 16] -> [N, 64, 64]
    Source: big_vision's evaluator of PaliGemma's segmentation; VQ-VAE, arXiv 1711.00937.
    """
    codebook = unpack(w[CODEBOOK], dtype)
    x = codebook[codes].reshape(len(codes), GRID, GRID, -1)  # [N, 4, 4, E]
    w = w.scope("decoder")
    x = _relu(conv(x, w, "0", ops=ops))
    for block in ("2", "3"):
        x = x + _residual(x, w.scope(f"{block}.net"), ops=ops)
    for layer in ("4", "6", "8", "10"):
        x = _relu(conv_transpose(x, w, layer, ops=ops))  # [N, 8, 8, 128], ... [N, 64, 64, 16]
    return conv(x, w, "12", ops=ops)[..., 0]


def _residual(x: Array, w: Weights, *, ops: ModuleType) -> Array:
    """Three convolutions, bent between but not after. x [N, h, w, C] -> [N, h, w, C]"""
    x = _relu(conv(x, w, "0", ops=ops))
    x = _relu(conv(x, w, "2", ops=ops))
    return conv(x, w, "4", ops=ops)


def _relu(x: Array) -> Array:
    """Cut off what is negative. x [...] -> [...]"""
    return np.maximum(x, 0)


def conv(x: Array, w: Weights, layer: str, *, ops: ModuleType) -> Array:
    """Map every pixel and what surrounds it, beyond the edges zeros; the size stays.

    x [N, h, w, C], w [O, C, k, k], bias [O] -> [N, h, w, O]
    """
    weight = unpack(w[f"{layer}.weight"], x.dtype)
    O, C, k, _ = weight.shape
    edge = k // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    around = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))
    rows = around.reshape(-1, C * k * k)  # [N h w, C k k]
    return ops.linear(rows, weight.reshape(O, -1), w[f"{layer}.bias"]).reshape(*x.shape[:3], O)


def conv_transpose(x: Array, w: Weights, layer: str, *, ops: ModuleType) -> Array:
    """Paint every pixel as a square of 4 x 4, two apart, added up where they overlap.

    What reaches beyond the doubled picture by a pixel is cut off. Kernels are stored [C, O, 4, 4].

    x [N, h, w, C], w [C, O, k, k], bias [O] -> [N, u, v, O]
    """
    (N, height, width, C), weight = x.shape, unpack(w[f"{layer}.weight"], x.dtype)
    _, O, k, _ = weight.shape
    flat = np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(-1, C)  # [k k O, C]
    squares = ops.linear(x.reshape(-1, C), flat).reshape(N, height, width, k, k, O)
    y = np.zeros((N, 2 * height + 2, 2 * width + 2, O), x.dtype)
    for i in range(k):
        for j in range(k):
            y[:, i : i + 2 * height : 2, j : j + 2 * width : 2] += squares[:, :, :, i, j]
    return y[:, 1:-1, 1:-1] + unpack(w[f"{layer}.bias"], x.dtype)
