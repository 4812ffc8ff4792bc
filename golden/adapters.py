"""PEFT as the oracle of adapters: random ones on random checkpoints, and what they make of these.

`python golden/adapters.py` writes the stored ones. Nothing of npvlm is used here.

Axis letters: N pictures · R picture side · T tokens · V vocabulary.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.numpy import save_file

from golden import oracle
from golden.oracle import RECIPES, STEPS, Recipe

FOLDER = Path(__file__).resolve().parent / "adapters"
STORED = {  # a checkpoint beside this folder, and a variant
    "pg1-moved": ("pg1", "moved"),
    "pg1-patterns": ("pg1", "patterns"),
    "pg1-spelled": ("pg1", "spelled"),
    "pg1-trained": ("pg1", "trained"),
    "pg2-dora": ("pg2", "dora"),
    "pg2-tables": ("pg2", "tables"),
}
KEPT = 4  # of the rows of logits, the last ones

EVERY = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|(gate|up|down)_proj|fc1|fc2|linear)"


@dataclass(frozen=True)
class Variant:
    """A kind of adapter: its name, and the settings of PEFT that make it.

    moved : whether its base had other tables than the checkpoint, which are saved with it
    """

    name: str
    settings: dict[str, Any]
    moved: bool = False


VARIANTS = (
    Variant("plain", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    Variant(
        "patterns",
        {
            "r": 5,
            "lora_alpha": 7,
            "target_modules": EVERY,
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 18},
            "alpha_pattern": {"language_model.*up_proj": 11, "linear": 2.5},
            "use_rslora": True,
        },
    ),
    Variant("dora", {"r": 6, "lora_alpha": 3, "target_modules": EVERY, "use_dora": True}),
    Variant(
        "tables",
        {
            "r": 3,
            "target_modules": [
                "embed_tokens",
                "position_embedding",
                "patch_embedding",
                "gate_proj",
            ],
        },
    ),
    # Patterns count in the spelling that modules have here; these others fit nothing.
    Variant(
        "spelled",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"vision_tower\.vision_model\..*": 6},
            "alpha_pattern": {
                "language_model.model.layers.0.self_attn.q_proj": 64,
                r"vision_tower\.vision_model\..*": 32,
                "vision_tower.*v_proj": 16,
            },
        },
    ),
    Variant("moved", {"r": 3, "target_modules": ["lm_head"]}, moved=True),
    Variant("moved-table", {"r": 3, "target_modules": ["embed_tokens"]}, moved=True),
    Variant("head", {"r": 3, "target_modules": ["lm_head", "embed_tokens"]}),
    Variant(
        "trained",
        {
            "r": 4,
            "target_modules": ["o_proj", "fc1"],
            "bias": "all",
            "modules_to_save": ["multi_modal_projector", "embed_tokens"],
        },
    ),
    Variant(
        "some-layers",
        {
            "r": 20,
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [1],
            "bias": "lora_only",
            "modules_to_save": ["lm_head"],
        },
    ),
)


@dataclass(frozen=True)
class Adapted:
    """One prompt with its picture, and what PEFT makes of it with an adapter.

    torchs, truth : logits [T, V] of one pass over prompt and answer, in float32 and float64
    """

    picture: Image.Image
    prompt: str
    pixels: np.ndarray  # [1, 3, R, R]
    ids: list[int]
    answer: list[int]
    torchs: np.ndarray = field(repr=False)
    truth: np.ndarray = field(repr=False)


def build_adapter(base: Path, variant: Variant, seed: int, folder: Path) -> None:
    """Save an adapter of a checkpoint as PEFT does, every tensor of it random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(oracle.load_float32(base), LoraConfig(**variant.settings))
        generator = np.random.default_rng(seed)
        with torch.no_grad():
            if variant.moved:
                model.get_input_embeddings().weight.mul_(1.5)
            for name, weight in sorted(model.named_parameters()):
                if not weight.requires_grad:
                    continue
                noise = generator.standard_normal(tuple(weight.shape), dtype=np.float32)
                low = ".lora_A." in name or ".lora_B." in name or "lora_embedding" in name
                if low:
                    weight.copy_(torch.from_numpy(0.25 * noise))
                else:  # a length, a bias or a whole weight: near to what it was
                    weight.mul_(1 + 0.2 * torch.from_numpy(noise)).add_(0.01)
        model.save_pretrained(folder)
    (folder / "README.md").unlink()  # a form to fill in
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": base.name}
    values["target_modules"] = sorted_list(values["target_modules"])  # PEFT keeps a set
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def sorted_list(modules: str | list[str]) -> str | list[str]:
    """A list in its order, a pattern as it is."""
    return modules if isinstance(modules, str) else sorted(modules)


def open_adapted(base: Path, folder: Path) -> tuple[PeftModel, PeftModel]:
    """The adapter on its base as PEFT loads it, in float32 and in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        float32 = oracle.load_float32(base)
        float64 = oracle.load_float64(float32)
        narrow = PeftModel.from_pretrained(float32, folder).eval()
        wide = PeftModel.from_pretrained(float64, folder).double().eval()
    return narrow, wide


def ask(base: Path, recipe: Recipe, float32: PeftModel, float64: PeftModel) -> Adapted:
    """Let PEFT answer a prompt about a picture, greedily."""
    picture = oracle.random_picture(np.random.default_rng(2000 + recipe.seed))
    pixels = oracle.pixel_values(base, picture)[None]
    prompt = "caption en the red cat"
    ids = oracle.layout(base, prompt, 1)
    inner = float32.base_model.model
    answer, _ = oracle.greedy(inner, pixels, ids, STEPS)
    torchs = oracle.logits(inner, pixels, ids, answer)
    with oracle.lifted():
        truth = oracle.logits(float64.base_model.model, pixels, ids, answer)
    return Adapted(picture, prompt, pixels, ids, answer, torchs, truth)


def merged(float64: PeftModel) -> dict[str, np.ndarray]:
    """The weights with the adapter in them, in float64, by their published names."""
    with warnings.catch_warnings(), oracle.lifted():
        warnings.simplefilter("ignore")
        model = float64.merge_and_unload()
    return {oracle.published(name): w.numpy() for name, w in model.state_dict().items()}


def write(place: Path) -> None:
    """Write the stored adapters, and what PEFT makes of a prompt with each."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    recipes = {recipe.name: recipe for recipe in RECIPES}
    variants = {variant.name: variant for variant in VARIANTS}
    cases = {}
    for name, (checkpoint, variant) in STORED.items():
        base = FOLDER.parent / checkpoint
        build_adapter(base, variants[variant], 1, place / name)
        case = ask(base, recipes[checkpoint], *open_adapted(base, place / name))
        stored = {"picture": np.asarray(case.picture), "truth": case.truth[-KEPT:]}
        save_file(
            {key: np.ascontiguousarray(v) for key, v in stored.items()},
            place / f"{name}.safetensors",
        )
        error = np.sqrt(np.mean((case.torchs - case.truth) ** 2) / np.mean(case.truth**2))
        cases[name] = {
            "checkpoint": checkpoint,
            "prompt": case.prompt,
            "ids": case.ids,
            "answer": case.answer,
            "torch_float32_error": float(error),
        }
    packages = ("peft", "torch", "transformers")
    record = {
        "made_by": "python golden/adapters.py",
        "versions": {package: version(package) for package in packages},
        "cases": cases,
    }
    (place / "adapters.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    oracle.quiet(threads=1)
    write(FOLDER)
