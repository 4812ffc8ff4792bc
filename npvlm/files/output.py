"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from npvlm.errors import NpvlmError, UsageError


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises
    ------
    UsageError
        For a name that does not end in .png.
    NpvlmError
        Where it cannot be written; nothing is left behind then.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} is no name for the picture, expected one that ends in .png.")
    with new_file(path) as draft:
        picture.save(draft, "PNG")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write that takes its place once the block has ended without an error.

    Until then it lies beside its place under another name. A link is followed to what it names.

    Raises
    ------
    NpvlmError
        Where it cannot be written; nothing is left behind then.
    """
    path = path.expanduser().resolve()
    if path.exists() and not path.is_file():
        raise NpvlmError(f"{path} is no regular file, expected a place for one.")
    draft = None
    try:
        handle, draft = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
        os.close(handle)
        yield Path(draft)
        Path(draft).chmod(0o666 & ~_umask())
        Path(draft).replace(path)
        draft = None
    except OSError as error:
        reason = error.strerror or str(error)
        raise NpvlmError(f"{path}: cannot be written ({reason}); name another place.") from error
    finally:
        if draft is not None:
            Path(draft).unlink()


def check_place(path: Path) -> None:
    """See before the work whether a file can be written, as far as that can be told.

    Raises
    ------
    UsageError
        Where there is no folder around it.
    NpvlmError
        Where it may not be written.
    """
    path = path.expanduser().resolve()
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder; make it first.")
    if path.exists() and not path.is_file():
        raise NpvlmError(f"{path} is no regular file, expected a place for one.")
    if not os.access(path.parent, os.W_OK):
        raise NpvlmError(f"{path.parent} may not be written to; name another place.")


def check_new(folder: Path) -> None:
    """Refuse a place where something is already, or around which there is no folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} is there already, expected a new or an empty folder.")
    if not folder.parent.is_dir():
        raise UsageError(f"{folder.parent} is no folder; make it first.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its place once the block has ended without an error.

    Until then it lies in a hidden folder beside its place, which is removed whatever happens.

    Raises
    ------
    UsageError
        Where something is there already, or the folder around it is not.
    NpvlmError
        Where it cannot be written.
    """
    folder = folder.expanduser().resolve()
    check_new(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as hidden:
            draft = Path(hidden) / folder.name
            draft.mkdir()
            yield draft
            draft.replace(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise NpvlmError(f"{folder}: cannot be written ({reason}); name another place.") from error


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
