"""What each token of an answer needs of the picture: cover a part, and see how its odds fall.

Axis letters: A tokens of the answer · P patches of the picture, a square of g x g · R picture side.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from npvlm.model.weights import Array

PARTS_ACROSS = 8  # any picture takes 64 runs, however many patches it has


def occlude(
    pixel_values: Array,
    side: int,
    read: Callable[[Array], NDArray[np.float64]],
    logprobs: NDArray[np.float64],
    tell: Callable[[int, int], None],
) -> NDArray[np.float64]:
    """How far the odds of each token fall where the picture is covered, as natural logarithms.

    Odds, because a model that is certain stays so under most covers: its probability goes from
    0.999999 to 0.99999, which is next to nothing, and its odds fall to a tenth.

    Parameters
    ----------
    pixel_values : the picture [3, R, R] as the tower reads it
    side : patches from one edge of the picture to the other, g
    read : gives the tokens' log-probabilities [A] for a picture
    logprobs : those of the whole picture [A]
    tell : is told how many parts are done, and of how many

    Returns
    -------
    falls [A, P]; a negative one says that the token grew likelier
    """
    falls, patch = np.empty((len(logprobs), side, side)), pixel_values.shape[-1] // side
    whole = log_odds(logprobs)
    places = list(product(parts(side), parts(side)))
    for done, (down, across) in enumerate(places, 1):
        covered = cover(pixel_values, _scaled(down, patch), _scaled(across, patch))
        falls[:, down, across] = (whole - log_odds(read(covered)))[:, None, None]
        tell(done, len(places))
    return falls.reshape(len(logprobs), -1)


def log_odds(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of p / (1 - p), from those of p; the surest are 1e-15 from certain."""
    logprobs = np.minimum(logprobs, -1e-15)
    return logprobs - np.log(-np.expm1(logprobs))


def parts(side: int) -> list[slice]:
    """Runs of patches from edge to edge, as even as whole patches allow."""
    edges = np.linspace(0, side, min(side, PARTS_ACROSS) + 1).round().astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(edges)]


def cover(pixel_values: Array, down: slice, across: slice) -> Array:
    """The picture with a rectangle of pixels in its mean colour.

    pixel_values [3, R, R] -> [3, R, R]
    """
    covered = pixel_values.copy()
    covered[:, down, across] = pixel_values.mean((1, 2))[:, None, None]
    return covered


def _scaled(run: slice, patch: int) -> slice:
    """Pixels in place of patches."""
    return slice(run.start * patch, run.stop * patch)
