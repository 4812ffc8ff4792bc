"""big_vision's checkpoints and transformers', one made of the other as transformers' scripts do it.

The mapping is that of convert_paligemma_weights_to_hf.py and convert_paligemma2_weights_to_hf.py in
huggingface/transformers, step by step, and back. Needs no torch; nothing of npvlm is used here.

Axis letters: L layers of a tower · D its width · F its inner width · H, K heads · d their width · V
vocabulary · P patches · p side of a patch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

TOWER = "vision_tower.vision_model."
BLOCK = "img/Transformer/encoderblock/"
ATTENTION = f"{BLOCK}MultiHeadDotProductAttention_0/"
LAYERS = "llm/layers/"


def to_big_vision(w: Arrays, heads: int, groups: int, tower_heads: int) -> Arrays:
    """The arrays of which the scripts make these tensors, float32 under their published names."""
    width = w[f"{TOWER}post_layernorm.weight"].shape[0]
    layers = 1 + max(int(n.split(".")[3]) for n in w if n.startswith("language_model.model.layers"))
    blocks = 1 + max(int(n.split(".")[4]) for n in w if n.startswith(f"{TOWER}encoder.layers"))

    def block(name: str) -> np.ndarray:
        return np.stack([w[f"{TOWER}encoder.layers.{i}.{name}"] for i in range(blocks)])

    def layer(name: str) -> np.ndarray:
        return np.stack([w[f"language_model.model.layers.{i}.{name}"] for i in range(layers)])

    def turned(stack: np.ndarray) -> np.ndarray:
        return stack.transpose(0, 2, 1)

    def by_head(name: str, count: int) -> np.ndarray:  # [L, H d, D] -> [L, H, D, d]
        stack = layer(f"self_attn.{name}.weight")
        return stack.reshape(layers, count, -1, stack.shape[2]).transpose(0, 1, 3, 2)

    found: Arrays = {
        "img/embedding/kernel": w[f"{TOWER}embeddings.patch_embedding.weight"].transpose(
            2, 3, 1, 0
        ),
        "img/embedding/bias": w[f"{TOWER}embeddings.patch_embedding.bias"],
        "img/pos_embedding": w[f"{TOWER}embeddings.position_embedding.weight"][None],
        "img/Transformer/encoder_norm/scale": w[f"{TOWER}post_layernorm.weight"],
        "img/Transformer/encoder_norm/bias": w[f"{TOWER}post_layernorm.bias"],
        "img/head/kernel": w["multi_modal_projector.linear.weight"].T,
        "img/head/bias": w["multi_modal_projector.linear.bias"],
        "llm/embedder/input_embedding": w["language_model.model.embed_tokens.weight"],
        "llm/final_norm/scale": w["language_model.model.norm.weight"],
    }
    for theirs, ours in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        found[f"{BLOCK}{theirs}/scale"] = block(f"{ours}.weight")
        found[f"{BLOCK}{theirs}/bias"] = block(f"{ours}.bias")
    for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        found[f"{BLOCK}MlpBlock_0/{theirs}/kernel"] = turned(block(f"mlp.{ours}.weight"))
        found[f"{BLOCK}MlpBlock_0/{theirs}/bias"] = block(f"mlp.{ours}.bias")
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        kernel = turned(block(f"self_attn.{ours}.weight"))
        found[f"{ATTENTION}{theirs}/kernel"] = kernel.reshape(blocks, width, tower_heads, -1)
        bias = block(f"self_attn.{ours}.bias")
        found[f"{ATTENTION}{theirs}/bias"] = bias.reshape(blocks, tower_heads, -1)
    out = turned(block("self_attn.out_proj.weight"))
    found[f"{ATTENTION}out/kernel"] = out.reshape(blocks, tower_heads, -1, width)
    found[f"{ATTENTION}out/bias"] = block("self_attn.out_proj.bias")

    mixed = layer("self_attn.o_proj.weight")  # [L, D, H d]
    found[f"{LAYERS}attn/q_einsum/w"] = by_head("q_proj", heads)
    pair = [by_head("k_proj", groups), by_head("v_proj", groups)]
    found[f"{LAYERS}attn/kv_einsum/w"] = np.stack(pair, axis=1)
    found[f"{LAYERS}attn/attn_vec_einsum/w"] = mixed.reshape(
        layers, mixed.shape[1], heads, -1
    ).transpose(0, 2, 3, 1)
    gates = [turned(layer(f"mlp.{name}_proj.weight")) for name in ("gate", "up")]
    found[f"{LAYERS}mlp/gating_einsum"] = np.stack(gates, axis=1)
    found[f"{LAYERS}mlp/linear"] = turned(layer("mlp.down_proj.weight"))
    found[f"{LAYERS}pre_attention_norm/scale"] = layer("input_layernorm.weight")
    if "language_model.model.layers.0.pre_feedforward_layernorm.weight" in w:
        found[f"{LAYERS}pre_ffw_norm/scale"] = layer("pre_feedforward_layernorm.weight")
        found[f"{LAYERS}post_attention_norm/scale"] = layer("post_attention_layernorm.weight")
        found[f"{LAYERS}post_ffw_norm/scale"] = layer("post_feedforward_layernorm.weight")
    else:
        found[f"{LAYERS}pre_ffw_norm/scale"] = layer("post_attention_layernorm.weight")
    return found


def to_transformers(arrays: Arrays) -> Arrays:
    """The tensors that the scripts make of these arrays, under their published names."""
    a = {name.removeprefix("params/"): value for name, value in arrays.items()}
    width = a["img/embedding/bias"].shape[0]
    w = {
        f"{TOWER}embeddings.patch_embedding.weight": a["img/embedding/kernel"].transpose(
            3, 2, 0, 1
        ),
        f"{TOWER}embeddings.patch_embedding.bias": a["img/embedding/bias"],
        f"{TOWER}embeddings.position_embedding.weight": a["img/pos_embedding"].reshape(-1, width),
        f"{TOWER}post_layernorm.weight": a["img/Transformer/encoder_norm/scale"],
        f"{TOWER}post_layernorm.bias": a["img/Transformer/encoder_norm/bias"],
        "multi_modal_projector.linear.weight": a["img/head/kernel"].transpose(),
        "multi_modal_projector.linear.bias": a["img/head/bias"],
        "language_model.model.embed_tokens.weight": a["llm/embedder/input_embedding"],
        "language_model.model.norm.weight": a["llm/final_norm/scale"],
    }
    for i in range(len(a[f"{BLOCK}LayerNorm_0/scale"])):
        at = f"{TOWER}encoder.layers.{i}."
        for n in (0, 1):
            w[f"{at}layer_norm{n + 1}.weight"] = a[f"{BLOCK}LayerNorm_{n}/scale"][i]
            w[f"{at}layer_norm{n + 1}.bias"] = a[f"{BLOCK}LayerNorm_{n}/bias"][i]
            dense = f"{BLOCK}MlpBlock_0/Dense_{n}"
            w[f"{at}mlp.fc{n + 1}.weight"] = a[f"{dense}/kernel"][i].transpose()
            w[f"{at}mlp.fc{n + 1}.bias"] = a[f"{dense}/bias"][i]
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            kernel = a[f"{ATTENTION}{theirs}/kernel"][i]
            w[f"{at}self_attn.{ours}_proj.weight"] = kernel.reshape(-1, width).transpose()
            w[f"{at}self_attn.{ours}_proj.bias"] = a[f"{ATTENTION}{theirs}/bias"][i].reshape(-1)
    gemma2 = f"{LAYERS}post_attention_norm/scale" in a
    for i, q in enumerate(a[f"{LAYERS}attn/q_einsum/w"]):
        at, (H, D, d) = f"language_model.model.layers.{i}.", q.shape
        k, v = a[f"{LAYERS}attn/kv_einsum/w"][i]
        o = a[f"{LAYERS}attn/attn_vec_einsum/w"][i]
        w[f"{at}self_attn.q_proj.weight"] = q.transpose(0, 2, 1).reshape(H * d, D)
        w[f"{at}self_attn.k_proj.weight"] = k.transpose(0, 2, 1).reshape(-1, D)
        w[f"{at}self_attn.v_proj.weight"] = v.transpose(0, 2, 1).reshape(-1, D)
        w[f"{at}self_attn.o_proj.weight"] = o.transpose(2, 0, 1).reshape(D, H * d)
        w[f"{at}mlp.gate_proj.weight"] = a[f"{LAYERS}mlp/gating_einsum"][i, 0].transpose()
        w[f"{at}mlp.up_proj.weight"] = a[f"{LAYERS}mlp/gating_einsum"][i, 1].transpose()
        w[f"{at}mlp.down_proj.weight"] = a[f"{LAYERS}mlp/linear"][i].transpose()
        w[f"{at}input_layernorm.weight"] = a[f"{LAYERS}pre_attention_norm/scale"][i]
        before = "pre_feedforward_layernorm" if gemma2 else "post_attention_layernorm"
        w[f"{at}{before}.weight"] = a[f"{LAYERS}pre_ffw_norm/scale"][i]
        if gemma2:
            attended = a[f"{LAYERS}post_attention_norm/scale"][i]
            w[f"{at}post_attention_layernorm.weight"] = attended
            w[f"{at}post_feedforward_layernorm.weight"] = a[f"{LAYERS}post_ffw_norm/scale"][i]
    return {name: np.ascontiguousarray(value) for name, value in w.items()}


def save(path: Path, arrays: Arrays, dtype: str, prefix: str = "params/") -> None:
    """Write an .npz as big_vision's are; bfloat16 is 16 bits of no type, as NumPy keeps JAX's."""
    stored = {}
    for name, array in arrays.items():
        if dtype == "bfloat16":
            bits = np.ascontiguousarray(array).view(np.uint32) >> 16  # what is cut off is zero
            stored[prefix + name] = bits.astype(np.uint16).view("V2")
        else:
            stored[prefix + name] = np.ascontiguousarray(array.astype(dtype))
    np.savez(path, **stored)
