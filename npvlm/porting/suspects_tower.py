"""Known mistakes between pixel values and image features: the image tower and the projector.

Axis letters: N pictures · P patches · D hidden_size of the tower · C colour channels · H heads ·
d width of a head · p side of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from npvlm.model.weights import Array, Weight, unpack
from npvlm.porting.stages import TOWER
from npvlm.porting.suspects_case import Case, Guess, Suspect

TABLE = f"{TOWER}.embeddings.position_embedding.weight"
KERNEL = f"{TOWER}.embeddings.patch_embedding.weight"
FEATURES = "multi_modal_projector"


def patch_columns(c: Case) -> Iterator[Guess]:
    side = math.isqrt(c.patches)
    order = np.arange(c.patches).reshape(side, side).T.reshape(-1)
    yield "", c.run(patch_embed=lambda *args: c.ops.patch_embed(*args)[:, order])


def conv_hwc(c: Case) -> Iterator[Guess]:
    kernel = c.weights[KERNEL]
    D, C, p, _ = kernel.shape
    flat = unpack(kernel, np.float32).reshape(D, -1)
    places = np.arange(C * p * p).reshape(C, p, p)
    back = np.argsort(places.transpose(1, 2, 0).reshape(-1))
    for what, order in (
        ("colours last in a patch", back),
        ("weights stored with colours last", places.transpose(1, 2, 0).reshape(-1)),
        ("y and x swapped in a patch", places.transpose(0, 2, 1).reshape(-1)),
    ):
        yield what, c.run(weights={KERNEL: flat[:, order].reshape(D, C, p, p)})


def positions_missing(c: Case) -> Iterator[Guess]:
    yield "", c.run(weights={TABLE: np.zeros(c.weights[TABLE].shape, np.float32)})


def positions_shifted(c: Case) -> Iterator[Guess]:
    table, at = unpack(c.weights[TABLE], np.float32), np.arange(c.patches)
    for by in (1, -1):
        for rows in ((at + by) % len(at), np.clip(at + by, 0, len(at) - 1)):
            yield f"patch i has the row of patch i{by:+}", c.run(weights={TABLE: table[rows]})


def vit_eps(c: Case) -> Iterator[Guess]:
    for eps in (1e-5, 1e-12, 1e-8, 1e-3, 0.0):
        vision = replace(c.config.vision_config, layer_norm_eps=eps)
        yield f"eps is {eps:g}", c.run(config=replace(c.config, vision_config=vision))


def gelu_erf(x: Array) -> Array:
    """The exact form."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    y: Array = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return y.astype(x.dtype)


def gelu_sigmoid(x: Array) -> Array:
    """The quick form."""
    return x / (1 + np.exp(-1.702 * x))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def relu(x: Array) -> Array:
    y: Array = np.maximum(x, 0)
    return y


def gelu_without_cube(x: Array) -> Array:
    y: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x))
    return y


def vit_activation(c: Case) -> Iterator[Guess]:
    yield "x * sigmoid(x)", c.run(gelu_tanh=silu)
    yield "max(x, 0)", c.run(gelu_tanh=relu)
    yield "no function at all", c.run(gelu_tanh=lambda x: x)
    yield "without 0.044715 x^3", c.run(gelu_tanh=gelu_without_cube)


def vit_norm(c: Case) -> Iterator[Guess]:
    def divided_by_less(x: Array, weight: Weight, bias: Weight, eps: float) -> Array:
        D = x.shape[-1]
        gain = math.sqrt((D - 1) / D)
        y: Array = c.ops.layer_norm(x, unpack(weight, x.dtype) * gain, bias, eps * (D - 1) / D)
        return y

    def rms_norm(x: Array, weight: Weight, bias: Weight, eps: float) -> Array:
        y: Array = c.ops.rms_norm(x, unpack(weight, x.dtype) - 1, eps)
        return y

    def one_more(x: Array, weight: Weight, bias: Weight, eps: float) -> Array:
        y: Array = c.ops.layer_norm(x, unpack(weight, x.dtype) + 1, bias, eps)
        return y

    yield "its variance is divided by D - 1", c.run(layer_norm=divided_by_less)
    yield "it is an RMSNorm, which takes no mean away", c.run(layer_norm=rms_norm)
    yield "its gain is 1 + weight, as in Gemma", c.run(layer_norm=one_more)


