"""The mistakes that are planted in a port: a table, and the few lines that make each.

Every one changes the port alone, as somebody would have written it; none is taken from what npvlm
suspects. Where a mistake makes no difference for a family it is left out for that family.

Not here, because a pass over picture and prompt cannot show them: a sliding window that is ignored
(the prompt sees itself as a whole in every layer), and a soft-cap behind the mask (nothing is
masked). Nor is an epsilon outside the root of an RMSNorm, which is below the noise of float32, nor
<loc0007> split into several tokens, which is an error of the ids like any other.

Axis letters: R picture side · P patches · T tokens · D hidden_size of the tower at hand ·
H query heads · K key/value heads · d width of a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import QuickGELUActivation
from transformers.models.gemma.modeling_gemma import rotate_half

from golden.planted_port import BOS, Port, merge, scale_colours, squeeze

V, T = "vision_tower.vision_model", "language_model.model"
V0, T0, T1 = f"{V}.encoder.layers.0", f"{T}.layers.0", f"{T}.layers.1"
WINDOW = 7  # of the planted sliding windows: shorter than any sequence here

Plant = Callable[[Port], object]


def everywhere(port: Port) -> bool:
    """It shows in every family."""
    return True


def gemma_1(port: Port) -> bool:
    """It shows in PaliGemma 1 alone."""
    return not port.second


def gemma_2(port: Port) -> bool:
    """It shows in PaliGemma 2 alone."""
    return port.second


@dataclass(frozen=True)
class Mistake:
    """One mistake: what it is called, the first stage that it makes wrong, and how it is made.

    cause : the id of the cause that has to be found
    note : what tells it from another mistake with the same cause
    """

    cause: str
    stage: str | Callable[[Port], str]
    plant: Plant
    shows: Callable[[Port], bool] = everywhere
    note: str = ""

    def first_stage(self, port: Port) -> str:
        """The first stage that it makes wrong in this port."""
        return self.stage if isinstance(self.stage, str) else self.stage(port)


# --- the picture ---------------------------------------------------------------------------------


def colours(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Change the scaled picture [3, R, R]."""

    def plant(port: Port) -> None:
        port.pixels = change(port.pixels).astype(np.float32)

    return plant


def resized(how: Callable[[Image.Image, int], np.ndarray]) -> Plant:
    """Make the square [R, R, 3] in another way."""

    def plant(port: Port) -> None:
        port.pixels = scale_colours(how(port.picture, port.side))

    return plant


def filtered(how: Image.Resampling) -> Plant:
    return resized(lambda picture, side: squeeze(picture, side, how))


def imagenet(pixels: np.ndarray) -> np.ndarray:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((pixels + 1) / 2 - mean[:, None, None]) / std[:, None, None]


def short_side_then_crop(picture: Image.Image, side: int) -> np.ndarray:
    short = min(picture.size)
    width, height = (side * length // short for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    whole = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + side, top + side)))


def crop_then_resize(picture: Image.Image, side: int) -> np.ndarray:
    return np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC))


def letterbox(picture: Image.Image, side: int) -> np.ndarray:
    return np.asarray(ImageOps.pad(picture, (side, side), Image.Resampling.BICUBIC, color="black"))


def no_antialias(picture: Image.Image, side: int) -> np.ndarray:
    values = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None]
    square = functional.interpolate(values, (side, side), mode="bicubic", align_corners=False)
    return square[0].permute(1, 2, 0).round().clamp(0, 255).numpy()


PICTURE = (
    Mistake("bgr", "pixel_values", colours(lambda x: x[::-1])),
    Mistake("range_0_1", "pixel_values", colours(lambda x: (x + 1) / 2)),
    Mistake("imagenet_norm", "pixel_values", colours(imagenet)),
    Mistake("centre_crop", "pixel_values", resized(short_side_then_crop), note="resize first"),
    Mistake("centre_crop", "pixel_values", resized(crop_then_resize), note="crop first"),
    Mistake("letterbox", "pixel_values", resized(letterbox)),
    Mistake("nearest", "pixel_values", filtered(Image.Resampling.NEAREST)),
    Mistake("bilinear", "pixel_values", filtered(Image.Resampling.BILINEAR)),
    Mistake("lanczos", "pixel_values", filtered(Image.Resampling.LANCZOS)),
    Mistake("no_antialias", "pixel_values", resized(no_antialias)),
    Mistake("transposed_picture", "pixel_values", colours(lambda x: x.transpose(0, 2, 1))),
    Mistake("flipped_picture", "pixel_values", colours(lambda x: x[:, ::-1])),
)


