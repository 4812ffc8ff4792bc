"""Known mistakes behind the projector: the merge, the layers of Gemma, the scores.

Axis letters: T tokens · P image tokens · D hidden_size · H query heads · K key/value heads ·
d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from npvlm.model.ops import Index
from npvlm.model.tap import Tap
from npvlm.model.weights import Array, Weight, unpack
from npvlm.porting.stages import TEXT, TOWER
from npvlm.porting.suspects_case import Case, Guess, Suspect
from npvlm.porting.suspects_tower import FEATURES, gelu_erf, silu, with_gelu, with_scale

MERGED = "inputs_embeds"
# Bases of RoPE that other models have, and sqrt(10000): what comes of d where d/2 belongs.
BASES = (1e6, 5e5, 1e5, 1e3, 100.0)


# The merge


def with_features(c: Case, change: Callable[[Array], Array]) -> Array | None:
    """A stage whose image features were changed, by the projector or when they are merged."""
    if c.stage == FEATURES:
        right = c.right.get(FEATURES)
        if right is None or not np.isfinite(right).all():
            right = c.context.reference(FEATURES)
        return None if right is None else change(right)
    features = c.given.get(FEATURES)
    return None if features is None else c.run(given={FEATURES: change(features)})


def scaled(c: Case, factor: float) -> Array | None:
    return with_features(c, lambda x: x * np.float32(factor))


def widths(c: Case) -> dict[str, int]:
    """The widths that ports take a square root of."""
    text, vision = c.config.text_config.hidden_size, c.config.vision_config.hidden_size
    return {"hidden_size": text, "the tower's hidden_size": vision, "PaliGemma 1's width": 2048}


def image_divided_by_sqrt(c: Case) -> Iterator[Guess]:
    for name, width in widths(c).items():
        factor = width**-0.5
        what = f"by {factor:.4g} = 1/sqrt({width}), {name}"
        yield what, scaled(c, factor)


def image_scaled(c: Case) -> Iterator[Guess]:
    for name, width in widths(c).items():
        factor = width**0.5
        what = f"by {factor:.4g} = sqrt({width}), {name}"
        yield what, scaled(c, factor)


def features_normalised(c: Case) -> Iterator[Guess]:
    def to_unit(x: Array) -> Array:
        y: Array = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return y

    root = math.sqrt(c.config.text_config.hidden_size)
    yield "to length 1", with_features(c, to_unit)
    yield "to length sqrt(D)", with_features(c, lambda x: to_unit(x) * np.float32(root))


def with_text_scale(c: Case, scale: float) -> Array | None:
    def embed(ids: Index, table: Weight, _: float, dtype: DTypeLike) -> Array:
        x: Array = c.ops.embed(ids, table, scale, dtype)
        return x

    return c.run(embed=embed)


def text_unscaled(c: Case) -> Iterator[Guess]:
    yield "", with_text_scale(c, 1.0)


def text_scaled_by_tower(c: Case) -> Iterator[Guess]:
    own = c.config.text_config.hidden_size
    for name, width in widths(c).items():
        if width != own:
            yield f"by sqrt({width}), {name}", with_text_scale(c, math.sqrt(width))


def image_after_text(c: Case) -> Iterator[Guess]:
    right = c.right.get(MERGED)
    if right is not None and c.stage == MERGED:
        P = c.patches
        yield "", np.concatenate([right[P:], right[:P]])
        yield "before the newline", np.concatenate([right[P:-1], right[:P], right[-1:]])


# Norms


def rms_weight(c: Case) -> Iterator[Guess]:
    def rms_norm(x: Array, weight: Weight, eps: float) -> Array:
        y: Array = c.ops.rms_norm(x, unpack(weight, np.float32) - 1, eps)
        return y

    yield "", c.run(rms_norm=rms_norm)


def rms_eps(c: Case) -> Iterator[Guess]:
    for eps in (1e-5, 1e-12, 1e-8, 1e-3, 0.0):
        text = replace(c.config.text_config, rms_norm_eps=eps)
        yield f"eps is {eps:g}", c.run(config=replace(c.config, text_config=text))


def final_norm_missing(c: Case) -> Iterator[Guess]:
    yield "", c.run(rms_norm=c.without_norms(f"{TEXT}.norm.weight"))


def is_second(c: Case) -> bool:
    return c.config.text_config.model_type == "gemma2" and c.layer is not None


def post_norms(c: Case) -> list[str]:
    """The weights of the norms that Gemma 2 has behind attention and behind the MLP."""
    names = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    return [name for name in c.weights if name.startswith(TEXT) and name.endswith(names)]


def post_norms_missing(c: Case) -> Iterator[Guess]:
    if is_second(c):
        yield "", c.run(rms_norm=c.without_norms(*post_norms(c)))
        for kind in ("attention", "feedforward"):
            names = [name for name in post_norms(c) if kind in name]
            yield f"behind {kind}", c.run(rms_norm=c.without_norms(*names))


def pre_post_confused(c: Case) -> Iterator[Guess]:
    if not is_second(c):
        attention, weight = c.inside("self_attn"), c.weights.get(f"{c.stage}.weight")
        if c.stage.endswith("post_attention_layernorm") and attention is not None:
            eps = c.config.text_config.rms_norm_eps
            normed = c.ops.rms_norm(attention, weight, eps)
            yield "attention alone is normed, as in Gemma 2, not the stream with it", normed
        return
    text = replace(c.config.text_config, model_type="gemma")
    first = c.run(config=replace(c.config, text_config=text))
    yield "post_attention_layernorm is used before the MLP, as in Gemma 1", first
    module, i = c.layer or ("", 0)
    start = f"{module}.{i}."
    for one, two in (
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ("input_layernorm", "post_attention_layernorm"),
    ):
        names = f"{start}{one}.weight", f"{start}{two}.weight"
        swapped = {names[0]: c.weights[names[1]], names[1]: c.weights[names[0]]}
        yield f"{one} and {two} are swapped", c.run(weights=swapped)


# Attention


def rope_pairs(c: Case) -> Iterator[Guess]:
    def rope(x: Array, positions: Index, theta: float) -> Array:
        d = x.shape[-1]
        halves = np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])
        turned: Array = c.ops.rope(x[..., halves], positions, theta)
        return turned[..., np.argsort(halves)]

    def rope_moved(x: Array, positions: Index, theta: float) -> Array:
        """Pairs are gathered, but left so."""
        d = x.shape[-1]
        halves = np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])
        turned: Array = c.ops.rope(x[..., halves], positions, theta)
        return turned

    yield "", c.run(rope=rope)
    yield "and left in halves", c.run(rope=rope_moved)


def rope_missing(c: Case) -> Iterator[Guess]:
    yield "", c.run(rope=lambda x, *rest: x)


def rope_base(c: Case) -> Iterator[Guess]:
    for base in BASES:
        text = replace(c.config.text_config, rope_theta=base)
        yield f"it is {base:g}", c.run(config=replace(c.config, text_config=text))


def seeing(c: Case, see: Callable[[Array, Array], tuple[Array, Array]]) -> Array | None:
    """A stage whose tokens, numbered from 0, saw other rows: from the first up to the last."""

    def attend(q: Array, k: Array, v: Array, start: Array, *rest: Any) -> Array:
        _, last, *others = rest
        first, end = see(np.arange(len(q)), last)
        mixed: Array = c.ops.attend(q, k, v, start, first, end, *others)
        return mixed

    return c.run(attend=attend) if c.context.step == 0 else None


def causal_prefix(c: Case) -> Iterator[Guess]:
    yield "", seeing(c, lambda t, _: (0 * t, t + 1))
    P = c.patches
    yield "behind the picture", seeing(c, lambda t, _: (0 * t, np.where(t < P, P, t + 1)))
    yield "within the picture", seeing(c, lambda t, all: (0 * t, np.where(t < P, t + 1, all)))


def kv_tiled(c: Case) -> Iterator[Guess]:
    def attend(q: Array, k: Array, v: Array, *rest: Any) -> Array:
        heads = np.arange(q.shape[1]) % k.shape[1]
        mixed: Array = c.ops.attend(q, k[:, heads], v[:, heads], *rest)
        return mixed

    yield "", c.run(attend=attend)


def scale_missing(c: Case) -> Iterator[Guess]:
    yield "", with_scale(c, 1.0)


def scale_width(c: Case) -> Iterator[Guess]:
    text = c.config.text_config
    share = text.hidden_size / text.num_attention_heads
    for what, width in (
        ("hidden_size", text.hidden_size),
        ("hidden_size / heads", share),
        ("head_dim", text.head_dim),
        ("twice", text.attention_scale**-4),
    ):
        yield f"1/sqrt({width:g}): {what}", with_scale(c, width**-0.5)


def softcap_missing(c: Case) -> Iterator[Guess]:
    text = replace(c.config.text_config, attn_logit_softcapping=None)
    yield "", c.run(config=replace(c.config, text_config=text))


def slides(c: Case) -> bool | None:
    """Whether the layer of a stage has a window; None where no layer has one."""
    text = c.config.text_config
    if text.sliding_window is None or c.layer is None:
        return None
    return text.layer_types[c.layer[1]] == "sliding_attention"


def windowed(c: Case) -> Iterator[Guess]:
    """A window that holds for the prefix too."""
    width = c.config.text_config.sliding_window or 0
    causal = "and tokens see only those before them"
    yield "", seeing(c, lambda t, all: (np.maximum(t - width + 1, 0), all))
    yield causal, seeing(c, lambda t, _: (np.maximum(t - width + 1, 0), t + 1))
    both = seeing(c, lambda t, all: (np.maximum(t - width + 1, 0), np.minimum(t + width, all)))
    yield "to both sides", both


def window_everywhere(c: Case) -> Iterator[Guess]:
    if c.context.step:
        yield "in every layer", with_types(c, lambda kind: "sliding_attention")
    elif slides(c):
        yield from windowed(c)


def window_parity(c: Case) -> Iterator[Guess]:
    other = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
    if c.context.step:
        yield "", with_types(c, other.__getitem__)
    elif slides(c) is False:
        yield from windowed(c)


def with_types(c: Case, change: Callable[[str], str]) -> Array | None:
    """A stage of a later step, with windows in other layers."""
    text = c.config.text_config
    if text.sliding_window is None:
        return None
    text = replace(text, layer_types=tuple(change(kind) for kind in text.layer_types))
    return c.whole_run(replace(c.config, text_config=text))


# The MLP, the stream and the end


def gelu_on_up(c: Case) -> Iterator[Guess]:
    def gated(x: Array, gate: Weight, up: Weight, *, tap: Tap) -> Array:
        left = tap("gate_proj", c.ops.linear(x, gate))
        right = tap("up_proj", c.ops.linear(x, up))
        y: Array = left * c.ops.gelu_tanh(right)
        return y

    yield "", c.run(gated=gated)


def residual_normed(c: Case) -> Iterator[Guess]:
    """The normed copy is added to, before the MLP or behind it."""
    if c.layer is None:  # a layer before the stage is not looked into
        return
    module, i = c.layer
    in_tower, second = module.startswith(TOWER), is_second(c)
    before = "layer_norm1" if in_tower else "input_layernorm"
    between = "layer_norm2" if in_tower else "post_attention_layernorm"
    between = "pre_feedforward_layernorm" if second else between
    thought = c.inside("post_feedforward_layernorm" if second else "mlp")
    normed, later = c.inside(before), c.inside(between)
    skip = c.without_norms(f"{module}.{i}.{before}.weight")
    if normed is not None:
        yield f"of {before}", c.run(given={c.start: normed}, rms_norm=skip, layer_norm=skip)
    if c.stage != f"{module}.{i}":
        return
    if later is not None and thought is not None:
        yield f"of {between}", later + thought
    if normed is not None:
        both = c.stages(given={c.start: normed}, rms_norm=skip, layer_norm=skip)
        parts = [
            c.given.get(f"{c.stage}.{name}", both.get(f"{c.stage}.{name}"))
            for name in (between, "post_feedforward_layernorm" if second else "mlp")
        ]
        if parts[0] is not None and parts[1] is not None:
            yield "of both norms", parts[0] + parts[1]


def final_softcap_missing(c: Case) -> Iterator[Guess]:
    text = replace(c.config.text_config, final_logit_softcapping=None)
    yield "", c.run(config=replace(c.config, text_config=text))
    cap, capped = c.config.text_config.final_logit_softcapping, c.context.reference(c.stage)
    if cap is not None and capped is not None and c.stage == "language_model.logits":
        with np.errstate(divide="ignore"):  # a score at the cap itself
            yield "", cap * np.arctanh(capped.astype(np.float64) / cap)


LAYERS = f"{TEXT}.layers.*"
ATTEND = (f"{LAYERS}.attend",)
BOTH = (FEATURES, MERGED)

TEXT_SUSPECTS = (
    Suspect(
        "image_divided_by_sqrt",
        BOTH,
        "image features are divided by a square root of a width: only text rows are scaled, by "
        "sqrt(hidden_size), image features not at all",
        image_divided_by_sqrt,
    ),
    Suspect(
        "image_scaled",
        BOTH,
        "image features are multiplied by a square root of a width: only text rows are scaled, "
        "by sqrt(hidden_size), image features not at all",
        image_scaled,
    ),
    Suspect(
        "text_unscaled",
        (MERGED,),
        "text rows are as the table has them: they are to be multiplied by sqrt(hidden_size)",
        text_unscaled,
    ),
    Suspect(
        "text_scaled_by_tower",
        (MERGED,),
        "text rows are scaled by another width: it is sqrt(hidden_size) of text_config",
        text_scaled_by_tower,
    ),
    Suspect(
        "features_normalised",
        BOTH,
        "image features are normed: the decoder reads them as the projector makes them",
        features_normalised,
    ),
    Suspect(
        "image_after_text",
        (MERGED,),
        "the picture stands behind the prompt: image tokens come first",
        image_after_text,
    ),
    Suspect(
        "rms_weight",
        (f"{LAYERS}norm", f"{TEXT}.norm"),
        "a norm multiplies by its weight: Gemma's multiply by 1 + weight",
        rms_weight,
    ),
    Suspect(
        "rope_pairs",
        (f"{LAYERS}_rope",),
        "queries and keys are turned in neighbouring pairs: Gemma pairs dimension j with j + d/2",
        rope_pairs,
    ),
    Suspect(
        "rope_missing",
        (f"{LAYERS}_rope",),
        "queries and keys are not turned by their positions (RoPE)",
        rope_missing,
    ),
    Suspect(
        "rope_base",
        (f"{LAYERS}_rope",),
        "the base of RoPE is another one: it is rope_theta of the config, 10000 in every published "
        "PaliGemma",
        rope_base,
    ),
    Suspect(
        "causal_prefix",
        ATTEND,
        "tokens see only those before them: picture and prompt see each other as a whole, only "
        "the answer is causal",
        causal_prefix,
    ),
    Suspect(
        "kv_tiled",
        ATTEND,
        "query head h reads key/value head h % K: it is h // (H / K), neighbours share one",
        kv_tiled,
    ),
    Suspect(
        "scale_missing",
        ATTEND,
        "scores are not scaled: they are to be multiplied by 1/sqrt of head_dim (Gemma 1) or of "
        "query_pre_attn_scalar (Gemma 2)",
        scale_missing,
    ),
    Suspect(
        "scale_width",
        ATTEND,
        "scores are scaled by another width: it is 1/sqrt of head_dim (Gemma 1) or of "
        "query_pre_attn_scalar (Gemma 2), once",
        scale_width,
    ),
    Suspect(
        "softcap_missing",
        ATTEND,
        "scores are not soft-capped: Gemma 2 caps them by attn_logit_softcapping after scaling",
        softcap_missing,
    ),
    Suspect(
        "window_everywhere",
        ATTEND,
        "the sliding window holds where it should not: a prefix sees itself as a whole, and every "
        "other layer has no window",
        window_everywhere,
    ),
    Suspect(
        "window_parity",
        ATTEND,
        "the sliding window is in the wrong layers: it is in the first and every other one",
        window_parity,
    ),
    Suspect(
        "post_norms_missing",
        (f"{LAYERS}.post_attention_layernorm", f"{LAYERS}.post_feedforward_layernorm"),
        "the norms behind attention and MLP are missing: Gemma 2 norms what they give too",
        post_norms_missing,
    ),
    Suspect(
        "pre_post_confused",
        (f"{LAYERS}norm",),
        "norms have changed places: post_attention_layernorm norms what attention gives in "
        "Gemma 2, and what the MLP reads in Gemma 1",
        pre_post_confused,
    ),
    Suspect(
        "gelu_erf",
        (f"{LAYERS}.mlp.gated",),
        "the GeLU is the exact one (erf): Gemma's is the tanh form",
        with_gelu(gelu_erf),
    ),
    Suspect(
        "gelu_silu",
        (f"{LAYERS}.mlp.gated",),
        "the gate is bent by SiLU: Gemma bends it by GeLU, in its tanh form",
        with_gelu(silu),
    ),
    Suspect(
        "gelu_on_up",
        (f"{LAYERS}.mlp.gated",),
        "GeLU is on up_proj: it bends gate_proj",
        gelu_on_up,
    ),
    Suspect(
        "residual_normed",
        (f"{TEXT}.layers.*", f"{TOWER}.encoder.layers.*"),
        "the normed copy is carried on: what a half-layer gives is added to its input as it was",
        residual_normed,
    ),
    Suspect(
        "final_norm_missing",
        (f"{TEXT}.norm",),
        "the last norm is missing: it comes before the scores",
        final_norm_missing,
    ),
    Suspect(
        "final_softcap_missing",
        ("language_model.logits",),
        "the scores of the vocabulary are not soft-capped: Gemma 2 caps them by "
        "final_logit_softcapping",
        final_softcap_missing,
    ),
    Suspect(
        "rms_eps",
        (f"{LAYERS}norm", f"{TEXT}.norm"),
        "the eps of a norm is another one: it is rms_norm_eps of the config, 1e-6",
        rms_eps,
    ),
)
