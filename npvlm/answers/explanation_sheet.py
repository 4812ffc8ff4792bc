"""One picture of an explanation: the plain picture, then one with the heat of each word.

Axis letters: g patches from one edge of the picture to the other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from npvlm.answers.fonts import font_for
from npvlm.answers.heat import lit, peak_of, shows
from npvlm.answers.words import in_words, sureness
from npvlm.errors import shown

if TYPE_CHECKING:
    from npvlm.answers.explanation import Explanation

PAPER, INK, FAINT = (250, 249, 246), (28, 30, 36), (112, 116, 126)
AREA, LONG = 300 * 240, 600  # pixels of a panel's picture, and at most of its side
NARROW = 120  # pixels at least of a column
MARGIN, GAP = 32, 22
WORD, SMALL, TITLE = 19, 13, 21  # sizes of letters
CAPTION = 52  # pixels under a picture for its word
WIDE = 640  # pixels at least of the sheet
SHAPE = 1.6  # its width over its height, about

NOTES = {
    "attention": "Light: where the model looked as it chose the word, which is not yet why.",
    "occlusion": "Light: where a cover makes the word less likely. Dark: no cover does.",
    "match": "Light: where a word fits best. Under it: its part of the score; padding has more.",
}


class Panel(NamedTuple):
    """A picture and what is written under it."""

    picture: Image.Image
    title: str
    note: str


def sheet(explanation: Explanation) -> Image.Image:
    """Lay the panels out in rows, with the question above them."""
    picture, method = scaled(explanation.picture), explanation.method
    panels = [Panel(picture, "", "the picture")]
    for word in explanation.words:
        sure = sureness(word.text, word.probability)
        panels.append(heat_panel(picture, word.heat, method, in_words(word.text), sure))
    how = f"{explanation.model}, {explanation.precision}, {method}"
    return lay_out(panels, explanation.prompt, how, method)


def scaled(picture: Image.Image) -> Image.Image:
    """The picture at the size of a panel; a small one is enlarged, so that its heat can be seen."""
    width, height = picture.size
    factor = min(math.sqrt(AREA / (width * height)), LONG / max(width, height))
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def heat_panel(
    picture: Image.Image, heat: NDArray[np.float64], method: str, title: str, note: str
) -> Panel:
    """The picture with the heat [g, g] of a word over it, and a ring around its peak."""
    drawn = lit(picture, heat, method)
    if shows(heat, method):
        _mark(drawn, peak_of(heat))
    return Panel(drawn, title, note)


def _mark(picture: Image.Image, peak: tuple[float, float]) -> None:
    """A ring around the hottest place, dark and light, so that it shows on everything."""
    pen = ImageDraw.Draw(picture)
    x, y = peak[0] * picture.width, peak[1] * picture.height
    ring = min(8, max(4, min(picture.size) / 22))
    for radius, colour, line in ((ring + 1, INK, 4), (ring, (255, 255, 255), 2)):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=line)


def lay_out(panels: list[Panel], title: str, how: str, method: str) -> Image.Image:
    """One sheet of all panels, with a title, a line that says how, and what light means."""
    width, height = panels[0].picture.size
    across, down = max(width, NARROW) + GAP, height + CAPTION + GAP
    columns = min(len(panels), max(1, round(math.sqrt(SHAPE * len(panels) * down / across))))
    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)  # as even as can be

    wide = max(WIDE, 2 * MARGIN + columns * across - GAP)
    head, foot = MARGIN + TITLE + 3 * SMALL, MARGIN + 2 * SMALL
    sheet = Image.new("RGB", (wide, head + rows * down + foot), PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, MARGIN), title, TITLE, INK, wide - 2 * MARGIN)
    _write(pen, (MARGIN, MARGIN + TITLE + 8), how, SMALL, FAINT, wide - 2 * MARGIN)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = MARGIN + column * across, head + row * down
        _place(sheet, panel, left, top, across - GAP)
    note = NOTES[method]
    _write(pen, (MARGIN, sheet.height - MARGIN - SMALL), note, SMALL, FAINT, wide - 2 * MARGIN)
    return sheet


def _place(sheet: Image.Image, panel: Panel, left: int, top: int, wide: int) -> None:
    """A panel's picture in the middle of its column, the word under it."""
    pen = ImageDraw.Draw(sheet)
    sheet.paste(panel.picture, (left + (wide - panel.picture.width) // 2, top))
    under = top + panel.picture.height + 8
    _write(pen, (left, under), panel.title or panel.note, WORD, INK, wide, middle=True)
    if panel.title:
        _write(pen, (left, under + WORD + 5), panel.note, SMALL, FAINT, wide, middle=True)


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: float,
    colour: tuple[int, int, int],
    wide: float,
    *,
    middle: bool = False,
) -> None:
    """One line, cut where it has no room."""
    text = shown(" ".join(text.split()))
    font = font_for(text, size)
    if font.getlength(text) > wide:
        while text and font.getlength(f"{text}...") > wide:
            text = text[:-1]
        text = f"{text}..."
    left = at[0] + (wide - font.getlength(text)) / 2 if middle else at[0]
    pen.text((left, at[1]), text, font=font, fill=colour)