# --- the ids -------------------------------------------------------------------------------------


def bos_first(port: Port) -> None:
    port.ids.remove(BOS)
    port.ids.insert(0, BOS)


def image_tokens_short(port: Port) -> None:
    port.ids.remove(port.image_token)
    port.merge = lambda features, text, at: merge(features[: int(at.sum())], text, at)


IDS = (
    Mistake("bos_missing", "input_ids", lambda port: port.ids.remove(BOS)),
    Mistake("bos_first", "input_ids", bos_first),
    Mistake("newline_missing", "input_ids", lambda port: port.ids.pop()),
    Mistake("newline_twice", "input_ids", lambda port: port.ids.append(port.newline)),
    Mistake("image_tokens_short", "input_ids", image_tokens_short),
)


# --- weights and layers --------------------------------------------------------------------------


def weights(change: Callable[[Port], object]) -> Plant:
    """Change parameters in place."""
    return torch.no_grad()(change)


def attention(tower: nn.Module) -> list[nn.Module]:
    return [module for name, module in tower.named_modules() if name.endswith("self_attn")]


def norms(tower: nn.Module) -> list[nn.Module]:
    return [m for m in tower.modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))]


def mlps(tower: nn.Module) -> list[nn.Module]:
    return [module for name, module in tower.named_modules() if name.endswith("mlp")]


def assign(modules: Iterable[nn.Module], **values: Any) -> None:
    for module in modules:
        for name, value in values.items():
            # A module of its own for each: one that is shared would be shown under its last name.
            own = copy.copy(value) if isinstance(value, nn.Module) else value
            setattr(module, name, own)


def zeroed(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.zero_()


def swapped(a: nn.Linear, b: nn.Linear) -> None:
    a.weight, b.weight = b.weight, a.weight


def masked(port: Port, tower: nn.Module, visible: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """Hide from attention what `visible(query, key, layer)` denies, all of them [T, T]."""

    def masking(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> Any:
            x = named["hidden_states"]
            at = torch.arange(x.shape[1])
            seen = visible(at[:, None], at[None, :], layer)
            hidden = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
            return inputs, named | {"attention_mask": hidden[None, None].to(x.dtype)}

        return hook

    for layer, module in enumerate(attention(tower)):
        module.register_forward_pre_hook(masking(layer), with_kwargs=True)


def skipped(port: Port, layer: nn.Module) -> None:
    layer.forward = lambda hidden_states, *rest, **named: hidden_states
    port.silent.add(layer)


def exchanged(layers: nn.ModuleList) -> None:
    layers[0], layers[1] = layers[1], layers[0]


def after(layers: str, count: int, skipped_layer: int, norm: str, end: str) -> str:
    """The first stage behind a layer that is not there."""
    return end if skipped_layer == count - 1 else f"{layers}.{skipped_layer + 1}.{norm}"


Half = Callable[[Port], nn.Module]
Wiring = Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], Tensor]


def rewired(layers: Half, wiring: Wiring) -> Plant:
    """Put the parts of every layer together in another way."""

    def forward_of(layer: nn.Module) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *mask: None, **named: Any) -> Tensor:
            def attend(x: Tensor) -> Tensor:
                return layer.self_attn(hidden_states=x, **named)[0]

            return wiring(layer, hidden_states, attend)

        return forward

    def plant(port: Port) -> None:
        for layer in layers(port):
            layer.forward = forward_of(layer)

    return plant


def tower_layers(port: Port) -> nn.Module:
    return port.tower.encoder.layers


def decoder_layers(port: Port) -> nn.Module:
    return port.decoder.layers


