"""The sheet of an explanation: where its panels lie, and what is written where."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from npvlm.answers.explanation import Explanation, Word
from npvlm.answers.explanation_sheet import (
    CAPTION,
    FAINT,
    GAP,
    INK,
    MARGIN,
    NARROW,
    PAPER,
    SMALL,
    TITLE,
    sheet,
)
from npvlm.answers.heat import lit

GREEN = (0, 200, 0)
FLAT = np.full((4, 4), 0.25)


def drawn(size: tuple[int, int], words: list[Word], **changes: object) -> np.ndarray:
    """The sheet of a green picture, as pixels."""
    values = {"image": "a.png", "prompt": "caption en", "answer": "a", "own": True, "layers": [0]}
    values |= {"model": "shapes", "precision": "int8", "method": "attention"} | changes
    picture = Image.new("RGB", size, GREEN)
    return np.asarray(sheet(Explanation(picture=picture, words=words, **values)))


def flat(count: int, text: str = " a") -> list[Word]:
    """Words without a peak, so that their panels have one colour."""
    return [Word(text, [5], 0.5, FLAT)] * count


def runs(hit: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hit, [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def rectangles(hit: np.ndarray) -> list[tuple[int, int, int, int]]:
    """x0, y0, x1, y1 of what is hit, row by row."""
    found = [(row, runs(hit[slice(*row)].any(0))) for row in runs(hit.any(1))]
    return [(x0, y0, x1, y1) for (y0, y1), columns in found for x0, x1 in columns]


def of_colour(pixels: np.ndarray, *colours: tuple[int, ...]) -> np.ndarray:
    return np.any([(pixels == colour).all(-1) for colour in colours], axis=0)


def panels(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    cold = lit(Image.new("RGB", (1, 1), GREEN), FLAT, "attention").getpixel((0, 0))
    return rectangles(of_colour(pixels, GREEN, cold))


@pytest.mark.parametrize(("words", "columns"), [(1, 2), (2, 2), (3, 2), (5, 3), (11, 4)])
def test_panels_lie_in_rows_with_equal_margins_and_gaps(words: int, columns: int) -> None:
    pixels = drawn((300, 240), flat(words))
    found = panels(pixels)
    assert len(found) == words + 1
    across, down = 300 + GAP, 240 + CAPTION + GAP
    top = found[0][1]
    for number, (x0, y0, x1, y1) in enumerate(found):
        row, column = divmod(number, columns)
        assert (x0, y0) == (MARGIN + column * across, top + row * down)
        assert (x1 - x0, y1 - y0) == (300, 240)
    assert pixels.shape[1] == MARGIN + columns * across - GAP + MARGIN


@pytest.mark.parametrize(
    ("size", "panel"),
    [
        ((600, 480), (300, 240)),
        ((30, 24), (300, 240)),
        ((2000, 1000), (379, 190)),
        ((2000, 7), (600, 2)),
        ((3, 900), (2, 600)),
        ((1, 1), (268, 268)),
        ((4000, 1), (600, 1)),
    ],
)
def test_panels_have_about_the_same_area_and_no_side_is_too_long(size, panel) -> None:
    x0, y0, x1, y1 = panels(drawn(size, flat(1)))[0]
    assert (x1 - x0, y1 - y0) == panel


def test_a_narrow_picture_stands_in_the_middle_of_its_column() -> None:
    found = panels(drawn((3, 900), flat(1)))
    assert found[0][0] == MARGIN + (NARROW - 2) // 2
    assert found[1][0] - found[0][0] == NARROW + GAP


def test_the_hottest_place_has_a_ring_dark_and_light_and_flat_heat_has_none() -> None:
    heat = np.zeros((4, 4))
    heat[2, 1] = 1.0  # its middle is at x 112.5, y 150
    pixels = drawn((300, 240), [Word(" a", [5], 0.5, heat), *flat(1)])
    left, top, *_ = panels(pixels)[0]
    second = pixels[top : top + 240, left + 300 + GAP :][:, :300]
    third = pixels[top + 240 + CAPTION + GAP :][:240, left : left + 300]
    assert not of_colour(third, (255, 255, 255)).any()
    for colour, radius in (((255, 255, 255), 8), (INK, 9)):
        rows, columns = np.nonzero(of_colour(second, colour))
        edges = columns.min(), columns.max(), rows.min(), rows.max()
        expected = 112.5 - radius, 112.5 + radius, 150 - radius, 150 + radius
        assert np.abs(np.subtract(edges, expected)).max() <= 1
    assert not of_colour(second[147:154, 110:116], INK, (255, 255, 255)).any()


@pytest.mark.parametrize(("height", "radius"), [(200, 60 * 2 / 22), (100, 4)])
def test_the_ring_is_smaller_on_a_flat_picture(height: int, radius: float) -> None:
    heat = np.zeros((4, 4))
    heat[2, 1] = 1.0
    pixels = drawn((1000, height), [Word(" a", [5], 0.5, heat)])
    left, top, right, bottom = panels(pixels)[0]
    assert (right - left, bottom - top) == (600, height * 0.6)
    second = pixels[bottom + CAPTION + GAP :][: bottom - top, left:right]
    rows, columns = np.nonzero(of_colour(second, (255, 255, 255)))
    edges = columns.min(), columns.max(), rows.min(), rows.max()
    x, y = 0.375 * 600, 0.625 * 0.6 * height
    assert np.abs(np.subtract(edges, (x - radius, x + radius, y - radius, y + radius))).max() <= 1


def test_there_is_room_for_two_lines_above_the_panels_and_for_one_below() -> None:
    pixels = drawn((300, 240), flat(2))
    assert panels(pixels)[0][1] == MARGIN + TITLE + 3 * SMALL
    assert len(pixels) - panels(pixels)[-1][3] == CAPTION + GAP + MARGIN + 2 * SMALL


def test_the_question_is_larger_than_what_is_said_about_it() -> None:
    pixels = drawn((300, 240), flat(1), prompt="HHH", model="HHH", precision="", method="attention")
    top = panels(pixels)[0][1]
    [(first, last)] = runs(of_colour(pixels[:top], INK).any(1))
    assert 0.6 * TITLE < last - first < TITLE


def test_the_question_stands_above_with_how_it_was_asked_and_the_note_below() -> None:
    pixels = drawn((300, 240), flat(2))
    top, bottom = panels(pixels)[0][1], panels(pixels)[-1][3] + CAPTION
    question, how = (np.argwhere(of_colour(pixels[:top], c)) for c in (INK, FAINT))
    note = np.argwhere(of_colour(pixels[bottom:], FAINT))
    assert question[:, 0].min() >= MARGIN and question[:, 0].max() < how[:, 0].min()
    assert how[:, 0].max() < top - 10
    assert note.size and bottom + note[:, 0].max() < len(pixels) - MARGIN + 4
    for part in (pixels[:top], pixels[bottom:]):
        assert MARGIN <= np.flatnonzero((part != PAPER).any((0, 2))).min() <= MARGIN + 3
    assert tuple(pixels[0, 0]) == tuple(pixels[-1, -1]) == PAPER


@pytest.mark.parametrize("changes", [{"prompt": "caption me " * 90}, {"model": "a/model" * 90}])
def test_what_is_too_long_is_cut_before_the_margin(changes: dict[str, str]) -> None:
    pixels = drawn((300, 240), flat(1, " extraordinarily" * 20), **changes)
    written = np.flatnonzero((pixels != PAPER).any(-1).any(0))
    assert written.min() >= MARGIN and written.max() < pixels.shape[1] - MARGIN
    top = panels(pixels)[0][1]
    longest = np.flatnonzero((pixels[:top] != PAPER).any(-1).any(0)).max()
    assert longest > pixels.shape[1] - MARGIN - 30  # it goes on for as long as it may


def test_a_word_stands_in_the_middle_under_its_panel_and_how_sure_it_was_below() -> None:
    pixels = drawn((300, 240), flat(1))
    for number, (x0, _, x1, y1) in enumerate(panels(pixels)):
        under = pixels[y1 : y1 + CAPTION, x0:x1]
        columns = np.flatnonzero(of_colour(under, INK).any(0))
        assert abs(columns.min() + columns.max() - 300) <= 6
        rows, below = (np.flatnonzero(of_colour(under, c).any(1)) for c in (INK, FAINT))
        assert rows.min() >= 8 and rows.max() < CAPTION
        if number == 0:  # the plain picture has one line alone
            assert not below.size
        else:
            assert rows.max() < below.max() < CAPTION
            columns = np.flatnonzero(of_colour(under, FAINT).any(0))
            assert abs(columns.min() + columns.max() - 300) <= 6
