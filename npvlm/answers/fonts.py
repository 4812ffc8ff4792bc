"""Fonts that have the letters of a text: Pillow's own, else one of the system's."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

# Pillow's own font has English letters alone; these are where systems keep the rest.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "Hiragino Sans GB.ttc",
)
_NO_LETTER = "\uffff"


def font_for(text: str, size: float) -> Font:
    """The font that lacks the fewest letters of the text, of several the first."""
    tried: list[tuple[int, Font]] = []
    for font in _fonts(size):
        lacking = _lacking(font, text)
        if not lacking:
            return font
        tried.append((lacking, font))
    return min(tried, key=lambda one: one[0])[1]


def _fonts(size: float) -> Iterator[Font]:
    yield ImageFont.load_default(size)
    for name in SYSTEM_FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:
            continue


def _lacking(font: Font, text: str) -> int:
    """How many letters are drawn as the box that stands for a missing one."""
    missing = bytes(font.getmask(_NO_LETTER))
    return sum(bytes(font.getmask(c)) == missing for c in text if not c.isspace())