def renormed(half: Half, change: Callable[[Tensor, nn.Module], Tensor]) -> Plant:
    """Norm rows in another way."""

    def forward_of(norm: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: change(x, norm)

    def plant(port: Port) -> None:
        for norm in norms(half(port)):
            norm.forward = forward_of(norm)

    return plant


# --- the tower -----------------------------------------------------------------------------------


def conv_hwc(port: Port) -> None:
    w = port.tower.embeddings.patch_embedding.weight
    w.copy_(w.permute(0, 2, 3, 1).reshape(w.shape).clone())


def patch_columns(port: Port) -> None:
    conv = port.tower.embeddings.patch_embedding
    rows_first = conv.forward
    conv.forward = lambda pixels: rows_first(pixels).transpose(2, 3)


def positions_shifted(port: Port) -> None:
    e = port.tower.embeddings
    e.position_ids = e.position_ids.roll(-1, dims=-1)


def heads_interleaved(port: Port) -> None:
    """Split the width as [d, H] where it is [H, d]."""

    def forward_of(attn: nn.Module) -> Callable[..., Any]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.head_dim, attn.num_heads)).permute(0, 3, 1, 2)

        def forward(hidden_states: Tensor, **rest: Any) -> tuple[Tensor, None]:
            q, k, v = (
                heads(p(hidden_states)) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
            )  # [1, H, P, d]
            mixed = torch.softmax(q @ k.mT * attn.scale, -1) @ v
            return attn.out_proj(mixed.transpose(1, 2).flatten(2)), None

        return forward

    for attn in attention(port.tower):
        attn.forward = forward_of(attn)


