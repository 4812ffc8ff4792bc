"""The arrays of an .npz file, viewed where they lie: nothing is unpickled, nothing is read whole.

An .npz is a zip of .npy files, stored as they are unless they were compressed. zipfile reads the
zip's directory and NumPy the head of each array, which it takes for a literal and never runs. NumPy
would make room for whatever a head promises, and zipfile inflate whatever a member holds: here a
head is held to the size that the directory says before anything behind it is read.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.errors import NpvlmError, why
from npvlm.model.weights import Array

LARGEST_UNPACKED = 2**30  # bytes of a compressed array, which has to be unpacked in memory
_HEAD = 2**14  # bytes that hold the head of any array that NumPy would read
_LOCAL = struct.Struct("<4s22xHH")  # what a member begins with: mark, lengths of name and extra
_CHUNK = 2**20
_LONGEST_NAME = 500
_BFLOAT16 = np.dtype("V2")  # how NumPy saves the bits of a type that it has not


@dataclass(frozen=True)
class Head:
    """What stands in front of an array's numbers, and its bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    by_columns: bool
    nbytes: int


class Npz:
    """An opened .npz file: the names of its arrays, and each as an array of its own.

    Raises
    ------
    NpvlmError
        No such file, no zip, or one that has two arrays of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise NpvlmError(f"{path} cannot be read: {error.strerror or error}.") from None
        except Exception as error:  # a damaged archive makes its reader raise nearly anything
            raise NpvlmError(f"{path} is no .npz file ({why(error)}); copy it again.") from None
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._archive.infolist():
            name = member.filename.replace("\\", "/")
            if not name.endswith(".npy"):
                continue
            name = name.removesuffix(".npy")
            if not name.isprintable() or len(name) > _LONGEST_NAME:
                raise NpvlmError(f"{path} has an array whose name is none that could be printed.")
            if name in self._members:
                raise NpvlmError(f"{path}: {name} is there twice, expected one; copy it again.")
            self._members[name] = member

    @property
    def names(self) -> list[str]:
        """The arrays, in the order of the file, with slashes between the parts of a name."""
        return list(self._members)

    def head(self, name: str) -> Head:
        """Read what an array is, and see that its member has as many bytes as that takes.

        Raises
        ------
        NpvlmError
            For what is no array of numbers (bfloat16's bits are some), an encrypted member, or one
            that is packed as NumPy packs none.
        """
        member = self._members[name]
        with self._damage_in(name):
            if member.flag_bits & 1:
                raise ValueError("it is encrypted")
            if member.compress_type == zipfile.ZIP_STORED:
                start = self._stored(member)[:_HEAD].tobytes()
            elif member.compress_type == zipfile.ZIP_DEFLATED:
                with self._archive.open(member) as stream:
                    start = stream.read(min(_HEAD, member.file_size))
            else:
                raise ValueError("it is packed in a way that NumPy does not")
            head = _head(start, member.file_size)
        if head.dtype.kind not in "fiubc" and head.dtype != _BFLOAT16:
            kind = str(head.dtype)[:60]
            raise NpvlmError(f"{self.path}: {name} is {kind}, expected an array of numbers.")
        return head

    def array(self, name: str) -> Array:
        """View an array, or unpack a small one that is compressed.

        Raises
        ------
        NpvlmError
            As `head` does, for a member that is not all there, or a large one that is compressed.
        """
        head, member = self.head(name), self._members[name]
        with self._damage_in(name):
            if member.compress_type == zipfile.ZIP_STORED:
                content = self._stored(member)
            else:
                content = self._unpacked(name, member)
            numbers, by_columns = content[len(content) - head.nbytes :], head.by_columns
            return np.ndarray(head.shape, head.dtype, numbers, order="F" if by_columns else "C")

    def check(self, names: Iterable[str]) -> None:
        """Read arrays once, a little at a time, and hold them against the sums in the file.

        Raises
        ------
        NpvlmError
            As `head` does, or for an array that is not what was written.
        """
        for name in names:
            self.head(name)
            with self._damage_in(name), self._archive.open(self._members[name]) as stream:
                while stream.read(_CHUNK):
                    pass

    def _stored(self, member: zipfile.ZipInfo) -> Array:
        """The bytes of a member that is not compressed, as they lie in the file."""
        start, size = member.header_offset, member.file_size
        mark, name, extra = _LOCAL.unpack(self._data[start : start + _LOCAL.size].tobytes())
        start += _LOCAL.size + name + extra
        if mark != b"PK\x03\x04" or size != member.compress_size or start + size > len(self._data):
            raise ValueError("a member is not where it should be")
        return self._data[start : start + size]

    def _unpacked(self, name: str, member: zipfile.ZipInfo) -> Array:
        if member.file_size > LARGEST_UNPACKED:
            raise NpvlmError(
                f"{self.path}: {name} is compressed, expected an array that is stored as it is; "
                "unpack the file and pack it again with zip -0."
            )
        with self._archive.open(member) as stream:
            content = np.frombuffer(stream.read(member.file_size), np.uint8)
        if len(content) < member.file_size:
            raise ValueError("it ends early")
        return content

    @contextmanager
    def _damage_in(self, name: str) -> Iterator[None]:
        """Whatever is wrong with an array is one sentence."""
        try:
            yield
        except NpvlmError:
            raise
        except Exception as error:  # as above
            raise NpvlmError(
                f"{self.path}: {name} cannot be read ({why(error)}); copy the file again."
            ) from None


def _head(start: bytes, size: int) -> Head:
    """What the first bytes of an .npy file of a size say, if the rest of it may be that."""
    stream = io.BytesIO(start)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_2_0(stream)
    else:  # NumPy writes it for records alone
        raise ValueError(f"it is .npy of version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickled")
    nbytes = size - stream.tell()
    if min(shape, default=0) < 0 or nbytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"it has not the size that its shape {list(shape)[:9]} takes")
    return Head(dtype, shape, by_columns, nbytes)
