"""Masks in the picture: placed, outlined, run-length encoded, cut out.

Axis letters: h, w sides of a mask as decoded (64) · H, W height and width of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from npvlm.answers.boxes import Box

Bits = NDArray[np.bool_]
Field = NDArray[np.float32]  # a decoded mask: above 0 is inside
Point = tuple[float, float]


def place(field: Field, box: Box, width: int, height: int) -> Bits:
    """Say for each pixel of the picture whether it belongs to the thing.

    The decoded mask is stretched over its box, whose corners are cut to whole pixels.

    field [h, w] -> [H, W]
    Source: big_vision's evaluator of PaliGemma's segmentation.
    """
    x0, y0, x1, y1 = whole_pixels(box)
    stretched = Image.fromarray(field).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
    placed = np.zeros((height, width), bool)
    inside = placed[y0:y1, x0:x1]
    inside[:] = (np.asarray(stretched) > 0)[: inside.shape[0], : inside.shape[1]]
    return placed


def whole_pixels(box: Box) -> tuple[int, int, int, int]:
    """The corners x0, y0, x1, y1 cut to whole pixels, at least one apart."""
    x0, y0 = int(box.x0), int(box.y0)
    return x0, y0, max(x0 + 1, int(box.x1)), max(y0 + 1, int(box.y1))


def run_lengths(mask: Bits) -> list[int]:
    """Count equal pixels in a row, down the columns, beginning with those outside: COCO's order.

    mask [H, W] -> counts that add up to H * W
    """
    flat = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes])).tolist()


def outlines(field: Field, box: Box) -> list[list[Point]]:
    """Walk around each part of the thing, in pixels; holes are left out.

    Where the decoded mask passes through 0 is found between its points, as `place` does, so the
    corners are finer than pixels and as many for a small picture as for a large one.

    field [h, w] -> rings of (x, y)
    Source: marching squares.
    """
    h, w = field.shape
    x0, y0, x1, y1 = whole_pixels(box)
    down, across = _stops(h, y0, y1), _stops(w, x0, x1)
    edged = np.pad(np.pad(field, 1, mode="edge"), 1)  # zeros: outside
    follow = dict(_steps(edged))
    rings = []
    while follow:
        start, after = follow.popitem()
        ring = [start]
        while after != start:
            ring.append(after)
            after = follow.pop(after)
        points = [_crossing(edge, edged, down, across) for edge in ring]
        if _area(points) > 0 and len(corners := _bends(points)) > 2:  # else a speck, or a hole
            rings.append(corners)
    return rings


_Edge = tuple[int, int, int, int]  # between two points of the grid: row, column, row, column


def _stops(count: int, first: float, last: float) -> NDArray[np.float64]:
    """Where the points of the edged field lie: pixel centres, and both ends twice."""
    centres = (np.arange(count) + 0.5) / count
    return first + (last - first) * np.concatenate([[0, 0], centres, [1, 1]])


def _steps(field: Field) -> list[tuple[_Edge, _Edge]]:
    """From each edge that the outline crosses to the next one, with the inside on the right."""
    inside = field > 0
    corners = np.stack([inside[:-1, :-1], inside[:-1, 1:], inside[1:, 1:], inside[1:, :-1]])
    mixed = corners.any(0) & ~corners.all(0)
    steps = []
    for row, column in np.argwhere(mixed).tolist():
        # Its corners clockwise from the upper left, and the edge from each to the next.
        at = [(row, column), (row, column + 1), (row + 1, column + 1), (row + 1, column)]
        held = corners[:, row, column]
        edges = [(*min(at[i], at[i - 3]), *max(at[i], at[i - 3])) for i in range(4)]
        leaves = [i for i in range(4) if held[i] and not held[i - 3]]  # clockwise, out of the thing
        enters = [i for i in range(4) if not held[i] and held[i - 3]]
        if len(leaves) == 2:  # a saddle: is its middle inside?
            joined = field[row : row + 2, column : column + 2].mean() > 0
            enters = sorted(enters, key=lambda i: (i - leaves[0]) % 4, reverse=not joined)
        steps += [(edges[a], edges[b]) for a, b in zip(leaves, enters, strict=True)]
    return steps


def _crossing(
    edge: _Edge, field: Field, down: NDArray[np.float64], across: NDArray[np.float64]
) -> Point:
    """Where on an edge the field passes through 0."""
    r0, c0, r1, c1 = edge
    one, other = float(field[r0, c0]), float(field[r1, c1])
    share = one / (one - other)
    return (
        float(across[c0] + share * (across[c1] - across[c0])),
        float(down[r0] + share * (down[r1] - down[r0])),
    )


def _bends(points: Sequence[Point]) -> list[Point]:
    """The points of a ring at which it turns."""
    apart = [point for i, point in enumerate(points) if point != points[i - 1]]
    here = np.array(apart)
    before, after = here - np.roll(here, 1, 0), np.roll(here, -1, 0) - here
    turns = abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9
    return [point for point, turn in zip(apart, turns, strict=True) if turn]


def _area(points: Sequence[Point]) -> float:
    """Twice the area within a ring, above 0 where it runs clockwise on the screen."""
    x, y = np.array(points).T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def cut_out(picture: Image.Image, mask: Bits, box: Box) -> Image.Image:
    """The thing alone, as large as its box, clear around it."""
    cut = picture.convert("RGBA")
    cut.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
    return cut.crop(whole_pixels(box))
