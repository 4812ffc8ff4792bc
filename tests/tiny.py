"""Tiny random PaliGemmas for the tests: every size different, every tensor random."""

from __future__ import annotations

import numpy as np

from npvlm.config import Config, parse_config
from npvlm.files.names import expected_shapes
from npvlm.model.weights import Array, Weights

IMAGE = 93
EOS = 1


def tiny_config(family: str, **changes: object) -> Config:
    """A config of either family ("gemma", "gemma2") whose sizes all differ; K = 2, G = 3."""
    text = {
        "model_type": family,
        "hidden_size": 38,
        "intermediate_size": 53,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 97,
    }
    if family == "gemma2":
        text |= {
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 5,
        }
    vision = {
        "hidden_size": 33,
        "intermediate_size": 47,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 20,
        "patch_size": 6,
        "model_type": "siglip_vision_model",
    }
    values = {
        "model_type": "paligemma",
        "text_config": text | changes,
        "vision_config": vision,
        "projection_dim": text["hidden_size"],
        "image_token_index": IMAGE,
        "eos_token_id": EOS,
    }
    return parse_config(values)


def tiny_weights(config: Config, seed: int = 0, dtype: type = np.float32) -> Weights:
    """Random tensors under the published names, norms and biases included."""
    rng = np.random.default_rng(seed)
    return Weights(
        {
            name: (rng.standard_normal(shape) * 0.3).astype(dtype)
            for name, shape in expected_shapes(config).items()
        }
    )


def tiny_pixels(config: Config, pictures: int, seed: int = 1, dtype: type = np.float32) -> Array:
    """Random pictures [N, 3, R, R]."""
    side = config.vision_config.image_size
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (pictures, 3, side, side)).astype(dtype)


def tiny_prompt(config: Config, length: int, pictures: int = 1, seed: int = 2) -> Array:
    """Image ids of all pictures, then `length` text ids."""
    rng = np.random.default_rng(seed)
    text = rng.integers(4, IMAGE, length)
    images = np.full(pictures * config.vision_config.num_patches, IMAGE)
    return np.concatenate([images, text])
