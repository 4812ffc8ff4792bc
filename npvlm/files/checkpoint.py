"""Weights from safetensors files, mapped into memory and never copied: as published, or packed.

The safetensors library checks each file's layout (holes, overlaps, truncation); then the places of
the tensors are read from the same header, and each weight is a read-only view of the mapped file.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from npvlm.config import Config, parse_json, read_json
from npvlm.errors import NpvlmError, shortened, why
from npvlm.files.names import (
    EMBED_TOKENS,
    LM_HEAD,
    POSITIONS,
    PROJECTION,
    Shapes,
    canonical_name,
    expected_shapes,
    prefixes,
)
from npvlm.files.packed import join_parts, packing, part_names, part_tensors
from npvlm.model.weights import Array, BFloat16, Weight

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}
_FLOATS = ("F32", "F16", "BF16")
OTHER_FORMATS = (
    "*.bin",
    "*.npz",
    "*.gguf",
    "*.sbs",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
)
_POINTER = b"version https://git-lfs"
_LISTED = 3
_LARGEST_HEADER = 2**22  # bytes; the longest that is published has a twentieth
_LONGEST_NAME = 255  # bytes of the name of a file
_NAMED = 120  # characters of a name in a message: longer than that of any tensor
_KINDS = 60  # tensors named in a message, those of several layers counted once
_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)")


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its file's bytes, its place in them and what they mean."""

    file: Path
    name: str
    data: NDArray[np.uint8]
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def bytes(self) -> NDArray[np.uint8]:
        """View the stored bytes as they are."""
        return self.data[self.offset : self.offset + self.nbytes]

    def array(self) -> Array:
        """View the stored bytes as numbers, bfloat16 as its bits; they need not be aligned."""
        return np.ndarray(self.shape, np.dtype(_DTYPES[self.dtype]), self.data, self.offset)

    def weight(self) -> Weight:
        """View the stored bytes as a weight."""
        return BFloat16(self.array()) if self.dtype == "BF16" else self.array()


# The shape that a tensor must have, and the types that it may have.
_Expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]


@dataclass(frozen=True)
class Differences:
    """How the tensors that are there differ from those that a config asks for: names, all of them.

    missing : as published
    unexpected : as the files spell them
    misshapen, mistyped : each with what it is and what was expected
    """

    missing: list[str]
    unexpected: list[str]
    misshapen: dict[str, str]
    mistyped: dict[str, str]

    def said(self) -> list[tuple[str, dict[str, str]]]:
        """What there is of each kind: the kind, and names with what is to be said of each."""
        kinds = (
            ("missing", dict.fromkeys(self.missing, "")),
            ("unexpected", dict.fromkeys(self.unexpected, "")),
            ("of another shape", self.misshapen),
            ("of another type", self.mistyped),
        )
        return [(kind, names) for kind, names in kinds if names]


def open_checkpoint(folder: Path, config: Config) -> dict[str, Weight]:
    """Map a folder's weights into memory under their published names.

    No weight is read, copied or widened here, so a checkpoint of any size opens at once. An
    output layer in the file is used as it is; without one, the embedding table serves.

    Parameters
    ----------
    folder : Path
        Holds model.safetensors, or model.safetensors.index.json and the files that it names.
    config : Config
        Says which tensors there must be, and their shapes.

    Returns
    -------
    dict of str to array, BFloat16, Int8 or Int4
        Read-only views: float32 and float16 as arrays, bfloat16 as its bits, and what
        `npvlm convert` packed with its scales.

    Raises
    ------
    NpvlmError
        No checkpoint, a damaged file, or tensors that do not fit the config: all named at once.
    """
    tensors = (tensor for file in checkpoint_files(folder) for tensor in read_header(file))
    stored, shapes = _tie_tables(by_name(tensors), config)
    expected, precision = _expected(shapes, config), config.quantization
    _check(folder, stored, expected, config)

    weights: dict[str, Weight] = {}
    for name, shape in shapes.items():
        if kind := packing(name, shape, precision):
            values, scales = (stored[part].array() for part in part_names(name))
            weights[name] = join_parts(values, scales, shape[1], kind)
        else:
            weights[name] = stored[name].weight()
    return weights


def by_name(tensors: Iterable[Stored]) -> dict[str, Stored]:
    """Tensors under their published names; one that is there twice is refused.

    Where all that a PaliGemma has stands under one prefix, what stands outside it is left out.
    """
    tensors = list(tensors)
    start = _prefix(tensors)
    stored: dict[str, Stored] = {}
    for tensor in tensors:
        if not tensor.name.startswith(start):
            continue
        name = canonical_name(tensor.name[len(start) :])
        if name.endswith(".position_ids"):  # a constant 0, 1, 2, ... that old releases saved
            continue
        if name in stored:
            raise _twice(stored[name], tensor)
        stored[name] = tensor
    return stored


def outside(tensors: Iterable[Stored]) -> tuple[str, list[str]]:
    """The prefix of a PaliGemma that is part of another model, and the tensors outside it."""
    tensors = list(tensors)
    start = _prefix(tensors)
    return start, [tensor.name for tensor in tensors if not tensor.name.startswith(start)]


