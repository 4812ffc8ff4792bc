"""Checkpoints of random weights: the sizes and files of published models, and no knowledge.

For measuring time and memory. Every tensor repeats one block of random numbers, so that gigabytes
are written in seconds.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.config import Values, parse_config
from npvlm.errors import NpvlmError
from npvlm.files.names import Shapes, expected_shapes
from npvlm.files.output import check_new, check_room, new_folder, place_of, scratch_folder
from npvlm.files.published import config_values, preprocessor_values

BLOCK = 4_194_301  # numbers in the block; a prime, so that no two rows of a weight are alike
SPREAD = np.float32(0.02)
WEIGHTS = "model.safetensors"
ELSEWHERE = "name another place with --save or in $TMPDIR."  # where there is no room


def synthetic_config(name: str) -> dict[str, Any]:
    """The config.json of a published 3B, such as "paligemma2-3b-448"."""
    size, _, resolution = name.rpartition("-")
    return config_values(size, int(resolution))


def weight_bytes(values: Values) -> int:
    """How much the weights of a config.json take in bfloat16."""
    return 2 * sum(map(math.prod, expected_shapes(parse_config(values)).values()))


def check_place(values: Values, folder: Path | None) -> None:
    """Refuse a place for a checkpoint that is taken, not there, or too small.

    Parameters are those of `save_checkpoint`; no folder is the system's temporary one.

    Raises
    ------
    UsageError
        Where the folder is something else than new or empty.
    NpvlmError
        Where the disk has too little room.
    """
    if folder is not None:
        check_new(place_of(folder))
    around = Path(tempfile.gettempdir()) if folder is None else place_of(folder).parent
    check_room(around, weight_bytes(values), ELSEWHERE)


@contextmanager
def synthetic_checkpoint(values: Values) -> Iterator[Path]:
    """A random checkpoint in the system's temporary folder, removed at the end.

    Parameters and errors are those of `save_checkpoint`.
    """
    check_place(values, None)
    with scratch_folder(Path(tempfile.gettempdir())) as folder:
        _write(folder, values)
        yield folder


def save_checkpoint(values: Values, folder: Path) -> None:
    """Write a random checkpoint that stays. It has everything but a tokenizer.

    It is written beside its place and moved there when it is whole; whatever ends that early,
    nothing stays behind.

    Parameters
    ----------
    values : the contents of config.json
    folder : a new one, or an empty one

    Raises
    ------
    UsageError, NpvlmError
        As `check_place` does; also where it cannot be written.
    """
    check_place(values, folder)
    with new_folder(folder) as draft:
        _write(draft, values)


def _unwritable(folder: Path, error: OSError) -> NpvlmError:
    reason = error.strerror or str(error)
    return NpvlmError(f"{folder} cannot be written ({reason}); name another place.")


def _write(folder: Path, values: Values) -> None:
    """Write all files, or say in a sentence why not."""
    size, patch = values["vision_config"]["image_size"], values["vision_config"]["patch_size"]
    try:
        for name, content in (
            ("config.json", values),
            ("added_tokens.json", {"<image>": values["image_token_index"]}),
            ("preprocessor_config.json", preprocessor_values(size, patch)),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        _write_tensors(folder / WEIGHTS, expected_shapes(parse_config(values)))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _write_tensors(path: Path, shapes: Shapes) -> None:
    """Write one safetensors file of bfloat16 tensors, block by block."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * SPREAD
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                file.write(block[: min(left, BLOCK)].data)
                left -= min(left, BLOCK)
        file.flush()
        os.fsync(file.fileno())  # or the disk would still be busy when the clock starts
