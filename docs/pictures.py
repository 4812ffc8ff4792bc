"""Make the README's pictures with the bundled model: `python docs/pictures.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import npvlm
from npvlm.work.demo import draw_picture

FOLDER = Path(__file__).resolve().parent / "figures"


def main() -> None:
    """Segment the demo's picture, and explain the caption of a part of it."""
    model, picture = npvlm.load("shapes"), draw_picture()
    found = model.segment(picture, "red circle ; blue square")
    found.draw(FOLDER / "segment.png")
    model.explain(picture.crop((0, 0, 448, 224)), "caption en").draw(FOLDER / "explain.png")


if __name__ == "__main__":
    main()
