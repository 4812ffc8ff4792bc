"""Boxes in an answer: four `<loc....>` tokens, perhaps sixteen `<seg...>` tokens, and a label."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

BINS = 1024  # a location token counts 1024ths of the picture's height or width
MASK_CODES = 16
_LOC = r"<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>"
_SEG = r"<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>"
_FOUR = 4 * len("<loc0000>")
_PART = re.compile(
    rf"(?P<places>(?:{_LOC})*) *(?P<codes>(?:{_SEG})*)(?P<label>(?:(?!{_LOC}|{_SEG})[^;])*);?"
)


@dataclass(frozen=True)
class Box:
    """A labelled rectangle; (x0, y0) is its upper left corner, in pixels.

    label : as the model wrote it; empty where it wrote none
    confidence : the model's probability for a box as near as a hundredth of the picture's side,
        and for its label
    codes : the sixteen codes of its mask, or none
    painted : its mask as decoded, float32 [64, 64], above 0 inside; see npvlm.answers.masks
    spans : the characters of the answer that say its places and its label, first and one past the
        last of each
    """

    label: str
    x0: float
    y0: float
    x1: float
    y1: float
    confidence: float = 0.0
    codes: tuple[int, ...] = ()
    painted: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    spans: tuple[tuple[int, int], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Parsed:
    """The boxes of an answer, in its order, and the parts of it that are none."""

    boxes: list[Box]
    unread: list[str]


def parse_boxes(
    text: str, width: int, height: int, bins: int = BINS, *, whole: bool = True
) -> Parsed:
    """Find the boxes of a `detect` or `segment` answer.

    A box is y0, x0, y1, x1, each a place / bins, for a picture of width x height pixels. A label
    may be missing, and holds any characters but a semicolon. What is broken stays text: places that
    are not four, a mask that is not sixteen codes (its box is kept), a box without area; and of an
    answer that is not `whole` its last part, which may be half of what it was to be.

    Source: the demo that Google published with PaliGemma divides by 1024; big_vision's encoder and
    evaluator use 1023.
    """
    boxes, unread = [], []
    for part in _PART.finditer(text):
        places = [int(place) / bins for place in re.findall(r"<loc(\d{4})>", part["places"])]
        codes = tuple(int(code) for code in re.findall(r"<seg(\d{3})>", part["codes"]))
        corners = [places[i : i + 4] for i in range(0, len(places), 4)]
        sound = bool(places) and all(len(c) == 4 and c[0] < c[2] and c[1] < c[3] for c in corners)
        if not sound or (not whole and part.end() == len(text)):
            if left := part[0].removesuffix(";").strip():
                unread.append(left)
            continue
        if len(codes) not in (0, MASK_CODES):
            unread.append(part["codes"])
            codes = ()
        for i, (y0, x0, y1, x1) in enumerate(corners):
            at = part.start() + i * _FOUR
            box = Box(
                label="",
                x0=x0 * width,
                y0=y0 * height,
                x1=x1 * width,
                y1=y1 * height,
                spans=((at, at + _FOUR),),
            )
            boxes.append(box)
        label = part["label"].strip()
        at = part.start("label") + part["label"].find(label)
        said = (*boxes[-1].spans, (at, at + len(label))) if label else boxes[-1].spans
        boxes[-1] = replace(boxes[-1], label=label, codes=codes, spans=said)
    return Parsed(boxes, unread)
