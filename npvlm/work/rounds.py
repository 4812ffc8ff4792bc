"""One timed answer of a model, to random ids and pixels: what they say changes no speed.

Axis letters: N pictures · R picture side · T tokens of a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from npvlm.config import Config, read_config
from npvlm.decoding.generate import Token, generate
from npvlm.files.adapters import open_adapter
from npvlm.model import paligemma
from npvlm.model.ops import Index
from npvlm.model.tap import closed
from npvlm.model.weights import Array, Weights
from npvlm.opening import open_weights
from npvlm.work.peers.process import Round


@dataclass(frozen=True)
class Opened:
    """A model without its tokenizer, and the seconds that opening it took."""

    config: Config
    weights: Weights
    precision: str
    ops: ModuleType
    load: float


@dataclass(frozen=True)
class Inputs:
    """A batch: ids [N, T], of which the first are image tokens, and pixels [N, 3, R, R]."""

    ids: Index
    pixels: Array


def open_model(folder: Path, precision: str | None, adapter: Path | None = None) -> Opened:
    """Open a checkpoint folder as `load` does, its tokenizer aside."""
    began = time.perf_counter()
    config = read_config(folder)
    beside = open_adapter(adapter) if adapter is not None else None
    weights, precision, ops = open_weights(folder, config, precision, "kernels", beside)
    return Opened(config, weights, precision, ops, time.perf_counter() - began)


def random_inputs(config: Config, batch: int, prompt_tokens: int) -> Inputs:
    """Pictures of noise, each with as many text tokens behind it."""
    random = np.random.default_rng(0)
    vision, image = config.vision_config, config.image_token_index
    ids = np.full((batch, vision.num_patches + prompt_tokens), image, np.int64)
    words = min(image, config.text_config.vocab_size)  # below both, no id means a picture
    ids[:, vision.num_patches :] = random.integers(0, words, (batch, prompt_tokens))
    pixels = random.random((batch, 3, vision.image_size, vision.image_size), np.float32) * 2 - 1
    return Inputs(ids, pixels)


def look(model: Opened, inputs: Inputs) -> Array:
    """The image features [M, D] of a whole batch."""
    features = paligemma.image_features(
        inputs.pixels, model.weights, model.config, ops=model.ops, tap=closed
    )
    return features.reshape(-1, features.shape[-1])


def write(model: Opened, inputs: Inputs, features: Array, new_tokens: int) -> Iterator[list[Token]]:
    """Greedy tokens, one step of the batch at a time; only their number ends it."""
    return generate(
        list(inputs.ids),
        features,
        model.weights,
        replace(model.config, eos_token_ids=()),
        [lambda scores: int(np.argmax(scores))] * len(inputs.ids),
        [new_tokens] * len(inputs.ids),
        ops=model.ops,
        tap=closed,
    )


def run_round(model: Opened, inputs: Inputs, new_tokens: int) -> Round:
    """Answer a batch and look at the clock."""
    began = time.perf_counter()
    features = look(model, inputs)
    seen = time.perf_counter()
    steps = write(model, inputs, features, new_tokens)
    tokens = [token.id for token in next(steps)]
    read = time.perf_counter()
    for _ in steps:
        pass
    written = time.perf_counter()
    return Round(seen - began, read - seen, read - began, written - read, tokens)