def left_out(folder: Path) -> str | None:
    """Say which tensors of a folder are no part of its PaliGemma, if any are not."""
    tensors = [tensor for file in checkpoint_files(folder) for tensor in read_header(file)]
    start, left = outside(tensors)
    if not start:
        return None
    groups = Counter(".".join(name.split(".")[:2]) for name in left)
    what = listed([f"{shortened(group, _NAMED)} ({count})" for group, count in groups.items()])
    beside = f"; what stands beside it is left out: {what}" if left else ""
    return f"the PaliGemma under {shortened(start.removesuffix('.'), _NAMED)} is taken{beside}."


def _prefix(tensors: list[Stored]) -> str:
    """What stands before the names of all that a PaliGemma has."""
    found = prefixes(tensor.name for tensor in tensors)
    if len(found) > 1:
        starts = listed(repr(start[:_NAMED]) for start in found)
        raise NpvlmError(
            f"{tensors[0].file.parent} holds {len(found)} PaliGemmas, under {starts}, "
            "expected one; keep the files of one"
        )
    return found[0] if found else ""


def fit_rows(config: Config, stored: Mapping[str, Any]) -> Config:
    """A config whose vocabulary is as long as the table, if that has all but untrained rows.

    Tables made from the original have no row for `<image>`, which is never looked up, and none of
    those behind it, which stand in the published files to make their number a multiple of 64.
    """
    table = stored.get(EMBED_TOKENS, stored.get(LM_HEAD))
    rows = table.shape[0] if table is not None and table.shape else 0
    if not config.image_token_index <= rows < config.text_config.vocab_size:
        return config
    return replace(config, text_config=replace(config.text_config, vocab_size=rows))


def find_differences(stored: Mapping[str, Stored], config: Config) -> Differences:
    """Hold tensors, under their published names, against those that a config asks for."""
    tied, shapes = _tie_tables(stored, config)
    return _differences(tied, _expected(shapes, config))


def _tie_tables(stored: Mapping[str, Stored], config: Config) -> tuple[dict[str, Stored], Shapes]:
    """The tensors, one serving as both tables where it has to, and the shapes there must be."""
    stored, shapes = dict(stored), expected_shapes(fit_rows(config, stored))
    if LM_HEAD in stored and LM_HEAD not in shapes:
        # Tied by name, yet there: the same numbers again, the only copy, or a head trained apart.
        # Or ColPali has one left from its PaliGemma.
        if EMBED_TOKENS in stored:
            shapes[LM_HEAD] = shapes[EMBED_TOKENS]
        elif config.text_config.tie_word_embeddings:
            stored[EMBED_TOKENS] = stored.pop(LM_HEAD)
    return stored, shapes


def _expected(shapes: Shapes, config: Config) -> _Expected:
    """What the tensors must be that stand for weights of these shapes."""
    expected: _Expected = {}
    for name, shape in shapes.items():
        if kind := packing(name, shape, config.quantization):
            parts = part_tensors(name, shape, kind)
            expected |= {part: (size, (dtype,)) for part, (dtype, size) in parts.items()}
        else:
            expected[name] = shape, _FLOATS
    return expected


def checkpoint_files(folder: Path) -> list[Path]:
    """Find the safetensors files of a checkpoint folder."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise NpvlmError(f"{folder} is {found}, expected a folder with {SINGLE}")
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return _shards(folder / INDEX)
    if (folder / "adapter_model.safetensors").exists():
        raise NpvlmError(
            f"{folder} holds an adapter, expected a whole model; name its base as the model, and "
            "this folder with --adapter"
        )
    others = sorted({file.name for kind in OTHER_FORMATS for file in folder.glob(kind)})
    if others:
        raise NpvlmError(
            f"{folder} has {listed(others, 3)} and no {SINGLE}; npvlm reads safetensors only: "
            "fetch the model's safetensors files, or save it again with transformers"
        )
    raise NpvlmError(f"{folder} has neither {SINGLE} nor {INDEX}; copy the weights into it")


def _shards(index: Path) -> list[Path]:
    """List the files that an index names, each a plain name inside the index's own folder.

    The name is what is checked; `links` sees to it where a file by that name may lead.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NpvlmError(f"{index} has no weight_map, which says the file of each tensor")
    shards = []
    for shard in dict.fromkeys(map(json.dumps, weight_map.values())):
        name = json.loads(shard)
        if not isinstance(name, str) or not name.endswith(".safetensors") or not is_plain(name):
            raise NpvlmError(
                f"{index} names the file {shard[:80]}, "
                "expected the plain name of a .safetensors file in the same folder"
            )
        shards.append(index.parent / name)
    missing = [file.name for file in shards if not file.exists()]
    if missing:
        raise NpvlmError(
            f"{index} names {len(shards)} files and {len(missing)} of them are missing: "
            f"{listed(missing)}; copy them into {index.parent}"
        )
    return shards


