"""Known mistakes in loading: the right computation with weights that are not those of the stage.

Axis letters: O, I out and in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from npvlm.model.weights import Array, BFloat16, Weight, round_to_bfloat16, unpack
from npvlm.porting.kinds import plain
from npvlm.porting.stages import TEXT, TOWER, stages
from npvlm.porting.suspects_case import SLACK, Case, Guess, Suspect, cases, relative_error

KINDS = ("weight", "bias")
OUTSIDE = (  # layers and tables
    "position_embedding.weight",
    "patch_embedding.weight",
    "patch_embedding.bias",
    "norm.weight",
    "norm.bias",
    "linear.weight",
    "linear.bias",
)
# The weights of stages that are not called like them.
MAKERS = {
    "self_attn": ("o_proj", "out_proj"),
    "mlp": ("down_proj", "fc2"),
}


def weights_of(c: Case) -> list[str]:
    """The weights that are used at the stage, or before it where the port shows nothing."""
    names = []
    for stage in c.between:
        places = [f"{stage}.{name}" for name in MAKERS.get(stage.rpartition(".")[2], ())]
        names += [f"{place}.weight" for place in (stage, *places, f"{stage}.linear")]
    return [name for name in names if name in c.weights]


def weight_transposed(c: Case) -> Iterator[Guess]:
    for name in weights_of(c):
        w = c.weights[name]
        if len(w.shape) == 2:
            turned = unpack(w, np.float32).reshape(w.shape[::-1]).T  # [O, I]
            yield name, c.run(weights={name: np.ascontiguousarray(turned)})
    kernel = f"{TOWER}.embeddings.patch_embedding.weight"
    if kernel in weights_of(c):
        turned = unpack(c.weights[kernel], np.float32).swapaxes(2, 3)
        yield f"{kernel}, y and x", c.run(weights={kernel: np.ascontiguousarray(turned)})


def kv_swapped(c: Case) -> Iterator[Guess]:
    module, i = c.layer or ("", 0)
    start = f"{module}.{i}.self_attn"
    if c.stage == f"{start}.k_proj":
        yield "", c.context.reference(f"{start}.v_proj")
    yield "", c.run(weights=exchanged(c, f"{start}.k_proj", f"{start}.v_proj"))


def qk_swapped(c: Case) -> Iterator[Guess]:
    module, i = c.layer or ("", 0)
    start = f"{module}.{i}.self_attn"
    names = [f"{start}.{name}.weight" for name in ("q_proj", "k_proj")]
    if len({c.weights[name].shape for name in names if name in c.weights}) == 1:
        yield "", c.run(weights=exchanged(c, f"{start}.q_proj", f"{start}.k_proj"))


def norms_swapped(c: Case) -> Iterator[Guess]:
    module, i = c.layer or ("", 0)
    start = f"{module}.{i}"
    names = {name.removeprefix(f"{start}.").partition(".")[0] for name in c.weights}
    norms = sorted(
        name for name in names if "norm" in name and f"{start}.{name}.weight" in c.weights
    )
    for one in norms:
        for two in norms:
            if one < two:
                pair = exchanged(c, f"{start}.{one}", f"{start}.{two}")
                yield f"{one} and {two}", c.run(weights=pair)
            if one != two:
                same = {
                    f"{start}.{two}.{kind}": c.weights[f"{start}.{one}.{kind}"]
                    for kind in KINDS
                    if f"{start}.{one}.{kind}" in c.weights
                }
                yield f"{two} has those of {one}", c.run(weights=same)


def residual_missing(c: Case) -> Iterator[Guess]:
    """What is added to the stream is taken for the stream, or added to an earlier one."""
    module, i = c.layer or ("", 0)
    start, tower, text = f"{module}.{i}", module.startswith(TOWER), c.config.text_config
    second = not tower and text.model_type == "gemma2"
    gathered = c.inside("post_attention_layernorm" if second else "self_attn")
    between = "pre_feedforward_layernorm" if second else "post_attention_layernorm"
    between = f"{start}.layer_norm2" if tower else f"{start}.{between}"
    thought = "post_feedforward_layernorm" if second else "mlp"
    if gathered is not None and f"{between}.weight" in c.weights:
        gain = [c.weights[f"{between}.{kind}"] for kind in KINDS[: 2 if tower else 1]]
        eps = c.config.vision_config.layer_norm_eps if tower else text.rms_norm_eps
        normed = (c.ops.layer_norm if tower else c.ops.rms_norm)(gathered, *gain, eps)
        if c.stage == between:
            yield "attention's", normed
        elif c.stage == start:
            added = c.stages(given={between: normed}).get(f"{start}.{thought}")
            yield "attention's", None if added is None else gathered + added
    mlp, x = c.inside(thought), c.given.get(c.start)
    if c.stage == start and mlp is not None:
        yield "the MLP's", mlp
        if x is not None and x.size == mlp.size:
            yield "the MLP is added to the layer's own input", x.reshape(mlp.shape) + mlp


def exchanged(c: Case, one: str, two: str) -> dict[str, Weight]:
    """The weights and biases of two modules, each under the other's name."""
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in ((one, two), (two, one)) for kind in KINDS}
    return {name: c.weights[other] for name, other in names.items() if other in c.weights}


