"""SigLIP, the image tower: a vision transformer without a class token.

Axis letters: N pictures · P patches of a picture · T = N x P patches in this call · D hidden_size ·
H heads · d width of a head · R picture side.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from npvlm.config import VisionConfig
from npvlm.model.ops import Index
from npvlm.model.tap import Tap, within
from npvlm.model.weights import Array, Weights, unpack


def patch_features(
    pixel_values: Array, w: Weights, config: VisionConfig, *, ops: ModuleType, tap: Tap
) -> Array:
    """Turn pictures into one vector per patch, each knowing its whole picture.

    Pictures are packed end to end as sequences are: patches see their own picture only.

    pixel_values [N, 3, R, R] -> [N, P, D]
    Source: SigLIP, arXiv 2303.15343; the So400m shape, arXiv 2305.13035.
    """
    x = embed(pixel_values, w, ops=ops, tap=tap)
    N, P, D = x.shape
    x = x.reshape(N * P, D)
    first = np.repeat(np.arange(N) * P, P)
    last = first + P
    for i in range(config.num_hidden_layers):
        name = f"encoder.layers.{i}"
        x = layer(x, w.scope(name), config, first, last, ops=ops, tap=within(tap, name))
        x = tap(name, x)

    norm = w.scope("post_layernorm")
    x = ops.layer_norm(x, norm["weight"], norm["bias"], config.layer_norm_eps)
    return tap("post_layernorm", x).reshape(N, P, D)


def embed(pixel_values: Array, w: Weights, *, ops: ModuleType, tap: Tap) -> Array:
    """Turn each square of a picture into a vector and add what was learned about its place.

    pixel_values [N, 3, R, R] -> [N, P, D]
    """
    e = w.scope("embeddings")
    x = ops.patch_embed(pixel_values, e["patch_embedding.weight"], e["patch_embedding.bias"])
    x = tap("embeddings.patch_embedding", x)
    return tap("embeddings", x + unpack(e["position_embedding.weight"], x.dtype))


def layer(
    x: Array,
    w: Weights,
    config: VisionConfig,
    first: Index,
    last: Index,
    *,
    ops: ModuleType,
    tap: Tap,
) -> Array:
    """Look around, then think: attention and MLP, each on a normed copy and added back.

    x [T, D], first [T], last [T] -> [T, D]
    """

    def norm(value: Array, name: str) -> Array:
        gain, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return tap(name, ops.layer_norm(value, gain, bias, config.layer_norm_eps))

    normed, inner = norm(x, "layer_norm1"), within(tap, "self_attn")
    attention = self_attention(
        normed, w.scope("self_attn"), config, first, last, ops=ops, tap=inner
    )
    x = x + tap("self_attn", attention)

    normed, inner = norm(x, "layer_norm2"), within(tap, "mlp")
    return x + tap("mlp", mlp(normed, w.scope("mlp"), ops=ops, tap=inner))


def self_attention(
    x: Array,
    w: Weights,
    config: VisionConfig,
    first: Index,
    last: Index,
    *,
    ops: ModuleType,
    tap: Tap,
) -> Array:
    """Let each patch gather from all patches of its picture.

    x [T, D], first [T], last [T] -> [T, D]
    """

    def heads(name: str) -> Array:
        projected = tap(name, ops.linear(x, w[f"{name}.weight"], w[f"{name}.bias"]))
        return projected.reshape(len(x), config.num_attention_heads, config.head_dim)  # [T, H, d]

    q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")

    mixed = ops.attend(q, k, v, first, first, last, config.head_dim**-0.5)  # [T, H, d]
    mixed = tap("attend", mixed)
    return ops.linear(mixed.reshape(len(x), -1), w["out_proj.weight"], w["out_proj.bias"])


def mlp(x: Array, w: Weights, *, ops: ModuleType, tap: Tap) -> Array:
    """Widen, bend, narrow.

    x [T, D] -> [T, D]
    """
    wide = tap("fc1", ops.linear(x, w["fc1.weight"], w["fc1.bias"]))
    return ops.linear(tap("gelu", ops.gelu_tanh(wide)), w["fc2.weight"], w["fc2.bias"])
