"""Suspects: each known mistake, made by a port written here, is named; nobody else is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm.api import Model
from npvlm.model.weights import Array, unpack
from npvlm.porting.dumps import Dump
from npvlm.porting.floors import LEAST, floors, to_bfloat16
from npvlm.porting.stages import EXACT, TEXT, TOWER, chosen, stages
from npvlm.porting.statistics import rms
from npvlm.porting.suspects import SUSPECTS, Context, Finding, accuse
from npvlm.porting.trace import Trace, run, trace

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {name: ROOT / "golden" / name for name in ("pg1", "pg2")}
PROMPT = "caption en"
FAR = 8  # times the floor: what compare calls different

Stages = dict[str, Array]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth shapes and some noise, neither square nor symmetric."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:37, :58] / 8
    waves = np.stack([np.sin(x * a + y * b) for a, b in ((1, 0.3), (0.2, 1.4), (0.7, -0.9))], 2)
    numbers = 127 + 90 * waves + rng.uniform(-30, 30, waves.shape)
    return Image.fromarray(numbers.clip(0, 255).astype(np.uint8))


class Reference:
    """A model of one family, its trace, and the floors of float32."""

    def __init__(self, folder: Path, picture: Image.Image) -> None:
        self.model: Model = npvlm.load(folder, ops="numpy")
        self.trace: Trace = trace(self.model, picture, PROMPT)
        self.floors = floors(self.trace, self.model)

    @property
    def stages(self) -> Stages:
        return self.trace.stages

    def dump(self) -> Dump:
        kinds = dict.fromkeys(self.stages, "F32")
        return Dump(Path("reference"), kinds, self.stages.__getitem__, {"step": 0})

    def accuse(
        self,
        stage: str,
        values: Mapping[str, Array],
        precision: str = "float32",
        model: Model | None = None,
    ) -> Finding | None:
        floor = max(self.floors[stage][precision], LEAST)
        context = Context(self.dump(), self.model.config, model, values, floor)
        return accuse(stage, values[stage], context)

    def first_wrong(self, values: Mapping[str, Array]) -> str | None:
        """The first stage of a port that is over the floor."""
        for name, expected in self.stages.items():
            if name in values:
                value = values[name]
                if value.size != expected.size:
                    return name
                missed = rms(value.reshape(expected.shape).astype(np.float64) - expected)
                if missed > FAR * self.floors[name]["float32"] * rms(expected):
                    return name
        return None


@pytest.fixture(scope="module")
def references(picture: Image.Image) -> dict[str, Reference]:
    return {name: Reference(folder, picture) for name, folder in FOLDERS.items()}


# A port: the whole model once more, in float64, with one mistake if asked for.


def port(ref: Reference, mistake: str = "") -> Stages:
    """Every stage of a port, in the reference's layout and in float32."""
    given = ref.trace.inputs
    config, text = ref.model.config, ref.model.config.text_config
    w = {name: unpack(value, np.float64) for name, value in ref.model.weights.items()}
    out: Stages = {"image.rgb": given.rgb}
    out["image.resized"] = prepared(given.rgb, config.vision_config.image_size, mistake)
    x = out["image.resized"].astype(np.float64) / 255
    mean, std = np.full(3, 0.5), np.full(3, 0.5)
    if mistake == "imagenet_norm":
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = x if mistake == "range_0_1" else (x - mean) / std
    x = 127.5 * x if mistake == "range_other" else x
    pixels = x.transpose(2, 0, 1)
    if mistake == "conv_hwc:pixels":
        pixels = x.reshape(pixels.shape)
    out["pixel_values"] = pixels[None]
    P = config.vision_config.num_patches
    ids = given.ids
    if mistake == "bos_first":
        ids = np.concatenate([ids[P : P + 1], ids[:P], ids[P + 1 :]])
    if mistake == "image_after_text":
        ids = np.concatenate([ids[P:], ids[:P]])
    if mistake == "newline_twice":
        ids = np.array([*ids[:-1], ids[-1] + 1])
    out["input_ids"] = ids
    T = len(ids)
    places = np.arange(T) + 1
    if mistake == "positions_restart":
        places = np.concatenate([np.arange(P), np.arange(T - P)]) + 1
    if mistake == "rope_shift":
        places = places + (places > P)
    out["positions"] = places

    features = tower(pixels, w, ref, mistake, out)
    root = math.sqrt(text.hidden_size)
    if mistake == "image_divided_by_sqrt":
        features = features / root
    if mistake == "image_scaled":
        features = features * root
    if mistake == "features_normalised":
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
    if mistake == "text_unscaled":
        root = 1.0
    if mistake == "text_scaled_by_tower":
        root = math.sqrt(config.vision_config.hidden_size)
    table = w[f"{TEXT}.embed_tokens.weight"]
    image = ids == config.image_token_index
    x = table[np.where(image, 0, ids)] * root
    x[image] = features
    out["inputs_embeds"] = x
    order = list(range(text.num_hidden_layers))
    if mistake == "layer_order":
        order[1:3] = [2, 1]
    for i, source in enumerate(order):
        x = text_layer(x, w, source, i, ref, mistake, places, out)
    if mistake != "final_norm_missing":
        x = rms_normed(x, w[f"{TEXT}.norm.weight"], text.rms_norm_eps, mistake)
    out[f"{TEXT}.norm"] = x
    scores = x[-1:] @ table.T
    if text.final_logit_softcapping and mistake != "final_softcap_missing":
        scores = np.tanh(scores / text.final_logit_softcapping) * text.final_logit_softcapping
    out["language_model.logits"] = scores
    return {n: v.astype(np.int64 if n in EXACT else np.float32) for n, v in out.items()}


