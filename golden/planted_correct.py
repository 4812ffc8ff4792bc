"""Correct ports in many guises: other precisions, names, layouts, conventions and files.

None of them may be accused of anything.

Axis letters: N pictures · P patches · T tokens · D hidden_size of the tower at hand ·
H query heads · K key/value heads · d width of a head · F intermediate_size · V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden import oracle
from golden.planted_mistakes import attention, gemma_1, rope_pairs
from golden.planted_port import Dump, Family, Port, narrow, run, staged

Rename = Callable[[str], str | None]
VISION_LAYER, TEXT_LAYER = (
    re.compile(rf"{start}\.layers\.(\d+)\.?(.*)")
    for start in ("vision_tower.vision_model.encoder", "language_model.model")
)


@dataclass(frozen=True)
class Correct:
    """A correct port: its dump, and the kind of file that it is written to."""

    name: str
    make: Callable[[Family], Dump]
    form: str = "safetensors"  # npz | npy | bin
    shows: Callable[[Port], bool] = lambda port: True


def changed(change: Callable[[Port], object]) -> Callable[[Family], Dump]:
    """The dump of a port that does something in another way."""

    def make(family: Family) -> Dump:
        port = family.port()
        with torch.no_grad():
            change(port)
        return run(port)

    return make


def rearranged(change: Callable[[Dump, Port], Dump]) -> Callable[[Family], Dump]:
    """The stages of a dump in another arrangement."""

    def make(family: Family) -> Dump:
        port = family.port()
        return change(staged(run(port)), port)

    return make


def each(change: Callable[[str, Tensor], Tensor]) -> Callable[[Family], Dump]:
    """Every stage changed by itself."""
    return rearranged(lambda dump, port: {name: change(name, v) for name, v in dump.items()})


# --- conventions ---------------------------------------------------------------------------------


def from_zero(port: Port) -> None:
    port.positions = list(range(len(port.ids)))


def in_pairs(port: Port) -> None:
    """RoPE on neighbours, with the rows of q_proj and k_proj put in that order."""
    d = port.decoder.config.head_dim
    order = torch.arange(d).view(2, d // 2).T.flatten()  # 0, d / 2, 1, d / 2 + 1, ...
    for attn in attention(port.decoder):
        for linear in (attn.q_proj, attn.k_proj):
            rows = linear.weight.unflatten(0, (-1, d))[:, order]
            linear.weight.copy_(rows.flatten(0, 1))
    rope_pairs(port)


def scaled_queries(dump: Dump, port: Port) -> Dump:
    """Queries that carry the scale of attention already, as in JAX."""
    for i, attn in enumerate(attention(port.decoder)):
        dump[f"language_model.model.layers.{i}.self_attn.q_rope"] *= attn.scaling
    return dump


# --- layouts -------------------------------------------------------------------------------------


def channels_last(name: str, value: Tensor) -> Tensor:
    is_map = name == "pixel_values" or name.endswith("patch_embedding")
    return value.permute(0, 2, 3, 1) if is_map else value


def no_batch(name: str, value: Tensor) -> Tensor:
    return value[0]


def tokens_first(dump: Dump, port: Port) -> Dump:
    """Heads behind tokens, and an axis of their own for projections and attention."""
    found = {}
    for name, value in dump.items():
        config = port.tower.config if name.startswith("vision") else port.decoder.config
        if name.endswith("_rope"):
            value = value.transpose(1, 2)
        elif name.endswith(("q_proj", "self_attn.attend")):
            value = value.unflatten(-1, (config.num_attention_heads, -1))
        found[name] = value
    return found


def heads_first(dump: Dump, port: Port) -> Dump:
    """Attention as it is inside: [1, H, T, d]; keys repeated for every query head."""
    found = {}
    for name, value in dump.items():
        config = port.tower.config if name.startswith("vision") else port.decoder.config
        H = config.num_attention_heads
        if name.endswith("self_attn.attend"):
            value = value.unflatten(-1, (H, -1)).transpose(1, 2)
        elif name.endswith("k_rope"):
            value = value.repeat_interleave(H // value.shape[1], dim=1)
        found[name] = value
    return found


def fused(dump: Dump, port: Port) -> Dump:
    """Projections of the same input side by side."""
    found: dict[str, list[Tensor]] = {}
    for name, value in dump.items():
        at, _, last = name.rpartition(".")
        joint = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}.get(last)
        joint = joint or {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}.get(last)
        found.setdefault(f"{at}.{joint}" if joint else name, []).append(value)
    return {name: torch.cat(values, -1) for name, values in found.items()}


def last_logits_padded(dump: Dump, port: Port) -> Dump:
    """Logits of the last token alone, with columns for ids that there are not."""
    last = dump["language_model.logits"][:, -1]
    return dump | {"language_model.logits": torch.cat([last, torch.zeros(1, 64)], -1)}


# --- names ---------------------------------------------------------------------------------------

GGUF_VISION = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn": "attn_out",
    "layer_norm2": "ln2",
}
GGUF_TEXT = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp": "ffn_down",
}
GGUF = {
    "pixel_values": "pixel_values",
    "input_ids": "input_ids",
    "vision_tower.vision_model.embeddings.patch_embedding": "v.patch_embd",
    "vision_tower.vision_model.post_layernorm": "v.post_ln",
    "multi_modal_projector": "mm.input_projection",
    "language_model.model.norm": "output_norm",
    "language_model.logits": "output",
}
GRAPH_TEXT = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "Qcur",
    "self_attn.k_proj": "Kcur",
    "self_attn.v_proj": "Vcur",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp": "ffn_out",
    "": "l_out",
}
GRAPH = {
    "input_ids": "inp_tokens",
    "language_model.model.norm": "result_norm",
    "language_model.logits": "result_output",
}
BIG_VISION_LAYER = {
    "layer_norm1": "LayerNorm_0",
    "self_attn.q_proj": "MultiHeadDotProductAttention_0/query",
    "self_attn.k_proj": "MultiHeadDotProductAttention_0/key",
    "self_attn.v_proj": "MultiHeadDotProductAttention_0/value",
    "self_attn": "MultiHeadDotProductAttention_0/out",
    "layer_norm2": "LayerNorm_1",
    "mlp.fc1": "MlpBlock_0/Dense_0",
    "mlp": "MlpBlock_0/Dense_1",
}
BIG_VISION = {
    "pixel_values": "image",
    "vision_tower.vision_model.embeddings.patch_embedding": "img/embedding",
    "vision_tower.vision_model.post_layernorm": "img/Transformer/encoder_norm",
    "multi_modal_projector": "img/head",
    "language_model.model.norm": "llm/final_norm",
}


def layer_norms(second: bool, first_of_mlp: str, behind: tuple[str, str]) -> dict[str, str]:
    """How others call the norms behind attention, whose names mean two things here."""
    if not second:
        return {"post_attention_layernorm": first_of_mlp}
    return {
        "post_attention_layernorm": behind[0],
        "pre_feedforward_layernorm": first_of_mlp,
        "post_feedforward_layernorm": behind[1],
    }


def gguf(second: bool) -> Rename:
    text = GGUF_TEXT | layer_norms(second, "ffn_norm", ("post_attention_norm", "post_ffw_norm"))

    def rename(stage: str) -> str | None:
        if found := VISION_LAYER.fullmatch(stage):
            name = GGUF_VISION.get(found[2])
            return name and f"v.blk.{found[1]}.{name}"
        if found := TEXT_LAYER.fullmatch(stage):
            name = text.get(found[2])
            return name and f"blk.{found[1]}.{name}"
        return GGUF.get(stage)

    return rename


def graph(second: bool) -> Rename:
    text = GRAPH_TEXT | layer_norms(second, "ffn_norm", ("attn_post_norm", "ffn_post_norm"))

    def rename(stage: str) -> str | None:
        if found := TEXT_LAYER.fullmatch(stage):
            name = text.get(found[2])
            return name and f"{name}-{found[1]}"
        return GRAPH.get(stage)

    return rename


def big_vision(second: bool) -> Rename:
    norms = layer_norms(second, "pre_ffw_norm", ("post_attention_norm", "post_ffw_norm"))
    text = norms | {"input_layernorm": "pre_attention_norm"}

    def rename(stage: str) -> str | None:
        if found := VISION_LAYER.fullmatch(stage):
            name = BIG_VISION_LAYER.get(found[2])
            return name and f"img/Transformer/encoderblock_{found[1]}/{name}"
        if found := TEXT_LAYER.fullmatch(stage):
            name = text.get(found[2])
            return name and f"llm/layers/{found[1]}/{name}"
        return BIG_VISION.get(stage)

    return rename


def named(names: Callable[[bool], Rename]) -> Callable[[Family], Dump]:
    """Stages under others' names; those that have none are left out."""

    def change(dump: Dump, port: Port) -> Dump:
        rename = names(port.second)
        return {name: value for stage, value in dump.items() if (name := rename(stage))}

    return rearranged(change)


