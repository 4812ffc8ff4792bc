"""Checks of a model at work: through the cache or not, packed or alone, and what it answers.

A few tokens of two drawn pictures, so that a model of any size is done in a bounded time.

Axis letters: N pictures · P patches of a picture · R its side · D width of the decoder ·
T, A, B tokens · V vocabulary.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from PIL import Image, ImageOps

from npvlm.api import Model
from npvlm.decoding.generate import generate, logits
from npvlm.decoding.prompt import layout
from npvlm.files.pictures import open_picture, pixel_values
from npvlm.model import paligemma
from npvlm.model.ops import Index
from npvlm.model.tap import closed
from npvlm.model.weights import Array
from npvlm.work.checks.finding import Check, Finding, settle

PROMPTS = ("caption en", "detect red circle ; blue square")  # of unlike lengths
ANSWER_TOKENS = 20


class Recorder:
    """Chooses the likeliest token that ends nothing, and keeps the scores it chose from."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.ends = list(ends)
        self.ids: list[int] = []
        self.rows: list[Array] = []

    def __call__(self, row: Array) -> int:
        self.rows.append(row.copy())
        going_on = row.copy()
        going_on[self.ends] = -np.inf
        self.ids.append(int(going_on.argmax()))
        return self.ids[-1]


class Trial:
    """Two prompts about a picture and its mirror image, run in several ways."""

    def __init__(self, model: Model, picture: Image.Image, steps: int) -> None:
        self.model, self.picture, self.steps = model, picture, steps

    def checks(self) -> list[tuple[str, Check]]:
        """All of them, with their names."""
        return [
            ("pictures together = alone", self.pictures),
            ("cached = uncached", self.cached),
            ("batch = single", self.batch),
            ("answer", self.answer),
        ]

    def pictures(self) -> Finding:
        """Two pictures seen in one call have the features that each has alone, bit for bit."""
        pixels = self._pixels
        equal = all(
            np.array_equal(self._look(pixels[i : i + 1])[0], self._features[i]) for i in range(2)
        )
        finite = bool(np.isfinite(self._features).all())
        said = "2 pictures, " + _bits(equal)
        if not finite:
            said = "image features that are no numbers; are the weights damaged?"
        return settle("pictures together = alone", equal and finite, said)

    def cached(self) -> Finding:
        """Scores of an answer token by token are those of one pass over all of it, bit for bit."""
        ids, rows = self._alone[0]
        whole = self._one_pass(self._ids[0], ids[:-1], self._features[0])
        equal = np.array_equal(rows, whole)
        said = f"{len(ids)} tokens behind {len(self._ids[0])}, {_bits(equal)}"
        return settle("cached = uncached", equal, said)

    def batch(self) -> Finding:
        """Two sequences packed into one call give what each gives alone, bit for bit."""
        together = self._decode(self._ids, self._features)
        equal = all(
            packed[0] == alone[0] and np.array_equal(packed[1], alone[1])
            for packed, alone in zip(together, self._alone, strict=True)
        )
        lengths = " and ".join(str(len(ids)) for ids in self._ids)
        said = f"sequences of {lengths} tokens, {self.steps} more of each, {_bits(equal)}"
        return settle("batch = single", equal, said)

    def answer(self) -> Finding:
        """What the model says to a caption prompt: for a human to look at."""
        [answer] = self.model.generate(self.picture, PROMPTS[0], max_tokens=ANSWER_TOKENS)
        seconds = answer.seconds
        total = seconds.image + seconds.prefill + seconds.decode
        said = f"{PROMPTS[0]!r} on a drawn picture: {answer.text!r} ({total:.1f} s, all finite)"
        return Finding("answer", "ok", said)

    @cached_property
    def _pixels(self) -> Array:
        """[N, 3, R, R]"""
        pictures = (self.picture, ImageOps.mirror(self.picture))
        settings = self.model.preprocessor
        return np.stack([pixel_values(open_picture(p), settings) for p in pictures])

    @cached_property
    def _features(self) -> Array:
        """[N, P, D]"""
        return self._look(self._pixels)

    @cached_property
    def _ids(self) -> list[Index]:
        patches = self.model.config.vision_config.num_patches
        return [layout(self.model.tokenizer, prompt, patches) for prompt in PROMPTS]

    @cached_property
    def _alone(self) -> list[tuple[list[int], Array]]:
        return [
            self._decode([ids], features[None])[0]
            for ids, features in zip(self._ids, self._features, strict=True)
        ]

    def _look(self, pixels: Array) -> Array:
        model = self.model
        return paligemma.image_features(
            pixels, model.weights, model.config, ops=model.ops, tap=closed
        )

    def _decode(self, prompts: list[Index], features: Array) -> list[tuple[list[int], Array]]:
        """For each sequence the ids it goes on with, and the scores [T, V] they came from."""
        model = self.model
        recorders = [Recorder(model.config.eos_token_ids) for _ in prompts]
        for _ in generate(
            prompts,
            features.reshape(-1, features.shape[-1]),
            model.weights,
            model.config,
            recorders,
            [self.steps] * len(prompts),
            ops=model.ops,
            tap=closed,
        ):
            pass
        return [(recorder.ids, np.stack(recorder.rows)) for recorder in recorders]

    def _one_pass(self, prompt: Index, answer: list[int], features: Array) -> Array:
        """Score what follows the prompt and each token of the answer, without a cache to look in.

        prompt [A], answer [B], features [P, D] -> [B + 1, V]
        """
        w, config, ops = self.model.weights, self.model.config, self.model.ops
        given, first = np.array(answer, np.int64), len(prompt) - 1
        return logits(prompt, given, features, w, config, ops=ops, tap=closed, first=first)


def _bits(equal: bool) -> str:
    return "bit for bit" if equal else "not bit for bit"
