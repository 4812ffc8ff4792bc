"""The demo: a drawn picture, three questions about it, and the boxes on a PNG."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from npvlm.answers.boxes import Box
from npvlm.api import load
from npvlm.files.output import save_picture
from npvlm.work.scenes import Thing, draw_things

SIZE = 448
THINGS = (
    Thing("red", "circle", 40, 60, 168, 188),
    Thing("blue", "square", 236, 236, 356, 356),
    Thing("orange", "star", 272, 48, 400, 170),
)
QUESTION, LABELS = "how many shapes?", "red circle ; blue square"


@dataclass(frozen=True)
class Shown:
    """What the demo asked, what the model said, where it is drawn, and how long it took."""

    answers: list[tuple[str, str]]
    boxes: list[Box]
    drawn: Path
    seconds: float


def draw_picture() -> Image.Image:
    """The demo's picture: a circle, a star and a square on a light ground."""
    picture = Image.new("RGB", (SIZE, SIZE), (232, 226, 210))
    draw_things(picture, THINGS)
    return picture


def run_demo(output: Path) -> Shown:
    """Write the demo's picture, ask the bundled model about it, and draw what it finds."""
    drawn = output.with_name(f"{output.stem}-boxes{output.suffix}")
    picture = draw_picture()
    save_picture(picture, output)
    model, began = load("shapes"), time.perf_counter()
    seen = model.look(picture)
    found = model.detect(seen, LABELS)
    answers = [model.caption(seen), model.ask(seen, QUESTION), found.answer]
    found.draw(drawn)
    seconds = time.perf_counter() - began
    return Shown([(a.prompt, a.text) for a in answers], found.boxes, drawn, seconds)
