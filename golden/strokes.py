"""Digits as pen strokes of our own: fonts differ between machines and between Pillow versions."""

from math import cos, pi, sin

from PIL import Image, ImageDraw

from npvlm.work.scenes import SMOOTH, Point

Stroke = list[Point]


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Stroke:
    """Follow an ellipse around (x, y); angles in turns, 0 is to the right, 0.25 is down."""
    steps = max(4, round(abs(end - start) * 28))
    turns = [start + (end - start) * i / steps for i in range(steps + 1)]
    return [(x + rx * cos(2 * pi * t), y + ry * sin(2 * pi * t)) for t in turns]


def strokes(digit: str) -> list[Stroke]:
    """Give a digit's strokes in a box 0.6 wide and 1 high."""
    return {
        "0": [arc(0.3, 0.5, 0.3, 0.5, 0.0, 1.0)],
        "1": [[(0.1, 0.22), (0.34, 0.0), (0.34, 1.0)]],
        "2": [[*arc(0.3, 0.28, 0.28, 0.28, 0.5, 1.08), (0.02, 1.0), (0.6, 1.0)]],
        "3": [arc(0.27, 0.25, 0.27, 0.25, 0.55, 1.25), arc(0.27, 0.74, 0.31, 0.26, 0.75, 1.45)],
        "4": [[(0.44, 1.0), (0.44, 0.0), (0.0, 0.68), (0.6, 0.68)]],
        "5": [[(0.54, 0.0), (0.1, 0.0), (0.06, 0.43), *arc(0.27, 0.68, 0.32, 0.32, 0.63, 1.42)]],
        "6": [[(0.46, 0.0), *arc(0.3, 0.69, 0.3, 0.31, 0.56, 1.56)]],
        "7": [[(0.0, 0.0), (0.6, 0.0), (0.22, 1.0)]],
        "8": [arc(0.3, 0.25, 0.25, 0.25, 0.25, 1.25), arc(0.3, 0.75, 0.3, 0.25, 0.75, 1.75)],
        "9": [[*arc(0.3, 0.31, 0.3, 0.31, 1.06, 0.06), (0.16, 1.0)]],
    }[digit]


def draw_digit(
    picture: Image.Image,
    digit: str,
    left: float,
    top: float,
    height: float,
    thickness: float,
    slant: float,
    colour: tuple[int, int, int],
) -> tuple[int, int, int, int]:
    """Draw one digit and give its box (x0, y0, x1, y1).

    height is that of the pen's path; thickness and slant (how far the top leans right) are
    fractions of it.
    """
    pen_width = thickness * height
    points = [
        [(left + (x + slant * (1 - y)) * height, top + y * height) for x, y in stroke]
        for stroke in strokes(digit)
    ]
    flat = [point for stroke in points for point in stroke]
    x0 = int(min(x for x, _ in flat) - pen_width / 2)
    y0 = int(min(y for _, y in flat) - pen_width / 2)
    x1 = int(max(x for x, _ in flat) + pen_width / 2) + 1
    y1 = int(max(y for _, y in flat) + pen_width / 2) + 1
    mask = Image.new("L", ((x1 - x0) * SMOOTH, (y1 - y0) * SMOOTH))
    pen, radius = ImageDraw.Draw(mask), pen_width * SMOOTH / 2
    for stroke in points:
        path = [((x - x0) * SMOOTH, (y - y0) * SMOOTH) for x, y in stroke]
        pen.line(path, fill=255, width=round(2 * radius), joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    picture.paste(colour, (x0, y0, x1, y1), mask.reduce(SMOOTH))
    return x0, y0, x1, y1
