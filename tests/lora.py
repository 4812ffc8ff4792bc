"""Small adapters in the layout of PEFT, written without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from npvlm.config import read_config
from npvlm.files.names import expected_shapes
from npvlm.model.weights import Array

PREFIX = "base_model.model."
TARGETS = ("q_proj", "up_proj", "multi_modal_projector.linear")


def newer(name: str) -> str:
    """A published name as modules of transformers 5 have it."""
    name = name.replace("language_model.model.", "language_model.").replace("vision_model.", "")
    return f"model.{name}"


SPELLINGS: dict[str, Callable[[str], str]] = {
    "published": lambda name: PREFIX + name,
    "modules of transformers 5": lambda name: PREFIX + newer(name),
    "modules of transformers 4.52": lambda name: (
        PREFIX + "model." + name.replace("language_model.model.", "language_model.")
    ),
    "with the name of the adapter": lambda name: (
        PREFIX + newer(name).replace(".weight", ".default.weight")
    ),
    "without a prefix": newer,
    "with the prefix twice": lambda name: PREFIX * 2 + newer(name),
}


def lora_tensors(
    base: Path, rank: int = 4, targets: tuple[str, ...] = TARGETS, seed: int = 0
) -> dict[str, Array]:
    """The factors of every module whose name ends so, under published names."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in expected_shapes(read_config(base)).items():
        module = name.removesuffix(".weight")
        if module != name and module.endswith(targets):
            low = {"lora_A": (rank, shape[1]), "lora_B": (shape[0], rank)}
            for part, size in low.items():
                values = rng.standard_normal(size, dtype=np.float32) * np.float32(0.2)
                tensors[f"{module}.{part}.weight"] = values
    return tensors


def save_lora(
    folder: Path,
    tensors: Mapping[str, Array],
    spelling: str = "published",
    **settings: Any,
) -> Path:
    """Write an adapter's folder; the names are spelled as asked."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    spelled = {SPELLINGS[spelling](name): w for name, w in tensors.items()}
    save_file(spelled, folder / "adapter_model.safetensors")
    return folder