def published(family: Family) -> Dump:
    """Every module under the path that it has in a published checkpoint."""
    return {oracle.published(name): value for name, value in run(family.port()).items()}


CORRECT = (
    Correct("float32", changed(lambda port: None)),
    Correct(
        "float32, sdpa", changed(lambda port: port.model.set_attn_implementation("sdpa")),
        shows=gemma_1,
    ),
    Correct("bfloat16", changed(lambda port: narrow(port, "bfloat16"))),
    Correct("float16", changed(lambda port: narrow(port, "float16"))),
    Correct("published module paths", published),
    Correct("GGUF names", named(gguf)),
    Correct("llama.cpp's graph", named(graph)),
    Correct("big_vision's names", named(big_vision)),
    Correct("channels last", each(channels_last)),
    Correct("no batch axis", each(no_batch)),
    Correct("tokens before heads", rearranged(tokens_first)),
    Correct("heads before tokens", rearranged(heads_first)),
    Correct("fused projections", rearranged(fused)),
    Correct("last logits, padded", rearranged(last_logits_padded)),
    Correct("positions from 0", changed(from_zero)),
    Correct("RoPE in pairs", changed(in_pairs)),
    Correct("queries with their scale", rearranged(scaled_queries)),
    Correct("every third stage", rearranged(lambda d, port: dict(list(d.items())[::3]))),
    Correct("another order, npz", rearranged(lambda d, port: dict(reversed(d.items()))), "npz"),
    Correct("a folder of npy", changed(lambda port: None), "npy"),
    Correct("raw numbers", changed(lambda port: None), "bin"),
)  # fmt: skip


# --- files ---------------------------------------------------------------------------------------

RAW = {torch.float32: "F32", torch.int64: "I64"}


def save(dump: Dump, path: Path, form: str) -> Path:
    """Write a dump as a port would; its path."""
    dump = {name: value.detach().contiguous().clone() for name, value in dump.items()}
    path = path.with_suffix("" if form == "npy" else f".{form}")
    if form == "safetensors":
        save_file(dump, path)
    elif form == "npz":
        np.savez(path, **{name: value.numpy() for name, value in dump.items()})
    elif form == "npy":
        path.mkdir()
        for name, value in dump.items():
            np.save(path / f"{name}.npy", np.asfortranarray(value.numpy()))
    else:
        stages, at = [], 0
        with path.open("wb") as file:
            for name, value in dump.items():
                data = value.numpy().tobytes()
                shape, kind = list(value.shape), RAW[value.dtype]
                stages.append({"name": name, "shape": shape, "dtype": kind, "offset": at})
                at += file.write(data)
        path.with_suffix(".json").write_text(json.dumps({"stages": stages}))
    return path
