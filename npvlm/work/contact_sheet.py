"""A contact sheet of a batch: one page to look through, filter and sort its records, offline."""

from __future__ import annotations

import base64
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from npvlm.answers.drawing import COLOURS
from npvlm.answers.lines import json_line
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.output import check_new, new_file, new_folder, resolved
from npvlm.files.thumbnails import Thumbnail, thumbnail
from npvlm.work.batch_input import Item

PARTS = Path(__file__).parent / "sheet_files"
SIDE = 320  # pixels of a thumbnail's longer side
AHEAD = 64  # thumbnails made before they are written
# What is long and not to be looked at; the records have it.
_LONG = ("token_ids", "logprobs", "mask")


def is_file(place: Path) -> bool:
    """Whether a name asks for one file; else it is a folder's."""
    return place.suffix.lower() in (".html", ".htm")


def check_place(place: Path, inputs: Sequence[str]) -> None:
    """Find out before the work whether the sheet can be written.

    Raises
    ------
    UsageError
        Where there is no folder around it, or it is a folder that is there already or lies among
        the pictures, where its thumbnails would be taken for some.
    """
    if is_file(place):
        if not place.parent.is_dir():
            raise UsageError(f"{place.parent} is no folder; make it first.")
        return
    check_new(place)
    for folder in (resolved(Path(name)) for name in inputs if Path(name).is_dir()):
        if resolved(place).is_relative_to(folder):
            raise UsageError(f"{place} is among the pictures of {folder}; name another place.")


def contact_sheet(
    items: Sequence[Item],
    records: Iterable[dict[str, Any]],
    place: Path,
    tell: Callable[[int, int], None],
) -> None:
    """Write the sheet of a batch that is complete.

    Parameters
    ----------
    items : what was asked
    records : of each item
    place : a name that ends in .html for one file with everything in it, which replaces one that is
        there; else a new folder with index.html and thumbnails, which large batches load faster
    tell : is told how many of all thumbnails are made

    Raises
    ------
    UsageError, NpvlmError
        Where it cannot be written.
    """
    if is_file(place):
        with new_file(place) as draft:
            _write(draft, _views(items, records, tell, _within))
        return
    with new_folder(place) as folder:
        (folder / "thumbnails").mkdir()

        def beside(index: int, small: Thumbnail) -> str:
            name = f"thumbnails/{index:06}.{small.kind}"
            (folder / name).write_bytes(small.data)
            return name

        _write(folder / "index.html", _views(items, records, tell, beside))


def _within(index: int, small: Thumbnail) -> str:
    return f"data:image/{small.kind};base64,{base64.b64encode(small.data).decode()}"


def _write(path: Path, views: Iterator[dict[str, Any]]) -> None:
    """Fill the template; what is in the records cannot end the script that holds it."""
    page = (PARTS / "sheet.html").read_text(encoding="utf-8")
    for part in ("sheet.css", "sheet.js"):
        page = page.replace(f"/* {part} */", (PARTS / part).read_text(encoding="utf-8"))
    before, after = page.split(">records<")
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(f'{before}>{{"colours": {json.dumps([f"rgb{c}" for c in COLOURS])}, "views": [')
        for number, view in enumerate(views):
            file.write(("," if number else "") + "\n" + json_line(view).replace("<", r"\u003c"))
        file.write(f"\n]}}<{after}")


def _views(
    items: Sequence[Item],
    records: Iterable[dict[str, Any]],
    tell: Callable[[int, int], None],
    keep: Callable[[int, Thumbnail], str],
) -> Iterator[dict[str, Any]]:
    """What the page needs to show each record; `keep` stores a thumbnail and says where."""
    looked_at = _with_thumbnails(items, records)
    for done, (item, record, small) in enumerate(looked_at, 1):
        view: dict[str, Any] = {"record": _short(record)}
        if small is not None:
            view |= {"thumbnail": keep(record["index"], small), "tiny": small.kind == "png"}
            view |= {"width": small.width, "height": small.height}
        if "error" in record:
            view["reason"] = record["error"].removeprefix(f"{item.path} ")
        else:
            view["confidence"] = math.exp(min(0.0, fmean(record["logprobs"])))
        yield view
        tell(done, len(items))


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what is long."""
    short = {key: value for key, value in record.items() if key not in _LONG}
    if "boxes" in record:
        short["boxes"] = [
            {key: value for key, value in box.items() if key not in _LONG}
            for box in record["boxes"]
        ]
    return short


def _with_thumbnails(
    items: Sequence[Item], records: Iterable[dict[str, Any]]
) -> Iterator[tuple[Item, dict[str, Any], Thumbnail | None]]:
    """Each record, with its picture made small unless that cannot be read, several at once."""
    pool = ThreadPoolExecutor(os.cpu_count())
    ahead: deque[tuple[Item, dict[str, Any], Future[Thumbnail | None]]] = deque()
    try:
        for item, record in zip(items, records, strict=True):
            path = None if "error" in record else item.path
            ahead.append((item, record, pool.submit(_thumbnail, path)))
            if len(ahead) == AHEAD:
                yield _come(*ahead.popleft())
        for one in ahead:
            yield _come(*one)
    finally:
        pool.shutdown(cancel_futures=True)


def _come(
    item: Item, record: dict[str, Any], small: Future[Thumbnail | None]
) -> tuple[Item, dict[str, Any], Thumbnail | None]:
    return item, record, small.result()


def _thumbnail(path: Path | None) -> Thumbnail | None:
    """None for a picture that was not read, or is not there any more."""
    try:
        return None if path is None else thumbnail(path, SIDE)
    except NpvlmError:
        return None
