"""transformers' ColPali as the oracle: random checkpoints, and what PyTorch makes of pages.

Nothing of npvlm is used here. Axis letters: N pages · T tokens of a query · S vectors of a page ·
E width of a vector · R picture side.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ColPaliConfig,
    ColPaliForRetrieval,
    ColPaliProcessor,
    GemmaTokenizer,
    SiglipImageProcessorPil,
)

from golden import oracle
from golden.oracle import Recipe, lifted

QUERIES = (
    "how many red circle",
    "x",
    "what is the blue square and the  cat where a dog é 12?",
    "detect <loc0007> \t circle ",
)
PAGES = 3


def _layouts() -> dict[str, Callable[[str], str]]:
    """How tensors are named, from their names as ColPali was published."""

    def engine(name: str) -> str:
        name = name.replace("embedding_proj_layer", "custom_text_proj")
        return name.replace("vlm.", "model.")

    return {"hf": lambda name: name, "saved": saved, "engine": engine}


def saved(name: str) -> str:
    """The tower as transformers 5 saves it."""
    return name.replace("vision_model.", "")


@dataclass(frozen=True)
class ColPaliRecipe:
    """A random PaliGemma, the width of its vectors, and whose layout its files have."""

    base: Recipe
    width: int
    layout: str


RECIPES = (
    ColPaliRecipe(
        Recipe(
            "colpali", 91, "bfloat16", "published",
            oracle._vision(20, 5, 39, 71, layers=2, heads=3),
            oracle._gemma(45, 93, layers=3, heads=3, groups=1, head_dim=10),
            locations=64,
        ),
        24, "hf",
    ),
    ColPaliRecipe(
        Recipe(
            "colpali-on-2", 92, "float32", "published",
            oracle._vision(18, 3, 35, 59, layers=2, heads=5),
            oracle._gemma(44, 89, layers=4, heads=4, groups=2, head_dim=20)
            | oracle._gemma2(window=9, scalar=13, attn=2.5, final=3.0),
            locations=64, tied=False,
        ),
        13, "saved",
    ),
    ColPaliRecipe(
        Recipe(
            "colpali-engine", 93, "float16", "published",
            oracle._vision(64, 2, 33, 61, layers=2, heads=3),
            oracle._gemma(52, 87, layers=2, heads=4, groups=2, head_dim=12),
            locations=64,
        ),
        128, "engine",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one run of the model gives: vectors of each page and query, and the scores [T, N]."""

    pages: list[np.ndarray]
    queries: list[np.ndarray]
    scores: np.ndarray


@dataclass(frozen=True)
class Case:
    """A checkpoint's pages and queries, and what transformers makes of them."""

    pictures: list[Image.Image]
    pixels: np.ndarray  # [N, 3, R, R] float32
    page_ids: list[int]
    query_ids: list[list[int]]
    torchs: Run  # float32
    truth: Run  # float64
    operations: int


