"""Small copies of pictures, to look at."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from npvlm.errors import NpvlmError
from npvlm.files.pictures import open_picture

QUALITY = 78


def thumbnail(path: Path, side: int) -> tuple[bytes, int, int]:
    """Shrink a picture to a JPEG whose longer side is at most `side`; its width and height.

    Raises
    ------
    NpvlmError
        For a picture that cannot be read.
    """
    picture = _small(path, side)
    picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    drawn = io.BytesIO()
    picture.save(drawn, "JPEG", quality=QUALITY, optimize=True)
    return drawn.getvalue(), *picture.size


def _small(path: Path, side: int) -> Image.Image:
    """A picture as people see it, as a JPEG in the smallest size its decoder gives at once."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (2 * side, 2 * side))
            return open_picture(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise NpvlmError(f"{path} cannot be read as a picture ({error})") from None
