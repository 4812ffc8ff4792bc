"""The demo: a drawn picture, three questions about it, and the boxes on a PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from npvlm.answers.boxes import Box, parse_boxes
from npvlm.answers.drawing import draw_boxes
from npvlm.api import load
from npvlm.files.output import save_picture
from npvlm.work.scenes import Thing, draw_things

SIZE = 448
THINGS = (
    Thing("red", "circle", 40, 60, 168, 188),
    Thing("blue", "square", 236, 236, 356, 356),
    Thing("orange", "star", 272, 48, 400, 170),
)
PROMPTS = ("caption en", "answer en how many shapes?", "detect red circle ; blue square")


@dataclass(frozen=True)
class Shown:
    """What the demo asked, what the model said, and how long it took."""

    answers: list[tuple[str, str]]
    boxes: list[Box]
    seconds: float


def draw_picture() -> Image.Image:
    """The demo's picture: a circle, a star and a square on a light ground."""
    picture = Image.new("RGB", (SIZE, SIZE), (232, 226, 210))
    draw_things(picture, THINGS)
    return picture


def run_demo(output: Path) -> Shown:
    """Ask the bundled model about the demo's picture and write the boxes it names to a PNG."""
    picture = draw_picture()
    answers = load("shapes").generate([picture] * len(PROMPTS), PROMPTS)
    boxes = parse_boxes(answers[-1].text, *picture.size)
    save_picture(draw_boxes(picture, boxes), output)
    spent = answers[0].seconds
    seconds = spent.image + spent.prefill + spent.decode
    return Shown([(a.prompt, a.text) for a in answers], boxes, seconds)
