"""Arrays out of .npz archives, each held to its header before it is read.

NumPy makes room for whatever a header promises, and inflates whatever an archive holds: a file of
a few kilobytes may ask for all the memory there is. Pickles are never read.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from npvlm.model.weights import Array

_SUFFIX = ".npy"
_PIECE = 2**20  # bytes inflated at a time


@dataclass(frozen=True)
class Member:
    """What the header of an array says."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    by_columns: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.dtype.itemsize * math.prod(self.shape)


def npz_members(path: Path) -> dict[str, Member]:
    """The arrays of an archive by name; no number is read.

    Raises
    ------
    Exception
        Nearly any, for a damaged archive; ValueError for one that is not what its headers say.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(_SUFFIX)
            if name == info.filename:
                continue
            if name in found:
                raise ValueError(f"{name[:80]!r} is there twice")
            with archive.open(info) as stream:
                found[name] = _header(stream, info)
    return found


def read_member(path: Path, name: str) -> Array:
    """One array of an archive; errors are those of `npz_members`."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name + _SUFFIX)
        with archive.open(info) as stream:
            member = _header(stream, info)
            raw = np.empty(member.nbytes, np.uint8)
            at = 0
            while at < len(raw):
                piece = stream.read(min(_PIECE, len(raw) - at))
                if not piece:
                    raise ValueError(f"{name[:80]!r} is cut off")
                raw[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                at += len(piece)
    return np.ndarray(member.shape, member.dtype, raw, order="F" if member.by_columns else "C")


def _header(stream: IO[bytes], info: zipfile.ZipInfo) -> Member:
    """Read an array's header, and hold it to the size that the archive says."""
    name = info.filename[:80]
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} is packed in a way that NumPy does not")
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_2_0(stream)
    else:  # NumPy writes it for records alone
        raise ValueError(f"{name!r} is .npy of version {version}, expected 1.0 or 2.0")
    if dtype.kind not in "fiubc":
        raise ValueError(f"{name!r} holds {dtype}, expected numbers")
    member = Member(dtype, shape, by_columns)
    if min(shape, default=0) < 0 or stream.tell() + member.nbytes != info.file_size:
        raise ValueError(f"{name!r} has not the size that its shape {list(shape)[:9]} takes")
    return member
