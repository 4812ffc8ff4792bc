"""What a batch is asked to do: pictures that are named, or a list in JSONL, CSV or Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from npvlm.answers.lines import json_line
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.listing import list_pictures, picture_suffixes
from npvlm.work.batch_parquet import Table, is_parquet

LISTS = (".jsonl", ".csv")
STDIN = "-"
# What records say themselves: a list may have any other fields.
_TAKEN = ["index", "text", "token_ids", "logprobs", "logprob", "stop", "model", "precision"]
_TAKEN += ["max_tokens", "width", "height", "boxes", "unread", "error"]
_BOM = b"\xef\xbb\xbf"
_LOOK = 4096  # bytes of a file that tell whether it is text
_NOTHING = "nothing is asked; give --task or --prompt, or a list with prompts."


@dataclass(frozen=True)
class Stored:
    """Where in a Parquet file a picture's bytes are: the row group, and the row of it."""

    group: int
    row: int


@dataclass(frozen=True)
class Item:
    """One picture and what is asked about it.

    index : its place in the whole input, from 0
    image : the picture as the input names it; None where a broken line names none
    prompt : None where a broken line has none
    path : where the picture is, or the Parquet file that has it
    extra : the other fields of its line, for the record
    error : what is wrong with its line; None for one that can be asked
    stored : where in the file it is; None for a file of its own
    """

    index: int
    image: str | None
    prompt: str | None
    path: Path
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    stored: Stored | None = None

    @property
    def head(self) -> dict[str, Any]:
        """What its record begins with."""
        return {"index": self.index, "image": self.image, "prompt": self.prompt, **self.extra}


def read_input(names: Sequence[str], prompt: str | None) -> list[Item]:
    """Find everything that is to be asked, in order.

    Parameters
    ----------
    names : files, folders and patterns; or one list, a .jsonl or .csv file whose lines have
        `image`, a path as seen from the list's folder, and `prompt`; or .parquet files with such
        columns, where `image` may be the bytes of pictures, and `path` what they are called
    prompt : the one for all pictures, None where a list has them

    Raises
    ------
    UsageError
        Where it is not clear what is asked, nothing is named, or a list has fields that records
        have themselves.
    NpvlmError
        For a file or folder that cannot be read.
    """
    if STDIN in names:
        raise UsageError("batch reads no stdin; name files, folders, patterns or a list.")
    if any(map(is_parquet, names)):
        return _parquet_items(names, prompt)
    lists = [name for name in names if name.lower().endswith(LISTS)]
    if not lists:
        if len(names) == 1 and _is_other_text(Path(names[0])):
            raise UsageError(f"{names[0]} is text; a list ends in {' or '.join(LISTS)}: rename it.")
        if prompt is None:
            raise UsageError(_NOTHING)
        paths = list_pictures(names)
        return [Item(i, str(path), prompt, path) for i, path in enumerate(paths)]
    if len(names) > 1:
        raise UsageError(f"{lists[0]} is a list, expected it alone; put all pictures into it.")
    path = Path(lists[0])
    read = _read_csv if path.suffix.lower() == ".csv" else _read_jsonl
    lines = enumerate(read(path))
    items = [_item(path, prompt, i, f"line {n}", values) for i, (n, values) in lines]
    return _checked(items, path)


