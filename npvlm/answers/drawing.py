"""Boxes and masks drawn on a picture, each label in a colour of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from npvlm.answers.boxes import Box
from npvlm.answers.fonts import Font, font_for
from npvlm.answers.masks import outlines, place
from npvlm.errors import shown

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# Told apart by those who see few colours, too; after Okabe and Ito.
COLOURS: tuple[Colour, ...] = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (240, 228, 66),
)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
SMALLEST = 400  # pixels of the longer side; smaller pictures are enlarged
WASH = 0.45  # how much of a mask's colour lies over the picture


def draw_boxes(
    picture: Image.Image, boxes: Sequence[Box], labels: Sequence[str] = ()
) -> Image.Image:
    """A copy of the picture with masks washed in and every box outlined and labelled.

    Lines and letters grow with the picture, and a small picture is enlarged by a whole factor, so
    that labels can be read at any size. Colours go by label, first those of `labels`.
    """
    drawn = picture.convert("RGB")
    factor = max(1, -(-SMALLEST // max(drawn.size)))
    colours = label_colours([*labels, *(box.label for box in boxes)])
    for box in boxes:
        if box.painted is not None:
            _wash(drawn, box, colours[box.label])
    if factor > 1:
        size = drawn.width * factor, drawn.height * factor
        drawn = drawn.resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(drawn)
    line = max(2, round(max(drawn.size) / 250))
    for box in boxes:
        if box.painted is not None:
            for ring in outlines(box.painted, box):
                _trace(pen, [(factor * x, factor * y) for x, y in ring], line, colours[box.label])
    placed = [(factor * b.x0, factor * b.y0, factor * b.x1, factor * b.y1) for b in boxes]
    for box, corners in zip(boxes, placed, strict=True):
        pen.rectangle(corners, outline=BLACK, width=line + 2)  # stands out on any ground
        x0, y0, x1, y1 = corners
        if x1 - x0 > 2 and y1 - y0 > 2:
            inner = (x0 + 1, y0 + 1, x1 - 1, y1 - 1)
            pen.rectangle(inner, outline=colours[box.label], width=line)
    taken: list[Rectangle] = []
    for box, corners in zip(boxes, placed, strict=True):
        text = " ".join(
            filter(None, [shown(box.label), f"{box.confidence:.2f}" if box.confidence else ""])
        )
        if text:
            taken.append(_write(pen, text, corners, colours[box.label], line, drawn.size, taken))
    return drawn


def label_colours(labels: Sequence[str]) -> dict[str, Colour]:
    """A colour for each label, in the order in which they first come."""
    distinct = dict.fromkeys(labels)
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(distinct)}


def _wash(picture: Image.Image, box: Box, colour: Colour) -> None:
    """Lay a thing's colour over its pixels."""
    assert box.painted is not None
    mask = place(box.painted, box, *picture.size)
    strength = Image.fromarray((mask * (255 * WASH)).astype(np.uint8))
    picture.paste(colour, (0, 0, *picture.size), strength)


def _trace(
    pen: ImageDraw.ImageDraw, ring: Sequence[tuple[float, float]], line: int, colour: Colour
) -> None:
    """Draw an outline that shows on a ground of its own colour, too."""
    closed = [*ring, ring[0]]
    pen.line(closed, fill=WHITE, width=line + 2, joint="curve")
    pen.line(closed, fill=colour, width=line, joint="curve")


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    corners: Rectangle,
    colour: Colour,
    line: int,
    size: tuple[int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Put a label where no other is, on the picture: above its box, below, or within."""
    font, text = _fitting(pen, text, size)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * line, bottom - top + 2 * line
    x0, y0, _, y1 = corners
    x = max(0.0, min(x0, size[0] - width))
    rows = [y0 - height, y1, y0, y1 - height, *(y0 + i * height for i in range(1, 40))]
    fitting = [y for y in rows if 0 <= y <= size[1] - height] or [0.0]
    free = [y for y in fitting if not any(_meet((x, y, x + width, y + height), t) for t in taken)]
    y = (free or fitting)[0]
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((x + line - left, y + line - top), text, font=font, fill=BLACK if bright else WHITE)
    return x, y, x + width, y + height


def _fitting(pen: ImageDraw.ImageDraw, text: str, size: tuple[int, int]) -> tuple[Font, str]:
    """A font in which the text is no wider than the picture; what is too long is cut."""
    points = max(11.0, max(size) / 34)
    font = font_for(text, points)
    while points > 11 and pen.textlength(text, font) > 0.95 * size[0]:
        points *= 0.9
        font = font_for(text, points)
    if pen.textlength(text, font) <= 0.95 * size[0]:
        return font, text
    while len(text) > 1 and pen.textlength(f"{text}…", font) > 0.95 * size[0]:
        text = text[:-1]
    return font, f"{text}…"


def _meet(one: Rectangle, other: Rectangle) -> bool:
    """Whether two rectangles share an area."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    return across > 0 and min(one[3], other[3]) - max(one[1], other[1]) > 0
