"""Boxes in an answer: four `<loc....>` tokens and a label, in pixels of the picture."""

from __future__ import annotations

import re
from dataclasses import dataclass

BINS = 1024  # a location token counts 1024ths of the picture's height or width
_LOC = r"<loc(?:0\d{3}|10[01]\d|102[0-3])>"
_BOX = re.compile(rf"((?:{_LOC}){{4}}) ?([^<;]*)")


@dataclass(frozen=True)
class Box:
    """A labelled rectangle; (x0, y0) is its upper left corner, in pixels."""

    label: str
    x0: float
    y0: float
    x1: float
    y1: float


def parse_boxes(text: str, width: int, height: int) -> list[Box]:
    """Find the boxes of a `detect` answer.

    The tokens come as y0, x0, y1, x1, each a place / 1024, for a picture of width x height pixels.
    Text that is no box is passed over, and a label may be missing.

    Source: the demo that Google published with PaliGemma divides by 1024; its training code has
    other conventions, off by at most a thousandth of the picture.
    """
    boxes = []
    for places, label in _BOX.findall(text):
        y0, x0, y1, x1 = (int(place) / BINS for place in re.findall(r"\d{4}", places))
        boxes.append(Box(label.strip(), x0 * width, y0 * height, x1 * width, y1 * height))
    return boxes