def others(c: Case) -> list[int]:
    """The other layers, the nearest first."""
    module, i = c.layer or ("", 0)
    text, vision = c.config.text_config, c.config.vision_config
    count = (vision if module.startswith(TOWER) else text).num_hidden_layers
    return sorted((j for j in range(count) if j != i), key=lambda j: (abs(j - i), -j))


def weight_of_other_layer(c: Case) -> Iterator[Guess]:
    module, i = c.layer or ("", 0)
    names = [name for name in weights_of(c) if name.startswith(f"{module}.{i}.")]
    for j in others(c) if len(names) == 1 else others(c)[:2]:
        for name in names:
            inner = name.removeprefix(f"{module}.{i}.")
            taken = {name: c.weights[f"{module}.{j}.{inner}"]}
            bias = name.replace("weight", "bias")
            if bias in c.weights:
                taken[bias] = c.weights[f"{module}.{j}.{inner.replace('weight', 'bias')}"]
            yield f"{inner} is that of layer {j}", c.run(weights=taken)


def from_layer(c: Case, i: int, j: int) -> dict[str, Weight]:
    """All weights of layer j, under the names of layer i."""
    module, _ = c.layer or ("", 0)
    start = f"{module}.{j}."
    return {
        f"{module}.{i}.{name.removeprefix(start)}": w
        for name, w in c.weights.items()
        if name.startswith(start)
    }


def layer_order(c: Case) -> Iterator[Guess]:
    i = c.layer[1] if c.layer else 0
    for j in others(c) if is_first_shown(c) else ():
        taken = from_layer(c, i, j)
        guess = c.run(weights=taken)
        if not is_near(c, c.mine, guess) or not fits_later(c, i, taken):
            continue
        # One further on is a layer left out, unless this one is what comes next.
        if j != i + 1 or fits_later(c, j, from_layer(c, j, i), unseen=False):
            yield f"layer {i} has the weights of layer {j}", guess


def layer_skipped(c: Case) -> Iterator[Guess]:
    i = c.layer[1] if c.layer else 0
    for k in range(i, max(i - 3, -1), -1):
        yield f"layer {k} does nothing", c.run(weights=doing_nothing(c, k))
    if i + 1 in others(c) and is_first_shown(c):
        taken = from_layer(c, i, i + 1)
        guess = c.run(weights=taken)
        if is_near(c, c.mine, guess) and fits_later(c, i, taken):
            yield f"layer {i + 1} stands in the place of layer {i}", guess


def doing_nothing(c: Case, k: int) -> dict[str, Weight]:
    """Weights of layer k that leave the stream as it is."""
    module, _ = c.layer or ("", 0)
    last = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")
    ends = (*last, "out_proj.bias", "fc2.bias")
    return {
        name: np.zeros(w.shape, np.float32)
        for name, w in c.weights.items()
        if name.startswith(f"{module}.{k}.") and name.endswith(ends)
    }


def is_first_shown(c: Case) -> bool:
    """Whether the port shows nothing of the layer before the stage: what it shows is right."""
    start = f"{c.layer[0]}.{c.layer[1]}." if c.layer else ""
    return not any(name.startswith(start) for name in c.given)


def is_near(c: Case, value: Array, guess: Array | None) -> bool:
    """Whether a guess gives a value but for rounding."""
    return guess is not None and relative_error(value, guess) <= SLACK * c.context.floor


