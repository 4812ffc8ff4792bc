"""Finding pages: a ColPali makes vectors of pictures of pages, and of a query, and compares them.

Axis letters: T tokens of a query · S vectors of a page · P patches of a picture, the first S - P
behind them being the page's sentence · E width of a vector · N pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npvlm.answers.match import Match, matched_words
from npvlm.api import Model, open_model
from npvlm.asked import Shown, check_text, check_whole
from npvlm.computing import TURNS
from npvlm.config import Fields, read_json
from npvlm.decoding.passes import trusted
from npvlm.decoding.prompt import layout, query_layout
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.index import Origin, Page, PageIndex, fingerprint, open_index
from npvlm.files.pictures import open_picture
from npvlm.model import colpali
from npvlm.model.ops import Index
from npvlm.model.tap import closed
from npvlm.model.weights import Array

AT_ONCE = 1000  # pages scored before Ctrl-C is heard
PAGE_PROMPT, QUERY_PREFIX = "Describe the image.", "Question: "

Vectors = NDArray[np.float32]


def load_retriever(
    model: str | Path, precision: str | None = None, ops: str = "kernels"
) -> Retriever:
    """Open a ColPali. Parameters are those of `npvlm.load`, and no model is bundled.

    Raises
    ------
    UsageError
        For a precision or ops that there is not, or a precision the folder was not packed for.
    NpvlmError
        In one sentence: what is missing or wrong in the folder; a PaliGemma without a projection.
    """
    opened = open_model(model, precision, ops)
    if opened.config.embedding_dim is None:
        raise NpvlmError(
            f"{model} is a PaliGemma without a projection, expected a ColPali, such as "
            "vidore/colpali-v1.3-hf; docs/retrieval.md says how to bring one."
        )
    return Retriever(opened, *_read_prompts(opened.folder))


def _read_prompts(folder: Path) -> tuple[str, str]:
    """What pages and queries are read with: the published words, or those that a file names."""
    file = folder / "processor_config.json"
    fields = Fields(read_json(file) if file.exists() else {}, f"{file}: ")
    found = []
    for key, usual in (("visual_prompt_prefix", PAGE_PROMPT), ("query_prefix", QUERY_PREFIX)):
        text = fields.values.get(key)
        if text is not None and not isinstance(text, str):
            raise fields.wrong(key, "a text")
        found.append(usual if text is None else text)
    return found[0], found[1]


@dataclass(frozen=True)
class Hit:
    """A page that was found: its place from 1, its score, and which page of the index it is."""

    rank: int
    score: float
    page: Page
    number: int


@dataclass(frozen=True, eq=False)
class Retriever:
    """An opened ColPali: the PaliGemma it is, and the words it reads pages and queries with."""

    model: Model
    page_prompt: str = field(repr=False)
    query_prefix: str = field(repr=False)

    @property
    def patches(self) -> int:
        """Vectors of a page that stand for a part of its picture; they come first."""
        return self.model.config.vision_config.num_patches

    @property
    def page_ids(self) -> Index:
        """What the decoder reads of every page: image tokens, and the sentence behind them."""
        return layout(self.model.tokenizer, self.page_prompt, self.patches)

    def query_ids(self, query: str) -> Index:
        """What the decoder reads of a query. Errors are those of `embed_query`."""
        check_text("query", query)
        tokenizer, most = self.model.tokenizer, self.model.config.text_config
        if not query.strip():
            raise UsageError("the query is empty, expected words to look for.")
        if tokenizer.strip_image_marks(query)[1]:
            raise UsageError("the query holds <image>, expected text alone.")
        ids = query_layout(tokenizer, self.query_prefix + query)
        if len(ids) > most.max_position_embeddings:
            raise UsageError(
                f"the query is {len(ids)} tokens, expected at most "
                f"{most.max_position_embeddings} (max_position_embeddings of config.json)."
            )
        return ids

    def origin(self, store: str) -> Origin:
        """What an index of this model says about itself."""
        model = self.model
        size, width = len(self.page_ids), model.config.embedding_dim or 0
        return Origin(model.name, fingerprint(model.folder), model.precision, store, size, width)

    def embed_page(self, picture: Shown) -> Vectors:
        """The vectors of a page [S, E], each of length 1: its patches, then its sentence.

        Raises
        ------
        UsageError
            For anything but one picture.
        NpvlmError
            For a picture that cannot be read.
        """
        features = self.model.look(picture).features
        assert features is not None
        return self._vectors(self.page_ids, features)

    def embed_query(self, query: str) -> Vectors:
        """The vectors of a query [T, E], each of length 1: those of its padding, too.

        Raises
        ------
        UsageError
            For a query without words, with a picture in it, or too long.
        """
        config = self.model.config.text_config
        ids = self.query_ids(query)
        return self._vectors(ids, np.empty((0, config.hidden_size), np.float32))

    def open(self, file: str | Path) -> PageIndex:
        """Map an index that this very model made.

        Raises
        ------
        NpvlmError
            Where it is no index, damaged, or another model's.
        """
        index = open_index(Path(file))
        if index.origin.fingerprint != fingerprint(self.model.folder):
            raise NpvlmError(
                f"{file} was made with another model than {self.model.name} (it was called "
                f"{index.origin.model}), or with other weights under that name; search with the "
                "model that made it, or embed the pages again."
            )
        return index

    def search(self, index: PageIndex, query: str, top: int = 10) -> list[Hit]:
        """The pages that fit a query best, the best first; of equal ones the earlier.

        Parameters
        ----------
        index : what `open` gives
        top : how many pages at most
        """
        check_whole("top", top, 1)
        scores = self.scores(index, self.embed_query(query))
        order = np.argsort(-scores, kind="stable")[:top].tolist()
        return [
            Hit(rank, float(scores[number]), index.pages[number], number)
            for rank, number in enumerate(order, 1)
        ]

    def scores(self, index: PageIndex, query: Vectors) -> NDArray[np.float32]:
        """How well each page of an index fits. query [T, E] -> [N]"""
        parts = []
        for first in range(0, len(index.pages), AT_ONCE):
            rows = index.rows(first, min(first + AT_ONCE, len(index.pages)))
            with TURNS.take(self.model.ops):
                parts.append(self.model.ops.max_sim(query, rows, index.origin.size))
        scores = np.concatenate(parts)
        # Vectors of length 1 make products of 1 at most, however they are rounded.
        for number in np.flatnonzero(~(np.abs(scores) <= 1.1 * len(query))).tolist():
            path = index.pages[number].path
            raise NpvlmError(f"{index.file}: the vectors of {path} are damaged; embed it again.")
        return scores

    def match(self, index: PageIndex, hit: Hit, query: str) -> Match:
        """Say for each word of a query which parts of a page it fits; the page's file is read.

        Raises
        ------
        NpvlmError
            Where the page's picture cannot be read any more.
        """
        picture = open_picture(hit.page.path)
        ids, own = self.query_ids(query), self.embed_query(query)
        page = index.vectors(hit.number)
        with TURNS.take(self.model.ops):
            fits = self.model.ops.linear(own, page)  # [T, S]
        side = math.isqrt(self.patches)
        return Match(
            page=hit.page.path,
            picture=picture,
            query=query,
            score=hit.score,
            model=self.model.name,
            precision=self.model.precision,
            heat=np.mean(fits[:, : self.patches], axis=0, dtype=np.float64).reshape(side, side),
            words=matched_words(
                self.model.tokenizer, ids.tolist(), fits, self.patches, self.query_prefix
            ),
        )

    def _vectors(self, ids: Index, features: Array) -> Vectors:
        model = self.model
        with TURNS.take(model.ops):
            found: Vectors = colpali.vectors(
                ids, features, model.weights, model.config, ops=model.ops, tap=closed
            )
        return trusted(found, model.weights, model.config)
