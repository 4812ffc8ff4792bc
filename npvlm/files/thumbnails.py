"""Small copies of pictures, to look at."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from npvlm.files.pictures import open_picture

QUALITY = 90  # with colours at full size: a drawing has no rings around its shapes
LOSSLESS = 128  # pixels of the longer side up to which a picture is kept as it is


@dataclass(frozen=True)
class Thumbnail:
    """A small copy: its file, whether that is a "png" or a "jpeg", and its size."""

    data: bytes
    kind: str
    width: int
    height: int


def thumbnail(path: Path, side: int) -> Thumbnail:
    """Shrink a picture to a JPEG whose longer side is at most `side`; a tiny one is a PNG.

    Raises
    ------
    NpvlmError
        For a picture that cannot be read.
    """
    picture, drawn = open_picture(path, 2 * side), io.BytesIO()
    if max(picture.size) <= min(side, LOSSLESS):
        picture.save(drawn, "PNG", optimize=True)
        return Thumbnail(drawn.getvalue(), "png", *picture.size)
    picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    picture.save(drawn, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return Thumbnail(drawn.getvalue(), "jpeg", *picture.size)