def positions_scaled(c: Case) -> Iterator[Guess]:
    table = unpack(c.weights[TABLE], np.float32)
    root = math.sqrt(table.shape[1])
    yield "times sqrt(D)", c.run(weights={TABLE: table * np.float32(root)})
    yield "divided by sqrt(D)", c.run(weights={TABLE: table / np.float32(root)})


def with_gelu(*forms: Callable[[Array], Array]) -> Callable[[Case], Iterator[Guess]]:
    """Guesses of another bend."""

    def guesses(c: Case) -> Iterator[Guess]:
        for form in forms:
            yield "", c.run(gelu_tanh=form)

    return guesses


def vit_causal(c: Case) -> Iterator[Guess]:
    def attend(q: Array, k: Array, v: Array, start: Array, first: Array, *rest: Any) -> Array:
        mixed: Array = c.ops.attend(q, k, v, start, first, np.arange(len(q)) + 1, *rest[1:])
        return mixed

    yield "", c.run(attend=attend)


def with_scale(c: Case, scale: float) -> Array | None:
    """A stage whose scores were multiplied by another number."""

    def attend(q: Array, k: Array, v: Array, *rest: Any) -> Array:
        start, first, last, _, *cap = rest
        mixed: Array = c.ops.attend(q, k, v, start, first, last, scale, *cap)
        return mixed

    return c.run(attend=attend)


def vit_scale_missing(c: Case) -> Iterator[Guess]:
    yield "", with_scale(c, 1.0)


def vit_scale_width(c: Case) -> Iterator[Guess]:
    vision = c.config.vision_config
    yield f"1/sqrt({vision.hidden_size})", with_scale(c, vision.hidden_size**-0.5)
    yield f"1/{vision.head_dim}: twice", with_scale(c, 1 / vision.head_dim)
    heads = vision.num_attention_heads
    yield f"1/sqrt({heads}): the number of heads", with_scale(c, heads**-0.5)


def heads_not_joined(c: Case) -> Iterator[Guess]:
    def laid_out(heads: Array) -> Array:
        return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(heads.shape)

    yield "", c.run(attend=lambda *args: laid_out(c.ops.attend(*args)))
    known = c.context.reference(c.stage)
    if known is not None and known.ndim == 3:
        yield "", laid_out(known)


def heads_interleaved(c: Case) -> Iterator[Guess]:
    """Both ways to lay out what comes of it."""

    def apart(x: Array) -> Array:
        T, H, d = x.shape
        return np.ascontiguousarray(x.reshape(T, d, H).swapaxes(1, 2))

    def together(x: Array) -> Array:
        T, H, d = x.shape
        return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(T, H, d)

    def attend(q: Array, k: Array, v: Array, *rest: Any) -> Array:
        mixed: Array = c.ops.attend(apart(q), apart(k), apart(v), *rest)
        return mixed

    def attend_turned(q: Array, k: Array, v: Array, *rest: Any) -> Array:
        mixed: Array = c.ops.attend(q, k, apart(v), *rest)
        return mixed

    def rope(x: Array, *rest: Any) -> Array:
        turned: Array = c.ops.rope(apart(x), *rest)
        return turned

    if c.stage.startswith(TOWER):
        yield "", c.run(attend=attend)
        yield "", c.run(attend=lambda *args: together(attend(*args)))
    else:  # Gemma's queries and keys are cut into heads before they are turned
        yield "", c.run(rope=rope, attend=attend_turned)
        yield "", c.run(rope=rope, attend=lambda *args: together(attend_turned(*args)))


def vit_bias_missing(c: Case) -> Iterator[Guess]:
    def linear(x: Array, w: Weight, bias: Weight | None = None) -> Array:
        y: Array = c.ops.linear(x, w)
        return y

    def layer_norm(x: Array, weight: Weight, bias: Weight, eps: float) -> Array:
        y: Array = c.ops.layer_norm(x, weight, np.zeros(bias.shape, np.float32), eps)
        return y

    yield "of products", c.run(linear=linear)
    yield "of norms", c.run(layer_norm=layer_norm)
    yield "of products and norms", c.run(linear=linear, layer_norm=layer_norm)
    if c.layer is None or len(c.between) == 1:
        return
    start = f"{c.layer[0]}.{c.layer[1]}."
    biases = [name for name in c.weights if name.startswith(start) and name.endswith(".bias")]
    patches = f"{TOWER}.embeddings.patch_embedding"
    groups = [[name for name in biases if part in name] for part in ("self_attn", "mlp", "norm")]
    single = [*biases, f"{patches}.bias"] if patches in c.between else biases
    for names in (*groups, *([name] for name in single)):
        said = " and ".join(name.removeprefix(start) for name in names)
        zeros = {name: np.zeros(c.weights[name].shape, np.float32) for name in names}
        yield said, c.run(weights=zeros)


