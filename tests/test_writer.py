"""Safetensors files that are written piece by piece, and their headers read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from npvlm.files.checkpoint import read_header
from npvlm.files.writer import ALIGNED, ITEM_BYTES, Tensor, tensor_file

ARRAYS = {
    "odd": np.arange(7, dtype=np.int8).reshape(1, 7),
    "halves": np.arange(9, dtype=np.float16).reshape(3, 3),
    "wide": np.arange(10, dtype=np.float32).reshape(5, 2),
    "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
}
KINDS = {"int8": "I8", "float16": "F16", "float32": "F32", "uint8": "U8"}


def save(path: Path) -> None:
    """Write the arrays row by row, the last rows first."""
    tensors = {name: Tensor(KINDS[str(a.dtype)], a.shape) for name, a in ARRAYS.items()}
    with tensor_file(path, tensors) as file:
        for name, array in ARRAYS.items():
            for row in reversed(range(len(array))):
                file.write_rows(name, row, array[row : row + 1])


def test_rows_in_any_order_make_the_file_that_the_library_reads(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_every_number_is_aligned_in_the_file(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert min(stored.offset for stored in found) % ALIGNED == 0
    assert all(stored.offset % ITEM_BYTES[stored.dtype] == 0 for stored in found)


def test_a_header_says_where_the_bytes_of_each_tensor_are(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    found = {stored.name: stored for stored in read_header(tmp_path / "x.safetensors")}
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        stored = found[name]
        assert (stored.shape, stored.nbytes) == (array.shape, array.nbytes)
        assert content[stored.offset : stored.offset + stored.nbytes] == array.tobytes()
