"""npvlm's side of a comparison: every stage of a run, under its published name. Needs no torch.

A model runs with the operations it was loaded for; in float64 the kernels hand on to the
definitions.

Axis letters: N pictures · R picture side · T tokens · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from npvlm.api import Model
from npvlm.config import Config
from npvlm.decoding.beams import beam_search
from npvlm.decoding.generate import generate, logits
from npvlm.decoding.score import score as score_answers
from npvlm.model import paligemma
from npvlm.model.tap import closed
from npvlm.model.weights import Array

EVERY = 4  # of the decoding steps, how many go by for each whose logits are stored

Stages = dict[str, Array]


def run(model: Model, pixels: Array, ids: Sequence[int], answer: Sequence[int]) -> Stages:
    """One uncached pass over pictures, prompt and answer, in the dtype of the pixels.

    pixels [N, 3, R, R]
    """
    stages: Stages = {}

    def tap(name: str, value: Array) -> Array:
        stages[name] = value.copy()
        return value

    features = paligemma.image_features(pixels, model.weights, model.config, ops=model.ops, tap=tap)
    logits(
        np.array(ids, np.int64),
        np.array(answer, np.int64),
        features.reshape(-1, features.shape[-1]),
        model.weights,
        model.config,
        ops=model.ops,
        tap=tap,
    )
    return stages


def decode(
    model: Model,
    pixels: Sequence[Array],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[Array]:
    """Write given answers through the cache, packed together; the logits of each step [T, V].

    pixels: for each prompt its pictures [N, 3, R, R], in the dtype to compute in
    """
    features = paligemma.image_features(
        np.concatenate(pixels), model.weights, model.config, ops=model.ops, tap=closed
    )
    rows: list[list[Array]] = [[] for _ in answers]

    def chooser(
        i: int,
    ) -> Callable[[Array], int]:  # instead of choosing, say what is given, and keep what was scored
        def choose(scores: Array) -> int:
            rows[i].append(scores.copy())
            return answers[i][len(rows[i]) - 1]

        return choose

    steps = generate(
        [np.array(ids, np.int64) for ids in prompts],
        features.reshape(-1, features.shape[-1]),
        model.weights,
        model.config,
        [chooser(i) for i in range(len(answers))],
        [max(len(answer) for answer in answers)] * len(answers),
        ops=model.ops,
        tap=closed,
    )
    for _ in steps:
        pass
    return [np.stack(own) for own in rows]


def beams(
    model: Model, pixels: Sequence[Array], prompts: Sequence[Sequence[int]], steps: int, count: int
) -> list[tuple[list[int], list[float]]]:
    """The best beam of each prompt, packed together: its ids and their log-probabilities.

    pixels: for each prompt its pictures [N, 3, R, R], in the dtype to compute in
    """
    features = paligemma.image_features(
        np.concatenate(pixels), model.weights, model.config, ops=model.ops, tap=closed
    )
    found: dict[int, tuple[list[int], list[float]]] = {}
    for tokens in beam_search(
        [np.array(ids, np.int64) for ids in prompts],
        features.reshape(-1, features.shape[-1]),
        model.weights,
        model.config,
        count,
        [steps] * len(prompts),
        ops=model.ops,
        tap=closed,
    ):
        for token in tokens:
            ids, logprobs = found.setdefault(token.sequence, ([], []))
            ids.append(token.id)
            logprobs.append(token.logprob)
    return [found[i] for i in range(len(prompts))]


def score(
    model: Model, pixels: Array, ids: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[Array]:
    """The log-probabilities [T] of each of the given answers behind one prompt, scored together.

    pixels [N, 3, R, R]
    """
    features = paligemma.image_features(
        pixels, model.weights, model.config, ops=model.ops, tap=closed
    )
    return score_answers(
        np.array(ids, np.int64),
        [np.array(answer, np.int64) for answer in answers],
        features.reshape(-1, features.shape[-1]),
        model.weights,
        model.config,
        ops=model.ops,
        tap=closed,
    )


def required(config: Config) -> set[str]:
    """The stages that have to be compared, whatever else a run shows."""
    tower, text = "vision_tower.vision_model", "language_model"
    return {
        f"{tower}.embeddings",
        *(f"{tower}.encoder.layers.{i}" for i in range(config.vision_config.num_hidden_layers)),
        f"{tower}.post_layernorm",
        "multi_modal_projector",
        "inputs_embeds",
        *(f"{text}.model.layers.{i}" for i in range(config.text_config.num_hidden_layers)),
        f"{text}.model.norm",
        f"{text}.logits",
    }


def fused(stage: str) -> bool:
    """Whether a stage is inside an operation that the kernels do in one go."""
    return stage.endswith((".gate_proj", ".up_proj"))


# Two float32 runs that are each as near to the truth as torch's are at most twice torch's error
# apart. float64 rounds 2^29 times finer; its sums run in other orders, for which four is left.
APART = 2.0
FINER = 4 * 2.0**-29
MOST_FLOAT64 = 1e-10


def limit_float32(torchs: float) -> float:
    """How far npvlm's float32 may be from torch's, or from the truth, by torch's own error."""
    return APART * torchs


def limit_float64(torchs: float) -> float:
    """How far npvlm's float64 may be from the truth, by the error of torch's float32."""
    return min(MOST_FLOAT64, APART * FINER * torchs)


def rms(value: Array) -> float:
    """Root mean square."""
    return math.sqrt(float(np.mean(np.square(value, dtype=np.float64))))
