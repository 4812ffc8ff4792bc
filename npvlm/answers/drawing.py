"""Boxes drawn on a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from npvlm.answers.boxes import Box

INK, PAPER = (255, 255, 255), (214, 0, 110)


def draw_boxes(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of the picture with every box outlined and labelled.

    Lines and letters grow with the picture, so that they read the same at any size.
    """
    drawn = picture.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    line = max(2, round(max(drawn.size) / 250))
    font = ImageFont.load_default(size=max(11, max(drawn.size) / 32))
    for box in boxes:
        pen.rectangle((box.x0, box.y0, box.x1, box.y1), outline=PAPER, width=line)
        if box.label:
            _write_label(pen, box, font, line, drawn.size)
    return drawn


def _write_label(
    pen: ImageDraw.ImageDraw,
    box: Box,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    line: int,
    size: tuple[int, int],
) -> None:
    """Put the label on a strip above the box, or inside it where there is no room above."""
    left, top, right, bottom = pen.textbbox((0, 0), box.label, font=font)
    width, height = right - left + 2 * line, bottom - top + 2 * line
    x = max(0, min(box.x0, size[0] - width))
    y = box.y0 - height if box.y0 >= height else box.y0
    pen.rectangle((x, y, x + width, y + height), fill=PAPER)
    pen.text((x + line - left, y + line - top), box.label, font=font, fill=INK)
