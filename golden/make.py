"""Write the stored goldens, which need no torch to be compared with: `python golden/make.py`.

For each of three random checkpoints: the folder itself, what transformers makes of three prompts
(`NAME.safetensors`), and where it all comes from (`NAME.json`). Needs golden/requirements.txt.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from safetensors.numpy import save_file

from golden import oracle
from golden.oracle import RECIPES, Case, Recipe
from golden.ours import EVERY, rms

GOLDEN = Path(__file__).resolve().parent
NAMES = ("pg1", "pg2", "pg2-f16-sharded")
PACKAGES = ("torch", "transformers", "numpy", "pillow", "sentencepiece", "safetensors")
# What is stored: the output of every layer, of what stands before, between and behind them, and
# one stage that tells positions, of which all others see differences alone.
STORED = (
    "embeddings",
    "layers.0.self_attn.k_rope",
    "post_layernorm",
    "multi_modal_projector",
    "inputs_embeds",
    "language_model.model.norm",
)


def main() -> None:
    """Make all goldens anew and say how large they are."""
    oracle.quiet(threads=1)
    for recipe in RECIPES:
        if recipe.name in NAMES:
            make(recipe)
    size = sum(path.stat().st_size for name in NAMES for path in files_of(name))
    print(f"{len(NAMES)} goldens, {size:,} bytes")


def make(recipe: Recipe) -> None:
    """Write one golden."""
    folder = GOLDEN / recipe.name
    shutil.rmtree(folder, ignore_errors=True)
    oracle.build_checkpoint(folder, recipe)
    float32 = oracle.load_float32(folder)
    cases = oracle.cases(folder, recipe, float32, oracle.load_float64(float32))

    tensors: dict[str, np.ndarray] = {}
    for number, case in enumerate(cases):
        for i, picture in enumerate(case.pictures):
            tensors[f"{number}.picture.{i}"] = np.asarray(picture)
        tensors[f"{number}.pixel_values"] = case.pixels
        tensors[f"{number}.decode"] = decoded(case)
    tensors |= {f"0.{stage}": cases[0].truth[stage] for stage in stored(cases[0])}
    save_file(tensors, GOLDEN / f"{recipe.name}.safetensors")

    record = {
        "made_by": "python golden/make.py",
        "recipe": asdict(recipe),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "machine": platform.machine(),
        "prompts": [describe(case) for case in cases],
        "sha256": {
            str(path.relative_to(GOLDEN)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files_of(recipe.name)
            if path.suffix != ".json" or path.parent == folder
        },
    }
    path = GOLDEN / f"{recipe.name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def decoded(case: Case) -> np.ndarray:
    """The true logits of every fourth greedy step [T / 4, V]."""
    steps = case.truth["language_model.logits"][len(case.ids) - 1 : -1 : EVERY]
    return np.ascontiguousarray(steps)  # safetensors writes the memory as it lies


def stored(case: Case) -> list[str]:
    return [s for s in case.truth if s.endswith(STORED) or s.rpartition(".")[0].endswith(".layers")]


def describe(case: Case) -> dict[str, Any]:
    """A prompt in plain numbers, and by how much torch's float32 misses the truth."""
    errors = {stage: error(case.torchs[stage], case.truth[stage]) for stage in stored(case)}
    return {
        "prompt": case.prompt,
        "pictures": len(case.pictures),
        "ids": case.ids,
        "answer": case.answer,
        "torch_float32_error": errors | {"decode": error(case.scores[::EVERY], decoded(case))},
    }


def error(found: np.ndarray, truth: np.ndarray) -> float:
    """Relative, as root mean squares."""
    return rms(found - truth) / rms(truth)


def files_of(name: str) -> list[Path]:
    return sorted([*GOLDEN.glob(f"{name}.*"), *GOLDEN.glob(f"{name}/*")])


if __name__ == "__main__":
    main()
