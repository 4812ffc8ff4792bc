"""An index in the making: pages are added to a file one by one, safe against a kill at any moment.

The first line says where the vectors come from. Each page is a line about it, with a checksum of
the bytes behind it, which are what an index keeps. What a kill leaves at the end is dropped.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from io import FileIO
from pathlib import Path

import numpy as np

from npvlm.errors import UsageError
from npvlm.files.index import Origin, Page
from npvlm.model.weights import Array
from npvlm.work.batch_output import lock, said

_DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
_LONGEST = 2**16  # bytes of a line; no path is as long


class Draft:
    """The file; `pages` are those it holds, in order, each with the place of its bytes."""

    def __init__(self, path: Path, file: FileIO, origin: Origin) -> None:
        self._path, self._file, self._origin = path, file, origin
        self._bytes = sum(tensor.bytes for tensor in origin.tensors.values())
        self.pages: dict[str, tuple[Page, int]] = {}

    def read(self) -> None:
        """Find the pages there are; what stands behind the last whole one is dropped."""
        first = json.dumps(asdict(self._origin)).encode() + b"\n"
        self._file.seek(0)
        found = self._file.read(len(first))
        if not first.startswith(found):
            raise UsageError(
                f"{self._path} was begun with another model, precision or --store, or is something "
                "else; go on with the same, or remove it."
            )
        if found != first:  # nothing, or the beginning of the first line
            self._file.truncate(0)
            self._write(first)
        whole = len(first)
        while (page := self._page()) is not None:
            self.pages[page.path] = page, self._file.tell() - self._bytes
            whole = self._file.tell()
        self._file.truncate(whole)

    def append(self, page: Page, parts: Mapping[str, Array]) -> None:
        """Add a page and have the disk hold it; a page of the same path counts no more."""
        content = b"".join(parts[name].tobytes() for name in self._origin.tensors)
        line = json.dumps({**asdict(page), "crc32": zlib.crc32(content)}).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        self._write(line + content)
        self.pages[page.path] = page, end + len(line)

    def stored(self, path: str) -> dict[str, Array]:
        """What is kept of a page, by the name of its tensor."""
        self._file.seek(self.pages[path][1])
        parts = {}
        for name, tensor in self._origin.tensors.items():
            values = np.frombuffer(self._file.read(tensor.bytes), _DTYPES[tensor.dtype])
            parts[name] = values.reshape(tensor.shape)
        return parts

    def _page(self) -> Page | None:
        """The next page, read to the end of its bytes; None where it is not whole."""
        at = self._file.tell()
        line, end, _ = self._file.read(_LONGEST).partition(b"\n")
        self._file.seek(at + len(line) + len(end))
        content = self._file.read(self._bytes)
        try:
            about = json.loads(line)
            whole = about.pop("crc32") == zlib.crc32(content) and len(content) == self._bytes
            return Page(**about) if whole else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        with said(self._path, "make room and go on with --resume"):
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())


@contextmanager
def open_draft(path: Path, origin: Origin) -> Iterator[Draft]:
    """Open the file to go on with, or a new one; no other process may write it meanwhile.

    Raises
    ------
    UsageError
        Where it was begun with another model, or another process is writing it.
    NpvlmError
        Where it cannot be read or written.
    """
    with said(path, "name another place"):
        file = path.open("a+b", buffering=0)
    with file:
        with said(path, "name another place"):
            lock(file, path)
            draft = Draft(path, file, origin)
            draft.read()
        yield draft
