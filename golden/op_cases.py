"""torch's side of the goldens per operation: small cases of every operation, and what it gives.

The inputs are random float32 numbers. What comes out is computed twice by transformers' own modules
and functions, or torch's where those are called as they are: in float32, and in float64, which is
the truth. Functions have the names and arguments of npvlm's operations; nothing of npvlm is used.

Axis letters: T tokens · S rows with keys · N pictures · P patches of a picture · C colours ·
R picture side · p patch side · D width · H query heads · K key/value heads · d width of a head ·
V vocabulary · O, I out and in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, starmap
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, Gemma2Config, GemmaConfig, SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.colpali.processing_colpali import ColPaliProcessor
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from golden.oracle import lifted

SEED = 71

Inputs = dict[str, np.ndarray]
Numbers = dict[str, Any]


@dataclass(frozen=True)
class OpCase:
    """An operation, what goes in, and what comes out."""

    op: str
    name: str
    inputs: Inputs
    numbers: Numbers
    truth: np.ndarray  # float64; whole numbers or float32 where nothing is rounded on the way
    torchs: np.ndarray | None  # float32; None where nothing is rounded


@torch.no_grad()
def op_cases() -> list[OpCase]:
    """Every case of every operation, in the order of a run."""
    return [
        *resize_cases(),
        *squares_cases(),
        *patch_embed_cases(),
        *linear_cases(),
        *layer_norm_cases(),
        *gelu_cases(),
        *embed_cases(),
        *rms_norm_cases(),
        *rope_cases(),
        *visibility_cases(),
        *soft_cap_cases(),
        *softmax_cases(),
        *attend_cases(),
        *cache_cases(),
        *gated_cases(),
        *log_softmax_cases(),
        *unit_cases(),
        *max_sim_cases(),
    ]


class Draw:
    """Random numbers that depend on the case alone, so that a new case changes no other."""

    def __init__(self, op: str, name: str):
        self.generator = np.random.default_rng([SEED, *f"{op}.{name}".encode()])

    def __call__(self, *shape: int, size: float = 1.0) -> np.ndarray:
        """Normal float32 numbers."""
        return np.float32(size) * self.generator.standard_normal(shape, dtype=np.float32)

    def whole(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Whole numbers from low up to, not including, high."""
        return self.generator.integers(low, high, shape)

    def bytes(self, *shape: int) -> np.ndarray:
        """Colours."""
        return self.generator.integers(0, 256, shape, dtype=np.uint8)


def rounding(
    op: str, name: str, inputs: Inputs, numbers: Numbers, compute: Callable[..., Tensor]
) -> OpCase:
    """A case of an operation that rounds: computed in float32 and, as the truth, in float64."""
    narrow = {key: torch.from_numpy(value) for key, value in inputs.items()}
    wide = {key: t.double() if t.is_floating_point() else t for key, t in narrow.items()}
    torchs = compute(**narrow, **numbers).numpy()
    with lifted():
        truth = compute(**wide, **numbers)
    assert (torchs.dtype, truth.dtype) == (np.float32, torch.float64)
    return OpCase(op, name, inputs, numbers, plain(truth.numpy()), plain(torchs))


def exact(op: str, name: str, inputs: Inputs, numbers: Numbers, result: np.ndarray) -> OpCase:
    """A case of an operation that has one right answer."""
    return OpCase(op, name, inputs, numbers, plain(result), None)


def plain(value: np.ndarray) -> np.ndarray:
    """In the order of its axes, which is how safetensors writes memory."""
    return np.ascontiguousarray(value)


# --- the image tower -----------------------------------------------------------------------------


