"""The table of positions of an image tower for pictures of another size, as transformers makes it.

Axis letters: P patches of a picture · D hidden_size of the tower · S old and N new patches of a
picture's side.
"""

from __future__ import annotations

import numpy as np

from npvlm.files.deduced import side_of
from npvlm.model.weights import Array

_SHARPNESS = -0.75  # of the cubic curve, as PyTorch has it; Pillow's is -0.5


def resample_positions(table: Array, side: int) -> Array:
    """Resample positions bicubically to pictures of side x side patches.

    Corners are not aligned, the outermost rows stand for those beyond the edge, and nothing is
    smoothed where the new table is smaller. Computed in float64 and rounded once.

    table [P, D] -> [N * N, D] float32
    Source: interpolate_pos_encoding of transformers' SigLIP, F.interpolate of PyTorch.
    """
    old = side_of(len(table))
    grid = table.astype(np.float64).reshape(old, old, -1)
    curve = _weights(old, side)  # [N, S]
    rows = np.einsum("ns,sjd->njd", curve, grid)
    return np.einsum("ms,nsd->nmd", curve, rows).reshape(side * side, -1).astype(np.float32)


def _weights(old: int, new: int) -> Array:
    """How much each old place counts for each new one.

    -> [N, S]
    """
    places = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(places)
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        at = np.clip(first + offset, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), at), _cubic(np.abs(places - first - offset)))
    return weights


def _cubic(distance: Array) -> Array:
    """The weight of a place at a distance of 0 to 2."""
    a, t = _SHARPNESS, distance
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, far)
