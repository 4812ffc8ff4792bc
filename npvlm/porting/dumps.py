"""Dumps on disk: the stages of a run, ours with a manifest, a port's in whatever form it has.

Ours come in three forms with the same manifest: a safetensors file with X.json beside it; raw
numbers, X.bin with X.json beside it; a folder of .npy files with manifest.json in it. A compact
one is the manifest alone.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.config import LARGEST_JSON, parse_json, read_json, read_small
from npvlm.errors import NpvlmError, UsageError, why
from npvlm.files.checkpoint import read_header
from npvlm.files.links import refuse_links_out
from npvlm.files.npz import Npz
from npvlm.files.output import check_new, expanded, new_file, new_folder, place_of
from npvlm.model.weights import Array
from npvlm.porting.stages import SCHEMA
from npvlm.porting.statistics import BUCKETS, describe
from npvlm.porting.trace import Trace

MANIFEST = "manifest.json"
# How each type is called in safetensors and in manifests, and read as bytes: little-endian.
TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
LARGEST = 1e100  # number in a manifest: squares of such can still be added up
NAMES = {np.dtype(kind): name for name, kind in TYPES.items() if name != "BF16"}


@dataclass(frozen=True, eq=False)
class Dump:
    """The named arrays of a run, read when asked for, and what a manifest says of them.

    path : where it came from
    dtypes : of each array, as safetensors calls it ("BF16" for one that is read as float32)
    read : gives the array of a name
    manifest : of a trace that npvlm wrote, else None
    """

    path: Path
    dtypes: Mapping[str, str]
    read: Callable[[str], Array]
    manifest: dict[str, Any] | None

    def described(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of each stage, by name."""
        if self.manifest is None:
            return {}
        return {entry["name"]: entry for entry in self.manifest["stages"]}


