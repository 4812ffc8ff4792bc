"""Write a checkpoint again at another precision, block by block: a 28B needs no more than a 3B."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.config import FORMAT_VERSION, PACKED, Values, parse_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.checkpoint import INDEX, open_checkpoint
from npvlm.files.output import check_new, new_folder
from npvlm.files.packed import Rows, blocks_of, packing, part_tensors, parts_of
from npvlm.files.writer import Tensor, shard, shard_index, tensor_file
from npvlm.kernels.packing import PACKERS
from npvlm.model.weights import Array, BFloat16, round_to_bfloat16, unpack
from npvlm.work.sources import Say, locate, open_source

SHARD_BYTES = 5_000_000_000

Progress = Callable[[int, int, int, int], None]


def convert(
    model: str | Path,
    destination: Path,
    precision: str | None,
    progress: Progress,
    *,
    tokenizer: Path | None = None,
    image_size: int | None = None,
    say: Say = lambda _: None,
) -> None:
    """Write a checkpoint folder of the published form, its weights stored for a precision.

    docs/format.md says what is in it. It appears whole or not at all.

    Parameters
    ----------
    model : the name of a bundled model, or a source as `open_source` takes it
    destination : a folder that is not there yet, or an empty one
    precision : "bfloat16", "int8" or "int4"; None keeps the types that weights are stored in
    progress : told before every block and at the end: weights done, weights in all, bytes
        written, bytes in all
    tokenizer, image_size, say : as for `open_source`

    Raises
    ------
    UsageError
        Where the source is packed already or the destination is no place for a new folder.
    NpvlmError
        Where the source is damaged, or the disk too small or not to be written.
    """
    place, destination = locate(model), destination.expanduser().resolve()
    if destination.is_relative_to(place.resolve()) and destination != place.resolve():
        raise UsageError(f"{destination} lies inside {place}, expected a place beside it.")
    check_new(destination)
    source = open_source(place, tokenizer, image_size, say)
    weights = source.weights
    layout = {name: _tensors(name, weight, precision) for name, weight in weights.items()}
    total = sum(tensor.bytes for tensors in layout.values() for tensor in tensors.values())

    with new_folder(destination) as draft:
        _check_space(draft, total + sum(map(len, source.files.values())))
        for file_name, content in source.files.items():
            (draft / file_name).write_bytes(content)
        values = _config(source.values, precision)
        _write_json(draft / "config.json", values)

        shards = shard(list(layout.values()), SHARD_BYTES)
        if len(shards) > 1:
            _write_json(draft / INDEX, shard_index(shards))
        done = written = 0
        for file_name, parts in shards.items():
            inside = {name: tensor for tensors in parts for name, tensor in tensors.items()}
            with tensor_file(draft / file_name, inside) as output:
                for tensors in parts:
                    name = next(iter(tensors))
                    for first, arrays in _pieces(name, weights[name], precision):
                        progress(done, len(layout), written, total)
                        for part, array in zip(tensors, arrays, strict=True):
                            output.write_rows(part, first, array)
                            written += array.nbytes
                    done += 1
        progress(done, len(layout), written, total)
        # What was written is opened as it will be used, before it takes its place.
        open_checkpoint(draft, parse_config(values))


def _tensors(name: str, weight: Rows, precision: str | None) -> dict[str, Tensor]:
    """The tensors that a weight becomes, its own name first."""
    shape = weight.shape
    if kind := packing(name, shape, precision):
        parts = part_tensors(name, shape, kind)
        return {part: Tensor(dtype, size) for part, (dtype, size) in parts.items()}
    row = weight[:1]
    if isinstance(row, BFloat16) or precision == "bfloat16":
        return {name: Tensor("BF16", shape)}
    dtype = row.dtype if isinstance(row, np.ndarray) else None
    return {name: Tensor("F16" if dtype == np.float16 else "F32", shape)}


def _pieces(
    name: str, weight: Rows, precision: str | None
) -> Iterator[tuple[int, tuple[Array, ...]]]:
    """What a weight becomes, a few rows at a time: the first row, and each tensor's part."""
    kind = packing(name, weight.shape, precision)
    for rows in blocks_of(weight):
        block = weight[rows]
        numbers = unpack(block, np.float32)
        if not np.isfinite(numbers).all():
            raise NpvlmError(f"{name} holds inf or nan, expected numbers; copy the model again.")
        if kind:
            yield rows.start, parts_of(PACKERS[kind](block))
        elif isinstance(block, BFloat16):
            yield rows.start, (block.bits,)
        elif precision == "bfloat16":
            yield rows.start, (round_to_bfloat16(numbers).bits,)
        elif isinstance(block, np.ndarray):
            yield rows.start, (block,)


def _config(values: dict[str, Any], precision: str | None) -> Values:
    """The config.json of what is written: a type of weights, or how they are packed."""
    if precision in PACKED:
        entry = {"format": "npvlm", "version": FORMAT_VERSION, "precision": precision}
        return values | {"quantization": entry}
    if precision is None:
        return values
    if "dtype" not in values:
        values = values | {"torch_dtype": precision}
    return _retyped(values, precision)


def _retyped(values: Values, precision: str) -> dict[str, Any]:
    """Values whose fields for the type of the weights say `precision`, in every part."""
    return {
        key: _retyped(value, precision)
        if isinstance(value, dict)
        else precision
        if key in ("dtype", "torch_dtype")
        else value
        for key, value in values.items()
    }


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NpvlmError(
            f"{folder.parents[1]} has {free / 1e9:.1f} GB left, expected {needed / 1e9:.1f} GB; "
            "name a place on another disk."
        )


def _write_json(path: Path, values: Values) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
