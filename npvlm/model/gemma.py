"""Gemma 1 and Gemma 2, the decoder.

The families differ in three things: Gemma 2 norms the output of each half-layer too, soft-caps its
scores and logits, and gives every other layer a sliding window.

Axis letters: T tokens in this call · W of them that are wanted · C rows of the cache ·
D hidden_size · F intermediate_size · H query heads · K key/value heads · d head_dim · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

from numpy.typing import DTypeLike

from npvlm.config import TextConfig
from npvlm.model.cache import LayerCache, Rows
from npvlm.model.ops import Index
from npvlm.model.tap import Tap, within
from npvlm.model.weights import Array, Weights


def embed(
    ids: Index, w: Weights, config: TextConfig, dtype: DTypeLike, *, ops: ModuleType
) -> Array:
    """Turn token ids into vectors, scaled by sqrt(D).

    ids [T] -> [T, D]
    """
    return ops.embed(ids, w["model.embed_tokens.weight"], math.sqrt(config.hidden_size), dtype)


def hidden_states(
    x: Array,
    w: Weights,
    config: TextConfig,
    cache: Sequence[LayerCache],
    rows: Rows,
    wanted: Index,
    *,
    ops: ModuleType,
    tap: Tap,
) -> Array:
    """Carry vectors through every layer and the final norm; the cache is filled on the way.

    Of the last layer only the `wanted` tokens are needed, though the keys and values of all.

    x [T, D], wanted [W] -> [W, D]
    Source: Gemma, arXiv 2403.08295; Gemma 2, arXiv 2408.00118.
    """
    for i, kind in enumerate(config.layer_types):
        name = f"layers.{i}"
        inner = w.scope(f"model.{name}")
        seen = rows.sliding(config.sliding_window if kind == "sliding_attention" else None)
        last = i == config.num_hidden_layers - 1
        asked = wanted if last and len(wanted) < len(x) else slice(None)
        x = layer(x, inner, config, cache[i], seen, asked, ops=ops, tap=within(tap, name))
        x = tap(name, x)
    return tap("norm", ops.rms_norm(x, w["model.norm.weight"], config.rms_norm_eps))


def layer(
    x: Array,
    w: Weights,
    config: TextConfig,
    cache: LayerCache,
    rows: Rows,
    wanted: Index | slice,
    *,
    ops: ModuleType,
    tap: Tap,
) -> Array:
    """Look back, then think: attention and MLP, each on a normed copy and added to the stream.

    All tokens leave their keys and values in the cache, the wanted ones go on. The name
    post_attention_layernorm means two things: in Gemma 1 it is the norm before the MLP, in Gemma 2
    the norm of what attention gives.

    x [T, D], wanted [W] -> [W, D]
    """

    def norm(value: Array, name: str) -> Array:
        return tap(name, ops.rms_norm(value, w[f"{name}.weight"], config.rms_norm_eps))

    attention = self_attention(
        norm(x, "input_layernorm"),
        w.scope("self_attn"),
        config,
        cache,
        rows,
        wanted,
        ops=ops,
        tap=within(tap, "self_attn"),
    )
    attention = tap("self_attn", attention)
    x = x[wanted]

    if config.model_type == "gemma":
        x = x + attention
        normed = norm(x, "post_attention_layernorm")
        return x + tap("mlp", mlp(normed, w.scope("mlp"), ops=ops, tap=within(tap, "mlp")))

    x = x + norm(attention, "post_attention_layernorm")
    normed = norm(x, "pre_feedforward_layernorm")
    thought = tap("mlp", mlp(normed, w.scope("mlp"), ops=ops, tap=within(tap, "mlp")))
    return x + norm(thought, "post_feedforward_layernorm")


def self_attention(
    x: Array,
    w: Weights,
    config: TextConfig,
    cache: LayerCache,
    rows: Rows,
    wanted: Index | slice,
    *,
    ops: ModuleType,
    tap: Tap,
) -> Array:
    """Let each wanted token gather from the tokens it may see, through the cache.

    x [T, D], wanted [W] -> [W, D]
    """
    d, asking = config.head_dim, rows.at(wanted)
    q = tap("q_proj", ops.linear(x[wanted], w["q_proj.weight"])).reshape(
        -1, config.num_attention_heads, d
    )
    k = tap("k_proj", ops.linear(x, w["k_proj.weight"])).reshape(len(x), -1, d)  # [T, K, d]
    v = tap("v_proj", ops.linear(x, w["v_proj.weight"])).reshape(len(x), -1, d)  # [T, K, d]

    q = tap("q_rope", ops.rope(q, asking.positions, config.rope_theta))
    k = tap("k_rope", ops.rope(k, rows.positions, config.rope_theta))
    keys, values = cache.write(rows.slots, k, v)  # [C, K, d]

    scale, cap = config.attention_scale, config.attn_logit_softcapping
    mixed = ops.attend(
        q, keys, values, asking.start, asking.first, asking.last, scale, cap
    )  # [W, H, d]
    mixed = tap("attend", mixed).reshape(len(q), -1)
    return ops.linear(mixed, w["o_proj.weight"])  # [W, D]


def mlp(x: Array, w: Weights, *, ops: ModuleType, tap: Tap) -> Array:
    """Widen twice, let one half gate the other, narrow.

    x [T, D] -> [T, D]
    """
    wide = ops.gated(x, w["gate_proj.weight"], w["up_proj.weight"], tap=tap)  # [T, F]
    return ops.linear(tap("gated", wide), w["down_proj.weight"])


def logits(x: Array, w: Weights, config: TextConfig, *, ops: ModuleType, tap: Tap) -> Array:
    """Score every entry of the vocabulary: the embedding table serves as the last layer.

    A checkpoint whose tables are not tied has a lm_head of its own.

    x [T, D] -> [T, V]
    """
    scores = ops.linear(x, w.get("lm_head.weight", w["model.embed_tokens.weight"]))
    if config.final_logit_softcapping is not None:
        scores = ops.soft_cap(scores, config.final_logit_softcapping)
    return tap("logits", scores)