def manifest(trace: Trace, floors: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What is written beside the arrays: the run as a whole, then each stage."""
    stages = [
        {"name": name, **describe(value), "source": trace.sources[name]}
        | ({"floors": dict(floors[name])} if name in floors else {})
        for name, value in trace.stages.items()
    ]
    return {**trace.facts, "stages": stages}


def check_place(path: Path, compact: bool) -> None:
    """Refuse a place that a trace cannot be saved at, before anything is run for it.

    Raises
    ------
    UsageError
        For a form that does not fit, a folder that is there, or none around it.
    """
    path = expanded(path)
    if compact != (path.suffix == ".json"):
        raise UsageError(
            f"{path}: a compact trace is one .json, and only that; name such a file with --compact."
        )
    if path.suffix not in (".json", ".safetensors", ".bin"):
        check_new(place_of(path))
    elif not place_of(path).parent.is_dir():
        raise UsageError(f"{path.parent} is no folder; make it first.")
    elif path.suffix != ".json" and not path.exists() and path.with_suffix(".json").exists():
        raise UsageError(
            f"{path.with_suffix('.json')} is there already, of something else than {path.name}; "
            "name another file, as the manifest would take its place."
        )
    elif path.exists() and not _is_manifest(path.with_suffix(".json")):
        raise UsageError(f"{path} is there already, and no trace; name another file.")


def _is_manifest(path: Path) -> bool:
    """Whether a file is there that looks like the manifest of a trace."""
    return path.is_file() and b'"stages": [' in path.read_bytes()


def save_trace(
    trace: Trace, path: Path, floors: Mapping[str, Mapping[str, float]], *, compact: bool = False
) -> None:
    """Write a trace whole or not at all.

    Parameters
    ----------
    trace : Trace
    path : what it ends in says the form: .safetensors or .bin with a .json beside it; .json for a
        compact one; anything else is a new folder of .npy files
    floors : for each stage the error that each precision cannot avoid (`floors.floors`)
    compact : the manifest alone

    Raises
    ------
    UsageError
        As `check_place` does.
    NpvlmError
        Where it cannot be written.
    """
    check_place(path, compact)
    path, notes = expanded(path), manifest(trace, floors)
    if compact:
        with new_file(path) as draft:
            draft.write_text(_json(notes))
    elif path.suffix in (".safetensors", ".bin"):
        write = _write_safetensors if path.suffix == ".safetensors" else _write_raw
        with new_file(path.with_suffix(".json")) as beside, new_file(path) as draft:
            write(draft, trace.stages, notes)
            beside.write_text(_json(notes))
    else:
        with new_folder(path) as folder:
            for name, value in trace.stages.items():
                np.save(folder / f"{name}.npy", np.ascontiguousarray(value))
            (folder / MANIFEST).write_text(_json(notes))


def _json(notes: dict[str, Any]) -> str:
    """JSON with a line for each stage."""
    head = {name: value for name, value in notes.items() if name != "stages"}
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2]
    rows = ",\n  ".join(json.dumps(stage, separators=(",", ":")) for stage in notes["stages"])
    return f'{text},\n "stages": [\n  {rows}\n ]\n}}\n'


def _write_safetensors(path: Path, stages: Mapping[str, Array], notes: dict[str, Any]) -> None:
    header: dict[str, Any] = {"__metadata__": {"npvlm.schema": str(SCHEMA)}}
    end = 0
    for name, value in stages.items():
        start, end = end, end + value.nbytes
        kind = NAMES[value.dtype]
        header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in stages.values():
            file.write(_plain(value).data)


def _write_raw(path: Path, stages: Mapping[str, Array], notes: dict[str, Any]) -> None:
    """Numbers behind one another; the notes say from which byte on each stage's are."""
    end = 0
    with path.open("wb") as file:
        for entry, value in zip(notes["stages"], stages.values(), strict=True):
            entry["offset"], entry["bytes"] = end, value.nbytes
            file.write(_plain(value).data)
            end += value.nbytes


def _plain(value: Array) -> Array:
    """The numbers as they lie in a file: little-endian, C order."""
    return np.ascontiguousarray(value, value.dtype.newbyteorder("<"))


def open_dump(path: Path) -> Dump:
    """Open a dump in any form: .safetensors, .npz, .bin with .json, .json, or a folder of .npy.

    Raises
    ------
    NpvlmError
        Where it is not there, is damaged, or holds something else than named arrays of numbers.
    """
    path = path.expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise NpvlmError(f"{path} is not there, expected a dump: a file or a folder of .npy files.")
    forms = {".safetensors": _open_safetensors, ".npz": _open_npz, ".bin": _open_raw}
    if path.suffix == ".json":
        notes = _read_manifest(path)
        return Dump(path, {}, _no_array, notes)
    if path.suffix not in forms:
        raise NpvlmError(
            f"{path} is no dump, expected .safetensors, .npz, .bin with its .json, .json, or a "
            "folder of .npy files."
        )
    with _readable(path):
        dump = forms[path.suffix](path)

    def read(name: str) -> Array:
        with _readable(path):
            return dump.read(name)

    return replace(dump, read=read)


def _no_array(name: str) -> Array:
    raise KeyError(name)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file is one sentence."""
    try:
        yield
    except NpvlmError:
        raise
    except Exception as error:  # a damaged file makes its readers raise nearly anything
        raise NpvlmError(f"{path} cannot be read ({why(error)}); write it anew.") from error


def _open_safetensors(path: Path) -> Dump:
    stored = {tensor.name: tensor for tensor in read_header(path)}
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    for name, kind in dtypes.items():
        if kind not in TYPES:
            raise ValueError(f"{name} is {kind}, expected one of {', '.join(TYPES)}")

    def read(name: str) -> Array:
        tensor = stored[name]
        return _numbers(tensor.bytes(), tensor.dtype, tensor.shape)

    notes = _manifest_beside(path.with_suffix(".json"))
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return _described(Dump(path, dtypes, read, notes), shapes)


def _open_npz(path: Path) -> Dump:
    npz = Npz(path)
    dtypes = {name: _type(name, npz.head(name).dtype) for name in npz.names}

    def read(name: str) -> Array:
        npz.check([name])
        return npz.array(name)

    return Dump(path, dtypes, read, None)


def _open_folder(path: Path) -> Dump:
    files = {file.stem: file for file in sorted(path.glob("*.npy"))}
    if not files:
        raise NpvlmError(f"{path} holds no .npy file, expected one for each stage.")
    refuse_links_out(path)
    arrays, dtypes = {}, {}
    for name, file in files.items():
        try:
            arrays[name] = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # a damaged header makes its reader raise nearly anything
            raise NpvlmError(
                f"{file} cannot be read as .npy: its header is not as NumPy writes it, or the "
                "numbers are cut off; write it anew."
            ) from error
        with _readable(file):
            dtypes[name] = _type(name, arrays[name].dtype)
    notes = _manifest_beside(path / MANIFEST)
    dump = Dump(path, dtypes, lambda name: np.asarray(arrays[name]), notes)
    return _described(dump, {name: value.shape for name, value in arrays.items()})


def _open_raw(path: Path) -> Dump:
    """Raw numbers; the .json has a list "stages" of name, dtype, shape and offset, in bytes."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise NpvlmError(
            f"{path} has no {beside.name} beside it, expected one that lists the name, dtype, "
            "shape and offset of each stage."
        )
    notes = read_json(beside)
    data = np.memmap(path, np.uint8, "r")
    entries = _entries(beside, notes)
    dtypes = {name: entry["dtype"] for name, entry in entries.items()}

    def read(name: str) -> Array:
        entry = entries[name]
        kind = np.dtype(TYPES[dtypes[name]])
        begin = entry["offset"]
        end = begin + kind.itemsize * math.prod(entry["shape"])
        if not 0 <= begin <= end <= len(data):
            raise NpvlmError(
                f"{path}: {name} ends at byte {end:,}, but the file has {len(data):,}; is the "
                f"offset or the shape in {beside.name} wrong?"
            )
        return _numbers(data[begin:end], dtypes[name], entry["shape"])

    own = notes.get("schema") == SCHEMA
    if own:
        _check_manifest(beside, notes)
    return Dump(path, dtypes, read, notes if own else None)


