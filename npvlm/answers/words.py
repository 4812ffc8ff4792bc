"""The words of an answer: which of its tokens belong together."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from npvlm.decoding.prompt import Tokenizer

_PLACE, _OUTLINE = re.compile(r"<loc\d{4}>"), re.compile(r"<seg\d{3}>")
_CORNERS = 4  # location tokens of a box
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA")  # scripts without spaces, by names of characters


@dataclass(frozen=True)
class Span:
    """The tokens `start` up to, not including, `stop` of an answer, and what they say."""

    text: str
    start: int
    stop: int


def split_words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Span]:
    """Cut an answer into words, which cover its tokens without a gap and join to its text.

    A word begins with a space or behind one; pieces without a space, and bytes, go on with the
    word before. The four places of a box are one word, with the outline behind them. Scripts
    that are written without spaces are cut at every piece.
    """
    words: list[Span] = []
    for unit in _units(tokenizer, ids):
        if words and not _begins(words[-1].text, unit.text):
            unit = Span(words[-1].text + unit.text, words.pop().start, unit.stop)
        words.append(unit)
    return words


def in_words(text: str) -> str:
    """A word as people read it: the tokens of a box, in words."""
    if not _PLACE.search(text):
        return text.strip() if text.strip() else "(space)"
    return "(box and outline)" if _OUTLINE.search(text) else "(box)"


def sureness(text: str, probability: float) -> str:
    """How sure the model was of a word, in words."""
    percent = "under 1%" if probability < 0.01 else f"{probability:.0%}"
    return f"{percent} sure" + (" of these places" if _PLACE.search(text) else "")


def _units(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Span]:
    """The smallest runs of tokens that say whole characters."""
    if not ids:
        return []
    whole = [tokenizer.is_whole(token) for token in ids]
    edges = [0, *(at for at in range(1, len(ids)) if whole[at] or whole[at - 1]), len(ids)]
    return [Span(tokenizer.decode(list(ids[a:b])), a, b) for a, b in pairwise(edges)]


def _begins(before: str, text: str) -> bool:
    """Whether a text begins a new word behind another."""
    if not text.strip() or not before.strip():
        return False
    in_box, is_place = _PLACE.search(before), _PLACE.fullmatch(text)
    if is_place:
        full = len(_PLACE.findall(before)) == _CORNERS
        return not in_box or full or _OUTLINE.search(before) is not None
    if in_box:
        return not _OUTLINE.fullmatch(text)
    return text[0].isspace() or before[-1].isspace() or _is_unspaced(text[0])


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_UNSPACED)
