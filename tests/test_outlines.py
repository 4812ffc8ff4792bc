"""Outlines of masks, corner by corner, and where a mask lies in the picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from npvlm.answers.boxes import Box
from npvlm.answers.masks import cut_out, outlines, place, run_lengths, whole_pixels

Points = list[tuple[float, float]]


def rings(field: list | np.ndarray, box: Box) -> list[Points]:
    """The outlines, each from its first corner on."""
    found = outlines(np.array(field, np.float32), box)
    return sorted([ring[i:] + ring[:i] for ring in found for i in [ring.index(min(ring))]])


def area(ring: Points) -> float:
    x, y = np.array(ring).T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


@pytest.mark.parametrize(
    ("inner", "outer", "edge"), [(1, -1, 80), (1, -3, 65), (3, -1, 95), (0.5, -9.5, 53)]
)
def test_an_edge_lies_where_the_field_passes_through_zero(inner, outer, edge: float) -> None:
    box = Box("", 20.9, 10.2, 140.7, 50.1)  # 20 to 140 and 10 to 50, in whole pixels
    [left] = rings([[inner, outer], [inner, outer]], box)
    assert left == [
        (20, 10),
        (pytest.approx(edge), 10),
        (pytest.approx(edge), 50),
        (20, 50),
    ]
    [upper] = rings([[inner, inner], [outer, outer]], Box("", 10, 20, 50, 140))
    assert upper == [
        (10, 20),
        (50, 20),
        (50, pytest.approx(edge)),
        (10, pytest.approx(edge)),
    ]
    [lower] = rings([[outer, outer], [inner, inner]], Box("", 10, 20, 50, 140))
    assert lower[0] == (10, pytest.approx(160 - edge)) and area(lower) == pytest.approx(
        40 * (edge - 20)
    )


def test_rings_run_clockwise_on_the_screen() -> None:
    field = np.random.default_rng(1).standard_normal((12, 12))
    assert all(area(ring) > 0 for ring in outlines(field.astype(np.float32), Box("", 0, 0, 99, 99)))


def test_parts_that_touch_at_a_corner_are_one_where_the_middle_between_them_is_inside() -> None:
    box = Box("", 0, 0, 40, 40)
    assert len(rings([[1, -1], [-1, 1]], box)) == 2
    assert len(rings([[-1, 1], [1, -1]], box)) == 2
    [one] = rings([[2, -1], [-1, 2]], box)
    [other] = rings([[-1, 2], [2, -1]], box)
    assert area(one) == pytest.approx(area(other)) and 1000 < area(one) < 1200


def test_whether_parts_are_joined_is_decided_by_the_four_points_around() -> None:
    for between, parts in ((-1, 1), (-3, 2)):
        field = np.full((4, 4), -9.0)
        field[1:3, 1:3] = [[2, between], [between, 2]]
        for turned in (field, field.T, field[::-1], field[:, ::-1]):
            assert len(rings(turned, Box("", 0, 0, 40, 40))) == parts


def test_a_spot_smaller_than_a_pixel_has_an_outline() -> None:
    field = np.full((64, 64), -1.0)
    field[20, 30] = 1
    [ring] = rings(field, Box("", 0, 0, 4, 4))
    assert 0 < area(ring) < 0.01


def test_a_slanting_square_has_its_four_corners_alone() -> None:
    rows, columns = np.mgrid[:7, :7]
    [ring] = rings(2.25 - abs(rows - 3) - abs(columns - 3), Box("", 0, 0, 7, 7))
    assert ring == [(1.25, 3.5), (3.5, 1.25), (5.75, 3.5), (3.5, 5.75)]


def test_exactly_zero_is_outside() -> None:
    box = Box("", 0, 0, 8, 8)
    assert rings(np.zeros((4, 4)), box) == []
    assert not place(np.zeros((4, 4), np.float32), box, 8, 8).any()


def test_a_hole_takes_nothing_from_the_ring_around_it() -> None:
    field = np.ones((5, 5))
    field[2, 2] = -1
    assert rings(field, Box("", 0, 0, 50, 50)) == [[(0, 0), (50, 0), (50, 50), (0, 50)]]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10.9, 5.9, 20.9, 15.9), (10, 5, 20, 15)),
        ((10.9, 5.9, 10.95, 5.95), (10, 5, 11, 6)),
        ((10, 5, 11.5, 6.5), (10, 5, 11, 6)),
        ((0, 0, 12, 7), (0, 0, 12, 7)),
    ],
)
def test_corners_are_cut_to_whole_pixels_one_apart(box, expected) -> None:
    assert whole_pixels(Box("", *box)) == expected


def test_a_mask_lies_in_its_box_and_is_cut_at_the_picture() -> None:
    field = np.array([[1, -1], [1, -1], [1, -1], [-1, -1]], np.float32)
    mask = place(field, Box("", 4, 3, 12, 11), 20, 15)
    assert mask.shape == (15, 20)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), columns.min(), rows.max(), columns.max()) == (3, 4, 8, 7)
    assert mask[3:8, 4:8].all() and mask[8, 4] and not mask[8, 7]
    beyond = place(np.ones((2, 2), np.float32), Box("", 15, 10, 25, 30), 20, 15)
    assert beyond.sum() == 5 * 5 and beyond[10:, 15:].all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_cut_out_of_any_picture_has_colours_and_clearness(mode: str) -> None:
    picture = Image.new("RGB", (4, 4), (9, 9, 9)).convert(mode)
    cut = cut_out(picture, np.eye(4, dtype=bool), Box("", 0, 0, 2, 3))
    assert cut.mode == "RGBA" and cut.size == (2, 3)
    assert [cut.getpixel(at)[3] for at in ((0, 0), (1, 0), (1, 1), (0, 2))] == [255, 0, 255, 0]


def test_run_lengths_go_down_the_columns_from_what_is_outside() -> None:
    assert run_lengths(np.array([[1, 0, 1], [1, 0, 0]], bool)) == [0, 2, 2, 1, 1]
    assert run_lengths(np.array([[0, 0], [0, 1]], bool)) == [3, 1]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]
