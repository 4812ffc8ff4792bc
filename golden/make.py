"""Write the stored goldens, which need no torch to be compared with: `python golden/make.py`.

For each of three random checkpoints: the folder itself, what transformers makes of three prompts
(`NAME.safetensors`), and where it all comes from (`NAME.json`). For each bundled model the last
two, for a drawn picture (`shapes-run`). Small cases of every operation (`ops`). What beams find on
the random checkpoints (`beams`), and what the bundled mask decoder paints (`masks`). Needs
golden/requirements.txt.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from golden import beam_cases, op_cases, oracle, shapes
from golden.beam_cases import Search
from golden.mask_vae import CODEBOOK, CODES, GRID, MaskVae
from golden.op_cases import OpCase
from golden.oracle import RECIPES, Case, Recipe
from golden.ours import EVERY, rms

GOLDEN = Path(__file__).resolve().parent
NAMES = ("pg1", "pg2", "pg2-f16-sharded")
BUNDLED = GOLDEN.parent / "npvlm" / "bundled"
TOYS = ("shapes", "shapes2")  # the bundled models
MASKS, MASK_SEED = 3, 7
BOX = (0, 0, 220, 210)  # of the first held-out picture, halved: no square, and all things are there
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
    for toy in TOYS:
        make_toy(toy)
    make_ops()
    make_beams()
    make_masks()
    names = (*NAMES, *(f"{toy}-run" for toy in TOYS), "ops", "beams")
    size = sum(path.stat().st_size for name in names for path in files_of(name))
    print(f"{len(names)} goldens, {size:,} bytes")


def make(recipe: Recipe) -> None:
    """Write one golden of a random checkpoint, and the checkpoint."""
    folder = GOLDEN / recipe.name
    shutil.rmtree(folder, ignore_errors=True)
    oracle.build_checkpoint(folder, recipe)
    float32 = oracle.load_float32(folder)
    cases = oracle.cases(folder, recipe, float32, oracle.load_float64(float32))
    write(recipe.name, folder, {"recipe": asdict(recipe)}, cases)


def make_toy(name: str) -> None:
    """Write the golden of a bundled model."""
    origin = {"picture": f"draw_scene('held out', 1, 0).picture.crop({BOX}).reduce(2)"}
    write(f"{name}-run", BUNDLED / name, origin, toy_cases(name))


def toy_cases(name: str) -> list[Case]:
    """What a bundled model says about one drawn picture."""
    folder = BUNDLED / name
    picture = shapes.draw_scene("held out", 1, 0).picture.crop(BOX).reduce(2)
    float32 = oracle.load_float32(folder)
    float64 = oracle.load_float64(float32)
    return [
        oracle.ask(folder, [picture], prompt, float32, float64)
        for prompt in ("detect red circle", "caption en")
    ]


def write(name: str, folder: Path, origin: dict[str, Any], cases: list[Case]) -> None:
    """Write what transformers made of a checkpoint, and where it comes from."""
    save_file(tensors_of(cases), GOLDEN / f"{name}.safetensors")
    record = {
        "made_by": "python golden/make.py",
        **origin,
        "checkpoint": os.path.relpath(folder, GOLDEN),
        **surroundings(),
        "prompts": [describe(case) for case in cases],
        "sha256": sums([*checkpoint_files(folder), GOLDEN / f"{name}.safetensors"]),
    }
    write_json(GOLDEN / f"{name}.json", record)


def tensors_of(cases: list[Case]) -> dict[str, np.ndarray]:
    """What is stored of a checkpoint's prompts, by name."""
    tensors: dict[str, np.ndarray] = {}
    for number, case in enumerate(cases):
        for i, picture in enumerate(case.pictures):
            tensors[f"{number}.picture.{i}"] = np.asarray(picture)
        tensors[f"{number}.pixel_values"] = case.pixels
        tensors[f"{number}.decode"] = decoded(case)
    return tensors | {f"0.{stage}": cases[0].truth[stage] for stage in stored(cases[0])}