def part(items: Sequence[Item], number: int, count: int) -> Sequence[Item]:
    """Part `number`, from 1, of `count` that are as even as can be and join to the whole."""
    return items[(number - 1) * len(items) // count : number * len(items) // count]


def _checked(items: list[Item], path: Path) -> list[Item]:
    """Refuse a list that asks nothing."""
    if not items:
        raise UsageError(f"{path} is empty, expected a line for each picture.")
    named = [item for item in items if item.image is not None]
    if named and all(item.prompt is None for item in named):
        raise UsageError(f"{path} has no prompts: {_NOTHING}")
    return items


def _parquet_items(names: Sequence[str], prompt: str | None) -> list[Item]:
    """What the rows of Parquet files ask, file by file."""
    if wrong := [name for name in names if not is_parquet(name)]:
        raise UsageError(f"{wrong[0]} is no Parquet file, expected no others beside one.")
    items: list[Item] = []
    for path in list_pictures(names):
        rows = Table(path)
        places = [Stored(group, row) for group, n in enumerate(rows.groups) for row in range(n)]
        for number, (values, place) in enumerate(zip(rows, places, strict=True)):
            if not rows.bytes:
                items.append(_item(path, prompt, len(items), f"row {number}", values))
                continue
            values["image"] = values["image"] or f"{path}#{number}"
            item = _item(path, prompt, len(items), f"row {number}", values)
            items.append(replace(item, path=path, stored=place))
    return _checked(items, path)


def _item(
    path: Path, asked: str | None, index: int, place: str, values: dict[str, Any] | str
) -> Item:
    """What a line of a list asks; `values` are its fields, or what is wrong with it."""
    if isinstance(values, str):
        return Item(index, None, None, path, error=f"{place} {values}")
    extra = {key: value for key, value in values.items() if key not in ("image", "prompt")}
    if taken := [key for key in extra if key in _TAKEN]:
        raise UsageError(f"{path} {place}: records have a field {taken[0]!r}; rename yours.")
    image, prompt = values.get("image"), values.get("prompt", asked)
    if asked is not None and "prompt" in values:
        raise UsageError(f"{path} {place} has a prompt; leave out --task and --prompt.")
    wrong = [
        key
        for key, value in (("image", image), ("prompt", prompt))
        if not isinstance(value, str) or (key == "image" and not value)
    ]
    if wrong:
        error = f"{place} has no text as {wrong[0]!r}"
        image = None if "image" in wrong else image
        prompt = None if "prompt" in wrong else prompt
        return Item(index, image, prompt, path, extra, error)
    return Item(index, image, prompt, path.parent / str(image), extra)


def _is_other_text(path: Path) -> bool:
    """Whether a file is text, as a list is, and its name is not that of a picture."""
    if path.suffix.lower() in picture_suffixes() or not path.is_file():
        return False
    start = _bytes(path, _LOOK)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # a letter may be cut at the end
    except UnicodeDecodeError:
        return False
    return bool(start) and b"\0" not in start


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number of each line that is not empty, from 1, with its fields or what is wrong."""
    # Within JSON a line may hold other characters that end lines elsewhere.
    for number, line in enumerate(_bytes(path).split(b"\n"), 1):
        if line.strip():
            yield number, _fields(line)


def _fields(line: bytes) -> dict[str, Any] | str:
    try:
        values = json.loads(line.decode(), parse_constant=_refuse)
        json_line(values)  # a number too large for JSON is found now
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({str(error)[:100]})"
    return values if isinstance(values, dict) else 'is no JSON object with "image" and "prompt"'


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number of the line where each row ends, with its fields or what is wrong."""
    try:
        text = _bytes(path).decode()
    except UnicodeDecodeError as error:
        raise NpvlmError(f"{path} is no UTF-8 at byte {error.start}; save it as UTF-8.") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(rows, [])
        if "image" not in header or len(set(header)) < len(header):
            raise UsageError(
                f"{path} begins with {','.join(header)[:100]!r}, expected names of "
                "columns with commas between them, `image` among them, each once."
            )
        for row in rows:
            if not row:
                continue
            fits = len(row) == len(header)
            wrong = f"has {len(row)} columns, expected {len(header)} as in the header"
            yield rows.line_num, dict(zip(header, row, strict=True)) if fits else wrong
    except csv.Error as error:
        raise NpvlmError(f"{path} line {rows.line_num} is no CSV: {error}.") from None


def _bytes(path: Path, most: int = -1) -> bytes:
    """What a file holds, or the beginning of it."""
    try:
        with path.open("rb") as file:
            return file.read(most).removeprefix(_BOM)
    except OSError as error:
        raise NpvlmError(f"{path} cannot be read: {error.strerror}.") from None