def post_layernorm_missing(c: Case) -> Iterator[Guess]:
    yield "", c.run(layer_norm=c.without_norms(f"{TOWER}.post_layernorm.weight"))


def projector_bias_missing(c: Case) -> Iterator[Guess]:
    bias = f"{FEATURES}.linear.bias"
    yield "", c.run(weights={bias: np.zeros(c.weights[bias].shape, np.float32)})


LAYERS = f"{TOWER}.encoder.layers.*"

TOWER_SUSPECTS = (
    Suspect(
        "conv_hwc",
        (f"{TOWER}.embeddings.patch_embedding",),
        "the numbers of a patch are in another order than its weights: colour channel, then y, "
        "then x",
        conv_hwc,
    ),
    Suspect(
        "patch_columns",
        (f"{TOWER}.embeddings.patch_embedding",),
        "patches are counted column by column: PaliGemma's go row by row",
        patch_columns,
    ),
    Suspect(
        "positions_missing",
        (f"{TOWER}.embeddings",),
        "the learned positions are not added to the patches",
        positions_missing,
    ),
    Suspect(
        "positions_scaled",
        (f"{TOWER}.embeddings",),
        "the learned positions have a factor: they are added as they are",
        positions_scaled,
    ),
    Suspect(
        "positions_shifted",
        (f"{TOWER}.embeddings",),
        "the learned positions are off by one: there is no class token in front",
        positions_shifted,
    ),
    Suspect(
        "vit_causal",
        (f"{LAYERS}.attend",),
        "patches see only those before them: every patch sees the whole picture",
        vit_causal,
    ),
    Suspect(
        "vit_scale_missing",
        (f"{LAYERS}.attend",),
        "scores are not scaled: they are to be multiplied by 1/sqrt(head_dim)",
        vit_scale_missing,
    ),
    Suspect(
        "vit_scale_width",
        (f"{LAYERS}.attend",),
        "scores are scaled by another width: it is 1/sqrt(head_dim), once",
        vit_scale_width,
    ),
    Suspect(
        "heads_interleaved",
        (f"{LAYERS}.attend", "language_model.*_rope", "language_model.*.attend"),
        "heads are cut as d x H: a head's numbers lie side by side, H x d",
        heads_interleaved,
    ),
    Suspect(
        "heads_not_joined",
        ("*.attend",),
        "heads come first in memory, [H, tokens, d]: they have to be turned to [tokens, H, d] "
        "before they are joined",
        heads_not_joined,
    ),
    Suspect(
        "vit_gelu_erf",
        (f"{LAYERS}.mlp.gelu",),
        "the GeLU is the exact one (erf): SigLIP's is the tanh form",
        with_gelu(gelu_erf),
    ),
    Suspect(
        "vit_gelu_sigmoid",
        (f"{LAYERS}.mlp.gelu",),
        "the GeLU is the quick one, x * sigmoid(1.702 x): SigLIP's is the tanh form",
        with_gelu(gelu_sigmoid),
    ),
    Suspect(
        "vit_activation",
        (f"{LAYERS}.mlp.gelu",),
        "another function stands in the place of GeLU: SigLIP's is the tanh form",
        vit_activation,
    ),
    Suspect(
        "projector_bias_missing",
        (FEATURES,),
        "the projector's bias is missing",
        projector_bias_missing,
    ),
    Suspect(
        "vit_bias_missing",
        (f"{TOWER}.embeddings.patch_embedding", LAYERS, f"{TOWER}.post_layernorm"),
        "a bias is missing: every product and every norm of the tower has one",
        vit_bias_missing,
    ),
    Suspect(
        "post_layernorm_missing",
        (f"{TOWER}.post_layernorm",),
        "the tower's last norm is missing: post_layernorm comes before the projector",
        post_layernorm_missing,
    ),
    Suspect(
        "vit_norm",
        (f"{LAYERS}.layer_norm*", f"{TOWER}.post_layernorm"),
        "a norm of the tower is no plain layer norm",
        vit_norm,
    ),
    Suspect(
        "vit_eps",
        (f"{LAYERS}.layer_norm*", f"{TOWER}.post_layernorm"),
        "the eps of a norm is another one: SigLIP's is 1e-6",
        vit_eps,
    ),
)
