"""Draw the figures of docs/tour.md: `python docs/figures.py`; with --measure, time a 3B first.

The drawings are SVG, made of what npvlm itself computes where that is possible. One of them shows
seconds; they stand in docs/figures/time.json, which --measure writes anew (6 GB of disk).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from docs.tables import cache_numbers, models
from npvlm.config import Config
from npvlm.files.names import POSITIONS
from npvlm.model import ops
from npvlm.model.cache import Rows
from npvlm.model.weights import unpack
from npvlm.work.scenes import COLOURS, Thing, draw_things, outline

FOLDER = Path(__file__).resolve().parent / "figures"
TIMES = FOLDER / "time.json"
MEASURED = "paligemma-3b-224"

INK, GREY, PALE, RULE, PAPER = "#1f2933", "#66727f", "#eef1f4", "#c9d0d7", "#ffffff"
BLUE, ORANGE, TEAL, PINK, VIOLET = "#2f6db3", "#d97a1e", "#1f8f84", "#c2447a", "#7256b0"
LIGHT_BLUE, LIGHT_ORANGE, LIGHT_TEAL = "#cfe0f2", "#f8dfc4", "#c9e8e3"
LETTERS = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
GROUND = (232, 226, 210)

Point = tuple[float, float]


class Drawing:
    """An SVG of a given size on white; numbers keep two decimals, so that it is always the same."""

    def __init__(self, width: int, height: int, title: str) -> None:
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{LETTERS}">',
            f"<title>{escape(title)}</title>",
        ]
        self.rect(0, 0, width, height, PAPER, round=8)

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        edge: str = "none",
        line: float = 1,
        round: float = 0,
    ) -> None:
        self._add("rect", x=x, y=y, width=width, height=height, rx=round, **_ink(fill, edge, line))

    def line(self, a: Point, b: Point, edge: str = INK, line: float = 1, dash: str = "") -> None:
        ink = _ink("none", edge, line) | ({"stroke-dasharray": dash} if dash else {})
        self._add("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], **ink)

    def circle(
        self, centre: Point, r: float, fill: str = "none", edge: str = "none", line: float = 1
    ) -> None:
        self._add("circle", cx=centre[0], cy=centre[1], r=r, **_ink(fill, edge, line))

    def ellipse(self, centre: Point, rx: float, ry: float, fill: str) -> None:
        self._add("ellipse", cx=centre[0], cy=centre[1], rx=rx, ry=ry, fill=fill)

    def polygon(self, points: Sequence[Point], fill: str) -> None:
        self._add("polygon", points=_places(points), fill=fill)

    def curve(self, points: Sequence[Point], edge: str, line: float = 2) -> None:
        self._add("polyline", points=_places(points), **_ink("none", edge, line))

    def arc(self, a: Point, over: Point, b: Point, edge: str, line: float = 1.5) -> None:
        d = f"M{_places([a])}Q{_places([over])} {_places([b])}"
        self._add("path", d=d, **_ink("none", edge, line))

    def arrow(self, a: Point, b: Point, edge: str = INK, line: float = 1.5) -> None:
        angle = math.atan2(b[1] - a[1], b[0] - a[0])
        back = (b[0] - 7 * math.cos(angle), b[1] - 7 * math.sin(angle))
        aside = (4 * math.sin(angle), -4 * math.cos(angle))
        self.line(a, back, edge, line)
        wings = [(back[0] + s * aside[0], back[1] + s * aside[1]) for s in (1, -1)]
        self.polygon([b, *wings], edge)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        fill: str = INK,
        size: float = 13,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{_number(x)}" y="{_number(y)}" fill="{fill}" font-size="{_number(size)}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self._parts, "</svg>", ""])

    def _add(self, kind: str, **attributes: str | float) -> None:
        said = [
            f'{name}="{value if isinstance(value, str) else _number(value)}"'
            for name, value in attributes.items()
            if (name, value) != ("rx", 0)
        ]
        self._parts.append(f"<{kind} {' '.join(said)}/>")


def _number(value: float) -> str:
    said = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if said == "-0" else said


def _ink(fill: str, edge: str, line: float) -> dict[str, str | float]:
    if edge == "none":
        return {"fill": fill}
    return {"fill": fill, "stroke": edge, "stroke-width": line}


def _places(points: Sequence[Point]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)


def _rgb(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{round(c):02x}" for c in colour)


def _mix(value: float, low: str, high: str) -> str:
    """A colour between two, 0 to 1."""
    a, b = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (low, high))
    return _rgb([p + (q - p) * min(1.0, max(0.0, value)) for p, q in zip(a, b, strict=True)])


# --- the way ------------------------------------------------------------------------------------

STAGES = (
    ("picture", "224 × 224"),
    ("numbers", "3 × 224 × 224"),
    ("patches", "256 × 1152"),
    ("positions", "256 × 1152"),
    ("attention", "256 × 1152"),
    ("MLP", "256 × 1152"),
    ("projector", "256 × 2048"),
    ("prompt", "264 ids"),
    ("merge", "264 × 2048"),
    ("norm, turn", "q 264 × 8 × 256"),
    ("look back", "264 × 2048"),
    ("GeGLU", "264 × 2048"),
    ("scores, text", "257216"),
)


def draw_journey() -> Drawing:
    """The thirteen stages, as two rows of boxes."""
    d = Drawing(880, 276, "From a picture to text in thirteen stages")
    for y, first, last, colour, light in (
        (46, 0, 7, TEAL, LIGHT_TEAL),
        (172, 7, 13, BLUE, LIGHT_BLUE),
    ):
        for place, i in enumerate(range(first, last)):
            x = 22 + 121 * place
            name, shape = STAGES[i]
            d.rect(x, y, 110, 62, light, colour, round=6)
            d.text(x + 9, y + 18, str(i + 1), colour, 12, bold=True)
            d.text(x + 55, y + 34, name, INK, 13, "middle", bold=True)
            d.text(x + 55, y + 52, shape, GREY, 11, "middle")
            if i + 1 < last:
                d.arrow((x + 110, y + 31), (x + 121, y + 31), GREY, 1.2)
    d.text(22, 30, "the image tower, once per picture", TEAL, 12)
    d.text(22, 148, "the decoder, once for the prompt and once for every token after it", BLUE, 12)
    for name, first, last, y in (("27 layers", 4, 5, 118), ("18 layers", 2, 4, 244)):
        left, right = 22 + 121 * first, 22 + 121 * last + 110
        d.curve([(left, y - 5), (left, y), (right, y), (right, y - 5)], GREY, 1)
        d.text((left + right) / 2, y + 14, name, GREY, 11, "middle")
    d.curve([(803, 108), (803, 158), (198, 158)], GREY, 1.2)
    d.arrow((198, 158), (198, 172), GREY, 1.2)
    return d


# --- pictures -----------------------------------------------------------------------------------

SCENE = (
    Thing("red", "circle", 60, 70, 250, 260),
    Thing("orange", "star", 350, 40, 570, 250),
    Thing("blue", "square", 270, 250, 410, 390),
)
SCENE_SIZE, SIDE, PATCH, CHOSEN = (640, 400), 224, 14, 77


def draw_patches() -> Drawing:
    """A picture, the square it becomes, and one of its patches."""
    d = Drawing(880, 300, "A picture, squeezed to a square and cut into patches")
    _draw_scene(d, 24, 46, 320, 200)
    d.text(24, 30, "the picture, 640 × 400", INK, 13, bold=True)
    d.text(24, 268, "It is squeezed: nothing is cut off,", GREY, 12)
    d.text(24, 284, "and its shape is not kept.", GREY, 12)

    x, y = 408, 46
    _draw_scene(d, x, y, SIDE, SIDE)
    for i in range(17):
        d.line((x + PATCH * i, y), (x + PATCH * i, y + SIDE), "#8c8678", 0.5)
        d.line((x, y + PATCH * i), (x + SIDE, y + PATCH * i), "#8c8678", 0.5)
    d.text(x, 30, "224 × 224, in 16 × 16 patches", INK, 13, bold=True)
    for row in (0, 1, 15):
        middle = y + PATCH * row + 11
        d.text(x - 6, middle, str(16 * row), GREY, 10, "end")
        d.text(x + SIDE + 6, middle, str(16 * row + 15), GREY, 10)
    d.text(x, 288, "numbered row by row, 0 to 255", GREY, 12)

    row, column = divmod(CHOSEN, 16)
    px, py = x + PATCH * column, y + PATCH * row
    d.rect(px, py, PATCH, PATCH, "none", INK, 2)
    picture = Image.new("RGB", SCENE_SIZE, GROUND)
    draw_things(picture, SCENE)
    small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    patch = small[PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
    left, top, cell = 690, 62, 12
    d.line((px + PATCH, py), (left, top), GREY, 0.8, "3 3")
    d.line((px + PATCH, py + PATCH), (left, top + PATCH * cell), GREY, 0.8, "3 3")
    for i in range(PATCH):
        for j in range(PATCH):
            d.rect(left + cell * j, top + cell * i, cell, cell, _rgb(patch[i, j]), "#ffffff", 0.4)
    d.rect(left, top, PATCH * cell, PATCH * cell, "none", INK, 1.5)
    d.text(left, 30, f"patch {CHOSEN}", INK, 13, bold=True)
    d.text(left, 46, "14 × 14 pixels", INK, 13)
    d.text(left, 252, "3 colours × 14 × 14", GREY, 12)
    d.text(left, 268, "= 588 numbers,", GREY, 12)
    d.text(left, 284, "made into 1,152", GREY, 12)
    return d


def _draw_scene(d: Drawing, x: float, y: float, width: float, height: float) -> None:
    """The things of the scene, squeezed into a rectangle."""
    d.rect(x, y, width, height, _rgb(GROUND))
    sx, sy = width / SCENE_SIZE[0], height / SCENE_SIZE[1]
    for thing in SCENE:
        fill, w, h = _rgb(COLOURS[thing.colour]), thing.x1 - thing.x0, thing.y1 - thing.y0
        corners = outline(thing.shape)
        if corners:
            d.polygon(
                [(x + (thing.x0 + u * w) * sx, y + (thing.y0 + v * h) * sy) for u, v in corners],
                fill,
            )
        else:
            centre = (x + (thing.x0 + w / 2) * sx, y + (thing.y0 + h / 2) * sy)
            d.ellipse(centre, w / 2 * sx, h / 2 * sy, fill)


# --- positions ----------------------------------------------------------------------------------


def draw_positions() -> Drawing:
    """How alike the learned positions of the bundled model are, seen from eight patches."""
    import npvlm

    model = npvlm.load("shapes", ops="numpy")
    table = unpack(model.weights[POSITIONS], np.float64)
    table = table - table.mean(axis=0)
    table /= np.sqrt((table * table).sum(axis=1, keepdims=True))
    alike, side = table @ table.T, round(math.sqrt(len(table)))

    d = Drawing(880, 304, "How alike the learned positions of the patches are")
    cell = 12
    for i, (row, column) in enumerate(
        ((0, 0), (0, 4), (0, 7), (3, 1), (3, 4), (4, 6), (7, 0), (7, 5))
    ):
        x, y = 28 + 190 * (i % 4), 58 + 130 * (i // 4)
        d.text(x, y - 8, f"patch {side * row + column}", GREY, 11)
        for j, value in enumerate(alike[side * row + column]):
            colour = _mix(value, PAPER, BLUE) if value > 0 else _mix(-value, PAPER, ORANGE)
            d.rect(x + cell * (j % side), y + cell * (j // side), cell, cell, colour, PALE, 0.5)
        d.rect(x, y, side * cell, side * cell, "none", RULE)
        d.circle((x + cell * (column + 0.5), y + cell * (row + 0.5)), 2.5, INK)
    d.text(
        28, 26, "position table of the bundled model, 64 × 128, without its mean: cosine", INK, 13
    )
    x, y = 790, 62
    for i in range(81):
        value = 1 - i / 40
        colour = _mix(value, PAPER, BLUE) if value > 0 else _mix(-value, PAPER, ORANGE)
        d.rect(x, y + 2 * i, 14, 2.2, colour)
    d.rect(x, y, 14, 162, "none", RULE)
    for words, at in (("1", 0), ("0", 80), ("−1", 160)):
        d.text(x + 20, y + at + 5, words, GREY, 11)
    return d


def draw_rope() -> Drawing:
    """Pairs of dimensions as clocks, one turn of a pair, and which dimensions are a pair."""
    d = Drawing(880, 430, "Rotary positions: angles, one rotation, and the pairs")
    width, theta = 256, 10000.0
    places, pairs = (0, 1, 2, 3, 4, 8, 16, 64, 256), (0, 8, 16, 32, 64, 127)
    d.text(24, 28, "pair j at position p is turned by p × 10000^(−j/128)", INK, 13, bold=True)
    for c, place in enumerate(places):
        d.text(112 + 46 * c, 56, f"p = {place}" if c == 0 else str(place), GREY, 11, "middle")
    for r, pair in enumerate(pairs):
        y = 82 + 40 * r
        d.text(76, y + 4, f"j = {pair}", INK, 12, "end")
        for c, place in enumerate(places):
            angle = place * theta ** (-2 * pair / width)
            x = 112 + 46 * c
            d.circle((x, y), 15, PALE, RULE)
            d.arrow((x, y), (x + 14 * math.cos(angle), y - 14 * math.sin(angle)), BLUE)

    x, y, r = 690, 172, 92
    d.text(560, 28, "one pair is turned, its length is kept", INK, 13, bold=True)
    d.circle((x, y), r, "none", RULE)
    d.arrow((x - r - 20, y), (x + r + 34, y), GREY, 1)
    d.arrow((x, y + r + 16), (x, y - r - 22), GREY, 1)
    d.text(x + r + 40, y + 5, "x[j]", GREY, 12)
    d.text(x + 8, y - r - 14, "x[j + 128]", GREY, 12)
    first, second = 0.35, 1.55
    for angle, colour in ((first, GREY), (second, BLUE)):
        d.arrow((x, y), (x + r * math.cos(angle), y - r * math.sin(angle)), colour, 2)
    steps = np.linspace(first, second - 0.12, 24)
    d.curve([(x + 44 * math.cos(a), y - 44 * math.sin(a)) for a in steps], ORANGE, 1.5)
    d.text(x + 42, y - 58, "p × its angle", ORANGE, 12)
    d.text(x + r * math.cos(first) + 6, y - r * math.sin(first) + 2, "before", GREY, 12)
    d.text(x + r * math.cos(second) - 52, y - r * math.sin(second) + 20, "after", BLUE, 12)

    d.text(24, 340, "which dimensions are a pair (here of 16)", INK, 13, bold=True)
    for left, name, colour, mates in (
        (24, "halves, j and j + d/2: these weights", BLUE, [(j, j + 8) for j in (0, 1, 2)]),
        (470, "neighbours, 2j and 2j + 1: garbage", PINK, [(2 * j, 2 * j + 1) for j in range(3)]),
    ):
        for j in range(16):
            taken = any(j in mate for mate in mates)
            fill = (LIGHT_BLUE if colour == BLUE else "#f5d3e0") if taken else PALE
            d.rect(left + 22 * j, 374, 20, 20, fill, RULE, round=3)
            d.text(left + 22 * j + 10, 388, str(j), GREY, 10, "middle")
        for a, b in mates:
            at, to = left + 22 * a + 10, left + 22 * b + 10
            d.arc((at, 372), ((at + to) / 2, 372 - 0.12 * (to - at) - 8), (to, 372), colour)
        d.text(left, 414, name, colour, 12)
    return d


def draw_gelu() -> Drawing:
    """GeLU beside ReLU, and how far its two spellings are apart."""
    d = Drawing(880, 320, "GeLU and ReLU, and GeLU's tanh form against the exact one")
    xs = np.linspace(-4, 4, 161)
    bent = ops.gelu_tanh(xs)
    exact = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in xs])

    def left(x: float, y: float) -> Point:
        return 40 + 42 * (x + 4), 232 - 44 * y

    def right(x: float, y: float) -> Point:
        return 500 + 42 * (x + 4), 158 - 0.2 * y

    d.text(24, 28, "ReLU cuts, GeLU bends", INK, 13, bold=True)
    _axes(d, left, (-4, 4), (-1, 0, 1, 2, 3, 4), str)
    d.curve([left(x, max(x, 0)) for x in xs], ORANGE)
    d.curve([left(x, y) for x, y in zip(xs, bent, strict=True)], BLUE)
    d.text(*left(1.05, 2.6), "GeLU", BLUE, 13, "end", bold=True)
    d.text(*left(1.05, 3.1), "ReLU", ORANGE, 13, "end", bold=True)

    d.text(470, 28, "tanh form minus exact form, in millionths", INK, 13, bold=True)
    _axes(d, right, (-4, 4), (-400, -200, 0, 200, 400), str)
    d.curve([right(x, y) for x, y in zip(xs, (bent - exact) * 1e6, strict=True)], BLUE)
    d.text(470, 306, "Small, but it is added up in every layer, and it is not noise.", GREY, 12)
    return d


def _axes(
    d: Drawing,
    at: Callable[[float, float], Point],
    xs: tuple[float, float],
    ys: Sequence[float],
    say: Callable[[float], str],
) -> None:
    """Thin rules with their numbers."""
    for y in ys:
        d.line(at(xs[0], y), at(xs[1], y), INK if y == 0 else PALE)
        place = at(xs[0], y)
        d.text(place[0] - 6, place[1] + 4, say(y).replace("-", "−"), GREY, 11, "end")
    bottom = at(0, ys[0])[1] + 18
    for x in range(int(xs[0]), int(xs[1]) + 1, 2):
        d.text(at(x, 0)[0], bottom, str(x).replace("-", "−"), GREY, 11, "middle")


# --- the decoder --------------------------------------------------------------------------------


def draw_visibility() -> Drawing:
    """Who sees whom: the usual causal rule, PaliGemma's, and that of a layer with a window."""
    d = Drawing(880, 356, "What each token may see")
    picture, prompt, answer, window = 5, 4, 4, 6
    prefix, tokens = picture + prompt, picture + prompt + answer
    names = ["image"] * picture + ["<bos>", "caption", "en", "\\n"] + ["a", "red", "circle", "…"]
    kinds = [TEAL] * picture + [BLUE] * prompt + [ORANGE] * answer
    lights = {TEAL: "#7cc4bb", BLUE: "#86b0de", ORANGE: "#eeb377"}
    panels = (
        ("an ordinary decoder", "each token sees what is before it", Rows.of(0, 0, range(tokens))),
        ("PaliGemma", "picture and prompt see each other", Rows.of(0, prefix, range(tokens))),
        (
            "PaliGemma 2, every other layer",
            f"answers see the last {window} (really 4,096)",
            Rows.of(0, prefix, range(tokens)).sliding(window),
        ),
    )
    cell, top = 17, 80
    for i, (name, says, rows) in enumerate(panels):
        left = 84 + 266 * i
        d.text(left, 28, name, INK, 13, bold=True)
        d.text(left, 47, says, GREY, 12)
        for t in range(tokens):
            y = top + cell * t
            d.rect(left + cell * t, top - 9, cell - 1, 5, kinds[t])
            if i == 0:
                d.text(left - 14, y + 13, names[t], kinds[t], 11, "end")
            d.rect(left - 9, y, 5, cell - 1, kinds[t])
            for s in range(tokens):
                seen = rows.first[t] <= s < rows.last[t]
                fill = lights[kinds[s]] if seen else PALE
                d.rect(left + cell * s, y, cell - 1, cell - 1, fill)
    for x, words, colour in ((84, "image", TEAL), (150, "prompt", BLUE), (224, "answer", ORANGE)):
        d.rect(x, 328, 11, 11, lights[colour])
        d.text(x + 17, 338, words, colour, 12)
    d.text(306, 338, "row: the token that looks; column: the token it may see", GREY, 12)
    return d


