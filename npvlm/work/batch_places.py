"""Where a batch may write: found out before the work, so that none of it is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from npvlm.errors import NpvlmError, UsageError
from npvlm.files.listing import picture_suffixes
from npvlm.files.output import resolved
from npvlm.work.batch_input import Item
from npvlm.work.contact_sheet import check_place


def check_places(
    output: Path, html: Path | None, inputs: Sequence[str], items: Sequence[Item]
) -> None:
    """Refuse places that cannot be written, or hold what is asked about.

    Parameters
    ----------
    output : where the records go
    html : where the contact sheet goes, if there is to be one
    inputs : the files, folders, patterns or list that were named
    items : the pictures that they stand for

    Raises
    ------
    UsageError
        Where there is no folder around a place, or it is an input, another place, or would be
        taken for a picture of an input folder.
    NpvlmError
        Where the system lets nobody write.
    """
    if str(output) == "-":
        raise UsageError("-o - is no file; records go to one, for --resume to go on with: name it.")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is no folder; make it first.")
    _check_apart(output, inputs, items)
    if output.suffix.lower() in (".csv", ".tsv"):
        raise UsageError(f"{output}: records are JSON, a line each; name a .jsonl, or a .parquet.")
    if output.suffix.lower() in picture_suffixes():
        for folder in _folders(inputs):
            if resolved(output).is_relative_to(folder):
                raise UsageError(f"{output} would be taken for a picture of {folder}; rename it.")
    _check_writable(output if output.exists() else output.parent)
    if html is None:
        return
    if any(item.stored for item in items):
        raise UsageError("--html shows pictures that are files; leave it out with a Parquet file.")
    if resolved(output).is_relative_to(resolved(html)):
        raise UsageError(f"{html} is the place of the records, too; name another for the sheet.")
    check_place(html, inputs)
    _check_apart(html, inputs, items)
    _check_writable(html.parent)


def _check_apart(place: Path, inputs: Sequence[str], items: Sequence[Item]) -> None:
    """Refuse to write over the list or a picture, whatever links lead there."""
    if not place.exists():
        return
    for path in (*map(Path, inputs), *(item.path for item in items)):
        if _is_same(place, path):
            raise UsageError(f"{place} is what is asked about; name another place to write to.")


def _is_same(place: Path, path: Path) -> bool:
    """Whether two names are of one file; one that is not there, or can be no name, is none."""
    try:
        return place.samefile(path)
    except (OSError, ValueError):
        return False


def _folders(inputs: Sequence[str]) -> Iterator[Path]:
    """The folders among what was named."""
    return (resolved(Path(name)) for name in inputs if Path(name).is_dir())


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise NpvlmError(f"{path} cannot be written (no permission); name another place.")