def resize_cases() -> Iterator[OpCase]:
    """Pictures as the image processor resizes them, and the pixel values it makes of them."""
    half, own = ([0.5] * 3, [0.5] * 3), ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
    for name, (height, width), size, resample, (mean, std) in (
        ("bicubic_down", (37, 53), 15, 3, half),
        ("bicubic_up", (11, 7), 23, 3, half),
        ("bicubic_one_pixel", (1, 1), 5, 3, half),
        ("bicubic_same_size", (9, 9), 9, 3, half),
        ("bilinear", (29, 31), 13, 2, own),
        ("lanczos", (17, 41), 19, 1, own),
    ):
        picture = Draw("resize", name).bytes(height, width, 3)
        processor = SiglipImageProcessorPil(
            size={"height": size, "width": size},
            resample=resample,
            image_mean=mean,
            image_std=std,
            do_convert_rgb=True,
        )
        shown = partial(processor, Image.fromarray(picture), return_tensors="np")
        resized = shown(do_rescale=False, do_normalize=False)["pixel_values"][0]
        numbers = {"size": size, "resample": resample}
        assert resized.dtype == np.uint8
        yield exact("resize", name, {"picture": picture}, numbers, resized)
        colours = {"image_mean": mean, "image_std": std, "rescale_factor": 1 / 255}
        pixels = shown()["pixel_values"][0]
        assert pixels.dtype == np.float32
        yield exact("pixel_values", name, {"picture": picture}, numbers | colours, pixels)


def squares_cases() -> Iterator[OpCase]:
    """Squares of pictures, in the order in which a convolution goes over them."""
    for name, (N, C, R), p in (
        ("one_picture", (1, 3, 15), 5),
        ("two_pictures_and_a_rest", (2, 3, 11), 4),
        ("five_colours", (3, 5, 7), 2),
    ):
        pixels = Draw("squares", name)(N, C, R, R)
        cut = F.unfold(torch.from_numpy(pixels), p, stride=p).transpose(1, 2).numpy()
        yield exact("squares", name, {"pixel_values": pixels}, {"p": p}, cut)


def patch_embed(pixel_values: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """pixel_values [N, C, R, R], w [D, C, p, p], bias [D] -> [N, P, D]"""
    config = SiglipVisionConfig(
        hidden_size=len(w),
        num_channels=w.shape[1],
        patch_size=w.shape[-1],
        image_size=pixel_values.shape[-1],
    )
    embeddings = modeling_siglip.SiglipVisionEmbeddings(config)
    fill(embeddings.patch_embedding, weight=w, bias=bias)
    fill(
        embeddings.position_embedding, weight=torch.zeros_like(embeddings.position_embedding.weight)
    )
    return embeddings(pixel_values)


def patch_embed_cases() -> Iterator[OpCase]:
    """Patches, before the learned positions."""
    for name, (N, R), p, D in (
        ("one_picture", (1, 15), 5, 7),
        ("two_pictures_and_a_rest", (2, 23), 7, 11),
        ("patches_of_one_pixel", (1, 3), 1, 13),
        ("patches_of_14", (3, 30), 14, 9),
    ):
        draw = Draw("patch_embed", name)
        inputs = {
            "pixel_values": draw(N, 3, R, R),
            "w": draw(D, 3, p, p, size=(3 * p * p) ** -0.5),
            "bias": draw(D, size=0.3),
        }
        yield rounding("patch_embed", name, inputs, {}, patch_embed)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, I], w [O, I], bias [O] -> [T, O]"""
    return F.linear(x, w, bias)


def linear_cases() -> Iterator[OpCase]:
    """Linear layers, one with a sum as long as a real model's."""
    for name, T, (rows, terms), with_bias in (
        ("one_row", 1, (53, 37), False),
        ("bias", 5, (29, 43), True),
        ("many_rows", 67, (33, 19), True),
        ("long_sum", 3, (11, 1157), False),
    ):
        draw = Draw("linear", name)
        inputs = {"x": draw(T, terms), "w": draw(rows, terms, size=terms**-0.5)}
        if with_bias:
            inputs["bias"] = draw(rows, size=0.3)
        yield rounding("linear", name, inputs, {}, linear)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D], bias [D] -> [..., D]"""
    norm = fill(nn.LayerNorm(len(weight), eps=eps), weight=weight, bias=bias)
    return norm(x)


def layer_norm_cases() -> Iterator[OpCase]:
    """SigLIP's norm; small numbers tell where eps goes, an offset what is subtracted first."""
    for name, shape, size, offset, eps in (
        ("siglip", (5, 39), 1.0, 0.0, 1e-6),
        ("large_eps", (7, 23), 1.0, 0.0, 0.3),
        ("small_numbers", (3, 31), 1e-3, 0.0, 1e-6),
        ("far_from_zero", (2, 3, 17), 2.0, 9.0, 1e-6),
    ):
        draw, D = Draw("layer_norm", name), shape[-1]
        inputs = {
            "x": draw(*shape, size=size) + np.float32(offset),
            "weight": 1 + draw(D, size=0.3),
            "bias": draw(D, size=0.3),
        }
        yield rounding("layer_norm", name, inputs, {"eps": eps}, layer_norm)