def is_plain(name: str) -> bool:
    """Tell whether a name can only mean a file in the folder at hand, on any system."""
    outside = any(c in "/\\:" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name)
    return not outside and len(name.encode()) <= _LONGEST_NAME


def read_header(file: Path) -> list[Stored]:
    """Let safetensors check a file, then say where its tensors lie."""
    if not file.is_file():
        raise NpvlmError(f"{file} is no regular file; copy the checkpoint again")
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
            if start == _POINTER:
                raise NpvlmError(
                    f"{file} is a pointer of git LFS; fetch the file with git lfs pull"
                )
            (length,) = struct.unpack("<Q", start[:8])
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes, expected {_LARGEST_HEADER:,}")
            stream.seek(8)
            header = parse_json(stream.read(length))
        with safe_open(file, framework="numpy"):
            pass
        data = np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        raise NpvlmError(f"{file} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RecursionError, struct.error) as error:
        raise NpvlmError(
            f"{file} is no whole safetensors file ({why(error)}); copy it again"
        ) from None
    header.pop("__metadata__", None)
    return [
        Stored(
            file=file,
            name=name,
            data=data,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]


def _check(folder: Path, stored: dict[str, Stored], expected: _Expected, config: Config) -> None:
    """Hold the tensors that are there against those that must be, in one message."""
    found = _differences(stored, expected)
    faults = [
        f"{len(names)} {kind} ({listed(grouped(names), _KINDS)})" for kind, names in found.said()
    ]
    if faults:
        hint = _hint(found.missing, found.unexpected, stored, expected, config)
        raise NpvlmError(f"{folder}: tensors do not fit config.json: {'; '.join(faults)}; {hint}")


def _differences(stored: Mapping[str, Stored], expected: _Expected) -> Differences:
    there = [name for name in expected if name in stored]
    misshapen = [name for name in there if stored[name].shape != expected[name][0]]
    unread = [name for name in there if stored[name].dtype not in expected[name][1]]
    return Differences(
        missing=[name for name in expected if name not in stored],
        unexpected=[stored[name].name for name in stored if name not in expected],
        misshapen={
            n: f" is {list(stored[n].shape)}, expected {list(expected[n][0])}" for n in misshapen
        },
        mistyped={n: f" is {stored[n].dtype}, expected {_either(expected[n][1])}" for n in unread},
    )


def _hint(
    missing: list[str],
    unexpected: list[str],
    stored: dict[str, Stored],
    expected: _Expected,
    config: Config,
) -> str:
    """Guess what went wrong, or say what to do when there is nothing to guess."""
    family = 2 if config.text_config.model_type == "gemma2" else 1
    norm = "pre_feedforward_layernorm.weight"
    if family == 1 and any(name.endswith(norm) for name in unexpected):
        return "is this a PaliGemma 2 checkpoint with the config.json of a PaliGemma 1?"
    if family == 2 and any(name.endswith(norm) for name in missing):
        return "is this a PaliGemma 1 checkpoint with the config.json of a PaliGemma 2?"
    if any(part in name for name in unexpected for part in ("lora_", "base_layer")):
        return (
            "an adapter lies among these weights: let PEFT save it alone, and name it with "
            "--adapter beside its base"
        )
    if config.quantization:
        return "config.json says that the weights are packed: convert the original folder again"
    if any(name.endswith((".SCB", ".absmax", "_scale", ".qweight")) for name in unexpected):
        return "the weights are packed: take the float32, float16 or bfloat16 files"
    if any(canonical_name(name).startswith(PROJECTION) for name in unexpected):
        return "a ColPali's projection beside the config.json of a PaliGemma: take its own"
    if POSITIONS in stored and stored[POSITIONS].shape != expected[POSITIONS][0]:
        return (
            "was the model made for pictures of another size than image_size says? "
            "`npvlm convert SRC DST --image-size N` makes positions for N pixels"
        )
    return "do config.json and the weights come from the same model?"


def _twice(first: Stored, second: Stored) -> NpvlmError:
    """Refuse a tensor that is there twice: which of the two counts is anyone's guess."""
    here = f"{shortened(first.name, _NAMED)} in {first.file}"
    there = f"{shortened(second.name, _NAMED)} in {second.file.name}"
    return NpvlmError(f"{here} and {there} are the same tensor, expected one; remove the other")


def grouped(names: Mapping[str, str]) -> list[str]:
    """Name all tensors, each with what is said of it; those of several layers share a name."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name, says in names.items():
        found = _NUMBER.search(name)
        pattern = _NUMBER.sub("*", shortened(name, _NAMED), count=1)
        numbers.setdefault((pattern, says), []).extend([int(found[0])] if found else [])
    return [pattern.replace("*", _ranges(at), 1) + says for (pattern, says), at in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """Write numbers as {0-3,5}, one alone as it is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)
    return said if len(numbers) < 2 else f"{{{said}}}"


def listed(names: Iterable[str], most: int = _LISTED) -> str:
    """Join names, the first few of them when they are many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _either(words: tuple[str, ...]) -> str:
    """Join alternatives: A, B or C."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