def prepared(rgb: Array, R: int, mistake: str) -> Array:
    """A picture [h, w, 3] to a square [R, R, 3]."""
    image = Image.fromarray(rgb)
    w, h = image.size
    if mistake == "centre_crop":
        image = image.crop(((w - h) // 2, 0, (w - h) // 2 + h, h))
    if mistake == "letterbox":
        small = image.resize((R, int(h * R / w)), Image.Resampling.BICUBIC)
        image = Image.new("RGB", (R, R))
        image.paste(small, (0, (R - small.height) // 2))
        return np.asarray(image)
    filters = {"nearest": 0, "lanczos": 1, "bilinear": 2, "other_filter": 4}
    if mistake == "not_rounded":
        layers = [Image.fromarray(rgb[..., i].astype(np.float32)) for i in range(3)]
        layers = [layer.resize((R, R), Image.Resampling.BICUBIC) for layer in layers]
        return np.stack([np.asarray(layer) for layer in layers], -1).clip(0, 255)
    if mistake == "no_antialias":
        return unsmoothed(rgb, R)
    found = np.asarray(image.resize((R, R), Image.Resampling(filters.get(mistake, 3))))
    if mistake == "bgr":
        return found[..., ::-1]
    if mistake == "transposed_picture":
        return found.transpose(1, 0, 2)
    return found[:, ::-1] if mistake == "flipped_picture" else found


def unsmoothed(rgb: Array, R: int) -> Array:
    """Bilinear between the four pixels around each place, as many libraries do by default."""
    h, w = rgb.shape[:2]
    found = np.zeros((R, R, 3))
    for i in range(R):
        for j in range(R):
            y, x = (i + 0.5) * h / R - 0.5, (j + 0.5) * w / R - 0.5
            top, left = int(y), int(x)
            for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                share = abs(1 - a - (y - top)) * abs(1 - b - (x - left))
                found[i, j] += share * rgb[min(top + a, h - 1), min(left + b, w - 1)]
    return np.rint(found).astype(np.uint8)


def tower(
    pixels: Array, w: Mapping[str, Array], ref: Reference, mistake: str, out: Stages
) -> Array:
    """Pixel values to image features."""
    vision = ref.model.config.vision_config
    p, side = vision.patch_size, vision.image_size // vision.patch_size
    kernel = w[f"{TOWER}.embeddings.patch_embedding.weight"]
    patches = []
    for a in range(side):
        for b in range(side):
            y, x = (b, a) if mistake == "patch_columns" else (a, b)
            cut = pixels[:, y * p : y * p + p, x * p : x * p + p]
            cut = cut.transpose(1, 2, 0) if mistake == "conv_hwc" else cut
            patches.append(kernel.reshape(len(kernel), -1) @ cut.reshape(-1))
    x = np.array(patches)
    if mistake != "vit_bias_missing:patches":
        x = x + w[f"{TOWER}.embeddings.patch_embedding.bias"]
    out[f"{TOWER}.embeddings.patch_embedding"] = x[None]
    table = w[f"{TOWER}.embeddings.position_embedding.weight"]
    if mistake == "positions_shifted":
        table = np.concatenate([table[1:], table[-1:]])
    if mistake == "positions_scaled":
        table = table * math.sqrt(table.shape[1])
    x = x if mistake == "positions_missing" else x + table
    out[f"{TOWER}.embeddings"] = x[None]
    for i in range(vision.num_hidden_layers):
        x = tower_layer(x, w, i, ref, mistake, out)
    eps = vision.layer_norm_eps
    if mistake != "post_layernorm_missing":
        x = layer_normed(x, w, f"{TOWER}.post_layernorm", eps)
    out[f"{TOWER}.post_layernorm"] = x
    name = "multi_modal_projector.linear"
    x = x @ w[f"{name}.weight"].T
    x = x if mistake == "projector_bias_missing" else x + w[f"{name}.bias"]
    out["multi_modal_projector"] = x
    return x


def tower_layer(
    x: Array, w: Mapping[str, Array], i: int, ref: Reference, mistake: str, out: Stages
) -> Array:
    name, vision = f"{TOWER}.encoder.layers.{i}", ref.model.config.vision_config
    eps = 1e-5 if mistake == "vit_eps" else vision.layer_norm_eps

    def norm(y: Array, where: str) -> Array:
        if mistake == "norms_swapped":
            where = {"layer_norm1": "layer_norm2", "layer_norm2": "layer_norm1"}[where]
        less = 1 if mistake == "vit_norm" else 0
        return layer_normed(y, w, f"{name}.{where}", eps, less)

    def product(y: Array, where: str) -> Array:
        if mistake == "qk_swapped" and where.endswith(("q_proj", "k_proj")):
            where = where.translate({ord("q"): "k", ord("k"): "q"})
        y = y @ w[f"{name}.{where}.weight"].T
        missing = mistake == "vit_bias_missing" and "self_attn" in where
        return y if missing else y + w[f"{name}.{where}.bias"]

    normed = out[f"{name}.layer_norm1"] = norm(x, "layer_norm1")
    heads = []
    for part in ("q", "k", "v"):
        y = out[f"{name}.self_attn.{part}_proj"] = product(normed, f"self_attn.{part}_proj")
        P, H = len(y), vision.num_attention_heads
        if mistake == "heads_interleaved":
            heads.append(y.reshape(P, -1, H).transpose(2, 0, 1))
        else:
            heads.append(y.reshape(P, H, -1).transpose(1, 0, 2))
    q, k, v = heads  # [H, P, d]
    d = vision.head_dim
    scale = {"vit_scale_missing": 1.0, "vit_scale_width": vision.hidden_size**-0.5}
    scores = q @ k.transpose(0, 2, 1) * scale.get(mistake, d**-0.5)
    if mistake == "vit_causal":
        scores = np.where(np.tri(P, dtype=bool), scores, -np.inf)
    y = softmax(scores) @ v  # [H, P, d]
    y = y.reshape(P, H, d) if mistake == "heads_not_joined" else y.transpose(1, 0, 2)
    out[f"{name}.self_attn.attend"] = y
    y = out[f"{name}.self_attn"] = product(y.reshape(P, -1), "self_attn.out_proj")
    stream = normed if mistake == "residual_normed:tower" else x
    x = y if mistake == "residual_missing" else stream + y
    normed = out[f"{name}.layer_norm2"] = norm(x, "layer_norm2")
    y = out[f"{name}.mlp.fc1"] = product(normed, "mlp.fc1")
    y = out[f"{name}.mlp.gelu"] = bent(y, VIT_BENT.get(mistake, ""))
    y = out[f"{name}.mlp"] = product(y, "mlp.fc2")
    x = out[name] = x + y
    return x


def text_layer(
    x: Array,
    w: Mapping[str, Array],
    source: int,
    i: int,
    ref: Reference,
    mistake: str,
    places: Array,
    out: Stages,
) -> Array:
    """Layer i, with the weights of the layer `source`."""
    name, config = f"{TEXT}.layers.{i}", ref.model.config.text_config
    second, T = config.model_type == "gemma2", len(x)
    if mistake == "layer_skipped" and i == 1:
        out[name] = x
        return x

    def weight(where: str) -> Array:
        origin = source
        if mistake == "weight_of_other_layer" and i == 1 and where == "mlp.up_proj":
            origin = 2
        if mistake == "kv_swapped":
            where = {
                "self_attn.k_proj": "self_attn.v_proj",
                "self_attn.v_proj": "self_attn.k_proj",
            }.get(where, where)
        found = w[f"{TEXT}.layers.{origin}.{where}.weight"]
        if mistake == "weight_transposed" and where == "self_attn.o_proj":
            return found.reshape(found.shape[::-1]).T
        if mistake == "norm_not_loaded" and where == "input_layernorm":
            return np.zeros_like(found)
        if mistake == "bf16_as_fp16":
            bits = found.astype(np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return rounded.astype(np.uint16).view(np.float16).astype(np.float64)
        return found

    def normed(y: Array, where: str) -> Array:
        if mistake == "post_norms_missing" and second and where.startswith("post"):
            return y
        if mistake == "pre_post_confused" and second:
            swapped = ("post_attention_layernorm", "pre_feedforward_layernorm")
            where = swapped[1 - swapped.index(where)] if where in swapped else where
        eps = 1e-5 if mistake == "rms_eps" else config.rms_norm_eps
        return rms_normed(y, weight(where), eps, mistake)

    h = out[f"{name}.input_layernorm"] = normed(x, "input_layernorm")
    for part in ("q", "k", "v"):
        out[f"{name}.self_attn.{part}_proj"] = h @ weight(f"self_attn.{part}_proj").T
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = turned(out[f"{name}.self_attn.q_proj"].reshape(T, H, d), places, mistake)
    k = turned(out[f"{name}.self_attn.k_proj"].reshape(T, K, d), places, mistake)
    v = out[f"{name}.self_attn.v_proj"].reshape(T, K, d)
    out[f"{name}.self_attn.q_rope"], out[f"{name}.self_attn.k_rope"] = q, k
    y = out[f"{name}.self_attn.attend"] = attended(q, k, v, i, ref, mistake)
    y = out[f"{name}.self_attn"] = y.reshape(T, -1) @ weight("self_attn.o_proj").T
    stream = h if mistake == "residual_normed" else x
    if second:
        y = out[f"{name}.post_attention_layernorm"] = normed(y, "post_attention_layernorm")
    x = stream + y
    where = "pre_feedforward_layernorm" if second else "post_attention_layernorm"
    h = out[f"{name}.{where}"] = normed(x, where)
    left = out[f"{name}.mlp.gate_proj"] = h @ weight("mlp.gate_proj").T
    right = out[f"{name}.mlp.up_proj"] = h @ weight("mlp.up_proj").T
    if mistake == "gelu_on_up":
        left, right = right, left
    y = out[f"{name}.mlp.gated"] = bent(left, mistake) * right
    y = out[f"{name}.mlp"] = y @ weight("mlp.down_proj").T
    if second:
        y = out[f"{name}.post_feedforward_layernorm"] = normed(y, "post_feedforward_layernorm")
    x = out[name] = (h if mistake == "residual_normed:mlp" else x) + y
    return x


def attended(q: Array, k: Array, v: Array, i: int, ref: Reference, mistake: str) -> Array:
    config, (T, H, d), K = ref.model.config.text_config, q.shape, k.shape[1]
    scales = {"scale_missing": 1.0, "scale_width": config.hidden_size**-0.5}
    seen = np.ones((T, T), bool)
    near = np.abs(np.arange(T)[:, None] - np.arange(T)) < (config.sliding_window or T)
    if mistake == "causal_prefix":
        seen = np.tri(T, dtype=bool)
    if mistake == "window_everywhere" or (mistake == "window_parity" and i % 2):
        seen = near | ~np.tri(T, dtype=bool)
    mixed = np.zeros((T, H, d))
    for head in range(H):
        group = head % K if mistake == "kv_tiled" else head // (H // K)
        scores = q[:, head] @ k[:, group].T * scales.get(mistake, config.attention_scale)
        cap = config.attn_logit_softcapping
        if cap and mistake != "softcap_missing":
            scores = cap * np.tanh(scores / cap)
        mixed[:, head] = softmax(np.where(seen, scores, -np.inf)) @ v[:, group]
    return mixed


def turned(x: Array, places: Array, mistake: str) -> Array:
    """Each pair of a head as a complex number, times one of length one."""
    d = x.shape[-1]
    if mistake == "rope_missing":
        return x
    base = 1e6 if mistake == "rope_base" else 1e4
    turn = np.exp(1j * places[:, None] * base ** (-2 * np.arange(d // 2) / d))[:, None]
    if mistake == "rope_pairs":
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
    pairs = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
    return np.concatenate([pairs.real, pairs.imag], -1)


VIT_BENT = {
    "vit_gelu_erf": "gelu_erf",
    "vit_gelu_sigmoid": "gelu_sigmoid",
    "vit_activation": "gelu_silu",
}


def bent(x: Array, mistake: str) -> Array:
    if mistake == "gelu_erf":
        return x * np.vectorize(lambda a: 0.5 * math.erfc(-a / math.sqrt(2)))(x)
    if mistake == "gelu_sigmoid":
        return x / (1 + np.exp(-1.702 * x))
    if mistake == "gelu_silu":
        return x / (1 + np.exp(-x))
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    grown = np.exp(x - x.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def layer_normed(x: Array, w: Mapping[str, Array], name: str, eps: float, less: int = 0) -> Array:
    deviation = np.sqrt(x.var(-1, keepdims=True, ddof=less) + eps)
    normed = (x - x.mean(-1, keepdims=True)) / deviation
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_normed(x: Array, weight: Array, eps: float, mistake: str) -> Array:
    gain = weight if mistake == "rms_weight" else 1 + weight
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


# What is named


EVERYWHERE = (
    "bgr range_0_1 range_other imagenet_norm centre_crop letterbox nearest bilinear no_antialias "
    "lanczos other_filter not_rounded "
    "transposed_picture flipped_picture conv_hwc:pixels bos_first newline_twice image_after_text "
    "conv_hwc patch_columns positions_missing positions_shifted positions_scaled vit_eps "
    "vit_norm norms_swapped qk_swapped heads_not_joined residual_missing vit_activation "
    "vit_gelu_erf "
    "vit_gelu_sigmoid vit_causal vit_scale_missing vit_scale_width vit_bias_missing "
    "vit_bias_missing:patches heads_interleaved post_layernorm_missing projector_bias_missing "
    "image_divided_by_sqrt image_scaled text_unscaled text_scaled_by_tower features_normalised "
    "rms_weight rms_eps rope_missing rope_pairs rope_base rope_shift positions_restart "
    "causal_prefix "
    "scale_missing scale_width gelu_erf gelu_silu gelu_on_up residual_normed "
    "residual_normed:tower residual_normed:mlp final_norm_missing layer_skipped layer_order "
    "kv_swapped weight_transposed weight_of_other_layer norm_not_loaded bf16_as_fp16"
)
# Golden PaliGemma 1 has one key/value head, so tiling it changes nothing.
SECOND_ONLY = (
    "kv_tiled softcap_missing window_everywhere window_parity post_norms_missing "
    "pre_post_confused final_softcap_missing"
)
MADE = [("pg1", mistake) for mistake in EVERYWHERE.split()]
MADE += [("pg2", mistake) for mistake in f"{EVERYWHERE} {SECOND_ONLY}".split()]
MADE_OTHERWISE = {  # lengths below, windows of a later step below
    "bos_missing",
    "newline_missing",
    "image_tokens_short",
}

# What ports show: every stage; what the modules give; the streams alone.
SHOWN = {
    "all": "*",
    "modules": f"pixel_values,input_ids,{TOWER}.embeddings,*.layers.?,{TOWER}.post_layernorm,"
    f"multi_modal_projector,inputs_embeds,{TEXT}.norm,*.logits",
    "streams": "pixel_values,input_ids,*.layers.?,*.logits",
}
NEEDS_WEIGHTS = (
    "conv_hwc patch_columns vit_bias_missing vit_bias_missing:patches projector_bias_missing "
    "layer_skipped layer_order pre_post_confused weight_transposed weight_of_other_layer "
    "bf16_as_fp16 norms_swapped qk_swapped"
)


def test_the_port_without_a_mistake_is_the_reference(references: dict[str, Reference]) -> None:
    for ref in references.values():
        values = port(ref)
        assert list(values) == list(ref.stages)
        assert ref.first_wrong(values) is None


def test_every_suspect_is_tried_below() -> None:
    known = [suspect.id for suspect in SUSPECTS]
    made = {mistake.partition(":")[0] for _, mistake in MADE} | MADE_OTHERWISE
    assert set(known) == made
    assert len(made) >= 36


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize(("family", "mistake"), MADE)
def test_a_mistake_is_named(
    references: dict[str, Reference], family: str, mistake: str, shown: str
) -> None:
    ref = references[family]
    values = {n: v for n, v in port(ref, mistake).items() if chosen(n, SHOWN[shown])}
    first = ref.first_wrong(values)
    assert first is not None
    found = ref.accuse(first, values, model=ref.model)
    assert found is not None and found.id == mistake.partition(":")[0], (first, found)
    assert found.error < 0.01
    assert found.sentence.endswith(").")


@pytest.mark.parametrize(
    ("family", "mistake"),
    [made for made in MADE if made[1] not in NEEDS_WEIGHTS.split()],
)
def test_a_mistake_is_named_without_weights_where_none_are_needed(
    references: dict[str, Reference], family: str, mistake: str
) -> None:
    ref = references[family]
    values = port(ref, mistake)
    first = ref.first_wrong(values)
    assert first is not None
    found = ref.accuse(first, values)
    assert found is not None and found.id == mistake.partition(":")[0], (first, found)


def test_ids_of_another_length_are_explained(references: dict[str, Reference]) -> None:
    ref = references["pg1"]
    ids, P = ref.stages["input_ids"], ref.model.config.vision_config.num_patches
    bos, newline = ids[P : P + 1], ids[-1:]
    for name, wrong in {
        "bos_missing": np.delete(ids, P),
        "bos_first": np.concatenate([bos, ids]),
        "newline_missing": ids[:-1],
        "newline_twice": np.concatenate([ids, newline]),
        "image_tokens_short": ids[2:],
    }.items():
        found = ref.accuse("input_ids", {"input_ids": wrong})
        assert found is not None and found.id == name, (name, found)
    assert ref.accuse("input_ids", {"input_ids": ids[P:][::-1]}) is None


def test_a_mistake_of_a_16_bit_port_is_named(references: dict[str, Reference]) -> None:
    """Those that are larger than what bfloat16 rounds off."""
    for family, ref in references.items():
        for mistake in ("causal_prefix", "rope_pairs", "image_scaled", "rms_weight", "vit_causal"):
            values = {
                name: to_bfloat16(value) if value.dtype == np.float32 else value
                for name, value in port(ref, mistake).items()
            }
            first = ref.first_wrong(port(ref, mistake))
            assert first is not None
            found = ref.accuse(first, values, "bfloat16", ref.model)
            assert found is not None and found.id == mistake, (family, mistake, found)


@pytest.mark.parametrize("family", FOLDERS)
def test_nobody_is_accused_of_what_is_right_or_just_noise(
    references: dict[str, Reference], family: str
) -> None:
    ref, rng = references[family], np.random.default_rng(11)
    right = port(ref)
    for stage in (one.name for one in stages(ref.model.config)):
        value = right[stage]
        noises: list[Array]
        if value.dtype == np.float32:
            size = rms(value)
            noises = [
                value,
                to_bfloat16(value),
                *(
                    (value + level * size * rng.standard_normal(value.shape)).astype(np.float32)
                    for level in (1e-5, 0.1)
                ),
            ]
        else:
            noises = [value, rng.permutation(value.reshape(-1)).reshape(value.shape)]
        for noisy in noises:
            values = right | {stage: noisy}
            assert ref.accuse(stage, values, "float32", ref.model) is None, stage
            assert ref.accuse(stage, values, "bfloat16", ref.model) is None, stage
            assert ref.accuse(stage, values) is None, stage


@pytest.mark.parametrize("family", FOLDERS)
def test_whatever_a_port_shows_noise_accuses_nobody(
    references: dict[str, Reference], family: str
) -> None:
    ref, rng = references[family], np.random.default_rng(13)
    for _ in range(25):
        values = {n: v for n, v in ref.stages.items() if rng.random() < rng.choice([0.1, 0.5])}
        stage = str(rng.choice([name for name in ref.stages if name not in EXACT]))
        value = ref.stages[stage]
        noise = 0.1 * rms(value) * rng.standard_normal(value.shape)
        values[stage] = (value + noise).astype(np.float32)
        for model in (ref.model, None):
            assert ref.accuse(stage, values, "float32", model) is None, stage


def test_windows_show_in_a_later_step(
    references: dict[str, Reference], picture: Image.Image
) -> None:
    ref = references["pg2"]
    model, step = ref.model, 2
    shown = trace(model, picture, PROMPT, step=step)
    facts = {"step": step, "answer": list(shown.inputs.answer)}
    kinds = dict.fromkeys(shown.stages, "F32")
    dump = Dump(Path("reference"), kinds, shown.stages.__getitem__, facts)
    text = model.config.text_config
    sliding, full = "sliding_attention", "full_attention"
    for name, types in {
        "window_everywhere": (sliding,) * len(text.layer_types),
        "window_parity": tuple(full if t == sliding else sliding for t in text.layer_types),
        "none": text.layer_types,
    }.items():
        config = replace(model.config, text_config=replace(text, layer_types=types))
        # The answer must be the reference's: it is part of what is looked at.
        other = run_step(replace(model, config=config), shown)
        wrong = [
            n for n in other if rms(other[n] - shown.stages[n]) > FAR * 1e-6 * rms(shown.stages[n])
        ]
        if name == "none":
            assert not wrong
            continue
        context = Context(dump, model.config, model, other, 1e-6)
        found = accuse(wrong[0], other[wrong[0]], context)
        assert found is not None and found.id == name, (wrong[0], found)


def run_step(model: Model, shown: Trace) -> dict[str, Any]:
    """The stages of the same step by another model."""
    found: dict[str, Any] = {}

    def keep(name: str, value: Array) -> Array:
        found[name] = value.copy()
        return value

    run(shown.inputs, model.weights, model.config, ops=model.ops, tap=keep)
    return found


def test_a_reference_without_arrays_is_no_hindrance(references: dict[str, Reference]) -> None:
    ref = references["pg1"]
    values = port(ref, "gelu_erf")
    first = ref.first_wrong(values)
    assert first is not None

    def read(name: str) -> Array:
        raise KeyError(name)

    context = Context(Dump(Path("x"), {}, read, {}), ref.model.config, ref.model, values, 1e-7)
    found = accuse(first, values[first], context)
    assert found is not None and found.id == "gelu_erf"
    blind = replace(context, model=None)
    assert accuse("image.resized", values["image.resized"], blind) is None


@pytest.mark.parametrize("family", FOLDERS)
def test_noise_in_a_later_step_accuses_nobody(
    references: dict[str, Reference], picture: Image.Image, family: str
) -> None:
    ref, rng = references[family], np.random.default_rng(5)
    late = trace(ref.model, picture, PROMPT, step=1)
    shown, facts = late.stages, {"step": 1, "answer": list(late.inputs.answer)}
    dump = Dump(Path("x"), dict.fromkeys(shown, "F32"), shown.__getitem__, facts)
    for stage, value in shown.items():
        if stage in EXACT:
            continue
        noisy = value + (0.1 * rms(value) * rng.standard_normal(value.shape)).astype(np.float32)
        for values in (shown | {stage: noisy}, {stage: noisy}):
            for model in (ref.model, None):
                context = Context(dump, ref.model.config, model, values, 1e-7)
                assert accuse(stage, noisy, context) is None, stage
