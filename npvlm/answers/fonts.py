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
    """The first font that has every letter of the text, Pillow's own where none has."""
    return next((font for font in _fonts(size) if _has(font, text)), ImageFont.load_default(size))


def _fonts(size: float) -> Iterator[Font]:
    yield ImageFont.load_default(size)
    for name in SYSTEM_FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:
            continue


def _has(font: Font, text: str) -> bool:
    """Whether no letter is drawn as the box that stands for a missing one."""
    missing = bytes(font.getmask(_NO_LETTER))
    return all(bytes(font.getmask(c)) != missing for c in set(text) if not c.isspace())
