"""The pictures of a kit: each shows one thing that readers of pictures get wrong.

All are drawn, and are PNG: every decoder reads the same bytes from one, and not from a JPEG.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

ORIENTATION, TURN_CLOCKWISE = 0x0112, 6  # an EXIF tag, and a quarter turn to see it upright
MAIN = "photo"  # the picture that whole runs are about


def save_pictures(folder: Path) -> dict[str, Path]:
    """Draw all pictures of a kit into a folder; their files by name."""
    drawn = {
        "white": Image.fromarray(np.full((32, 32, 3), 255, np.uint8)),
        "ramp": Image.fromarray(_ramp()),
        "bars": Image.fromarray(_bars()),
        "checkerboard": Image.fromarray(_checkerboard()),
        MAIN: Image.fromarray(_photo()),
        "tall": Image.fromarray(_photo().transpose(1, 0, 2)[:, ::3]),
        "dot": Image.new("RGB", (1, 1), (200, 40, 90)),
        "transparent": Image.fromarray(_transparent()),
        "turned": Image.fromarray(_photo()[:60]),
    }
    exif = Image.Exif()
    exif[ORIENTATION] = TURN_CLOCKWISE
    files = {}
    for name, picture in drawn.items():
        files[name] = folder / f"{name}.png"
        picture.save(files[name], exif=exif if name == "turned" else None)
    return files


def _ramp() -> Pixels:
    """Red grows to the right, green downwards, blue along both: a swap of any two shows."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([x * 255 // 63, y * 255 // 47, (x + y) * 255 // 110], 2).astype(np.uint8)


def _bars() -> Pixels:
    """White, yellow, cyan, green, magenta, red, blue, black: colours in the wrong order show."""
    colours = [(255 * (c >> 1 & 1), 255 * (c >> 2 & 1), 255 * (c & 1)) for c in range(7, -1, -1)]
    return np.array([[colours[x // 11] for x in range(88)]] * 60, np.uint8)


def _checkerboard() -> Pixels:
    """Fields of 2 x 2: what does not average when it shrinks has patterns here."""
    y, x = np.mgrid[0:90, 0:90]
    return np.repeat(((x // 2 + y // 2) % 2 * 255)[..., None], 3, axis=2).astype(np.uint8)


def _photo() -> Pixels:
    """A sky, a field, a red ball and a blue box, with soft edges and the noise of a sensor."""
    height, width = 97, 131
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    ground = 1 / (1 + np.exp((58 + 5 * np.sin(x / 17) - y) / 2))
    ball = 1 / (1 + np.exp((np.hypot(x - 41, y - 52) - 19) / 1.2))
    box = 1 / (1 + np.exp((np.maximum(abs(x - 97) / 21, abs(y - 66) / 14) - 1) * 12))
    sky = np.stack([150 + y * 0.7, 190 + y * 0.4, 235 - y * 0.1], 2)
    field = np.stack([90 + x * 0.3, 140 - (y - 58) * 0.8, 60 + x * 0.1], 2)
    shade = (1.05 - np.hypot(x - 34, y - 44) / 70)[..., None]
    scene = sky
    for cover, colour in (
        (ground, field),
        (ball, np.array([215, 45, 40]) * shade),
        (box, np.array([45, 75, 190]) * (0.8 + x[..., None] / 500)),
    ):
        scene = scene * (1 - cover[..., None]) + colour * cover[..., None]
    noise = np.random.default_rng(11).normal(0, 4, scene.shape)
    return np.clip(np.rint(scene + noise), 0, 255).astype(np.uint8)


def _transparent() -> Pixels:
    """A red disc that fades out; black lies beneath, which shows where no white is put there."""
    y, x = np.mgrid[0:54, 0:70].astype(np.float64)
    cover = np.clip((26 - np.hypot(x - 34, y - 27)) / 12, 0, 1)
    colours = np.stack([220 * (cover > 0), 30 * cover, 40 * cover], 2)
    return np.dstack([colours, 255 * cover]).astype(np.uint8)