def heads_not_joined(port: Port) -> None:
    """Heads first when they are laid side by side."""

    def forward_of(attn: nn.Module) -> Callable[..., Any]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)

        def forward(hidden_states: Tensor, **rest: Any) -> tuple[Tensor, None]:
            q, k, v = (heads(p(hidden_states)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            mixed = torch.softmax(q @ k.mT * attn.scale, -1) @ v  # [1, H, P, d]
            return attn.out_proj(mixed.reshape(hidden_states.shape)), None

        return forward

    for attn in attention(port.tower):
        attn.forward = forward_of(attn)


def by_less(x: Tensor, norm: nn.Module) -> Tensor:
    deviation = torch.sqrt(x.var(-1, correction=1, keepdim=True) + norm.eps)
    return (x - x.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def tower_norms_swapped(port: Port) -> None:
    for layer in port.tower.encoder.layers:
        one, two = layer.layer_norm1, layer.layer_norm2
        one.weight, two.weight, one.bias, two.bias = two.weight, one.weight, two.bias, one.bias


def queries_and_keys_swapped(port: Port) -> None:
    for attn in attention(port.tower):
        swapped(attn.q_proj, attn.k_proj)
        attn.q_proj.bias, attn.k_proj.bias = attn.k_proj.bias, attn.q_proj.bias


def first_residual_missing(
    layer: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]
) -> Tensor:
    x = attend(layer.layer_norm1(x))
    return x + layer.mlp(layer.layer_norm2(x))


def second_residual_early(
    layer: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]
) -> Tensor:
    return x + layer.mlp(layer.layer_norm2(x + attend(layer.layer_norm1(x))))


def bias_missing(port: Port) -> None:
    for attn in attention(port.tower):
        zeroed(attn.q_proj.bias, attn.k_proj.bias, attn.v_proj.bias)


def middle(port: Port) -> int:
    return len(port.tower.encoder.layers) // 2


def transposed(linear: nn.Linear) -> None:
    linear.weight.copy_(linear.weight.mT.clone())


def tower_norm_not_loaded(port: Port) -> None:
    port.tower.encoder.layers[1].layer_norm2.reset_parameters()


TOWER = (
    Mistake("conv_hwc", f"{V}.embeddings.patch_embedding", weights(conv_hwc)),
    Mistake("patch_columns", f"{V}.embeddings.patch_embedding", patch_columns),
    Mistake(
        "positions_missing",
        f"{V}.embeddings",
        weights(lambda port: zeroed(port.tower.embeddings.position_embedding.weight)),
    ),
    Mistake("positions_shifted", f"{V}.embeddings", positions_shifted),
    Mistake(
        "positions_scaled",
        f"{V}.embeddings",
        weights(
            lambda port: port.tower.embeddings.position_embedding.weight.mul_(
                math.sqrt(port.tower.config.hidden_size)
            )
        ),
    ),
    Mistake(
        "vit_norm", f"{V0}.layer_norm1", renormed(lambda port: port.tower, by_less), note="D - 1"
    ),
    Mistake(
        "vit_norm", f"{V0}.layer_norm1", renormed(lambda port: port.tower, rms), note="RMSNorm"
    ),
    Mistake("norms_swapped", f"{V0}.layer_norm1", tower_norms_swapped),
    Mistake("qk_swapped", f"{V0}.self_attn.q_proj", queries_and_keys_swapped),
    Mistake("heads_not_joined", f"{V0}.self_attn.attend", heads_not_joined),
    Mistake(
        "residual_missing",
        f"{V0}.layer_norm2",
        rewired(tower_layers, first_residual_missing),
        note="attention's",
    ),
    Mistake(
        "residual_missing",
        V0,
        rewired(tower_layers, second_residual_early),
        note="from the layer's input",
    ),
    Mistake(
        "vit_activation",
        f"{V0}.mlp.gelu",
        lambda port: assign(mlps(port.tower), activation_fn=nn.SiLU()),
        note="silu",
    ),
    Mistake(
        "vit_activation",
        f"{V0}.mlp.gelu",
        lambda port: assign(mlps(port.tower), activation_fn=nn.ReLU()),
        note="relu",
    ),
    Mistake("vit_eps", f"{V0}.layer_norm1", lambda port: assign(norms(port.tower), eps=1e-5)),
    Mistake(
        "vit_gelu_erf",
        f"{V0}.mlp.gelu",
        lambda port: assign(mlps(port.tower), activation_fn=nn.GELU()),
    ),
    Mistake(
        "vit_gelu_sigmoid",
        f"{V0}.mlp.gelu",
        lambda port: assign(mlps(port.tower), activation_fn=QuickGELUActivation()),
    ),
    Mistake(
        "vit_causal",
        f"{V0}.self_attn.attend",
        lambda port: masked(port, port.tower, lambda q, k, layer: k <= q),
    ),
    Mistake(
        "vit_scale_missing",
        f"{V0}.self_attn.attend",
        lambda port: assign(attention(port.tower), scale=1.0),
    ),
    Mistake(
        "vit_scale_width",
        f"{V0}.self_attn.attend",
        lambda port: assign(attention(port.tower), scale=port.tower.config.hidden_size**-0.5),
    ),
    Mistake(
        "vit_scale_width",
        f"{V0}.self_attn.attend",
        lambda port: assign(
            attention(port.tower), scale=port.tower.config.num_attention_heads**-0.5
        ),
        note="heads",
    ),
    Mistake(
        "post_layernorm_missing",
        f"{V}.post_layernorm",
        lambda port: setattr(port.tower, "post_layernorm", nn.Identity()),
    ),
    Mistake("vit_bias_missing", f"{V0}.self_attn.q_proj", weights(bias_missing)),
    Mistake("heads_interleaved", f"{V0}.self_attn.attend", heads_interleaved),
    Mistake(
        "layer_skipped",
        lambda port: after(
            f"{V}.encoder.layers",
            len(port.tower.encoder.layers),
            middle(port),
            "layer_norm1",
            f"{V}.post_layernorm",
        ),
        lambda port: skipped(port, port.tower.encoder.layers[middle(port)]),
        note="tower",
    ),
    Mistake(
        "layer_order",
        f"{V0}.layer_norm1",
        lambda port: exchanged(port.tower.encoder.layers),
        note="tower",
    ),
    Mistake(
        "weight_transposed",
        f"{V0}.self_attn.q_proj",
        weights(lambda port: transposed(port.tower.encoder.layers[0].self_attn.q_proj)),
        note="tower",
    ),
    Mistake(
        "norm_not_loaded",
        f"{V}.encoder.layers.1.layer_norm2",
        weights(tower_norm_not_loaded),
        note="tower",
    ),
)


# --- picture and text together -------------------------------------------------------------------


def features(change: Callable[[Tensor], Tensor]) -> Plant:
    """Change the image features [P, D] on their way to the decoder."""

    def plant(port: Port) -> None:
        port.merge = lambda rows, text, at: merge(change(rows), text, at)

    return plant


def image_after_text(port: Port) -> None:
    port.merge = lambda rows, text, at: torch.cat([text[~at], rows])


def text_scaled(scale: Callable[[Port], float]) -> Plant:
    def plant(port: Port) -> None:
        port.decoder.embed_tokens.embed_scale.fill_(scale(port))

    return weights(plant)


def root_of_width(x: Tensor) -> float:
    return math.sqrt(x.shape[-1])


JOINT = (
    Mistake(
        "projector_bias_missing",
        "multi_modal_projector",
        weights(lambda port: zeroed(port.model.model.multi_modal_projector.linear.bias)),
    ),
    Mistake("image_divided_by_sqrt", "inputs_embeds", features(lambda x: x / root_of_width(x))),
    Mistake("image_scaled", "inputs_embeds", features(lambda x: x * root_of_width(x))),
    Mistake("features_normalised", "inputs_embeds", features(functional.normalize)),
    Mistake("text_unscaled", "inputs_embeds", text_scaled(lambda port: 1.0)),
    Mistake(
        "text_scaled_by_tower",
        "inputs_embeds",
        text_scaled(lambda port: math.sqrt(port.tower.config.hidden_size)),
        shows=lambda port: port.tower.config.hidden_size != port.decoder.config.hidden_size,
    ),
    Mistake("image_after_text", "inputs_embeds", image_after_text),
)


# --- the decoder ---------------------------------------------------------------------------------


def rope_pairs(port: Port) -> None:
    """Turn neighbours (2i, 2i + 1) where (i, i + d / 2) belong together."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = (part[:, None, :, : x.shape[-1] // 2] for part in (cos, sin))
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    port.rope = lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin))


def rope_base(base: float) -> Plant:
    def plant(port: Port) -> None:
        rotary = port.decoder.rotary_emb
        d = port.decoder.config.head_dim
        rotary.inv_freq = base ** (-torch.arange(0, d, 2) / d)

    return plant


def keys_shifted(by: int) -> Plant:
    """Queries at positions 1, 2, ..., keys at those plus `by`."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos[:, None] + rotate_half(x) * sin[:, None]

    def plant(port: Port) -> None:
        def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            places = torch.arange(1, q.shape[2] + 1)[None] + by
            return turn(q, cos, sin), turn(k, *port.decoder.rotary_emb(k, places))

        port.rope = rope

    return plant


def positions_restart(port: Port) -> None:
    images = port.ids.count(port.image_token)
    port.positions = [*range(1, images + 1), *range(1, len(port.ids) - images + 1)]


def kv_tiled(port: Port) -> None:
    port.repeat = lambda heads, times: heads.repeat(1, times, 1, 1)


def several_kv(port: Port) -> bool:
    """It shows where there are several key/value heads."""
    return port.decoder.config.num_key_value_heads > 1


def share_of_width(port: Port) -> int:
    config = port.decoder.config
    return config.hidden_size // config.num_attention_heads


def scale_wide(port: Port) -> None:
    assign(attention(port.decoder), scaling=share_of_width(port) ** -0.5)


def windowed(port: Port, layers: Callable[[int], bool]) -> None:
    masked(
        port,
        port.decoder,
        lambda q, k, layer: (k > q - WINDOW) | torch.tensor(not layers(layer)),
    )


def as_gemma_1(layer: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + attend(layer.input_layernorm(x))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def as_gemma_2(layer: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + layer.post_attention_layernorm(attend(layer.input_layernorm(x)))
    return x + layer.mlp(x)


def normed_stream_1(layer: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = layer.input_layernorm(x)
    x = layer.post_attention_layernorm(x + attend(x))
    return x + layer.mlp(x)


def normed_stream_2(layer: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = layer.input_layernorm(x)
    x = layer.pre_feedforward_layernorm(x + layer.post_attention_layernorm(attend(x)))
    return x + layer.post_feedforward_layernorm(layer.mlp(x))


def post_norms_missing(shown: bool) -> Plant:
    def plant(port: Port) -> None:
        for layer in port.decoder.layers:
            for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
                setattr(layer, name, nn.Identity())
                if not shown:
                    port.silent.add(getattr(layer, name))

    return plant


def gelu_on_up(port: Port) -> None:
    def forward_of(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: mlp.down_proj(mlp.gate_proj(x) * mlp.act_fn(mlp.up_proj(x)))

    for mlp in mlps(port.decoder):
        mlp.forward = forward_of(mlp)


def gate_and_up_swapped(port: Port) -> None:
    for mlp in mlps(port.decoder):
        swapped(mlp.gate_proj, mlp.up_proj)


def keys_and_values_swapped(port: Port) -> None:
    for attn in attention(port.decoder):
        swapped(attn.k_proj, attn.v_proj)


def lm_head_untied(port: Port) -> None:
    table = port.model.lm_head.weight
    drawn = torch.randn(table.shape, generator=torch.Generator().manual_seed(7))
    port.model.lm_head.weight = nn.Parameter(drawn * table.std())


DECODER = (
    Mistake("rms_weight", f"{T0}.input_layernorm", renormed(lambda port: port.decoder, rms)),
    Mistake(
        "rms_eps",
        f"{T0}.input_layernorm",
        lambda port: assign(norms(port.decoder), eps=1e-5),
    ),
    Mistake("rope_pairs", f"{T0}.self_attn.q_rope", rope_pairs),
    Mistake("rope_base", f"{T0}.self_attn.q_rope", rope_base(1e6), note="1e6"),
    Mistake("rope_base", f"{T0}.self_attn.q_rope", rope_base(500.0), note="500"),
    Mistake("rope_shift", f"{T0}.self_attn.k_rope", keys_shifted(1), note="keys ahead"),
    Mistake("rope_shift", f"{T0}.self_attn.k_rope", keys_shifted(-1), note="keys behind"),
    Mistake("positions_restart", "positions", positions_restart),
    Mistake(
        "causal_prefix",
        f"{T0}.self_attn.attend",
        lambda port: masked(port, port.decoder, lambda q, k, layer: k <= q),
    ),
    Mistake("kv_tiled", f"{T0}.self_attn.attend", kv_tiled, shows=several_kv),
    Mistake(
        "scale_missing",
        f"{T0}.self_attn.attend",
        lambda port: assign(attention(port.decoder), scaling=1.0),
    ),
    Mistake(
        "scale_width",
        f"{T0}.self_attn.attend",
        scale_wide,
        shows=lambda port: share_of_width(port) != port.decoder.config.head_dim,
    ),
    Mistake(
        "softcap_missing",
        f"{T0}.self_attn.attend",
        lambda port: assign(attention(port.decoder), attn_logit_softcapping=None),
        shows=gemma_2,
    ),
    Mistake(
        "window_everywhere",
        f"{T0}.self_attn.attend",
        lambda port: windowed(port, lambda layer: True),
        shows=gemma_2,
    ),
    Mistake(
        "window_parity",
        f"{T1}.self_attn.attend",
        lambda port: windowed(port, lambda layer: layer % 2 == 1),
        shows=gemma_2,
    ),
    Mistake(
        "post_norms_missing",
        f"{T0}.post_attention_layernorm",
        post_norms_missing(shown=True),
        shows=gemma_2,
        note="passed through",
    ),
    Mistake(
        "post_norms_missing",
        f"{T0}.pre_feedforward_layernorm",
        post_norms_missing(shown=False),
        shows=gemma_2,
        note="not dumped",
    ),
    Mistake(
        "pre_post_confused",
        f"{T0}.post_attention_layernorm",
        rewired(decoder_layers, as_gemma_2),
        shows=gemma_1,
        note="as in Gemma 2",
    ),
    Mistake(
        "pre_post_confused",
        f"{T0}.post_attention_layernorm",
        rewired(decoder_layers, as_gemma_1),
        shows=gemma_2,
        note="as in Gemma 1",
    ),
    Mistake(
        "residual_normed",
        f"{T0}.post_attention_layernorm",
        rewired(decoder_layers, normed_stream_1),
        shows=gemma_1,
    ),
    Mistake(
        "residual_normed",
        f"{T0}.pre_feedforward_layernorm",
        rewired(decoder_layers, normed_stream_2),
        shows=gemma_2,
    ),
    Mistake(
        "gelu_erf",
        f"{T0}.mlp.gated",
        lambda port: assign(mlps(port.decoder), act_fn=nn.GELU()),
    ),
    Mistake(
        "gelu_silu",
        f"{T0}.mlp.gated",
        lambda port: assign(mlps(port.decoder), act_fn=nn.SiLU()),
    ),
    Mistake("gelu_on_up", f"{T0}.mlp.gated", gelu_on_up),
    Mistake("gelu_on_up", f"{T0}.mlp.gate_proj", gate_and_up_swapped, note="weights swapped"),
    Mistake("kv_swapped", f"{T0}.self_attn.k_proj", keys_and_values_swapped),
    Mistake(
        "layer_skipped",
        f"{T}.layers.2.input_layernorm",
        lambda port: skipped(port, port.decoder.layers[1]),
        note="decoder",
    ),
    Mistake(
        "layer_order",
        f"{T0}.input_layernorm",
        lambda port: exchanged(port.decoder.layers),
        note="decoder",
    ),
    Mistake(
        "final_norm_missing",
        f"{T}.norm",
        lambda port: setattr(port.decoder, "norm", nn.Identity()),
    ),
    Mistake(
        "final_softcap_missing",
        "language_model.logits",
        lambda port: setattr(port, "final_softcap", None),
        shows=gemma_2,
    ),
    Mistake("lm_head_untied", "language_model.logits", lm_head_untied),
)


# --- weights and numbers -------------------------------------------------------------------------


def other_layer(name: str) -> Plant:
    """The second layer has this weight of the first."""

    def plant(port: Port) -> None:
        layers = port.decoder.layers if "mlp" in name else port.tower.encoder.layers
        layers[1].get_submodule(name).load_state_dict(layers[0].get_submodule(name).state_dict())

    return plant


def bf16_as_fp16(port: Port) -> None:
    for weight in port.model.parameters():
        weight.copy_(weight.bfloat16().view(torch.float16).float())


def stored_as_bf16(port: Port) -> bool:
    """It shows where the file holds bfloat16."""
    return all(torch.equal(w, w.bfloat16().float()) for w in port.model.parameters())


def spoiled(find: Callable[[Port], nn.Module], change: Callable[[Tensor], object]) -> Plant:
    """Spoil what a module gives."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change(output)
        return output

    return lambda port: find(port).register_forward_hook(hook)


WEIGHTS = (
    Mistake(
        "weight_transposed",
        f"{T0}.self_attn.q_proj",
        weights(lambda port: transposed(port.decoder.layers[0].self_attn.q_proj)),
        shows=lambda port: share_of_width(port) == port.decoder.config.head_dim,
        note="decoder",
    ),
    Mistake(
        "weight_of_other_layer",
        f"{T1}.mlp.gate_proj",
        weights(other_layer("mlp.gate_proj")),
        note="decoder",
    ),
    Mistake(
        "weight_of_other_layer",
        f"{V}.encoder.layers.1.self_attn.v_proj",
        weights(other_layer("self_attn.v_proj")),
        note="tower",
    ),
    Mistake(
        "norm_not_loaded",
        f"{T1}.input_layernorm",
        weights(lambda port: zeroed(port.decoder.layers[1].input_layernorm.weight)),
        note="decoder",
    ),
    Mistake(
        "bf16_as_fp16",
        f"{V}.embeddings.patch_embedding",
        weights(bf16_as_fp16),
        shows=stored_as_bf16,
    ),
    Mistake(
        "nan",
        f"{T1}.mlp",
        spoiled(lambda port: port.decoder.layers[1].mlp, lambda x: x[0, 3].fill_(math.nan)),
        note="a row",
    ),
    Mistake(
        "nan",
        f"{V0}.mlp.fc1",
        spoiled(
            lambda port: port.tower.encoder.layers[0].mlp.fc1, lambda x: x[0, 1, 2].fill_(math.inf)
        ),
        note="one infinity",
    ),
    Mistake(
        "constant",
        "multi_modal_projector",
        spoiled(lambda port: port.model.model.multi_modal_projector, Tensor.zero_),
        note="zeros",
    ),
    Mistake(
        "constant",
        f"{V}.encoder.layers.1.self_attn",
        spoiled(
            lambda port: port.tower.encoder.layers[1].self_attn.out_proj, lambda x: x.fill_(0.5)
        ),
        note="one half",
    ),
)

MISTAKES = (*PICTURE, *IDS, *TOWER, *JOINT, *DECODER, *WEIGHTS)