def make_ops() -> None:
    """Write the goldens per operation."""
    cases = op_cases.op_cases()
    tensors = {f"{c.op}.{c.name}.{key}": value for c in cases for key, value in parts(c).items()}
    save_file(tensors, GOLDEN / "ops.safetensors")
    described: dict[str, dict[str, Any]] = {}
    for case in cases:
        described.setdefault(case.op, {})[case.name] = describe_op(case)
    record = {
        "made_by": "python golden/make.py",
        "seed": op_cases.SEED,
        **surroundings(),
        "cases": described,
        "sha256": sums([GOLDEN / "ops.safetensors"]),
    }
    write_json(GOLDEN / "ops.json", record)


def make_beams() -> None:
    """Write what beams find on the random checkpoints, which are there already."""
    found = {}
    for recipe in (recipe for recipe in RECIPES if recipe.name in NAMES):
        folder = GOLDEN / recipe.name
        float32 = oracle.load_float32(folder)
        float64 = oracle.load_float64(float32)
        cases = oracle.cases(folder, recipe, float32, float64)
        found[recipe.name] = cases, beam_cases.searches(cases, float32, float64)
    record = {
        "made_by": "python golden/make.py",
        **surroundings(),
        "searches": {name: describe_beams(searches) for name, (_, searches) in found.items()},
        "logits_off": {
            name: [beam_cases.logits_off(case) for case in cases]
            for name, (cases, _) in found.items()
        },
    }
    write_json(GOLDEN / "beams.json", record)


def make_masks() -> None:
    """Write what the bundled decoder paints of random codes, in PyTorch."""
    vae, file = MaskVae(), BUNDLED / "vae.safetensors"
    published = {name: torch.tensor(w).float() for name, w in load_file(file).items()}
    vae.codebook.copy_(published.pop(CODEBOOK))
    vae.decoder.load_state_dict({n.removeprefix("decoder."): w for n, w in published.items()})
    codes = np.random.default_rng(MASK_SEED).integers(0, CODES, (MASKS, GRID * GRID))
    with torch.no_grad():
        torchs = vae.decode(torch.tensor(codes)).numpy()
        truth = vae.double().decode(torch.tensor(codes)).numpy()
    save_file({"codes": codes, "truth": truth}, GOLDEN / "masks.safetensors")
    record = {
        "made_by": "python golden/make.py",
        "seed": MASK_SEED,
        **surroundings(),
        "torch_float32_error": error(torchs, truth),
        "sha256": sums([file, GOLDEN / "masks.safetensors"]),
    }
    write_json(GOLDEN / "masks.json", record)


def describe_beams(searches: list[Search]) -> list[dict[str, Any]]:
    """Searches in plain numbers; what they find is that of float64."""
    fields = ("prompt", "beams", "ends", "answer", "score")
    return [{name: getattr(search, name) for name in fields} for search in searches]


def parts(case: OpCase) -> dict[str, np.ndarray]:
    """What is stored of an operation's case, by name."""
    found = case.inputs | {"truth": case.truth}
    return found if case.torchs is None else found | {"torch": case.torchs}


def describe_op(case: OpCase) -> dict[str, Any]:
    """A case in plain numbers, and by how much torch's float32 misses the truth."""
    shapes = {key: list(value.shape) for key, value in parts(case).items()}
    described = {"numbers": case.numbers, "shapes": shapes}
    if case.torchs is None:
        return described
    return described | {"torch_float32_error": error(case.torchs, case.truth)}


def surroundings() -> dict[str, Any]:
    """The versions and the kind of machine that made a golden."""
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {"versions": versions, "machine": platform.machine()}


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint, without what is said about it."""
    every = [path for kind in ("json", "safetensors", "model") for path in folder.glob(f"*.{kind}")]
    return [path for path in every if path.name != "PROVENANCE.json"]


def sums(paths: list[Path]) -> dict[str, str]:
    """The sha256 of files, by their path from here."""
    named = {os.path.relpath(path, GOLDEN): path for path in paths}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(named.items())
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
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
        "text": case.text,
        "torch_float32_error": errors | {"decode": error(case.scores[::EVERY], decoded(case))},
    }


def error(found: np.ndarray, truth: np.ndarray) -> float:
    """Relative, as root mean squares."""
    return rms(found - truth) / rms(truth)


def files_of(name: str) -> list[Path]:
    return sorted([*GOLDEN.glob(f"{name}.*"), *GOLDEN.glob(f"{name}/*")])


if __name__ == "__main__":
    main()
