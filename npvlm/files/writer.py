"""Writing safetensors piece by piece: the layout is known at the start, no tensor is ever whole.

The library's own writer wants every tensor in memory at once, and takes the bytes of an array that
is not contiguous in the wrong order without a word.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from npvlm.model.weights import Array

ALIGNED = 64  # bytes of a cache line, and of the widest vector
_MOVED = 2**24  # bytes that are moved at a time
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Tensor:
    """The type and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        return self.row_bytes * self.shape[0]


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file whose header is written and whose tensors are not yet."""

    file: BinaryIO
    tensors: Mapping[str, Tensor]
    starts: Mapping[str, int]

    def write_rows(self, name: str, first: int, rows: Array) -> None:
        """Put rows of a tensor in their place, the first of them at row `first`."""
        self.file.seek(self.starts[name] + first * self.tensors[name].row_bytes)
        self.file.write(np.ascontiguousarray(rows).data)


@contextmanager
def tensor_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorFile]:
    """Open a new file for tensors that are written in any order, all of them by the end.

    Wider types go first and the data begin at a multiple of 64 bytes, so that every number is
    aligned, and every tensor too whose size is such a multiple. Metadata are texts.
    """
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end, starts = 0, {}
    for name in sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name].dtype]):
        tensor = tensors[name]
        starts[name], end = end, end + tensor.bytes
        places = [starts[name], end]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": places}
    text = _header_bytes(header)
    before = len(text)
    with path.open("wb") as file:
        file.write(text)
        yield TensorFile(file, tensors, {name: before + start for name, start in starts.items()})
        file.flush()
        os.fsync(file.fileno())  # what is moved to its place has reached the disk


def _header_bytes(header: Mapping[str, object], length: int = 0) -> bytes:
    """A header with its own length in front, filled up with spaces to `length`, or to alignment."""
    text = json.dumps(header).encode()
    padded = (length or -(-(8 + len(text)) // ALIGNED) * ALIGNED) - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def shard(
    weights: Sequence[Mapping[str, Tensor]], most: int
) -> dict[str, list[Mapping[str, Tensor]]]:
    """Share weights, each of one tensor or a few, among files of at most `most` bytes.

    Only a weight that is larger alone makes a larger file. The files are named as the hub names
    them.
    """
    shards: list[list[Mapping[str, Tensor]]] = [[]]
    size = 0
    for weight in weights:
        added = sum(tensor.bytes for tensor in weight.values())
        if shards[-1] and size + added > most:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += added
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def shard_index(shards: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> dict[str, object]:
    """The contents of model.safetensors.index.json: the file of each tensor."""
    tensors = [
        (name, tensor, file)
        for file, weights in shards.items()
        for weight in weights
        for name, tensor in weight.items()
    ]
    total = sum(tensor.bytes for _, tensor, _ in tensors)
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file for name, _, file in tensors},
    }


class Stack:
    """An open safetensors file of float32 tensors that grow by a row each at a time.

    How many rows there will be is not known before the last one: there is room for the most, and
    what is left of it is closed up at the end.

    rows : the shape of a row of each tensor
    most : how many rows there may be
    metadata : as long as it can become
    """

    def __init__(
        self,
        file: BinaryIO,
        rows: Mapping[str, tuple[int, ...]],
        most: int,
        metadata: Mapping[str, str],
    ) -> None:
        self.file, self.rows, self.most, self.count = file, rows, most, 0
        self._before = len(self._header(most, metadata))

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Put a row behind each tensor."""
        for name, array in arrays.items():
            self.file.seek(self._start(name, self.most) + self.count * self._row_bytes(name))
            self.file.write(np.ascontiguousarray(array, np.float32).data)
        self.count += 1

    def close(self, metadata: Mapping[str, str]) -> None:
        """Move the tensors together, and write in front of them what there is."""
        for name in self.rows:  # towards the front, so that nothing is written over before it moves
            self._move(
                self._start(name, self.most),
                self._start(name, self.count),
                self.count * self._row_bytes(name),
            )
        self.file.truncate(self._before + self.count * sum(map(self._row_bytes, self.rows)))
        self.file.seek(0)
        self.file.write(self._header(self.count, metadata, self._before))
        self.file.flush()
        os.fsync(self.file.fileno())

    def _move(self, source: int, target: int, size: int) -> None:
        for at in range(0, size if source != target else 0, _MOVED):
            self.file.seek(source + at)
            part = self.file.read(min(_MOVED, size - at))
            self.file.seek(target + at)
            self.file.write(part)

    def _row_bytes(self, name: str) -> int:
        return ITEM_BYTES["F32"] * math.prod(self.rows[name])

    def _start(self, name: str, count: int) -> int:
        """Where a tensor begins when each has so many rows."""
        names = list(self.rows)
        before = names[: names.index(name)]
        return self._before + count * sum(map(self._row_bytes, before))

    def _header(self, count: int, metadata: Mapping[str, str], length: int = 0) -> bytes:
        """The header for so many rows, filled up with spaces."""
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, row in self.rows.items():
            start, end = end, end + count * self._row_bytes(name)
            header[name] = {"dtype": "F32", "shape": [count, *row], "data_offsets": [start, end]}
        return _header_bytes(header, length)