def gelu_tanh(x: Tensor) -> Tensor:
    """x [...] -> [...]"""
    return ACT2FN["gelu_pytorch_tanh"](x)


def gelu_cases() -> Iterator[OpCase]:
    """The activation of both towers: around zero, near zero, where it is flat, and far out."""
    for name, shape, size, offset in (
        ("around_zero", (5, 71), 1.0, 0.0),
        ("near_zero", (3, 37), 1e-3, 0.0),
        ("negative", (4, 29), 0.5, -3.0),
        ("far_out", (2, 3, 19), 9.0, 0.0),
    ):
        x = Draw("gelu_tanh", name)(*shape, size=size) + np.float32(offset)
        yield rounding("gelu_tanh", name, {"x": x}, {}, gelu_tanh)


# --- the decoder ---------------------------------------------------------------------------------


def embed(ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """ids [T], table [V, D] -> [T, D]"""
    V, D = table.shape
    module = modeling_gemma.GemmaTextScaledWordEmbedding(V, D, 0, embed_scale=scale)
    return fill(module, weight=table)(ids)


def embed_cases() -> Iterator[OpCase]:
    """Rows of the table times sqrt(D), which is never a whole number here."""
    for name, T, V, D in (("few", 7, 29, 45), ("wide", 3, 11, 117), ("many", 41, 13, 33)):
        draw = Draw("embed", name)
        inputs = {"ids": draw.whole(0, V, T), "table": draw(V, D)}
        yield rounding("embed", name, inputs, {"scale": D**0.5}, embed)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, kind: Callable[..., nn.Module]) -> Tensor:
    """x [..., D], weight [D] -> [..., D]"""
    return fill(kind(len(weight), eps), weight=weight)(x)