def fits_later(c: Case, i: int, weights: Mapping[str, Weight], unseen: bool = True) -> bool:
    """Whether what the port shows of layer i, behind the stage, has these weights too.

    One norm with the weights of another layer is one weight gone astray, not a whole layer.

    unseen : the answer where the port shows nothing of it
    """
    module = c.layer[0] if c.layer else ""
    names = [one.name for one in stages(c.config)]
    later = names[names.index(c.stage) + 1 :]
    ends = tuple(f"{module}.{i}.{end}" for end in ("self_attn.q_proj", "mlp.fc1", "mlp.gate_proj"))
    shown = [n for n in later if n in c.context.values and n in (*ends, f"{module}.{i}")]
    for name in shown:
        value = plain(c.context.values[name])
        case = next(cases(name, value, c.context), None)
        if case is None or not is_near(c, value, case.run(weights=weights)):
            return False
    return bool(shown) or unseen


def norm_not_loaded(c: Case) -> Iterator[Guess]:
    for name in weights_of(c):
        shape = c.weights[name].shape
        bias = name.replace("weight", "bias")
        if len(shape) != 1:
            continue
        for value in (1.0, 0.0):
            fresh = {name: np.full(shape, value, np.float32)}
            yield f"{name} is all {value:g}", c.run(weights=fresh)
            if bias in c.weights:
                zeros = {bias: np.zeros(shape, np.float32)}
                yield f"{name} is all {value:g}, the bias 0", c.run(weights=fresh | zeros)


def bf16_as_fp16(c: Case) -> Iterator[Guess]:
    """All weights of the layer, or all outside of layers but the table of embeddings."""
    module, i = c.layer or ("", 0)
    names = [name for name in c.weights if name.startswith(f"{module}.{i}.")]
    if c.layer is None:
        names = [n for n in c.weights if ".layers." not in n and n.endswith(OUTSIDE)]
    misread: dict[str, Weight] = {}
    reverse: dict[str, Weight] = {}
    for name in names:
        w = c.weights[name]
        wide = unpack(w, np.float32)
        bits = w.bits if isinstance(w, BFloat16) else round_to_bfloat16(wide).bits
        misread[name] = bits.view(np.float16).astype(np.float32)
        with np.errstate(over="ignore"):
            reverse[name] = BFloat16(wide.astype(np.float16).view(np.uint16)).unpack()
    yield "bfloat16 as float16", c.run(weights=misread)
    yield "float16 as bfloat16", c.run(weights=reverse)


LAYER = ("*.layers.*",)
EVERY = (*LAYER, f"{TOWER}.*", "multi_modal_projector", f"{TEXT}.norm", "language_model.logits")

WEIGHT_SUSPECTS = (
    Suspect(
        "kv_swapped",
        ("*.k_proj", "*.v_proj"),
        "the weights of keys and values are swapped",
        kv_swapped,
    ),
    Suspect(
        "qk_swapped",
        ("*.q_proj", "*.k_proj"),
        "the weights of queries and keys are swapped",
        qk_swapped,
    ),
    Suspect(
        "norms_swapped",
        ("*.layers.*norm*",),
        "a norm of the layer has another one's weights",
        norms_swapped,
    ),
    Suspect(
        "residual_missing",
        (f"{TOWER}.encoder.layers.*", f"{TEXT}.layers.*"),
        "a residual connection is not as it should be: the stream is x, then x + attention, then "
        "that + MLP",
        residual_missing,
    ),
    Suspect(
        "norm_not_loaded",
        ("*norm", "*norm?"),
        "a norm has the weights it was made with: the checkpoint's were not loaded",
        norm_not_loaded,
    ),
    Suspect(
        "weight_transposed",
        EVERY,
        "a weight is transposed: checkpoints hold [out, in]",
        weight_transposed,
    ),
    Suspect(
        "layer_order",
        LAYER,
        "layers are in another order: layers.10 comes behind layers.9, not behind layers.1",
        layer_order,
    ),
    Suspect(
        "layer_skipped",
        LAYER,
        "a layer is left out",
        layer_skipped,
    ),
    Suspect(
        "weight_of_other_layer",
        LAYER,
        "a weight is another layer's",
        weight_of_other_layer,
    ),
    Suspect(
        "bf16_as_fp16",
        EVERY,
        "the 16 bits of a weight are read as another type: bfloat16 has 8 bits of exponent, "
        "float16 has 5",
        bf16_as_fp16,
    ),
)
