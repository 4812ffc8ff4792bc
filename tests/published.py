"""The config.json of every kind of published checkpoint, written from what is known of them."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def paligemma(resolution: int, dtype: str = "float32") -> Values:
    """PaliGemma 1: most of the text fields, and at 224 the image size, are left to the class."""
    patches = (resolution // 14) ** 2
    vision: Values = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": patches,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    }
    if resolution != 224:
        vision["image_size"] = resolution
    return {
        "_name_or_path": f"final-hf/paligemma-3b-pt-{resolution}-main",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": 2048,
        "ignore_index": -100,
        "image_token_index": 257152,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": 2048,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": patches,
            "num_key_value_heads": 1,
            "torch_dtype": dtype,
            "vocab_size": 257216,
        },
        "torch_dtype": dtype,
        "transformers_version": "4.41.0.dev0",
        "vision_config": vision,
        "vocab_size": 257216,
    }


# hidden_size, layers, intermediate_size, heads, key/value heads, head_dim, query scalar, positions
PALIGEMMA2 = {
    "3b": (2304, 26, 9216, 8, 4, 256, 256, 256),
    "10b": (3584, 42, 14336, 16, 8, 256, 256, 1024),
    "28b": (4608, 46, 36864, 32, 16, 128, 144, 4096),
}


def paligemma2(size: str, resolution: int, text_eos: int | list[int] = 1) -> Values:
    """PaliGemma 2: no hidden_size at the top, and num_positions that says nothing."""
    hidden, layers, inner, heads, groups, head_dim, scalar, positions = PALIGEMMA2[size]
    patches = (resolution // 14) ** 2
    return {
        "_vocab_size": 257152,
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "image_token_index": 257152,
        "model_type": "paligemma",
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "projection_dim": hidden,
        "text_config": {
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "eos_token_id": text_eos,
            "final_logit_softcapping": 30.0,
            "head_dim": head_dim,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "max_position_embeddings": 8192,
            "model_type": "gemma2",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_image_tokens": patches,
            "num_key_value_heads": groups,
            "query_pre_attn_scalar": scalar,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "torch_dtype": "bfloat16",
            "vocab_size": 257216,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0.dev0",
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "image_size": resolution,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_image_tokens": patches,
            "num_positions": positions,
            "patch_size": 14,
            "projection_dim": hidden,
            "torch_dtype": "bfloat16",
            "vision_use_head": False,
        },
    }


def configs() -> dict[str, Values]:
    """Name every published config.json once: sizes, resolutions and types."""
    found = {}
    for resolution in (224, 448, 896):
        found[f"paligemma-3b-pt-{resolution}"] = paligemma(resolution)
        found[f"paligemma-3b-pt-{resolution}-bfloat16"] = paligemma(resolution, "bfloat16")
        for size in PALIGEMMA2:
            found[f"paligemma2-{size}-pt-{resolution}"] = paligemma2(size, resolution, [1, 107])
    for resolution in (224, 448):
        found[f"paligemma-3b-mix-{resolution}"] = paligemma(resolution)
        found[f"paligemma-3b-ft-vqav2-{resolution}"] = paligemma(resolution, "float16")
        for size in PALIGEMMA2:
            found[f"paligemma2-{size}-mix-{resolution}"] = paligemma2(size, resolution)
    for size in ("3b", "10b"):
        found[f"paligemma2-{size}-ft-docci-448"] = paligemma2(size, 448)
    return found


def saved_by_transformers5(family: str) -> Values:
    """What save_pretrained of a fresh model writes in transformers 5: every field, newer names."""
    text: Values = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 10,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 50,
        "max_position_embeddings": 8192,
        "model_type": family,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_image_tokens": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_bidirectional_attention": True,
        "use_cache": True,
        "vocab_size": 280,
    }
    if family == "gemma2":
        text |= {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_activation": text.pop("hidden_act"),
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "dtype": "float32",
        "hidden_size": 2048,
        "image_token_index": 270,
        "model_type": "paligemma",
        "projection_dim": 24,
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 30,
            "image_size": 28,
            "intermediate_size": 37,
            "layer_norm_eps": 1e-06,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 3,
            "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": 14,
            "projection_dim": 24,
            "vision_use_head": False,
        },
        "vocab_size": 257152,
    }