def rms_norm_cases() -> Iterator[OpCase]:
    """Gemma's norm; small numbers tell where eps goes."""
    one, two = modeling_gemma.GemmaRMSNorm, modeling_gemma2.Gemma2RMSNorm
    for name, kind, shape, size, eps in (
        ("gemma", one, (5, 45), 1.0, 1e-6),
        ("gemma2", two, (3, 57), 30.0, 1e-6),
        ("large_eps", one, (7, 23), 1.0, 0.3),
        ("small_numbers", two, (2, 3, 31), 1e-3, 1e-6),
    ):
        draw = Draw("rms_norm", name)
        inputs = {"x": draw(*shape, size=size), "weight": draw(shape[-1], size=0.3)}
        yield rounding("rms_norm", name, inputs, {"eps": eps}, partial(rms_norm, kind=kind))


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [T, H, d], positions [T] -> [T, H, d]"""
    config = gemma_config(theta=theta, head_dim=x.shape[-1])
    return unheaded(rotated(heads(x), heads(x), positions, config)[0])


def rope_cases() -> Iterator[OpCase]:
    """Rotary positions, from 1 as PaliGemma counts them, far out, and with another base."""
    for name, (T, H, d), positions, theta in (
        ("from_one", (7, 3, 10), range(1, 8), 10000.0),
        ("far_out", (5, 2, 22), (255, 1023, 4095, 8191, 100_003), 10000.0),
        ("another_base", (9, 1, 14), range(3, 66, 7), 77.0),
        ("zero_and_backwards", (4, 5, 6), (300, 20, 1, 0), 10000.0),
    ):
        inputs = {
            "x": Draw("rope", name)(T, H, d),
            "positions": np.array(positions, np.int64),
        }
        yield rounding("rope", name, inputs, {"theta": theta}, rope)


def visibility_cases() -> Iterator[OpCase]:
    """Which rows each token sees: all of the prefix, then all before, or a window of these."""
    for name, prefix, total, window in (
        ("prefix_and_answer", 5, 11, None),
        ("prefix_alone", 7, 7, None),
        ("window", 9, 23, 4),
        ("window_wider_than_prefix", 3, 17, 8),
        ("prefix_wider_than_window", 13, 15, 6),
        ("window_of_two", 2, 5, 2),
    ):
        numbers = {"prefix": prefix, "total": total, "window": window}
        visible = seen(prefix, total, window)
        yield exact("visibility", name, {}, numbers, visible.astype(np.uint8))


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x [...] -> [...]"""
    return torch.tanh(x / cap) * cap  # written out in Gemma2ForCausalLM and in its attention


def soft_cap_cases() -> Iterator[OpCase]:
    """Values far inside the cap, about as large, and far outside."""
    for name, shape, size, cap in (
        ("inside", (5, 43), 0.1, 30.0),
        ("bent", (3, 7, 19), 40.0, 30.0),
        ("outside", (2, 37), 900.0, 50.0),
        ("near_one", (4, 29), 1.0, 1.5),
    ):
        x = Draw("soft_cap", name)(*shape, size=size)
        yield rounding("soft_cap", name, {"x": x}, {"cap": cap}, soft_cap)


def softmax(x: Tensor) -> Tensor:
    """x [..., S] -> [..., S]"""
    return F.softmax(x, dim=-1, dtype=torch.float32)  # lifted where the truth is computed


def softmax_cases() -> Iterator[OpCase]:
    """Rows of scores, some hidden, some so large that a bare exponential overflows."""
    for name, shape, size, offset in (
        ("flat", (5, 37), 0.3, 0.0),
        ("peaked", (3, 7, 19), 9.0, 0.0),
        ("hidden", (7, 23), 2.0, 0.0),
        ("far_from_zero", (4, 29), 3.0, 1e4),
    ):
        draw = Draw("softmax", name)
        x = draw(*shape, size=size) + np.float32(offset)
        if name == "hidden":
            x[draw.whole(0, 3, *shape) == 0] = -np.inf
        yield rounding("softmax", name, {"x": x}, {}, softmax)


def log_softmax_cases() -> Iterator[OpCase]:
    """Log-probabilities, of few entries and of many."""
    for name, V, size in (("few", 29, 1.0), ("many", 1001, 3.0), ("peaked", 257, 30.0)):
        inputs = {"logits": Draw("log_softmax", name)(V, size=size)}
        yield rounding("log_softmax", name, inputs, {}, log_softmax)


def log_softmax(logits: Tensor) -> Tensor:
    """logits [V] -> [V]"""
    return F.log_softmax(logits, dim=-1)


@dataclass(frozen=True)
class Part:
    """A sequence in a packed call: a prefix and what follows; others do not see it."""

    prefix: int
    total: int
    asking: int  # the last so many tokens have queries


