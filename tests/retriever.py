"""A ColPali to test with: the bundled toy under a random projection, in either layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from npvlm.config import read_config, read_json
from npvlm.files.checkpoint import open_checkpoint
from npvlm.model.weights import unpack
from npvlm.opening import BUNDLED

WIDTH = 24


def build_retriever(folder: Path, seed: int = 5, width: int = WIDTH) -> Path:
    """Write a ColPali as transformers does, whose every vector depends on a random projection."""
    shutil.copytree(BUNDLED / "shapes", folder)
    config, values = read_config(folder), read_json(folder / "config.json")
    values = {"model_type": "colpali", "embedding_dim": width, "vlm_config": values}
    (folder / "config.json").write_text(json.dumps(values))
    weights = open_checkpoint(BUNDLED / "shapes", config)
    tensors = {f"vlm.{name}": unpack(weight, np.float32) for name, weight in weights.items()}
    rng, hidden = np.random.default_rng(seed), config.text_config.hidden_size
    projection = rng.standard_normal((width, hidden)).astype(np.float32)
    tensors["embedding_proj_layer.weight"] = projection
    tensors["embedding_proj_layer.bias"] = rng.standard_normal(width).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder
