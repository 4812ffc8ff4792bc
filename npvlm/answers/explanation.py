"""An explanation: for each word of an answer, the heat of every part of the picture.

Axis letters: g patches from one edge of the picture to the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from npvlm.answers.explanation_page import page
from npvlm.answers.explanation_sheet import sheet
from npvlm.answers.heat import peak_of
from npvlm.answers.lines import json_line
from npvlm.files.output import new_file, save_picture

METHODS = ("attention", "occlusion")
_DIGITS = 6  # of the heat, in JSON


@dataclass(frozen=True, eq=False)
class Word:
    """A word of an answer and where in the picture it has to do with.

    text : as it stands in the answer, spaces included
    token_ids : of the word
    probability : that the model gave all its tokens, each behind those before it, a location
        with those within a hundredth of the picture's side
    heat [g, g] : of every patch, row by row. With "attention" the share of all attention that the
        patch got, the mean over the word's tokens; with "occlusion" how far the logarithms of its
        tokens' odds fall together where the patch is covered
    """

    text: str
    token_ids: list[int]
    probability: float
    heat: NDArray[np.float64] = field(repr=False)

    @cached_property
    def peak(self) -> tuple[float, float]:
        """The middle of the hottest patch, as shares of the picture's width and height."""
        return peak_of(self.heat)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Which parts of a picture the words of an answer have to do with.

    image : the picture's name as it was given
    picture : as the model saw it, before it was squeezed to a square
    prompt, answer : the question, and the text that is explained
    own : whether the answer is the model's own, not one that was given
    model, precision : as in Answer
    method : "attention" or "occlusion"
    layers : those whose attention was taken, none with "occlusion"
    """

    image: str
    picture: Image.Image = field(repr=False)
    prompt: str
    answer: str
    own: bool
    model: str
    precision: str
    method: str
    layers: list[int]
    words: list[Word]

    def draw(self, path: str | Path) -> None:
        """Write a PNG: the picture once for each word, with its heat over it.

        Raises
        ------
        UsageError
            For a name that does not end in .png.
        NpvlmError
            Where it cannot be written.
        """
        save_picture(sheet(self), Path(path))

    def html(self, path: str | Path) -> None:
        """Write a page, complete in itself, where pointing at a word lights the picture.

        Raises
        ------
        NpvlmError
            Where it cannot be written.
        """
        with new_file(Path(path)) as draft:
            draft.write_text(page(self), encoding="utf-8", errors="replace")

    def to_json(self) -> str:
        """One line of JSON: everything but the picture; heats row by row, with six digits."""
        facts: dict[str, Any] = {
            "image": self.image,
            "size": list(self.picture.size),
            "prompt": self.prompt,
            "answer": self.answer,
            "own": self.own,
            "model": self.model,
            "precision": self.precision,
            "method": self.method,
            "layers": self.layers,
            "words": [self._facts(word) for word in self.words],
        }
        return json_line(facts)

    def _facts(self, word: Word) -> dict[str, Any]:
        width, height = self.picture.size
        heat = [[float(f"{number:.{_DIGITS}g}") for number in row] for row in word.heat.tolist()]
        return {
            "text": word.text,
            "token_ids": word.token_ids,
            "probability": word.probability,
            "peak": [math.floor(word.peak[0] * width), math.floor(word.peak[1] * height)],
            "heat": heat,
        }
