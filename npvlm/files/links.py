"""Links in a model's folder: a stranger's folder may not have npvlm open the user's other files."""

from __future__ import annotations

import os
from pathlib import Path

from npvlm.errors import NpvlmError
from npvlm.files.hub import cache_folder


def refuse_links_out(folder: Path) -> None:
    """Refuse a folder with a link to a file that lies elsewhere.

    Links inside the folder are followed, and those that the hub's tools make: from a snapshot to
    the blobs beside it, and from any folder to blobs in the hub's cache. A link that leads nowhere
    is told when it is opened.

    Raises
    ------
    NpvlmError
        For the first link that leads out.
    """
    for entry in sorted(folder.iterdir()):
        refuse_link_out(entry)


def refuse_link_out(entry: Path) -> None:
    """Refuse one file if it is such a link."""
    home, target = _real(entry.parent), _real(entry)
    if not entry.is_symlink() or not target.is_file() or target.is_relative_to(home):
        return
    storage = target.parent.parent
    in_hub = target.parent.name == "blobs" and (
        home.parent == storage / "snapshots" or storage.parent == _real(cache_folder())
    )
    if not in_hub:
        raise NpvlmError(
            f"{entry} is a link to {target}, out of its folder, expected the file itself; copy "
            "it there if you trust it, or name the folder that it lies in."
        )


def _real(path: Path) -> Path:
    """A path without links, as far as it leads anywhere."""
    return Path(os.path.realpath(path))
