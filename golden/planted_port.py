"""A port of PaliGemma in PyTorch that dumps what it computes, and in which anything can be wrong.

Its modules are transformers' own, so are the names in its dumps; the glue between them (picture,
ids, merging, positions) is a porter's, to be put wrong piece by piece. Nothing of npvlm is used.

Axis letters: R picture side · P patches · T tokens · D hidden_size of the tower at hand ·
H heads · d width of a head · V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2

from golden import oracle

Dump = dict[str, Tensor]
Rope = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
BOS = 2
DECODERS = (modeling_gemma, modeling_gemma2)


def merge(features: Tensor, text: Tensor, is_image: Tensor) -> Tensor:
    """Image features where the image tokens are: [P, D], [T, D], [T] -> [T, D]."""
    rows = text.clone()
    rows[is_image] = features
    return rows


def squeeze(picture: Image.Image, side: int, how: Image.Resampling) -> np.ndarray:
    """The whole picture as a square: [R, R, 3] uint8."""
    return np.asarray(picture.resize((side, side), how))


def scale_colours(picture: np.ndarray) -> np.ndarray:
    """Colours from -1 to 1, channels first: [R, R, 3] -> [3, R, R] float32."""
    return (picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)


@dataclass
class Port:
    """One port at work: change any of it, then `run` it.

    pixels [3, R, R], positions [T] or None for 1, 2, ...; rope and merge compute as their names
    say; silent: modules that leave no trace in the dump, as where a port has no such step.
    """

    model: PaliGemmaForConditionalGeneration
    picture: Image.Image
    pixels: np.ndarray
    ids: list[int]
    newline: int
    image_token: int
    final_softcap: float | None
    positions: list[int] | None = None
    rope: Rope = modeling_gemma.apply_rotary_pos_emb
    repeat: Callable[[Tensor, int], Tensor] = modeling_gemma.repeat_kv
    merge: Callable[[Tensor, Tensor, Tensor], Tensor] = merge
    silent: set[nn.Module] = field(default_factory=set)

    @property
    def tower(self) -> nn.Module:
        """The image tower."""
        return self.model.model.vision_tower

    @property
    def decoder(self) -> nn.Module:
        """The decoder without its last layer."""
        return self.model.model.language_model

    @property
    def second(self) -> bool:
        """Whether the decoder is Gemma 2."""
        return self.decoder.config.model_type == "gemma2"

    @property
    def side(self) -> int:
        """The side of the square that the tower reads."""
        return int(self.tower.config.image_size)


@dataclass(frozen=True)
class Family:
    """A model with a picture and a prompt, from which ports are made."""

    name: str
    folder: Path
    model: PaliGemmaForConditionalGeneration
    picture: Image.Image
    prompt: str

    def port(self) -> Port:
        """A correct port, with a copy of the weights to spoil."""
        model = copy.deepcopy(self.model)
        ids = oracle.layout(self.folder, self.prompt, 1)
        config = model.config
        side = config.vision_config.image_size
        return Port(
            model,
            self.picture,
            scale_colours(squeeze(self.picture, side, Image.Resampling.BICUBIC)),
            ids,
            newline=ids[-1],
            image_token=config.image_token_index,
            final_softcap=getattr(config.text_config, "final_logit_softcapping", None),
        )


def narrow(port: Port, precision: str) -> None:
    """Weights and arithmetic in 16 bits; angles stay float32, as where such a model is loaded."""
    for weight in port.model.parameters():
        weight.data = weight.data.to(getattr(torch, precision))


@torch.no_grad()
def run(port: Port) -> Dump:
    """Read picture and prompt in one pass; every module's output under transformers' name."""
    model = port.model
    T = len(port.ids)
    ids = torch.tensor(port.ids)
    positions = torch.tensor([port.positions or list(range(1, T + 1))])
    pixels = torch.from_numpy(np.ascontiguousarray(port.pixels))[None].to(model.dtype)
    dump: Dump = {"pixel_values": pixels, "input_ids": ids[None], "position_ids": positions}

    with recorded(port, dump):
        features = model.model.get_image_features(pixels).pooler_output[0]  # [P, D]
        is_image = ids == port.image_token
        text = port.decoder.embed_tokens(torch.where(is_image, 0, ids))  # [T, D]
        rows = port.merge(features, text, is_image)[None]
        dump["inputs_embeds"] = rows
        seen = torch.zeros(1, 1, T, T, dtype=model.dtype)  # picture and prompt see all of it
        mask = {"full_attention": seen, "sliding_attention": seen} if port.second else seen
        hidden = port.decoder(
            inputs_embeds=rows, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden)
        if port.final_softcap is not None:
            logits = torch.tanh(logits / port.final_softcap) * port.final_softcap
    return dump | {"logits": logits}


@contextlib.contextmanager
def recorded(port: Port, dump: Dump) -> Iterator[None]:
    """While the port runs inside, put down what its modules give, and attention's own values."""
    names = {module: name for name, module in port.model.named_modules() if name}
    at = ""  # the attention that runs

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name, value = names[module], output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and name != "lm_head":  # whose scores are not capped yet
            dump[name] = value

    def enter(module: nn.Module, inputs: object) -> None:
        nonlocal at
        at = names[module]

    def mixed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dump[f"{names[module].rpartition('.')[0]}.attend"] = inputs[0]

    def gated(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dump[f"{names[module].rpartition('.')[0]}.gated"] = inputs[0]

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = port.rope(q, k, cos, sin)
        dump[f"{at}.q_rope"], dump[f"{at}.k_rope"] = q, k
        return q, k

    special = {"out_proj": mixed, "o_proj": mixed, "down_proj": gated, "self_attn": enter}
    with contextlib.ExitStack() as stack:
        for module, name in names.items():
            if module in port.silent:
                continue
            stack.callback(module.register_forward_hook(keep).remove)
            before = special.get(name.rpartition(".")[2])
            if before:
                stack.callback(module.register_forward_pre_hook(before).remove)
        for modeling in DECODERS:
            for function, ours in (("apply_rotary_pos_emb", rope), ("repeat_kv", port.repeat)):
                stack.callback(setattr, modeling, function, getattr(modeling, function))
                setattr(modeling, function, ours)
        yield


# What is the same as another module's output, or no stage at all.
DOUBLES = ("o_proj", "out_proj", "fc2", "down_proj", "linear", "act_fn", "rotary_emb")
RENAMED = {
    "logits": "language_model.logits",
    "position_ids": "positions",
    "model.language_model": "language_model.model.norm",
}
CONTAINERS = ("", "vision_tower", "language_model", "embed_tokens", "position_embedding", "encoder")


def staged(dump: Dump) -> Dump:
    """The stages of a dump under the names of schema 1, in the order in which they came to be."""
    found = {}
    for name, value in dump.items():
        last = name.rpartition(".")[2]
        if last in DOUBLES or last in CONTAINERS:
            continue
        stage = RENAMED.get(name) or oracle.published(name)
        found[stage.replace("activation_fn", "gelu")] = value
    return found
