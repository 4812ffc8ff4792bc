"""Positions for pictures of another size are PyTorch's, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from golden import ours
from npvlm.errors import NpvlmError
from npvlm.files.resample import resample_positions

STORED = load_file(Path(ours.__file__).parent / "formats" / "positions.safetensors")
SIDES = sorted({name.rpartition(".")[0] for name in STORED})


@pytest.mark.parametrize("sides", SIDES)
def test_a_resampled_table_is_pytorch_s_in_float64_rounded_once(sides: str) -> None:
    _, new = map(int, sides.split("."))
    made = resample_positions(STORED[f"{sides}.table"], new)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, STORED[f"{sides}.made"])


def test_a_table_of_the_same_size_stays_as_it_is(rng: np.random.Generator) -> None:
    table = rng.standard_normal((49, 5)).astype(np.float32)
    np.testing.assert_array_equal(resample_positions(table, 7), table)


def test_a_table_that_is_the_same_everywhere_stays_so() -> None:
    for side in (1, 3, 8, 20):
        np.testing.assert_allclose(resample_positions(np.full((36, 2), 0.7), side), 0.7, rtol=1e-6)


def test_turning_the_picture_turns_the_table(rng: np.random.Generator) -> None:
    grid = rng.standard_normal((5, 5, 3))
    turned = grid.transpose(1, 0, 2).reshape(25, 3)
    made = resample_positions(grid.reshape(25, 3), 8).reshape(8, 8, 3).transpose(1, 0, 2)
    np.testing.assert_allclose(resample_positions(turned, 8).reshape(8, 8, 3), made, rtol=1e-6)


def test_a_table_of_no_square_is_refused() -> None:
    with pytest.raises(NpvlmError, match="has 12 rows, expected a square number"):
        resample_positions(np.zeros((12, 3)), 4)
