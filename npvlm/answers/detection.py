"""What `detect` and `segment` give: boxes and masks in the picture, to draw, to save, to count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from npvlm.answers.answer import Answer
from npvlm.answers.boxes import BINS, Box, parse_boxes
from npvlm.answers.confidence import confidence, token_spans
from npvlm.answers.drawing import draw_boxes
from npvlm.answers.formats import coco
from npvlm.answers.lines import json_line
from npvlm.answers.masks import cut_out, outlines, place, run_lengths
from npvlm.answers.tasks import labels_of
from npvlm.decoding.prompt import Tokenizer
from npvlm.files.output import save_picture
from npvlm.files.pictures import Picture, open_picture

Paint = Callable[[NDArray[np.int64]], NDArray[np.float32]]  # codes [N, 16] -> masks [N, 64, 64]


@dataclass(frozen=True)
class Detection:
    """The things that an answer names on a picture.

    answer : the text, its tokens and their log-probabilities
    width, height : of the picture, in pixels
    labels : what was asked for
    boxes : what was found, in the answer's order, each with its confidence and perhaps a mask
    unread : parts of the answer that are no box
    source : the picture
    """

    answer: Answer
    width: int
    height: int
    labels: list[str]
    boxes: list[Box]
    unread: list[str]
    source: Picture = field(repr=False, compare=False)

    def drawn(self) -> Image.Image:
        """A copy of the picture with every thing outlined, its label and its confidence."""
        return draw_boxes(open_picture(self.source), self.boxes, self.labels)

    def draw(self, path: str | Path) -> None:
        """Write the picture with every thing outlined, as a PNG.

        Raises
        ------
        UsageError
            For a name that does not end in .png.
        NpvlmError
            Where it cannot be written, or the picture is not there any more.
        """
        save_picture(self.drawn(), Path(path))

    def cut_out(self, box: Box) -> Image.Image:
        """One thing alone, clear around its mask; without a mask its whole box."""
        picture = open_picture(self.source)
        return cut_out(picture, self.mask(box), box)

    def mask(self, box: Box) -> NDArray[np.bool_]:
        """Which pixels are the thing's: its mask, or its whole box. -> [height, width]"""
        inside = np.ones((1, 1), np.float32) if box.painted is None else box.painted
        return place(inside, box, self.width, self.height)

    def to_dict(self) -> dict[str, Any]:
        """The answer's fields, the picture's size, `boxes` and `unread`.

        A box has its label, its corners x0, y0, x1, y1 in pixels, and its confidence; one with a
        mask also `mask`, run lengths as COCO has them, and `polygons`, its outlines without holes.
        """
        size = {"width": self.width, "height": self.height}
        boxes = [self._box(box) for box in self.boxes]
        return {**self.answer.to_dict(), **size, "boxes": boxes, "unread": self.unread}

    def to_json(self) -> str:
        """One line of JSON: `to_dict`."""
        return json_line(self.to_dict())

    def to_coco(self) -> dict[str, Any]:
        """A COCO dataset of this one picture, as `npvlm.answers.formats.coco` makes of several."""
        return coco([self])

    def _box(self, box: Box) -> dict[str, Any]:
        corners = [round(edge, 2) for edge in (box.x0, box.y0, box.x1, box.y1)]
        values: dict[str, Any] = {"label": box.label, "box": corners}
        values["confidence"] = box.confidence
        if box.painted is not None:
            counts = run_lengths(self.mask(box))
            values["mask"] = {"size": [self.height, self.width], "counts": counts}
            rings = outlines(box.painted, box)
            values["polygons"] = [[round(c, 2) for point in ring for c in point] for ring in rings]
        return values


def read_detection(
    answer: Answer,
    source: Picture,
    size: tuple[int, int],
    tokenizer: Tokenizer,
    paint: Paint | None = None,
    bins: int = BINS,
) -> Detection:
    """Read the boxes of an answer about a picture of (width, height), and paint their masks."""
    width, height = size
    parsed = parse_boxes(answer.text, width, height, bins, whole=answer.stop == "eos")
    spans = token_spans(tokenizer, answer.token_ids)
    boxes = [
        replace(box, confidence=confidence(box.spans, spans, answer.nearby)) for box in parsed.boxes
    ]
    masked = [i for i, box in enumerate(boxes) if box.codes]
    if paint is not None and masked:
        fields = paint(np.array([boxes[i].codes for i in masked]))
        for i, painted in zip(masked, fields, strict=True):
            boxes[i] = replace(boxes[i], painted=painted)
    labels = labels_of(answer.prompt)
    return Detection(answer, width, height, labels, boxes, parsed.unread, source)
