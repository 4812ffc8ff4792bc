"""Boxes and masks on pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from npvlm.answers.boxes import Box
from npvlm.answers.drawing import COLOURS, SMALLEST, WASH, draw_boxes, label_colours


@pytest.mark.parametrize("size", [(400, 300), (4000, 3000), (300, 4000)])
def test_a_box_is_outlined_where_it_is_and_the_picture_stays(size: tuple[int, int]) -> None:
    width, height = size
    plain = Image.new("RGB", size, (250, 250, 250))
    box = Box("", width * 0.25, height * 0.25, width * 0.75, height * 0.75)
    drawn = np.asarray(draw_boxes(plain, [box])).astype(int)
    assert np.asarray(plain).min() == 250
    rows, columns = np.nonzero((drawn != 250).any(-1))
    edges = (columns.min(), rows.min(), columns.max(), rows.max())
    expected = (box.x0, box.y0, box.x1, box.y1)
    assert all(abs(a - b) <= 1 for a, b in zip(edges, expected, strict=True))
    assert tuple(drawn[height // 2, int(box.x0) + 2]) == COLOURS[0]
    assert tuple(drawn[height // 2, width // 2]) == (250, 250, 250)


@pytest.mark.parametrize("size", [(3, 2), (40, 30), (399, 10), (100, 100)])
def test_a_small_picture_is_enlarged_until_labels_can_be_read(size: tuple[int, int]) -> None:
    drawn = draw_boxes(Image.new("RGB", size), [Box("cat", 1, 1, 2, 2)])
    assert SMALLEST <= max(drawn.size) < 2 * SMALLEST + max(size)
    assert drawn.width * size[1] == drawn.height * size[0]


@pytest.mark.parametrize("corner", [(0, 0), (395, 395), (-20, -20), (399, 0)])
@pytest.mark.parametrize("label", ["cat", "кот", "a very long label " * 30])
def test_labels_stay_on_the_picture(corner: tuple[int, int], label: str) -> None:
    x, y = corner
    ground = (1, 2, 3)
    box = Box(label, x, y, x + 30, y + 30)
    bare = draw_boxes(Image.new("RGB", (400, 400), ground), [Box("", *corner, x + 30, y + 30)])
    drawn = draw_boxes(Image.new("RGB", (400, 400), ground), [box])
    written = (np.asarray(drawn) != np.asarray(bare)).any(-1).sum()
    assert drawn.size == (400, 400) and written > 100


def test_labels_of_boxes_that_lie_upon_each_other_do_not() -> None:
    boxes = [Box(name, 100, 100, 300, 300) for name in ("one", "two", "six")]
    pixels = np.asarray(draw_boxes(Image.new("RGB", (400, 400)), boxes)).astype(int)
    outside = pixels[:, 115:125]  # a piece of each strip, away from the boxes' own lines
    for colour in label_colours([box.label for box in boxes]).values():
        assert (outside == colour).all(-1).sum() > 40


def test_colours_go_by_label_in_the_order_asked_for() -> None:
    colours = label_colours(["dog", "cat", "dog"])
    assert colours == {"dog": COLOURS[0], "cat": COLOURS[1]}


def test_a_mask_is_washed_in_where_the_thing_is() -> None:
    mask = np.full((64, 64), -1, np.float32)
    mask[:, :32] = 1  # the left half
    box = Box("cat", 100, 100, 300, 300, painted=mask)
    drawn = draw_boxes(Image.new("RGB", (400, 400), (200, 200, 200)), [box])
    expected = tuple(round(200 + WASH * (c - 200)) for c in COLOURS[0])
    found = drawn.getpixel((150, 250))
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    assert drawn.getpixel((250, 250)) == drawn.getpixel((50, 250)) == (200, 200, 200)
