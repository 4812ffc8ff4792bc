"""Draw the coloured shapes that the bundled model knows: for the demo, training and test."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import cos, pi, sin

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: Mapping[str, Colour] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 220, 55),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "purple": (140, 55, 175),
    "black": (20, 20, 25),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star")
SMOOTH = 4  # each pixel of an edge is the mean of SMOOTH x SMOOTH finer ones

# A star's points on the unit circle, tip up; a little fatter than a pentagram.
_STAR = [
    (radius * sin(pi * corner / 5), -radius * cos(pi * corner / 5))
    for corner in range(10)
    for radius in [1.0 if corner % 2 == 0 else 0.42]
]
STAR_WIDTH = 2 * sin(2 * pi / 5)  # of a star whose tips lie on the unit circle
STAR_HEIGHT = 1 + cos(pi / 5)


@dataclass(frozen=True)
class Thing:
    """One shape and its tight box in pixels: x0, y0 belong to it, x1, y1 are one past it."""

    colour: str
    shape: str
    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def label(self) -> str:
        """The thing in words, as prompts and answers have it."""
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The box as (x0, y0, x1, y1)."""
        return self.x0, self.y0, self.x1, self.y1


def outline(shape: str) -> list[Point]:
    """Give the corners of a shape that fills the unit square; a circle has none."""
    if shape == "square":
        return [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if shape == "star":
        return [(0.5 + x / STAR_WIDTH, (1 + y) / STAR_HEIGHT) for x, y in _STAR]
    return []


def mask_of(thing: Thing) -> Image.Image:
    """Draw one thing's cover of its own box, 0 to 255, with smooth edges."""
    width, height = (thing.x1 - thing.x0) * SMOOTH, (thing.y1 - thing.y0) * SMOOTH
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    corners = outline(thing.shape)
    if corners:
        pen.polygon([(x * (width - 1), y * (height - 1)) for x, y in corners], fill=255)
    else:
        pen.ellipse((0, 0, width - 1, height - 1), fill=255)
    return mask.reduce(SMOOTH)


def draw_things(
    picture: Image.Image, things: Iterable[Thing], colours: Mapping[str, Colour] = COLOURS
) -> None:
    """Draw the things on the picture, in their order, each in the colour of its name."""
    for thing in things:
        picture.paste(colours[thing.colour], thing.box, mask_of(thing))
