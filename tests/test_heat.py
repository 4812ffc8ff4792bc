"""Heat laid over a picture: colours, covers, and how it runs from patch to patch."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from npvlm.answers.heat import COLOURS, lit, shows, wash


def pixels(heat: list[list[float]], width: int, height: int, method: str = "attention"):
    return np.asarray(wash(np.array(heat), (width, height), method)).astype(int)


def test_colours_and_covers_go_by_the_share_of_the_peak() -> None:
    """Three pixels over two patches: the middle ones have half of each patch beside them."""
    found = pixels([[1, 0], [0, 0]], 3, 3)
    assert found[..., 3].tolist() == [[204, 140, 0], [140, 46, 0], [0, 0, 0]]
    for at, share in {(0, 0): 4, (0, 1): 2, (1, 0): 2, (1, 1): 1, (2, 2): 0}.items():
        assert tuple(found[at][:3]) == COLOURS[share]


def test_heat_runs_smoothly_from_one_middle_to_the_next_and_stays_behind_the_last() -> None:
    line = pixels([[1, 0]] * 2, 60, 2)[0, :, 3]
    assert line[:15].tolist() == [204] * 15 and line[45:].tolist() == [0] * 15
    assert (np.diff(line[15:45]) <= 0).all()
    assert line[16] - line[17] < line[26] - line[27]  # level at the patch, steepest between two
    way = (np.array([20, 25, 35]) + 0.5 - 15) / 30
    shares = 1 - way * way * (3 - 2 * way)
    covers = np.interp(shares, [0, 0.25, 0.5, 0.75, 1], [0, 0.18, 0.55, 0.72, 0.8])
    np.testing.assert_allclose(line[[20, 25, 35]], 255 * covers, atol=0.5)


def test_heat_runs_the_same_to_either_side() -> None:
    heat = [[0, 0.2, 1, 0], [0, 0, 0, 0], [0.6, 0, 0, 0]]
    turned = [row[::-1] for row in heat[::-1]]
    assert np.array_equal(pixels(heat, 20, 9), pixels(turned, 20, 9)[::-1, ::-1])


def test_every_patch_is_in_the_middle_of_its_own_pixels() -> None:
    for at in np.ndindex(3, 4):
        heat = np.zeros((3, 4))
        heat[at] = 1
        cover = pixels(heat.tolist(), 20, 9)[1::3, 2::5, 3]
        assert cover[at] == 204 and cover.sum() == 204


def test_what_everything_has_is_no_heat_and_less_than_nothing_is_none() -> None:
    alone = pixels([[1, 0], [0, 0]], 6, 6)
    assert np.array_equal(pixels([[0.3, 0.1], [0.1, 0.1]], 6, 6), alone)
    assert np.array_equal(pixels([[1, -1], [-1, -1]], 6, 6), alone)
    assert np.array_equal(pixels([[3, 3], [3, 3]], 6, 6)[..., 3], np.zeros((6, 6)))
    assert np.array_equal(pixels([[1]], 3, 2)[..., 3], np.zeros((2, 3)))


@pytest.mark.parametrize(("peak", "cover"), [(0.125, 46), (0.25, 140), (0.5, 204), (2, 204)])
def test_occlusion_is_bright_from_half_a_step_of_the_odds(peak: float, cover: int) -> None:
    assert pixels([[peak, 0], [0, 0]], 2, 2, "occlusion")[0, 0, 3] == cover
    assert pixels([[peak, 0], [0, 0]], 2, 2)[0, 0, 3] == 204


@pytest.mark.parametrize(
    ("heat", "method", "expected"),
    [
        ([[0.2, 0.2]], "attention", False),
        ([[0.2001, 0.2, 0.2]], "attention", True),
        ([[0.09, 0, 0]], "occlusion", False),
        ([[0.11, 0, 0]], "occlusion", True),
        ([[0.39, 0.3, 0.3]], "occlusion", False),
        ([[0.41, 0.3, 0.3]], "occlusion", True),
        ([[0.09, -3, -3]], "occlusion", False),
    ],
)
def test_a_place_is_marked_where_one_stands_out(heat, method: str, expected: bool) -> None:
    assert shows(np.array(heat), method) is expected


@pytest.mark.parametrize(
    ("colour", "ground"),
    [((255, 255, 255), (143, 143, 143)), ((0, 0, 0), (36, 36, 36)), ((255, 0, 0), (94, 56, 56))],
)
def test_a_lit_picture_is_darker_and_greyer_with_its_heat_above(colour, ground) -> None:
    picture = Image.new("RGB", (4, 4), colour)
    cold = lit(picture, np.zeros((2, 2)), "attention")
    assert cold.mode == "RGB"
    assert all(abs(a - b) <= 1 for a, b in zip(cold.getpixel((0, 0)), ground, strict=True))
    hot = np.asarray(lit(picture, np.array([[0, 0], [0, 1]]), "attention")).astype(int)
    expected = 0.8 * np.array(COLOURS[-1]) + 0.2 * np.array(ground)
    np.testing.assert_allclose(hot[3, 3], expected, atol=1)
    assert tuple(hot[0, 0]) == cold.getpixel((0, 0))