def attend_cases() -> Iterator[OpCase]:
    """Attention of SigLIP, Gemma and Gemma 2, with one key/value head, with two, with all."""
    siglip, gemma, gemma2 = modeling_siglip, modeling_gemma, modeling_gemma2
    for name, kind, sequences, (H, K, d), window, cap in (
        ("siglip", siglip, [(25, 25, 25)], (3, 3, 13), None, None),
        ("siglip_two_pictures", siglip, [(9, 9, 9)] * 2, (5, 5, 11), None, None),
        ("one_group", gemma, [(7, 13, 13)], (5, 1, 10), None, None),
        ("two_groups", gemma, [(9, 11, 11)], (6, 2, 14), None, None),
        ("group_per_head", gemma, [(5, 17, 17)], (3, 3, 18), None, None),
        ("packed", gemma, [(3, 7, 7), (11, 12, 12), (1, 5, 5)], (4, 2, 6), None, None),
        ("one_step", gemma, [(190, 203, 1), (61, 67, 1)], (3, 1, 12), None, None),
        ("soft_cap", gemma2, [(6, 15, 15)], (6, 2, 10), None, 1.5),
        ("window", gemma2, [(9, 23, 23)], (4, 2, 22), 5, None),
        ("window_and_soft_cap", gemma2, [(4, 19, 19), (13, 14, 14)], (5, 1, 20), 7, 0.75),
    ):
        asked = [Part(*sizes) for sizes in sequences]
        T, S = sum(part.asking for part in asked), sum(part.total for part in asked)
        draw = Draw("attend", name)
        inputs = {"q": draw(T, H, d), "k": draw(S, K, d), "v": draw(S, K, d)}
        inputs |= intervals(asked, window)
        numbers = {"scale": d**-0.5, "cap": cap}
        compute = partial(attend, kind=kind, sequences=asked, window=window)
        yield rounding("attend", name, inputs, numbers, compute)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
    cap: float | None,
    *,
    kind: ModuleType,
    sequences: Sequence[Part],
    window: int | None,
) -> Tensor:
    """One sequence after the other, each with the mask that transformers makes for it.

    The intervals say the same as the masks, for those who have no masks.

    q [T, H, d], k [S, K, d], v [S, K, d] -> [T, H, d]
    """
    mixed, row, key = [], 0, 0
    for part in sequences:
        mask = None  # SigLIP's patches all see each other
        if kind is not modeling_siglip:
            mask = visibility(part.prefix, part.total, window, q)[:, :, -part.asking :]
        own = slice(key, key + part.total)
        mixed.append(mix(kind, q[row : row + part.asking], k[own], v[own], mask, scale, cap))
        row, key = row + part.asking, key + part.total
    return torch.cat(mixed)


def cache_cases() -> Iterator[OpCase]:
    """A prefix at once, then token by token through the cache: rotary positions and attention."""
    gemma, gemma2 = modeling_gemma, modeling_gemma2
    for name, kind, (prefix, total), (H, K, d), window, cap in (
        ("one_group", gemma, (7, 13), (5, 1, 10), None, None),
        ("two_groups", gemma, (3, 11), (6, 2, 14), None, None),
        ("group_per_head", gemma2, (5, 9), (3, 3, 18), None, 2.5),
        ("window", gemma2, (11, 21), (4, 2, 6), 5, None),
        ("window_and_soft_cap", gemma2, (2, 19), (3, 1, 22), 7, 1.25),
    ):
        draw = Draw("cache", name)
        inputs = {
            "q": draw(total, H, d),
            "k": draw(total, K, d),
            "v": draw(total, K, d),
            "positions": np.arange(1, total + 1),
        }
        numbers = {
            "prefix": prefix, "window": window, "theta": 10000.0, "scale": d**-0.5, "cap": cap,
        }  # fmt: skip
        found = rounding("cache", name, inputs, numbers, partial(stepwise, kind=kind))
        whole = rounding("cache", name, inputs, numbers, partial(at_once, kind=kind))
        assert np.allclose(found.truth, whole.truth, rtol=0, atol=1e-13), (
            "the cache changes results"
        )
        yield found


