"""Beam search by the rules of transformers: the likeliest answers grow side by side.

Axis letters: B beams of a prompt · D width of the decoder · V vocabulary · M image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from npvlm.config import Config
from npvlm.decoding.generate import Token
from npvlm.decoding.passes import extend, prefill
from npvlm.model import gemma
from npvlm.model.cache import LayerCache, Rows, fork, new_cache
from npvlm.model.ops import Index
from npvlm.model.tap import Tap
from npvlm.model.weights import Array, Weights


@dataclass(frozen=True)
class Beam:
    """An answer in the making: the cache has its prefix and all its tokens but the last."""

    run: int  # the first of its rows of the cache
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0

    @property
    def score(self) -> float:
        """What finished answers are ranked by: a length penalty of 1 is the mean of the tokens."""
        return self.total / len(self.ids)

    def grown(self, token: int, logprob: float) -> Beam:
        """The same answer with one token more."""
        ids, logprobs = (*self.ids, token), (*self.logprobs, logprob)
        return Beam(self.run, ids, logprobs, self.total + logprob)


class Search:
    """The search for one prompt's answer."""

    def __init__(self, sequence: int, prefix: int, runs: Sequence[int]) -> None:
        self.sequence, self.prefix, self.runs = sequence, prefix, runs
        self.beams = [Beam(runs[0])]  # going on, the likeliest first
        self.finished: list[Beam] = []  # the best score first

    def grow(self, logprobs: NDArray[np.float64], ends: Sequence[int], last: bool) -> bool:
        """Take every beam one token further; tell whether the search is over.

        The best B continuations that end nothing go on. One that ends an answer counts only if it
        is among the best B of all. The search is over once B answers are finished and the best
        beam, were it to end here, would not be better than the worst of them. At the last step
        whatever is best ends.

        logprobs [B, V], of the beams that go on
        Source: transformers' generate with num_beams and no other setting (early_stopping False,
        length_penalty 1). Which of equal continuations comes first is left open there; here it is
        that of the better beam, then of the lower id.
        """
        most = len(self.runs)
        found = self._continuations(logprobs, (1 + len(ends)) * most)
        ended = [last or beam.ids[-1] in ends for beam in found]
        new = [beam for beam, end in zip(found[:most], ended[:most], strict=True) if end]
        self.finished = sorted([*self.finished, *new], key=lambda b: -b.score)[:most]
        self.beams = [beam for beam, end in zip(found, ended, strict=True) if not end][:most]
        full = len(self.finished) == most
        return not self.beams or (full and self.beams[0].score <= self.finished[-1].score)

    def _continuations(self, logprobs: NDArray[np.float64], count: int) -> list[Beam]:
        """The likeliest of all beams with one token more, likeliest first."""
        before = np.array([beam.total for beam in self.beams])
        totals = (before[:, None] + logprobs).ravel()
        least = np.partition(totals, -count)[-count] if count < len(totals) else -np.inf
        likely = np.flatnonzero(totals >= least)
        order = likely[np.argsort(-totals[likely], kind="stable")][:count]
        at = [divmod(int(i), logprobs.shape[1]) for i in order]
        return [self.beams[b].grown(token, float(logprobs[b, token])) for b, token in at]

    def settle(self, cache: Sequence[LayerCache]) -> None:
        """Give each beam a run of its own: the first to continue another stays in its run.

        The others move to runs that nobody continues. Only what differs is copied: the answer.
        """
        continued = {beam.run for beam in self.beams}
        free = [run for run in self.runs if run not in continued]
        for i, beam in enumerate(self.beams):
            if beam.run in continued:
                continued.remove(beam.run)
            else:
                run, end = free.pop(), self.prefix + len(beam.ids) - 1
                fork(cache, beam.run, [run], range(self.prefix, end))
                self.beams[i] = replace(beam, run=run)

    def rows(self) -> list[Rows]:
        """Where the last token of each beam stands."""
        last = [self.prefix + len(beam.ids) - 1 for beam in self.beams]
        return [
            Rows.of(beam.run, self.prefix, range(n, n + 1))
            for beam, n in zip(self.beams, last, strict=True)
        ]


def beam_search(
    prompts: Sequence[Index],
    features: Array,
    w: Weights,
    config: Config,
    beams: int,
    max_tokens: Sequence[int],
    *,
    ops: ModuleType,
    tap: Tap,
) -> Iterator[list[Token]]:
    """Yield after every step the answers that are certain now, as their tokens in order.

    Each prompt is read once and copied for its beams, and every prompt has a search of its own:
    they are packed end to end, and the results are those of each alone.

    Parameters
    ----------
    prompts : for each sequence its ids [T], image ids included
    features : image features [M, D] of all sequences, in their order
    beams : at least 1, which is greedy
    max_tokens : for each sequence, at least 1; its answer ends there or with one of
        config.eos_token_ids

    Raises
    ------
    NpvlmError
        Where the weights make scores that are no numbers.
    """
    # The last token is not read.
    widths = [len(ids) + most - 1 for ids, most in zip(prompts, max_tokens, strict=True)]
    starts = np.cumsum([0] + [beams * width for width in widths]).tolist()
    cache = new_cache(config.text_config, starts[-1], features.dtype)
    text = w.scope("language_model")

    scores = prefill(prompts, features, starts, cache, w, config, ops=ops, tap=tap)
    live = []
    for i, (ids, start, width) in enumerate(zip(prompts, starts, widths, strict=False)):
        runs = [start + beam * width for beam in range(beams)]
        fork(cache, start, runs[1:], range(len(ids)))
        live.append(Search(i, len(ids), runs))

    for step in range(max(max_tokens)):
        rows, going = iter(scores), []
        tokens: list[Token] = []
        for search in live:
            logprobs = np.stack([ops.log_softmax(next(rows)) for _ in search.beams])
            last = step == max_tokens[search.sequence] - 1
            if search.grow(logprobs, config.eos_token_ids, last):
                tokens += _tokens(search)
            else:
                search.settle(cache)
                going.append(search)
        yield tokens

        live = going
        if not live:
            return
        ids = np.array([beam.ids[-1] for search in live for beam in search.beams])
        x = gemma.embed(ids, text, config.text_config, features.dtype, ops=ops)
        packed = Rows.pack([row for search in live for row in search.rows()])
        scores = extend(x, packed, cache, w, config, ops=ops, tap=tap)


def _tokens(search: Search) -> list[Token]:
    """The best finished answer."""
    best = search.finished[0]
    return [
        Token(search.sequence, token, logprob)
        for token, logprob in zip(best.ids, best.logprobs, strict=True)
    ]
