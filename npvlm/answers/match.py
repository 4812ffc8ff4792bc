"""Why a page was found: for each word of the query, which parts of the page it fits.

Axis letters: T tokens of the query · S vectors of the page · P patches of its picture, which come
first · g patches from one edge of the picture to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from npvlm.answers.explanation_sheet import Panel, heat_panel, lay_out, scaled
from npvlm.answers.heat import peak_of
from npvlm.answers.words import in_words, split_words
from npvlm.decoding.prompt import QUERY_PADS, Tokenizer
from npvlm.files.output import save_picture
from npvlm.model.weights import Array


@dataclass(frozen=True, eq=False)
class MatchedWord:
    """A word of a query.

    score : what its tokens add to the page's score
    heat [g, g] : the mean of its tokens' products with every patch, row by row; from -1 to 1
    """

    text: str
    score: float
    heat: NDArray[np.float64] = field(repr=False)

    @cached_property
    def peak(self) -> tuple[float, float]:
        """The middle of the patch that it fits best, as shares of the width and height."""
        return peak_of(self.heat)


@dataclass(frozen=True, eq=False)
class Match:
    """A page, and which parts of it the words of a query fit.

    page : the path of its picture
    heat [g, g] : the mean over all tokens of the query, padding included
    words : those of the query; what is put around them adds to the score as well
    """

    page: str
    picture: Image.Image = field(repr=False)
    query: str
    score: float
    model: str
    precision: str
    heat: NDArray[np.float64] = field(repr=False)
    words: list[MatchedWord]

    def draw(self, path: str | Path) -> None:
        """Write a PNG: the page, the page under the whole query's heat, and once for each word.

        Raises
        ------
        UsageError
            For a name that does not end in .png.
        NpvlmError
            Where it cannot be written.
        """
        picture = scaled(self.picture)
        panels = [Panel(picture, "", "the page")]
        panels.append(self._panel(picture, self.heat, "(all)", self.score))
        panels += [self._panel(picture, w.heat, in_words(w.text), w.score) for w in self.words]
        how = f"{self.page}, {self.model}, {self.precision}"
        save_picture(lay_out(panels, self.query, how, "match"), Path(path))

    def _panel(
        self, picture: Image.Image, heat: NDArray[np.float64], title: str, score: float
    ) -> Panel:
        """What fits better than the rest is lit, be its product with the word below zero or not."""
        return heat_panel(picture, heat - heat.min(), "match", title, f"{score:.2f}")

    def facts(self) -> list[dict[str, Any]]:
        """The words for JSON: each with its score and its best place in pixels of the page."""
        width, height = self.picture.size
        return [
            {
                "text": word.text,
                "score": word.score,
                "peak": [math.floor(word.peak[0] * width), math.floor(word.peak[1] * height)],
            }
            for word in self.words
        ]


def matched_words(
    tokenizer: Tokenizer, ids: Sequence[int], fits: Array, patches: int, prefix: str
) -> list[MatchedWord]:
    """The words of a query as it is laid out, without what is put in front of it.

    ids [T], fits [T, S]: the products of the query's vectors with the page's
    """
    side = math.isqrt(patches)
    best = np.max(fits, axis=1)
    words, before = [], ""
    for span in split_words(tokenizer, ids[1 : -QUERY_PADS - 1]):  # between <bos> and padding
        if len(before) + len(span.text) <= len(prefix):
            before += span.text
            continue
        tokens = slice(span.start + 1, span.stop + 1)
        heat = np.mean(fits[tokens, :patches], axis=0, dtype=np.float64).reshape(side, side)
        words.append(MatchedWord(span.text, float(np.sum(best[tokens])), heat))
    return words