def stepwise(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, prefix: int, window: int | None,
    theta: float, scale: float, cap: float | None, *, kind: ModuleType,
) -> Tensor:  # fmt: skip
    """The prefix in one step, each later token in one of its own, through transformers' cache.

    q [T, H, d], k [T, K, d], v [T, K, d], positions [T] -> [T, H, d]
    """
    config = gemma_config(window, theta, q.shape[-1])
    cache, mixed = DynamicCache(config=config), []
    edges = [0, *range(prefix, len(q) + 1)]
    for rows in starmap(slice, pairwise(edges)):
        blocks = torch.zeros(1, prefix, dtype=torch.long) if rows.start == 0 else None
        mask = mask_of(config, q[rows], blocks, cache)
        turned = rotated(heads(q[rows]), heads(k[rows]), positions[rows], config)
        keys, values = cache.update(turned[1], heads(v[rows]), 0)
        mixed.append(
            mix(kind, unheaded(turned[0]), unheaded(keys), unheaded(values), mask, scale, cap)
        )
    return torch.cat(mixed)


def at_once(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, prefix: int, window: int | None,
    theta: float, scale: float, cap: float | None, *, kind: ModuleType,
) -> Tensor:  # fmt: skip
    """What `stepwise` has to give: one pass without a cache.

    q [T, H, d], k [T, K, d], v [T, K, d], positions [T] -> [T, H, d]
    """
    config = gemma_config(window, theta, q.shape[-1])
    mask = visibility(prefix, len(q), window, q)
    turned = rotated(heads(q), heads(k), positions, config)
    return mix(kind, unheaded(turned[0]), unheaded(turned[1]), v, mask, scale, cap)


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """x [T, I], gate [O, I], up [O, I] -> [T, O]"""
    config = GemmaConfig(hidden_size=gate.shape[1], intermediate_size=len(gate))
    mlp = modeling_gemma.GemmaMLP(config)
    fill(mlp.gate_proj, weight=gate)
    fill(mlp.up_proj, weight=up)
    mlp.down_proj = nn.Identity()
    return mlp(x)


def gated_cases() -> Iterator[OpCase]:
    """Gemma's MLP up to its last projection."""
    for name, T, (rows, terms), size in (
        ("one_row", 1, (93, 45), 1.0),
        ("rows", 7, (89, 33), 1.0),
        ("large", 3, (51, 19), 9.0),
        ("long_sum", 2, (23, 267), 1.0),
    ):
        draw = Draw("gated", name)
        weights = {half: draw(rows, terms, size=terms**-0.5) for half in ("gate", "up")}
        yield rounding("gated", name, {"x": draw(T, terms, size=size)} | weights, {}, gated)


# --- finding pages -------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """x [..., D] -> [..., D]"""
    return x / x.norm(dim=-1, keepdim=True)  # as it is inside ColPaliForRetrieval.forward


def unit_cases() -> Iterator[OpCase]:
    """Vectors of length 1, of few numbers, of as many as ColPali's have, and of very small ones."""
    for name, shape, size in (
        ("few", (5, 7), 1.0),
        ("colpali", (11, 128), 3.0),
        ("one", (1, 33), 20.0),
        ("small", (3, 4, 19), 1e-12),
    ):
        x = Draw("unit", name)(*shape, size=size)
        yield rounding("unit", name, {"x": x}, {}, unit)


def max_sim(q: Tensor, pages: Tensor, size: int) -> Tensor:
    """q [T, I], pages [O, I] -> [N]"""
    passages = list(pages.reshape(-1, size, pages.shape[-1]))
    return ColPaliProcessor.score_retrieval(None, [q], passages)[0]


def max_sim_cases() -> Iterator[OpCase]:
    """Late interaction: pages of few vectors and of many, queries of one token and of several."""
    for name, tokens, pages, size, width in (
        ("few", 5, 7, 3, 17),
        ("colpali", 13, 2, 37, 128),
        ("one_token", 1, 3, 67, 20),
        ("one_vector", 7, 11, 1, 29),
    ):
        draw = Draw("max_sim", name)
        inputs = {"q": draw(tokens, width), "pages": draw(pages * size, width)}
        yield rounding("max_sim", name, inputs, {"size": size}, max_sim)