@torch.no_grad()
def build(folder: Path, recipe: ColPaliRecipe) -> ColPaliForRetrieval:
    """Write a random checkpoint, every tensor random; give the model that it holds, in float32."""
    base = recipe.base
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = oracle.train_tokenizer(folder / "tokenizer.model", base.seed, base.locations)
    config = ColPaliConfig(vlm_config=oracle._config(base, vocabulary), embedding_dim=recipe.width)
    model = ColPaliForRetrieval(config)
    generator = np.random.default_rng(base.seed)
    for name, weight in sorted(model.named_parameters()):
        drawn = oracle._draw(generator, name, tuple(weight.shape), base.tied)
        weight.copy_(torch.from_numpy(drawn))
    model = model.to(getattr(torch, base.dtype))
    model.save_pretrained(folder)
    rename = _layouts()[recipe.layout]
    file = folder / "model.safetensors"
    tensors = {rename(published(name)): w for name, w in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    if recipe.layout == "engine":
        values = json.loads((folder / "config.json").read_text())["vlm_config"]
        oracle._write_json(folder / "config.json", {**values, "architectures": ["ColPali"]})
    oracle._write_json(folder / "preprocessor_config.json", oracle._preprocessor(base))
    tokenizer = {"tokenizer_class": "GemmaTokenizer"}
    oracle._write_json(folder / "tokenizer_config.json", tokenizer)
    if recipe.layout != "engine":
        model = load(folder)
    return copy(model, torch.float32)


def published(name: str) -> str:
    """The published spelling of a tensor that transformers 5 saves its own way."""
    inner = name.removeprefix("vlm.")
    return name if inner == name else f"vlm.{oracle.published(inner)}"


def load(folder: Path) -> ColPaliForRetrieval:
    """Open what was written: transformers finds every tensor under the names it has there."""
    model, found = ColPaliForRetrieval.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    wrong = {kind: names for kind, names in found.items() if names and kind != "error_msgs"}
    assert not wrong, wrong
    return model


def copy(model: ColPaliForRetrieval, dtype: torch.dtype) -> ColPaliForRetrieval:
    """The same numbers in a type, with eager attention; in float64 nothing in it is narrower."""
    wide = dtype == torch.float64
    with lifted() if wide else contextlib.nullcontext():
        made = ColPaliForRetrieval._from_config(
            model.config, dtype=dtype, attn_implementation="eager"
        )
    made.load_state_dict(model.state_dict())
    return made.eval()


def processor(folder: Path, recipe: ColPaliRecipe) -> ColPaliProcessor:
    """transformers' own, with the tokenizer that it makes of tokenizer.model."""
    side, patch = recipe.base.vision["image_size"], recipe.base.vision["patch_size"]
    pictures = SiglipImageProcessorPil.from_pretrained(folder)
    pictures.image_seq_length = (side // patch) ** 2
    return ColPaliProcessor(pictures, GemmaTokenizer.from_pretrained(folder))


def case(folder: Path, recipe: ColPaliRecipe, model: ColPaliForRetrieval) -> Case:
    """Let transformers read some pages and queries."""
    generator = np.random.default_rng(1000 + recipe.base.seed)
    pictures = [oracle.random_picture(generator) for _ in range(PAGES)]
    read = processor(folder, recipe)
    image_id = model.config.vlm_config.image_token_id
    pages = as_the_model_has_it(read.process_images(pictures), read.image_token_id, image_id)
    queries = [read.process_queries([query]) for query in QUERIES]
    together = read.process_queries(list(QUERIES))
    torchs = run(model, read, pages, queries, together)
    wide = copy(model, torch.float64)
    with lifted() as witness:
        truth = run(wide, read, pages, queries, together)
    return Case(
        pictures=pictures,
        pixels=pages["pixel_values"].numpy(),
        page_ids=pages["input_ids"][0].tolist(),
        query_ids=[query["input_ids"][0].tolist() for query in queries],
        torchs=torchs,
        truth=truth,
        operations=witness.operations,
    )


def as_the_model_has_it(batch: dict[str, Any], given: int, image_id: int) -> dict[str, Any]:
    """The small tokenizer adds `<image>` behind others; the config says which id it has."""
    ids = batch["input_ids"]
    batch["input_ids"] = torch.where(ids == given, image_id, ids)
    return batch


@torch.no_grad()
def run(
    model: ColPaliForRetrieval,
    read: ColPaliProcessor,
    pages: dict[str, Any],
    queries: list[dict[str, Any]],
    together: dict[str, Any],
) -> Run:
    """Embed pages in one batch and queries one by one; padded to a batch, these are the same."""
    pages = {**pages, "pixel_values": pages["pixel_values"].to(model.dtype)}
    passages = list(model(**pages).embeddings)
    alone = [model(**query).embeddings[0] for query in queries]
    padded = model(**together).embeddings
    for row, mask, own in zip(padded, together["attention_mask"], alone, strict=True):
        assert torch.allclose(
            row[mask == 1], own, atol=1e-10 if own.dtype == torch.float64 else 1e-4
        )
        assert not row[mask == 0].any()
    scores = read.score_retrieval(alone, passages)
    return Run(
        [page.numpy() for page in passages], [query.numpy() for query in alone], scores.numpy()
    )