def _described(dump: Dump, shapes: Mapping[str, Sequence[int]]) -> Dump:
    """The same dump, if its manifest is of these arrays and not of another run's."""
    for name, entry in dump.described().items():
        if name in shapes and list(entry["shape"]) != list(shapes[name]):
            raise NpvlmError(
                f"{dump.path}: {name} is {list(shapes[name])}, but its manifest says "
                f"{entry['shape']}; they are of two runs: write the trace anew."
            )
    return dump


def _entries(beside: Path, notes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arrays that a .json lists for a .bin, by name, each with all that reading it takes."""
    stages = notes.get("stages")
    if not isinstance(stages, list):
        raise NpvlmError(f'{beside} has no list "stages", expected name, dtype, shape and offset.')
    entries = {}
    for number, entry in enumerate(stages):
        given = entry if isinstance(entry, dict) else {}
        name, shape = given.get("name"), given.get("shape")
        said = f"{beside}: entry {number} of stages" + (f", {name!r}," if name else "")
        sides = shape if isinstance(shape, list) else [None]
        if not isinstance(name, str):
            raise NpvlmError(f"{said} has no name, expected the name of a stage.")
        if given.get("dtype") not in TYPES:
            kinds = ", ".join(TYPES)
            raise NpvlmError(f"{said} has dtype {given.get('dtype')!r}, expected one of {kinds}.")
        if not all(type(side) is int and side >= 0 for side in sides):
            raise NpvlmError(f"{said} has shape {shape!r}, expected a list of whole numbers.")
        if type(given.get("offset")) is not int:
            raise NpvlmError(
                f"{said} has offset {given.get('offset')!r}, expected the byte at which it begins."
            )
        if name in entries:
            raise NpvlmError(f"{said} is there twice, expected each stage once.")
        entries[name] = given
    return entries


def _type(name: str, dtype: np.dtype[Any]) -> str:
    """What safetensors calls the type of an array of numbers."""
    kind = NAMES.get(dtype.newbyteorder("<"))
    if kind is None:
        raise ValueError(f"{name} is {dtype}, expected numbers")
    return kind


def _numbers(data: Array, kind: str, shape: Sequence[int]) -> Array:
    """Bytes as numbers; bfloat16, which NumPy has not, as float32."""
    values = np.ndarray(tuple(shape), np.dtype(TYPES[kind]), data.tobytes())
    if kind == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def _read_manifest(path: Path) -> dict[str, Any]:
    notes = read_json(path)
    if notes.get("schema") != SCHEMA or not isinstance(notes.get("stages"), list):
        raise NpvlmError(
            f"{path} is no manifest of schema {SCHEMA}, expected one that `npvlm trace --save` "
            "wrote."
        )
    _check_manifest(path, notes)
    return notes


def _manifest_beside(path: Path) -> dict[str, Any] | None:
    """The manifest that lies beside arrays; None where there is none, or a file of another kind."""
    if not path.is_file():
        return None
    try:
        notes = parse_json(read_small(path, LARGEST_JSON))
    except (NpvlmError, ValueError, RecursionError):
        return None
    if not isinstance(notes, dict) or notes.get("schema") != SCHEMA or "config" not in notes:
        return None
    return _read_manifest(path)


def _check_manifest(path: Path, notes: Mapping[str, Any]) -> None:
    """Refuse a manifest in which something that is read later is missing or of another kind."""

    def refuse(what: str, expected: str) -> None:
        raise NpvlmError(f"{path}: {what}, expected {expected}; write the trace anew.")

    for key, kind, expected in (
        ("config", dict, "that of the model's config.json"),
        ("model", str, "the model's name"),
        ("step", int, "the number of the call"),
        ("answer", list, "the ids before the call"),
        ("ids", list, "those of picture and prompt"),
    ):
        if not isinstance(notes.get(key), kind):
            refuse(f"{key} is {notes.get(key)!r:.60}", expected)
    if not isinstance(notes.get("image") or {}, dict):
        refuse(f"image is {notes['image']!r:.60}", "what is said of the picture")
    if not all(type(number) is int for number in (*notes["ids"], *notes["answer"])):
        refuse("ids and answer hold something else", "whole numbers")
    seen: set[str] = set()
    for number, entry in enumerate(notes["stages"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            refuse(f"stage {number} has no name", "one")
        name, shape = entry["name"], entry.get("shape")
        if name in seen:
            refuse(f"{name!r:.60} is there twice", "each stage once")
        seen.add(name)
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            refuse(f"{name} has shape {shape!r:.60}", "a list of whole numbers")
        if not _is_size(entry.get("rms")):
            refuse(f"{name} has rms {entry.get('rms')!r:.60}", "a number of 0 or more")
        sketch = entry.get("sketch")
        if not isinstance(sketch, list) or len(sketch) != BUCKETS or not all(map(_is_real, sketch)):
            refuse(f"{name} has no whole sketch", f"a list of {BUCKETS} numbers")
        floors = entry.get("floors", {})
        if not isinstance(floors, dict) or not all(map(_is_size, floors.values())):
            refuse(f"{name} has floors {floors!r:.60}", "a number of 0 or more for each precision")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _is_size(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= LARGEST