# --- transformers, spoken to in rows -------------------------------------------------------------


def fill(module: nn.Module, **tensors: Tensor) -> nn.Module:
    """Give a module its weights."""
    for name, value in tensors.items():
        assert getattr(module, name).shape == value.shape
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    return module


def gemma_config(
    window: int | None = None, theta: float = 10000.0, head_dim: int = 256
) -> GemmaConfig | Gemma2Config:
    """A config of one layer, with a sliding window or without."""
    common: dict[str, Any] = {
        "num_hidden_layers": 1,
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attn_implementation": "eager",
    }
    if window is None:
        return GemmaConfig(**common)
    return Gemma2Config(**common, sliding_window=window, layer_types=["sliding_attention"])


def visibility(prefix: int, total: int, window: int | None, like: Tensor) -> Tensor:
    """The mask that transformers adds to the scores [1, 1, T, T]: 0 where a token may look."""
    blocks = torch.tensor([[0] * prefix + [-1] * (total - prefix)])
    return mask_of(gemma_config(window), like.new_zeros(total, 1), blocks, None)


def mask_of(
    config: GemmaConfig | Gemma2Config, rows: Tensor, blocks: Tensor | None, cache: Any
) -> Tensor:
    """transformers' own mask for the rows [T, ...] after those in the cache.

    Tokens of one block see each other; -1 is no block. PaliGemma calls a prefix one, and only when
    nothing is in the cache yet.
    """
    sliding = isinstance(config, Gemma2Config)
    make = create_sliding_window_causal_mask if sliding else create_causal_mask
    before = cache.get_seq_length() if cache is not None else 0
    return make(
        config=config,
        inputs_embeds=rows.new_zeros(1, len(rows), 1),
        attention_mask=torch.ones(1, before + len(rows), dtype=torch.long),
        past_key_values=cache,
        block_sequence_ids=blocks,
    )


def seen(prefix: int, total: int, window: int | None) -> np.ndarray:
    """Whether token t may see row s: [T, S] of bool."""
    return visibility(prefix, total, window, torch.zeros(1))[0, 0].numpy() == 0


def intervals(sequences: Sequence[Part], window: int | None) -> Inputs:
    """The masks of sequences end to end as intervals: start [T], first [T], last [T]."""
    parts, key = [], 0
    for part in sequences:
        visible = seen(part.prefix, part.total, window)[-part.asking :]
        first, count = visible.argmax(-1), visible.sum(-1)
        at = np.arange(part.total)
        runs = (first[:, None] <= at) & (at < (first + count)[:, None])
        assert (runs == visible).all(), "a mask is no interval"
        parts.append((np.full(part.asking, key), key + first, key + first + count))
        key += part.total
    start, first, last = (np.concatenate(values) for values in zip(*parts, strict=True))
    return {"start": start, "first": first, "last": last}


def rotated(
    q: Tensor, k: Tensor, positions: Tensor, config: GemmaConfig | Gemma2Config
) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, H, T, d] after rotary positions."""
    cos, sin = modeling_gemma.GemmaRotaryEmbedding(config)(q, positions[None])
    return modeling_gemma.apply_rotary_pos_emb(q, k, cos, sin)


def mix(
    kind: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """A model's own attention. q [T, H, d], k [S, K, d], v [S, K, d] -> [T, H, d]"""
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    more = {"softcap": cap} if kind is modeling_gemma2 else {}
    mixed, _ = kind.eager_attention_forward(
        module, heads(q), heads(k), heads(v), mask, scaling=scale, **more
    )
    return mixed[0]


def heads(x: Tensor) -> Tensor:
    """[T, H, d] -> [1, H, T, d]"""
    return x.transpose(0, 1)[None]


def unheaded(x: Tensor) -> Tensor:
    """[1, H, T, d] -> [T, H, d]"""
    return x[0].transpose(0, 1)
