"""Drawn shapes fill the boxes that are told, and the exam of the bundled model is fair."""

from random import Random

import numpy as np
import pytest
from PIL import Image

from golden import shapes
from npvlm.work.scenes import SHAPES, Thing, draw_things


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(32, 32), (57, 54), (88, 88)])
def test_a_thing_fills_its_box_and_nothing_beyond(shape, size):
    thing = Thing("black", shape, 10, 20, 10 + size[0], 20 + size[1])
    picture = Image.new("RGB", (120, 130), "white")
    draw_things(picture, [thing])
    changed = np.asarray(picture).min(-1) < 255
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == thing.box


def test_a_picture_depends_on_split_seed_and_number_alone():
    one, again = (shapes.draw_scene("train", 3, 7) for _ in range(2))
    assert one.picture.tobytes() == again.picture.tobytes() and one.things == again.things
    others = [("held out", 3, 7), ("train", 4, 7), ("train", 3, 8)]
    for other in others:
        assert shapes.draw_scene(*other).picture.tobytes() != one.picture.tobytes()


def test_true_answers_get_full_marks():
    rng = Random(0)
    for index in range(60):
        asked = shapes.exam(shapes.draw_scene("held out", 0, index), rng)
        marks = shapes.score(asked, [question.answer for question in asked])
        assert all(min(values, default=1.0) >= 0.85 for values in marks.values())  # steps of a box


def test_a_box_is_matched_once_and_by_label():
    thing = Thing("red", "circle", 0, 0, 112, 112)
    box = "<loc0000><loc0000><loc0512><loc0512>"
    assert sorted(shapes.overlaps([thing, thing], f"{box} red circle")) == [0.0, 1.0]
    assert shapes.overlaps([thing], f"{box} blue circle") == [0.0]
    assert shapes.overlaps([thing], "no box") == [0.0]
