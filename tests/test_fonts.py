"""Fonts that have the letters of a text."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from PIL import ImageFont

from npvlm.answers.fonts import SYSTEM_FONTS, font_for


@dataclass
class Font:
    """A font that draws its own letters, and a box in place of every other."""

    name: str
    size: float
    letters: str

    def getmask(self, character: str) -> bytes:
        return character.encode() if character in self.letters else b"box"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's font with two letters, and two of the system's with more."""
    found = {SYSTEM_FONTS[1]: "abc", SYSTEM_FONTS[4]: "abcd"}

    def truetype(name: str, size: float) -> Font:
        if name not in found:
            raise OSError("cannot open resource")
        return Font(name, size, found[name])

    monkeypatch.setattr(ImageFont, "load_default", lambda size: Font("Pillow's", size, "ab"))
    monkeypatch.setattr(ImageFont, "truetype", truetype)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ab ba", "Pillow's"),
        ("a\nb", "Pillow's"),
        ("", "Pillow's"),
        ("abc", SYSTEM_FONTS[1]),
        ("d a", SYSTEM_FONTS[4]),
        ("az", "Pillow's"),  # none has them all
        ("abcz", SYSTEM_FONTS[1]),
        ("dzzc", SYSTEM_FONTS[4]),
    ],
)
def test_the_first_font_that_lacks_the_fewest_letters_is_taken(
    installed: None, text: str, name: str
) -> None:
    font = font_for(text, 17.5)
    assert (font.name, font.size) == (name, 17.5)


def test_letters_grow_with_the_size_asked_for() -> None:
    small, large = font_for("cat", 10), font_for("cat", 30)
    assert large.getlength("cat") == pytest.approx(3 * small.getlength("cat"), rel=0.1)
