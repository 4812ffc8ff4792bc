"""What the files of a published PaliGemma checkpoint say, for those that are made here."""

from __future__ import annotations

from typing import Any

# Gemma's settings: pieces for single bytes, digits one by one, spaces as they stand.
SENTENCEPIECE = {
    "model_type": "bpe",
    "character_coverage": 1.0,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "pad_piece": "<pad>",
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "unk_piece": "<unk>",
    "num_threads": 1,
    "minloglevel": 2,
}


def preprocessor_config(size: int, patch_size: int) -> dict[str, Any]:
    """The contents of preprocessor_config.json for pictures of size x size."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": (size // patch_size) ** 2,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
