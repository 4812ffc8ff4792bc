"""Boxes and masks on pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from npvlm.answers.boxes import Box
from npvlm.answers.drawing import BLACK, COLOURS, SMALLEST, WASH, WHITE, draw_boxes, label_colours
from npvlm.errors import shown


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


@pytest.mark.parametrize("label", ["red\nsquare", "0\x1e\xb2", "\u202etac\x00"])
def test_what_would_break_a_label_is_spelled_out(label: str) -> None:
    picture = Image.new("RGB", (400, 400))
    drawn = draw_boxes(picture, [Box(label, 100, 100, 200, 200)])
    assert drawn == draw_boxes(picture, [Box(shown(label), 100, 100, 200, 200)])


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


GROUND = (1, 2, 3)


def drawn(boxes: list[Box], size: tuple[int, int] = (400, 400), labels: tuple[str, ...] = ()):
    """The pixels of a plain picture with boxes on it."""
    return np.asarray(draw_boxes(Image.new("RGB", size, GROUND), boxes, labels)).astype(int)


def strip_of(box: Box, size: tuple[int, int] = (400, 400)) -> tuple[int, int, int, int]:
    """Where the label of a box was written: x0, y0, x1, y1, the last pixels included."""
    bare = Box("", box.x0, box.y0, box.x1, box.y1)
    rows, columns = np.nonzero((drawn([box], size) != drawn([bare], size)).any(-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.mark.parametrize(
    ("size", "line"), [((400, 300), 2), ((300, 1000), 4), ((1126, 300), 5), ((2000, 900), 8)]
)
def test_the_line_of_a_box_has_its_colour_between_black_edges(size, line: int) -> None:
    x0, y0, x1, y1 = 50, 60, 250, 280
    pixels = drawn([Box("", x0, y0, x1, y1)], size)
    expected = [GROUND, BLACK, *[COLOURS[0]] * line, BLACK, GROUND]
    across, down = pixels[170], pixels[:, 150]
    for side in (across[x0 - 1 :], across[x1 + 1 :: -1], down[y0 - 1 :], down[y1 + 1 :: -1]):
        assert [tuple(pixel) for pixel in side[: line + 4]] == expected


@pytest.mark.parametrize(
    ("size", "factor"), [((400, 9), 1), ((399, 9), 2), ((200, 9), 2), ((199, 9), 3), ((3, 6), 67)]
)
def test_a_small_picture_grows_by_the_least_whole_factor_and_its_boxes_with_it(
    size, factor
) -> None:
    pixels = drawn([Box("", 0, 0, size[0], size[1] - 2)], size)
    assert pixels.shape[:2] == (size[1] * factor, size[0] * factor)
    assert np.flatnonzero((pixels != GROUND).any((1, 2))).max() == (size[1] - 2) * factor


def test_the_outline_of_a_mask_grows_with_a_small_picture() -> None:
    mask = np.full((64, 64), -1, np.float32)
    mask[:, :32] = 1  # the left half
    pixels = drawn([Box("", 10, 20, 50, 60, painted=mask)], (100, 100))
    row = [tuple(pixel) for pixel in pixels[160]]  # the edge is at x 30, four times as large
    assert set(row[118:123]) >= {COLOURS[0], WHITE}
    washed = row[80]
    assert washed not in (GROUND, COLOURS[0], WHITE) and row[150] == GROUND


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_a_picture_of_any_kind_is_drawn_on_in_colour(mode: str) -> None:
    drawn = draw_boxes(Image.new("RGB", (400, 400)).convert(mode), [Box("", 10, 10, 90, 90)])
    assert drawn.mode == "RGB" and drawn.getpixel((50, 12)) == COLOURS[0]


def test_an_enlarged_picture_has_its_pixels_as_squares() -> None:
    picture = Image.fromarray(np.array([[[9, 9, 9], [200, 100, 0]]], np.uint8))
    assert picture.resize((400, 200), Image.Resampling.NEAREST) == draw_boxes(picture, [])


@pytest.mark.parametrize("box", [(100, 100, 101, 300), (100, 100, 300, 101), (100, 100, 102, 102)])
def test_a_box_too_thin_for_two_lines_has_its_edge_alone(box) -> None:
    pixels = drawn([Box("", *box)])
    assert {tuple(pixel) for pixel in pixels.reshape(-1, 3)} == {GROUND, BLACK}


def test_a_label_lies_above_its_box_else_below_else_within() -> None:
    high = Box("cat", 100, 200, 300, 300)
    x0, y0, x1, y1 = strip_of(high)
    height = y1 - y0
    assert (x0, y1) == (100, 200) and 10 < height < 30 and 20 < x1 - x0 < 60
    assert strip_of(Box("cat", 100, 5, 300, 300))[1] == 300
    x0, y0, x1, y1 = strip_of(Box("cat", 0, 0, 399, 399))
    assert x0 <= 4 and 0 <= y0 <= 4 and y1 <= height + 4
    _, y0, _, y1 = strip_of(Box("cat", 100, height + 2, 300, 399))
    assert y0 <= 2 and y1 == height + 2  # there is just room above
    x0, _, x1, _ = strip_of(Box("cat", 390, 200, 399, 300))
    assert x1 == 399 and x0 < 380  # and none on the right


def test_labels_of_one_place_stand_above_below_and_then_within_without_a_gap() -> None:
    boxes = [Box(name, 100, 100, 300, 300) for name in ("aa", "ab", "ac", "ad", "ae", "af")]
    column = drawn(boxes)[:, 101]  # before the letters
    _, top, _, bottom = strip_of(boxes[0])
    height = bottom - top
    tops = [100 - height, 300, 100, 300 - height, 100 + height, 100 + 2 * height]
    for colour, top in zip(COLOURS, tops, strict=False):
        rows = np.flatnonzero((column == colour).all(-1)).tolist()
        assert set(range(top + 1, top + height)) <= set(rows)


def test_a_label_below_may_end_where_the_picture_ends() -> None:
    _, top, _, bottom = strip_of(Box("cat", 100, 200, 300, 300))
    lowest = 400 - (bottom - top)
    assert strip_of(Box("cat", 100, 5, 300, lowest))[1] == lowest
    assert strip_of(Box("cat", 100, 5, 300, lowest + 2))[1] < 10


@pytest.mark.parametrize("x", [0, -20, 790])
def test_a_label_begins_with_its_box_but_stays_on_the_picture(x: int) -> None:
    left, _, right, _ = strip_of(Box("cat", x, 200, 795, 250), (800, 300))
    assert (left == 0) if x <= 0 else (right == 799)


def test_labels_side_by_side_do_not_push_each_other_away() -> None:
    pixels = drawn([Box("one", 40, 100, 140, 300), Box("two", 240, 100, 340, 300)])
    for column, colour in ((41, COLOURS[0]), (241, COLOURS[1])):
        assert (pixels[90:100, column] == colour).all()


@pytest.mark.parametrize("size", [(600, 1500), (150, 1500), (1500, 150), (20, 1500)])
def test_a_label_is_no_wider_than_the_picture_and_uses_its_width(size: tuple[int, int]) -> None:
    width, height = size
    box = Box("some words " * 40, 0, height // 2, width, height // 2 + 20)
    left, top, right, bottom = strip_of(box, size)
    assert left == 0 and right < width and bottom - top < 60
    assert right > 0.8 * width - 12  # a letter more would be too much


def test_letters_have_the_same_margin_on_opposite_sides() -> None:
    size, line = (2000, 900), 8
    box = Box("HH", 100, 300, 700, 800)
    x0, y0, x1, y1 = strip_of(box, size)
    strip = drawn([box], size)[y0 : y1 + 1, x0 : x1 + 1]
    rows, columns = np.nonzero((strip != COLOURS[0]).any(-1))
    assert abs(rows.min() - line) <= 1 and abs(y1 - y0 - rows.max() - line) <= 1
    left, right = columns.min(), x1 - x0 - columns.max()
    assert abs(left - right) <= 1 and line <= left < 2 * line


def test_the_outline_of_a_mask_has_its_colour_between_white_edges_and_round_corners() -> None:
    field = np.full((4, 4), -1, np.float32)
    field[1:3, 1:3] = 1
    pixels = drawn([Box("", 0, 0, 2000, 2000, painted=field)], (2000, 2000))
    line = [tuple(pixel) for pixel in pixels[1000, 485:515]]  # the edge is at x 500
    first = line.index(WHITE)
    assert line[first : first + 10] == [WHITE, *[COLOURS[0]] * 8, WHITE]
    assert first in range(9, 12)
    assert line[first - 1] == GROUND and line[first + 10] not in (WHITE, GROUND, COLOURS[0])


def test_letters_are_dark_on_bright_colours_and_bright_on_dark_ones() -> None:
    for number, colour in enumerate(COLOURS):
        labels = tuple(map(str, range(number)))
        box = Box("cat", 100, 100, 300, 300)
        pixels = drawn([box], labels=labels)[84:99, 101:].reshape(-1, 3).tolist()
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        assert list(colour) in pixels
        assert ([*BLACK] in pixels, [*WHITE] in pixels) == (light, not light)


def test_a_confidence_stands_behind_its_label_or_alone() -> None:
    where = (100, 100, 300, 300)
    sure = drawn([Box("cat", *where, confidence=0.874)])
    assert np.array_equal(sure, drawn([Box("cat 0.87", *where)]))
    alone = drawn([Box("", *where, confidence=1.0)])
    assert np.array_equal(alone, drawn([Box("1.00", *where)]))
    assert np.array_equal(drawn([Box("cat", *where, confidence=0.0)]), drawn([Box("cat", *where)]))


def test_a_long_label_is_written_smaller_and_only_then_cut() -> None:
    size = (1000, 1000)
    short, long, endless = (
        strip_of(Box("many words " * count, 20, 300, 900, 900), size) for count in (1, 7, 60)
    )
    heights = [y1 - y0 for _, y0, _, y1 in (short, long, endless)]
    assert heights[0] > heights[1] > heights[2]
    assert 0.8 * 1000 < long[2] - long[0] <= 0.97 * 1000
    assert 0.9 * 1000 < endless[2] - endless[0] <= 0.97 * 1000
    cut = drawn([Box("many words " * 60, 20, 300, 900, 900)], size)
    assert np.array_equal(cut, drawn([Box("many words " * 61, 20, 300, 900, 900)], size))


def test_more_colours_than_there_are_begin_anew() -> None:
    colours = label_colours([str(i) for i in range(9)])
    assert colours["7"] == colours["0"] == COLOURS[0] and colours["8"] == COLOURS[1]
    assert len(set(colours.values())) == len(COLOURS)
