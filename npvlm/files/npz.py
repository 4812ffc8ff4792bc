"""The arrays of an .npz file, viewed where they lie: nothing is unpickled, nothing is read whole.

An .npz is a zip of .npy files, stored as they are unless they were compressed. zipfile reads the
zip's directory and NumPy the head of each array, which it takes for a literal and never runs.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from npvlm.errors import NpvlmError
from npvlm.model.weights import Array

LARGEST_UNPACKED = 2**28  # bytes of a compressed array, which has to be unpacked in memory
_HEAD = 2**14  # bytes that hold the head of any array that NumPy would read
_LOCAL = struct.Struct("<4s22xHH")  # what a member begins with: mark, lengths of name and extra
_CHUNK = 2**20
_LONGEST_NAME = 500


class Npz:
    """An opened .npz file: the names of its arrays, and each as an array of its own.

    Raises
    ------
    NpvlmError
        No such file, or no zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise NpvlmError(f"{path} cannot be read: {error.strerror or error}.") from None
        except Exception as error:  # a damaged archive makes its reader raise nearly anything
            raise self._damaged(error) from None
        self._members = {m.filename.replace("\\", "/").removesuffix(".npy"): m for m in members}
        if len(self._members) < len(members):
            raise NpvlmError(f"{path} has two arrays of one name, expected one; copy it again.")
        if not all(name.isprintable() and len(name) <= _LONGEST_NAME for name in self._members):
            raise NpvlmError(f"{path} has an array whose name is none that could be printed.")

    @property
    def names(self) -> list[str]:
        """The arrays, in the order of the file, with slashes between the parts of a name."""
        return list(self._members)

    def array(self, name: str) -> Array:
        """View an array, whatever its type, or unpack a small one that is compressed.

        Raises
        ------
        NpvlmError
            For Python objects, a member that is no array or is not all there, an encrypted one, or
            a large one that is compressed.
        """
        member = self._members[name]
        if member.flag_bits & 1:
            raise NpvlmError(f"{self.path}: {name} is encrypted, expected a plain array.")
        try:
            stored = member.compress_type == zipfile.ZIP_STORED
            content = self._stored(member) if stored else self._unpacked(name, member)
            return _array(content)
        except NpvlmError:
            raise
        except Exception as error:
            raise self._damaged(error, name) from None

    def check(self, names: Iterable[str]) -> None:
        """Read arrays once, a little at a time, and hold them against the sums in the file.

        Raises
        ------
        NpvlmError
            For one that is not what was written.
        """
        for name in names:
            try:
                with zipfile.ZipFile(self.path) as archive, archive.open(self._members[name]) as f:
                    while f.read(_CHUNK):
                        pass
            except Exception as error:
                raise self._damaged(error, name) from None

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
        with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
            content = np.frombuffer(file.read(member.file_size), np.uint8)
        if len(content) < member.file_size:
            raise ValueError("it ends early")
        return content

    def _damaged(self, error: Exception, name: str | None = None) -> NpvlmError:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        if name is None:
            return NpvlmError(f"{self.path} is no .npz file ({reason}); copy it again.")
        return NpvlmError(f"{self.path}: {name} cannot be read ({reason}); copy the file again.")


def _array(content: Array) -> Array:
    """View the bytes of an .npy file as its array.

    content [N] uint8 -> of the file's type and shape
    """
    head = io.BytesIO(content[:_HEAD].tobytes())
    version = np.lib.format.read_magic(head)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(head)
    else:
        raise ValueError(f"version {version[0]}.{version[1]} of .npy")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickled")
    body = content[head.tell() :]
    if min(shape, default=0) < 0 or len(body) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(body)} bytes are no {dtype} {list(shape)}")
    return np.ndarray(shape, dtype, body, order="F" if fortran else "C")
