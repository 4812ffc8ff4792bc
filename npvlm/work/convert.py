"""Write a checkpoint again at another precision or with an adapter in it, block by block.

A 28B needs no more memory than a 3B.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from npvlm.config import FORMAT_VERSION, PACKED, Values, parse_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.adapters import open_adapter
from npvlm.files.checkpoint import INDEX, open_checkpoint
from npvlm.files.names import POSITIONS
from npvlm.files.output import check_new, check_room, new_folder, place_of
from npvlm.files.packed import Rows, blocks_of, packing, part_tensors, parts_of
from npvlm.files.writer import Tensor, shard, shard_index, tensor_file
from npvlm.kernels.packing import PACKERS
from npvlm.model.weights import Adapted, Array, BFloat16, Weight, round_to_bfloat16, unpack
from npvlm.opening import find_place
from npvlm.work.sources import Say, content_of, open_source, size_of

SHARD_BYTES = 5_000_000_000

Progress = Callable[[int, int, int, int], None]


def convert(
    model: str | Path,
    destination: Path,
    precision: str | None,
    progress: Progress,
    adapter: Path | None = None,
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
    adapter : a LoRA to merge into the weights: in float64, rounded to float32, and from there as
        any other weight
    tokenizer, image_size, say : as for `open_source`

    Raises
    ------
    UsageError
        Where the source is packed already or the destination is no place for a new folder.
    NpvlmError
        Where the source or the adapter is damaged, the two do not fit, or the disk is too small or
        not to be written.
    """
    place, destination = find_place(model), place_of(destination)
    if destination.is_relative_to(place.resolve()) and destination != place.resolve():
        raise UsageError(f"{destination} lies inside {place}, expected a place beside it.")
    check_new(destination)
    source = open_source(place, tokenizer, image_size, say)
    weights = source.weights
    if adapter is not None:
        opened = open_adapter(adapter.expanduser())
        if image_size is not None and POSITIONS in opened.corrections:
            raise UsageError(
                f"{adapter} changes the table of positions, which --image-size resamples; merge it "
                "first, without --image-size, and convert what that makes."
            )
        if note := opened.other_base(str(model), place):
            say(note)
        # Rows of a source are had as those of any weight, which is all that an adapter asks for.
        weights = opened.correct(opened.replace(cast("Mapping[str, Weight]", weights)))
    layout = {name: _tensors(name, weight, precision) for name, weight in weights.items()}
    total = sum(tensor.bytes for tensors in layout.values() for tensor in tensors.values())

    with new_folder(destination) as draft:
        needed = total + sum(map(size_of, source.files.values()))
        check_room(destination.parent, needed, "name a place on another disk.")
        for file_name, small in source.files.items():
            (draft / file_name).write_bytes(content_of(small))
        values = _config(source.values, precision)
        if len(weights) > len(source.weights):  # an adapter has changed one of two tied tables
            values = _untied(values)
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
    if isinstance(row, Adapted):
        row = row.base
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
        if isinstance(block, Adapted):
            block = numbers if kind else _stored_as(block.base, numbers)
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


def _stored_as(base: Weight, numbers: NDArray[np.float32]) -> Array | BFloat16:
    """Numbers in the type of a weight that is not packed; those too large for it are infinite."""
    if isinstance(base, BFloat16):
        return round_to_bfloat16(numbers)
    assert isinstance(base, np.ndarray)
    with np.errstate(over="ignore"):
        return numbers.astype(base.dtype)


def _config(values: dict[str, Any], precision: str | None) -> dict[str, Any]:
    """The config.json of what is written: a type of weights, or how they are packed."""
    if precision is None:
        return values
    if precision in PACKED:
        entry = {"format": "npvlm", "version": FORMAT_VERSION, "precision": precision}
        return values | {"quantization": entry}
    if "dtype" not in values:
        values = values | {"torch_dtype": precision}
    return _retyped(values, precision)


def _untied(values: dict[str, Any]) -> dict[str, Any]:
    """Values that say that the output layer is not the embedding table."""
    untied = {"tie_word_embeddings": False}
    return values | untied | {"text_config": (values.get("text_config") or {}) | untied}


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


def _write_json(path: Path, values: Values) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
