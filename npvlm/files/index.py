"""An index of pages: the vectors of each, mapped from one safetensors file, and what they are of.

Axis letters: N pages · S vectors of a page · E width of a vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from npvlm.errors import NpvlmError
from npvlm.files.checkpoint import checkpoint_files, read_header
from npvlm.files.names import canonical_name
from npvlm.files.writer import Tensor, tensor_file
from npvlm.model.weights import Array, Int8, Weight, pack_int8, rotation_block, unpack

PART = ".part"  # behind the name of an index that is not whole yet
STORES = {"float32": "F32", "float16": "F16", "int8": "I8"}
_FORMAT, _VERSION = "npvlm index", "1"
_SETTINGS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "added_tokens.json",
)
_SAMPLE = 4096  # bytes of each weight that tell it from another model's


@dataclass(frozen=True)
class Origin:
    """What an index's vectors come from; a query's have to come from the same.

    model : as it was named
    fingerprint : of its weights, see `fingerprint`
    precision : that pages were read with
    store : how vectors are kept, one of STORES
    size, width : vectors of a page, and numbers of a vector
    """

    model: str
    fingerprint: str
    precision: str
    store: str
    size: int
    width: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept of one page."""
        if self.store != "int8":
            return {"vectors": Tensor(STORES[self.store], (self.size, self.width))}
        padded = self.width + -self.width % rotation_block(self.width, Int8.smallest_block)
        vectors = Tensor(STORES[self.store], (self.size, padded))
        return {"vectors": vectors, "scales": Tensor("F32", (self.size,))}


@dataclass(frozen=True)
class Page:
    """One page of an index: its picture's path, size in pixels, and bytes of the file."""

    path: str
    width: int
    height: int
    bytes: int


@dataclass(frozen=True, eq=False)
class PageIndex:
    """An opened index. Vectors are read where they are mapped, when they are needed."""

    file: Path
    origin: Origin
    pages: list[Page]
    parts: dict[str, Array]  # vectors [N, S, E], and scales [N, S] with int8

    def rows(self, first: int, beyond: int) -> Weight:
        """The vectors of pages `first` up to, not including, `beyond`, end to end."""
        vectors = self.parts["vectors"][first:beyond]
        flat = vectors.reshape(-1, vectors.shape[-1])
        if "scales" not in self.parts:
            return flat
        return Int8(flat, self.parts["scales"][first:beyond].reshape(-1), self.origin.width)

    def vectors(self, number: int) -> NDArray[np.float32]:
        """The vectors of one page [S, E]."""
        return unpack(self.rows(number, number + 1), np.float32)

    def stored(self, number: int) -> dict[str, Array]:
        """What is kept of one page, by the name of its tensor."""
        return {name: part[number] for name, part in self.parts.items()}


def pack(vectors: NDArray[np.float32], store: str) -> dict[str, Array]:
    """The vectors of a page [S, E] as an index keeps them."""
    if store == "int8":
        packed = pack_int8(vectors)
        return {"vectors": packed.values, "scales": packed.scales}
    return {"vectors": vectors.astype(np.dtype(store))}


def write_index(
    file: Path, origin: Origin, pages: Sequence[Page], stored: Iterable[Mapping[str, Array]]
) -> None:
    """Write an index; what is kept of each page is taken as it comes, one page at a time."""
    whole = {
        name: Tensor(part.dtype, (len(pages), *part.shape)) for name, part in origin.tensors.items()
    }
    about = {"format": _FORMAT, "version": _VERSION}
    about |= {"origin": json.dumps(asdict(origin)), "pages": json.dumps([*map(asdict, pages)])}
    with tensor_file(file, whole, about) as output:
        for number, parts in enumerate(stored):
            for name, part in parts.items():
                output.write_rows(name, number, part)


def _has_its_types(about: Origin | Page) -> bool:
    """Whether every field is what its class says: JSON may hold anything."""
    kinds = {"str": str, "int": int}
    return all(type(getattr(about, f.name)) is kinds[str(f.type)] for f in fields(about))


def open_index(file: Path) -> PageIndex:
    """Map an index.

    Raises
    ------
    NpvlmError
        Where it is not there, no index, damaged, or without pages.
    """
    part = file if file.suffix == PART else file.with_name(f"{file.name}{PART}")
    if part.exists() and (part == file or not file.exists()):
        raise NpvlmError(f"{file} is not whole yet; `npvlm embed` with --resume goes on.")
    if not file.exists():
        raise NpvlmError(f"{file} is not there; `npvlm embed PAGES... -o {file}` makes an index.")
    try:
        tensors = {tensor.name: tensor for tensor in read_header(file)}
    except NpvlmError:
        raise NpvlmError(
            f"{file} is no whole index, expected one that `npvlm embed` made."
        ) from None
    with safe_open(file, framework="numpy") as opened:
        about = opened.metadata() or {}
    if about.get("format") != _FORMAT:
        raise NpvlmError(f"{file} is no index of pages, expected one that `npvlm embed` made.")
    if about.get("version") != _VERSION:
        raise NpvlmError(
            f"{file} is an index of version {about.get('version')}, expected {_VERSION}; embed the "
            "pages again with this npvlm."
        )
    try:
        origin = Origin(**json.loads(about["origin"]))
        pages = [Page(**page) for page in json.loads(about["pages"])]
        if not _has_its_types(origin) or not all(_has_its_types(page) for page in pages):
            raise TypeError
        expected = {
            name: (part.dtype, (len(pages), *part.shape)) for name, part in origin.tensors.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        expected = {}
    if {name: (t.dtype, t.shape) for name, t in tensors.items()} != expected:
        raise NpvlmError(f"{file} is a damaged index: embed the pages again.")
    if not pages:
        raise NpvlmError(f"{file} holds no page; embed some.")
    return PageIndex(file, origin, pages, {name: t.array() for name, t in tensors.items()})


def fingerprint(folder: Path) -> str:
    """What tells a model from every other: a checksum of its settings and a part of each weight.

    Fine-tuning moves all weights, so a few thousand bytes of each tell models apart, and a 3B's are
    read in moments. The spelling of names and how weights are split into files do not matter.
    """
    stored = {canonical_name(t.name): t for f in checkpoint_files(folder) for t in read_header(f)}
    digest = hashlib.sha256()
    for path in (folder / name for name in _SETTINGS):
        digest.update(path.read_bytes() if path.is_file() else b"none")
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        middle = tensor.offset + tensor.nbytes // 2
        for start in (tensor.offset, middle):
            beyond = min(start + _SAMPLE, tensor.offset + tensor.nbytes)
            digest.update(tensor.data[start:beyond].tobytes())
    return digest.hexdigest()
