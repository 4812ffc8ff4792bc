"""The models of a kit: one random checkpoint of each family, small enough to commit.

Sizes are odd where they may be and nearly all different, so that a transposed matrix does not
fit; every tensor is random, norms and biases included, so that none can be forgotten. PaliGemma 1
has one key/value head and float32 weights, PaliGemma 2 has two and bfloat16.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.config import parse_config, read_json
from npvlm.files.names import EMBED_TOKENS, expected_shapes
from npvlm.files.writer import Tensor, tensor_file
from npvlm.model.weights import Array, round_to_bfloat16
from npvlm.opening import find_folder

VOCABULARY = "shapes"  # the bundled model whose tokenizer the random ones share
UNUSED_ROWS = 5  # of the embedding, beyond the last token: real models have some
TEXT: dict[str, dict[str, Any]] = {
    "pg1": {
        "head_dim": 10,
        "hidden_size": 38,
        "intermediate_size": 53,
        "model_type": "gemma",
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
    },
    "pg2": {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "head_dim": 14,
        "hidden_size": 46,
        "intermediate_size": 59,
        "model_type": "gemma2",
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 11,
        "sliding_window": 7,
    },
}
VISION: dict[str, dict[str, Any]] = {
    "pg1": {
        "hidden_size": 33,
        "image_size": 35,
        "intermediate_size": 47,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "patch_size": 7,
    },
    "pg2": {
        "hidden_size": 39,
        "image_size": 44,
        "intermediate_size": 61,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "patch_size": 11,
    },
}
DTYPES = {"pg1": "F32", "pg2": "BF16"}
BYTES_COPIED = ("tokenizer.model", "added_tokens.json", "generation_config.json")


def save_random_models(folder: Path) -> None:
    """Write the random checkpoints pg1 and pg2 into a folder."""
    vocabulary = find_folder(VOCABULARY)
    for seed, name in enumerate(TEXT):
        place = folder / name
        place.mkdir()
        values = _config(name, vocabulary)
        pictures = read_json(vocabulary / "preprocessor_config.json")
        side = values["vision_config"]["image_size"]
        pictures["size"] = {"height": side, "width": side}
        pictures["image_seq_length"] = (side // values["vision_config"]["patch_size"]) ** 2
        for file, content in (("config.json", values), ("preprocessor_config.json", pictures)):
            (place / file).write_text(json.dumps(content, indent=2) + "\n")
        for file in BYTES_COPIED:
            shutil.copyfile(vocabulary / file, place / file)
        _write_weights(place / "model.safetensors", values, DTYPES[name], seed)


def _config(name: str, vocabulary: Path) -> dict[str, Any]:
    """A config.json with the ids of a vocabulary."""
    ids = read_json(vocabulary / "config.json")
    rows = ids["vocab_size"] + UNUSED_ROWS
    named = ("architectures", "bos_token_id", "eos_token_id", "image_token_index", "pad_token_id")
    return {key: ids[key] for key in (*named, "model_type")} | {
        "projection_dim": TEXT[name]["hidden_size"],
        "text_config": TEXT[name] | {"vocab_size": rows},
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[DTYPES[name]],
        "vision_config": VISION[name]
        | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "vocab_size": rows,
    }


def _write_weights(path: Path, values: dict[str, Any], dtype: str, seed: int) -> None:
    """Random tensors under the published names."""
    shapes = expected_shapes(parse_config(values))
    rng = np.random.default_rng(seed)
    with tensor_file(path, {name: Tensor(dtype, shape) for name, shape in shapes.items()}) as file:
        for name, shape in shapes.items():
            numbers = _random(name, shape, rng)
            file.write_rows(name, 0, numbers if dtype == "F32" else round_to_bfloat16(numbers).bits)


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Numbers of a size that keeps the stream near one: by inputs for a matrix, else 0.3.

    Embedding rows are multiplied by the root of their width later, and smaller than what layers
    add, or every token would be followed by itself. The gain of a layer norm is around one; that
    of Gemma's norms is around zero already.
    """
    if name == EMBED_TOKENS:
        size = 0.4 / math.sqrt(shape[1])
    elif len(shape) > 1 and "position" not in name:
        size = 1.5 / math.sqrt(math.prod(shape[1:]))
    else:
        size = 0.3
    numbers = rng.standard_normal(shape) * size
    if name.startswith("vision_tower") and "norm" in name and name.endswith("weight"):
        numbers += 1
    return numbers.astype(np.float32)
