"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from PIL import Image
from safetensors import SafetensorError, safe_open

from npvlm.errors import NpvlmError, UsageError

_ROOM = 2**26  # bytes that are left for other files and for everyone else


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
    path = place_of(path)
    _check_regular(path)
    draft = path.with_name(f".{path.name[:40]}.{token_hex(4)}")
    try:
        draft.open("xb").close()
        yield draft
        draft.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise NpvlmError(f"{path}: cannot be written ({reason}); name another place.") from error
    finally:
        _remove(draft)


@contextmanager
def scratch_folder(inside: Path, prefix: str = "npvlm-") -> Iterator[Path]:
    """A folder for the time of a block, which is removed whatever happens but a kill."""
    folder = inside / f"{prefix}{token_hex(4)}"
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder)


def _remove(path: Path) -> None:
    """Remove a file or folder, if it is there; a signal meanwhile is raised when it is gone."""
    try:
        _remove_at_once(path)
    except BaseException:
        _remove_at_once(path)
        raise


def _remove_at_once(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # which leaves a file alone
    with suppress(OSError):
        path.unlink()


def expanded(path: Path) -> Path:
    """A name whose ~ is somebody's home; where there is nobody of that name, as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises)


def resolved(path: Path) -> Path:
    """Where links lead, as far as they lead anywhere."""
    return Path(os.path.realpath(path))  # Path.resolve raises


def place_of(path: Path) -> Path:
    """Where what has this name lies, or will."""
    return resolved(expanded(path))


def _check_regular(path: Path) -> None:
    if os.path.lexists(path) and not path.is_file():  # a link that is left leads in a circle
        raise NpvlmError(f"{path} is no regular file, expected a place for one.")


def check_place(path: Path) -> None:
    """See before the work whether a file can be written, as far as that can be told.

    Raises
    ------
    UsageError
        Where there is no folder around it.
    NpvlmError
        Where it may not be written.
    """
    path = place_of(path)
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder; make it first.")
    _check_regular(path)
    if not os.access(path.parent, os.W_OK):
        raise NpvlmError(f"{path.parent} may not be written to; name another place.")


def check_new(folder: Path) -> None:
    """Refuse a place where something is already, or around which there is no folder."""
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} is there already, expected a new or an empty folder.")
    if not folder.parent.is_dir():
        raise UsageError(f"{folder.parent} is no folder; make it first.")


def check_replaces(path: Path, kind: str) -> None:
    """Refuse a place where a file is that does not say to be of this kind, such as weights."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        with safe_open(path, framework="numpy") as file:
            found = (file.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        found = None
    if found != kind:
        raise UsageError(f"{path} is there already and something else; name another file.")


def disk_free(folder: Path) -> int:
    """Bytes that are free where a folder lies, or will."""
    folder = place_of(folder)
    return shutil.disk_usage(next(at for at in (folder, *folder.parents) if at.exists())).free


def check_room(folder: Path, needed: int, otherwise: str) -> None:
    """Refuse a folder whose disk has no room for so many bytes, and say what to do otherwise."""
    free = disk_free(folder)
    if free < needed + _ROOM:
        raise NpvlmError(
            f"{folder} has {free / 1e9:.1f} GB left, expected {needed / 1e9:.1f} GB; {otherwise}"
        )


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
    folder = place_of(folder)
    check_new(folder)
    try:
        with scratch_folder(folder.parent, f".{folder.name[:40]}.") as hidden:
            draft = hidden / folder.name
            draft.mkdir()
            yield draft
            draft.replace(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise NpvlmError(f"{folder}: cannot be written ({reason}); name another place.") from error
