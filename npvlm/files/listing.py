"""The pictures that people name on a command line: files, folders, and globs left unexpanded."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from npvlm.errors import NpvlmError
from npvlm.files.pictures import FORMATS, said_name


def list_pictures(names: Sequence[str | Path]) -> list[Path]:
    """Find the pictures that are named, in the order of the names, each once.

    Parameters
    ----------
    names : files, taken as they are; folders, for all pictures in and below them, by the ends of
        their names and in the order of their paths, without hidden ones; and patterns such as
        "photos/*.jpg", with ** for any folders, for all files that match and are not hidden

    Returns
    -------
    Paths that begin as the names do.

    Raises
    ------
    NpvlmError
        For a name that names nothing, or a folder without pictures.
    """
    found: dict[Path, Path] = {}
    for name in names:
        for path in _named(str(name)):
            found.setdefault(path.absolute(), path)
    return list(found.values())


def picture_suffixes() -> frozenset[str]:
    """The ends of the names of pictures that can be read, small letters, with their dot."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in FORMATS)


def _named(name: str) -> list[Path]:
    """What one name stands for."""
    if name and os.path.lexists(name):
        return _below(Path(name)) if Path(name).is_dir() else [Path(name)]
    if not glob.has_magic(name):
        said = said_name(name) or "an empty name"
        raise NpvlmError(f"{said} is no file or folder; is the path right?")
    matches = map(Path, glob.iglob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no root)
    files = sorted(match for match in matches if not match.is_dir())
    if not files:
        raise NpvlmError(f"{said_name(name)} matches no file; is the pattern right?")
    return files


def _below(folder: Path) -> list[Path]:
    """All pictures in and below a folder."""
    suffixes = picture_suffixes()
    found = sorted(p for p in _files(folder) if p.suffix.lower() in suffixes or p.is_dir())
    if not found:
        said = said_name(folder)
        raise NpvlmError(f"{said} holds no picture; name its files if they end otherwise.")
    return found


def _files(folder: Path) -> Iterator[Path]:
    """All files in and below a folder that are not hidden; links to folders are not followed.

    A folder that cannot be read stands for itself: whoever opens it is told why.
    """
    closed: list[str] = []
    for at, folders, files in os.walk(folder, onerror=lambda error: closed.append(error.filename)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(at, name) for name in files if not name.startswith("."))
    yield from map(Path, closed)
