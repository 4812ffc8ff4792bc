"""What is inside of a model while it reads: features of the tower, hidden states, attention.

One pass over pictures and prompt, of which only what is asked for is kept.

Axis letters: T tokens · M image tokens among them · D width of the decoder or the tower ·
L layers that are asked for · H query heads · K key/value heads · d width of a head · P patches of a
picture · R picture side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np

from npvlm.answers.attention import attention_weights
from npvlm.config import Config, TextConfig
from npvlm.model import gemma, paligemma, siglip
from npvlm.model.cache import Rows, new_cache
from npvlm.model.ops import Index
from npvlm.model.tap import Tap, closed, within
from npvlm.model.weights import Array, Weights

TOWER = "vision_tower.vision_model"
TEXT = "language_model.model"


def tower_features(pixels: Array, w: Weights, config: Config, *, ops: ModuleType) -> Array:
    """What the image tower makes of a picture, after its last norm and before the projector.

    pixels [3, R, R] -> [P, D]
    """
    tower, vision = w.scope(TOWER), config.vision_config
    return siglip.patch_features(pixels[None], tower, vision, ops=ops, tap=closed)[0]


def hidden_states(
    ids: Index,
    features: Array,
    layers: Sequence[int],
    w: Weights,
    config: Config,
    *,
    ops: ModuleType,
) -> Array:
    """What the decoder carries, by the numbers that transformers gives to its output_hidden_states.

    0 is what enters the first layer, n what leaves the n-th; but the last number is what leaves the
    norm behind the last layer. Layers behind those that are asked for are not run.

    ids [T], features [M, D] -> [L, T, D]
    """
    names = [f"{TEXT}.layers.{n - 1}" if n else "inputs_embeds" for n in layers]
    most = config.text_config.num_hidden_layers
    names = [f"{TEXT}.norm" if n == most else name for n, name in zip(layers, names, strict=True)]
    states = np.empty((len(layers), len(ids), features.shape[1]), features.dtype)

    def keep(name: str, value: Array) -> Array:
        for place, wanted in enumerate(names):
            if name == wanted:
                states[place] = value
        return value

    _read(ids, features, max(layers), w, config, ops=ops, tap=keep)
    return states


def attention(
    ids: Index,
    features: Array,
    layers: Sequence[int],
    w: Weights,
    config: Config,
    *,
    ops: ModuleType,
) -> Array:
    """How much each token looks at each, in each head of the layers asked for, counted from 0.

    ids [T], features [M, D] -> [L, H, T, T]
    """
    text, T = config.text_config, len(ids)
    weights = np.empty((len(layers), text.num_attention_heads, T, T), features.dtype)
    queries: dict[str, Array] = {}

    def weigh(name: str, value: Array) -> Array:
        layer = name.removesuffix(".self_attn.q_rope").removesuffix(".self_attn.k_rope")
        for place, n in enumerate(layers):
            if layer != f"{TEXT}.layers.{n}":
                continue
            if name.endswith(".q_rope"):
                queries[layer] = value
            elif name.endswith(".k_rope"):
                weights[place] = _weights(queries[layer], value, config.text_config)
        return value

    _read(ids, features, max(layers) + 1, w, config, ops=ops, tap=weigh)
    return weights


def _weights(q: Array, k: Array, text: TextConfig) -> Array:
    """The weights of one layer, head by head. q [T, H, d], k [T, K, d] -> [H, T, T]

    A prompt sees all of itself, in a layer with a window, too.
    """
    T = len(q)
    rows = Rows.of(0, T, range(T))
    group = q.shape[1] // k.shape[1]
    heads = [
        attention_weights(
            q[:, h : h + 1],
            k[:, h // group : h // group + 1],
            rows.first,
            rows.last,
            text.attention_scale,
            text.attn_logit_softcapping,
        )[0]
        for h in range(q.shape[1])
    ]
    return np.stack(heads)


def _read(
    ids: Index,
    features: Array,
    layers: int,
    w: Weights,
    config: Config,
    *,
    ops: ModuleType,
    tap: Tap,
) -> None:
    """Show a tap what pictures and prompt become in the first layers, of all tokens."""
    x = paligemma.embed(ids, features, w, config, ops=ops, tap=tap)
    kinds = config.text_config.layer_types[:layers]
    text = replace(config.text_config, num_hidden_layers=layers, layer_types=kinds)
    cache, rows = new_cache(text, len(x), x.dtype), Rows.of(0, len(x), range(len(x)))
    inner, every = w.scope("language_model"), np.arange(len(x))
    gemma.hidden_states(x, inner, text, cache, rows, every, ops=ops, tap=within(tap, TEXT))
