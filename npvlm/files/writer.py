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
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    before = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        yield TensorFile(file, tensors, {name: before + start for name, start in starts.items()})
        file.flush()
        os.fsync(file.fileno())  # what is moved to its place has reached the disk


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