def draw_heads() -> Drawing:
    """Which query heads share a key/value head."""
    d = Drawing(880, 372, "Query heads and the key/value heads they read")
    colours = (BLUE, ORANGE, TEAL, VIOLET)
    d.text(24, 28, "query head h reads key/value head h // (H / K)", INK, 13, bold=True)
    for row, (name, H, K) in enumerate(
        (
            ("PaliGemma 3B", 8, 1),
            ("PaliGemma 2 3B", 8, 4),
            ("PaliGemma 2 10B", 16, 8),
            ("PaliGemma 2 28B", 32, 16),
        )
    ):
        y, cell, wide = 50 + 66 * row, 20, H // K
        d.text(24, y + 15, name, INK, 12)
        d.text(24, y + 40, f"H = {H}, K = {K}", GREY, 12)
        for h in range(H):
            colour = colours[h // wide % 4]
            d.rect(168 + 21.5 * h, y, cell, cell, _mix(0.35, PAPER, colour), colour, round=3)
            d.text(178 + 21.5 * h, y + 14, str(h), INK, 9, "middle")
        for k in range(K):
            left = 168 + 21.5 * k * wide
            width, colour = 21.5 * wide - 1.5, colours[k % 4]
            d.rect(left, y + 27, width, 18, colour, round=3)
            d.text(left + width / 2, y + 40, str(k), PAPER, 10, "middle", bold=True)
    y = 326
    d.text(24, y + 15, "a slip: h % K", PINK, 12)
    for h in range(8):
        colour = colours[h % 4]
        d.rect(168 + 21.5 * h, y, 20, 20, _mix(0.35, PAPER, colour), colour, round=3)
        d.text(178 + 21.5 * h, y + 14, str(h), INK, 9, "middle")
    d.text(
        356, y + 15, "PaliGemma 2 3B with heads dealt out like cards: the right shapes,", GREY, 12
    )
    d.text(356, y + 32, "wrong answers, and no sign of it in PaliGemma 1, where K is 1.", GREY, 12)
    return d


def draw_cache() -> Drawing:
    """How the keys and values that are kept grow with the tokens."""
    d = Drawing(880, 380, "Memory of the key/value cache")
    looks = ((TEAL, -8), (BLUE, -2), (ORANGE, 6), (PINK, -10))

    def at(tokens: float, megabytes: float) -> Point:
        return 64 + 0.14 * tokens, 320 - 0.08 * megabytes

    d.text(24, 28, "keys and values in float32, MB", INK, 13, bold=True)
    for megabytes in (0, 1000, 2000, 3000):
        d.line(at(0, megabytes), at(4500, megabytes), INK if megabytes == 0 else PALE)
        d.text(56, at(0, megabytes)[1] + 4, f"{megabytes:,}", GREY, 11, "end")
    for tokens, words in ((256, "224 px"), (1024, "448 px"), (4096, "896 px")):
        x, bottom = at(tokens, 0)
        d.line((x, 70), (x, bottom), RULE, 1, "3 3")
        d.text(x, bottom + 18, f"{tokens:,}", GREY, 11, "middle")
        d.text(x, bottom + 34, words, GREY, 11, "middle")
    d.text(336, 372, "tokens (the marks: the picture alone)", GREY, 12, "middle")
    for (name, config), (colour, down) in zip(models().items(), looks, strict=True):
        per_token = 4 * cache_numbers(config.text_config)
        end = at(4500, 4500 * per_token / 1e6)
        d.curve([at(0, 0), end], colour)
        d.text(end[0] + 8, end[1] + down, name, colour, 12, bold=True)
        d.text(end[0] + 8, end[1] + down + 15, f"{per_token / 1000:.0f} kB a token", GREY, 11)
    return d


def draw_layers() -> Drawing:
    """The wiring of a layer in the three towers."""
    d = Drawing(880, 430, "A layer of SigLIP, of Gemma and of Gemma 2")
    norm, work = (PALE, GREY), (LIGHT_BLUE, BLUE)
    towers = (
        ("SigLIP", ["layer_norm1", "*attention"], ["layer_norm2", "*fc1, GeLU, fc2"]),
        (
            "Gemma (PaliGemma)",
            ["input_layernorm", "*attention"],
            ["post_attention_layernorm", "*gate, up, down"],
        ),
        (
            "Gemma 2 (PaliGemma 2)",
            ["input_layernorm", "*attention", "post_attention_layernorm"],
            ["pre_feedforward_layernorm", "*gate, up, down", "post_feedforward_layernorm"],
        ),
    )
    for i, (name, *halves) in enumerate(towers):
        x = 52 + 285 * i
        d.text(x - 14, 28, name, INK, 13, bold=True)
        d.text(x, 56, "x", INK, 13, "middle")
        d.arrow((x, 62), (x, 414), INK, 2)
        for half, boxes in enumerate(halves):
            top = 76 + 168 * half
            bottom = top + 142
            middle = x + 122
            d.curve([(x, top), (middle, top), (middle, bottom)], GREY, 1.2)
            for place, words in enumerate(boxes):
                y = top + 12 + 40 * place
                fill, edge = work if words.startswith("*") else norm
                d.rect(x + 26, y, 192, 28, fill, edge, round=5)
                d.text(middle, y + 18, words.lstrip("*"), INK, 12, "middle")
            d.arrow((middle, bottom), (x + 11, bottom), GREY, 1.2)
            d.circle((x, bottom), 10, PAPER, INK, 1.5)
            d.text(x, bottom + 5, "+", INK, 15, "middle")
    return d


PARTS = {
    "projections": ("q, k, v, o matrices", BLUE),
    "mlp": ("MLP", TEAL),
    "attention": ("attention itself", ORANGE),
    "logits": ("scores of the vocabulary", VIOLET),
    "rest": ("all the rest", "#98a3ad"),
}


def draw_time() -> Drawing:
    """Where the time of an answer goes, as measured."""
    measured = json.loads(TIMES.read_text())
    d = Drawing(880, 268, "Where the time goes")
    d.text(24, 28, "PaliGemma 3B at 224 px, float32 on two cores of a CPU", INK, 13, bold=True)
    for row, (key, words) in enumerate(
        (("look", "see the picture"), ("read", "read the prompt"), ("step", "write one token"))
    ):
        y, seconds = 50 + 54 * row, measured["seconds"][key]
        whole = sum(seconds.values())
        said = f"{whole:.1f} s" if whole >= 1 else f"{1000 * whole:.0f} ms"
        d.text(24, y + 16, words, INK, 13)
        d.text(24, y + 33, said, GREY, 12)
        x = 160.0
        for part, (_, colour) in PARTS.items():
            width = 690 * seconds[part] / whole
            d.rect(x, y, width, 36, colour)
            if width > 42:
                share = f"{100 * seconds[part] / whole:.0f} %"
                d.text(x + width / 2, y + 23, share, PAPER, 12, "middle", bold=True)
            x += width
    x = 24.0
    for words, colour in PARTS.values():
        d.rect(x, 226, 12, 12, colour)
        d.text(x + 18, 236, words, INK, 12)
        x += 42 + 7.4 * len(words)
    d.text(24, 258, "random weights in bfloat16, 264 tokens of picture and prompt", GREY, 11)
    return d


FIGURES: dict[str, Callable[[], Drawing]] = {
    "journey": draw_journey,
    "patches": draw_patches,
    "positions": draw_positions,
    "layers": draw_layers,
    "rope": draw_rope,
    "visibility": draw_visibility,
    "heads": draw_heads,
    "gelu": draw_gelu,
    "cache": draw_cache,
    "time": draw_time,
}
TRAINED = ("positions",)  # those that show trained weights, whose products round as they like


# --- the measurement ----------------------------------------------------------------------------


class Clock:
    """Operations that are timed by what they are for: hand a model `ops` instead of its own."""

    def __init__(self, namespace: ModuleType, config: Config) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._vocabulary = config.text_config.vocab_size
        self._inner = {config.text_config.intermediate_size, config.vision_config.intermediate_size}
        self.ops = ModuleType("clocked")
        vars(self.ops).update(vars(namespace))
        for name in ("attend", "gated", "gelu_tanh", "linear"):
            setattr(self.ops, name, self._timed(name, getattr(namespace, name)))

    def take(self, whole: float) -> dict[str, float]:
        """The seconds of the parts since the last time; `whole` tells how much is the rest."""
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds | {"rest": whole - sum(seconds.values())}

    def _timed(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def timed(x: Any, *others: Any, **options: Any) -> Any:
            began = time.perf_counter()
            y = op(x, *others, **options)
            self.seconds[self._part(name, others)] += time.perf_counter() - began
            return y

        return timed

    def _part(self, name: str, others: tuple[Any, ...]) -> str:
        if name == "attend":
            return "attention"
        if name != "linear":
            return "mlp"
        shape = set(others[0].shape)
        return (
            "logits"
            if self._vocabulary in shape
            else "mlp"
            if shape & self._inner
            else "projections"
        )


def measure(rounds: int = 5, tokens: int = 17) -> dict[str, Any]:
    """Time the operations of a 3B of random weights; of the rounds, the medians."""
    from npvlm.work.bench import machine
    from npvlm.work.rounds import look, open_model, random_inputs, write
    from npvlm.work.synthetic import synthetic_checkpoint, synthetic_config

    found: dict[str, list[dict[str, float]]] = {"look": [], "read": [], "step": []}
    with synthetic_checkpoint(synthetic_config(MEASURED)) as folder:
        model = open_model(folder, "float32")
        inputs = random_inputs(model.config, 1, 8)
        clock = Clock(model.ops, model.config)
        clocked = replace(model, ops=clock.ops)
        for number in range(1 + rounds):  # the first one compiles and warms up
            at = time.perf_counter()
            features = look(clocked, inputs)
            seconds = [clock.take(time.perf_counter() - at)]
            at = time.perf_counter()
            steps = write(clocked, inputs, features, tokens)
            next(steps)
            seconds.append(clock.take(time.perf_counter() - at))
            at = time.perf_counter()
            for _ in steps:
                pass
            all_steps = clock.take(time.perf_counter() - at)
            seconds.append({part: spent / (tokens - 1) for part, spent in all_steps.items()})
            if number:
                for phase, spent in zip(found, seconds, strict=True):
                    found[phase].append(spent)
    medians = {
        phase: {part: round(statistics.median(s[part] for s in spent), 5) for part in PARTS}
        for phase, spent in found.items()
    }
    return {
        "command": "python docs/figures.py --measure",
        "model": MEASURED,
        "precision": "float32",
        "rounds": rounds,
        "machine": machine(),
        "seconds": medians,
    }


def main() -> None:
    """Write every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="time a synthetic 3B first")
    if parser.parse_args().measure:
        TIMES.write_text(json.dumps(measure(), indent=2) + "\n")
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
