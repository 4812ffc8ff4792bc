"""Heat as something to look at: a ramp of colours, and a wash to lay over a picture.

Axis letters: g patches from one edge of the picture to the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# From no heat to the most, each colour lighter than the one before, so that everyone sees the
# order; the first are as good as clear.
PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
COLOURS = ((38, 12, 82), (92, 18, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164))
COVERS = (0.0, 0.18, 0.55, 0.72, 0.80)
# How much of its colours and of its contrast a picture keeps under a wash, and its darkest level:
# dark and light pictures both become a ground on which heat shows.
COLOUR, CONTRAST, DARKEST = 0.35, 0.42, 36


# The least heat that is as bright as can be. Attention is all shared out, so every word has a peak;
# a word may need nothing of the picture, though, or fit nothing on it, and is to be dark then.
BRIGHT = {"attention": 0.0, "occlusion": 0.5, "match": 0.2}


def shows(heat: NDArray[np.float64], method: str) -> bool:
    """Whether any part of the picture stands out, and so has a place to mark. heat [g, g]"""
    return float(heat.max()) - max(0.0, float(np.median(heat))) > 0.2 * BRIGHT[method]


def peak_of(heat: NDArray[np.float64]) -> tuple[float, float]:
    """The middle of the hottest patch, as shares of the picture's width and height. heat [g, g]"""
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    rows, columns = heat.shape
    return (float(column) + 0.5) / columns, (float(row) + 0.5) / rows


def lit(picture: Image.Image, heat: NDArray[np.float64], method: str) -> Image.Image:
    """The picture, darker and greyer, with the heat [g, g] of a method over it."""
    faded = Image.blend(picture.convert("L").convert("RGB"), picture, COLOUR)
    ground = faded.point(lambda level: DARKEST + CONTRAST * level).convert("RGBA")
    return Image.alpha_composite(ground, wash(heat, picture.size, method)).convert("RGB")


def wash(heat: NDArray[np.float64], size: tuple[int, int], method: str) -> Image.Image:
    """Heat [g, g] as colours, clear where there is none; stretched to a picture of this size.

    It counts from the median patch, so that a glimpse of everything is no colour.
    """
    above = np.clip(heat - max(0.0, float(np.median(heat))), 0, None)
    (rows, columns), (width, height) = above.shape, size
    smooth = _stretch(rows, height) @ above @ _stretch(columns, width).T
    at = smooth / max(float(above.max()), BRIGHT[method], 1e-12)
    channels = [np.interp(at, PLACES, levels) for levels in zip(*COLOURS, strict=True)]
    channels.append(255 * np.interp(at, PLACES, COVERS))
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8), "RGBA")


def _stretch(patches: int, pixels: int) -> NDArray[np.float64]:
    """How much of each patch each pixel of a line has [pixels, patches].

    It goes smoothly from one patch's middle to the next and never beyond either, so that nothing
    is brighter than the brightest patch.
    """
    place = np.clip((np.arange(pixels) + 0.5) * patches / pixels - 0.5, 0, patches - 1)
    before = place.astype(int)
    way = place - before
    way = way * way * (3 - 2 * way)
    shares, line = np.zeros((pixels, patches)), np.arange(pixels)
    shares[line, before] = 1 - way
    shares[line, np.minimum(before + 1, patches - 1)] += way
    return shares
