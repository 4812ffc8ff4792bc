"""The file that a batch writes: a record a line, in order, safe against a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows two processes must keep apart by themselves
    fcntl = None  # type: ignore[assignment]

from npvlm.answers.lines import json_line
from npvlm.errors import NpvlmError, UsageError
from npvlm.work.batch_parquet import in_table, is_parquet, need_pyarrow, read_rows, write_parquet

Record = Mapping[str, Any]


class Records:
    """A file of records that grows by whole lines.

    kept : how many it holds
    errors : how many of them say why there is no answer
    """

    def __init__(self, path: Path, file: FileIO | None, kept: int, errors: int) -> None:
        self._path, self._file = path, file
        self.kept = kept
        self.errors = errors

    def append(self, record: Record) -> None:
        """Write one line and have the disk hold it."""
        assert self._file is not None, "a table is whole"
        left = memoryview(f"{json_line(dict(record))}\n".encode())
        with said(self._path, "make room and go on with --resume"):
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        self.kept += 1
        self.errors += "error" in record


@contextmanager
def open_records(
    output: Path, expected: Sequence[tuple[Record, Record]], resume: bool
) -> Iterator[Records]:
    """Open the file to write, new or to go on with; no other process may write it meanwhile.

    Parameters
    ----------
    output : where all records will be; a table that is there has them already
    expected : for each record what it says in any case, and what an answer says besides
    resume : keep the records there are, drop the beginning of the next one, and append

    Raises
    ------
    UsageError
        Where something is there already and `resume` is not asked for, or it answers something
        else; or another process is writing it.
    NpvlmError
        Where it cannot be read or written.
    """
    path = while_running(output, resume)
    for place in (output, path):
        if place.exists() and not place.is_file():
            raise NpvlmError(f"{place} is no regular file, expected a place for one.")
    if is_table(output):
        yield Records(output, None, *_check_table(output, expected))
        _remove_lines_of(path, expected)
        return
    is_new = not path.exists()
    with said(path, "name another place"):
        file = path.open("a+b", buffering=0)
    with file:
        with said(path, "name another place"):
            lock(file, path)
            if path.stat().st_size and not resume:
                raise _holds_records(path)
            kept, errors, size = _check(path, expected)
            file.truncate(size)
        records = Records(path, file, kept, errors)
        try:
            yield records
        except (NpvlmError, UsageError):
            if is_new and records.kept == 0:  # what stopped it came before any record
                path.unlink(missing_ok=True)
            raise


@contextmanager
def said(path: Path, advice: str) -> Iterator[None]:
    """Turn what the system says into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise NpvlmError(f"{path}: cannot be written ({reason}); {advice}.") from error


def while_running(output: Path, resume: bool) -> Path:
    """Where records are until all are there: lines, beside a table, which has to be written whole.

    Raises
    ------
    UsageError
        For a table that is there already, unless `resume` is asked for.
    NpvlmError
        For a table, where there is nothing to write one with.
    """
    if not is_parquet(output):
        return output
    need_pyarrow()
    if is_table(output) and not resume:
        raise _holds_records(output)
    return output.with_name(f"{output.name}.jsonl")


def is_table(output: Path) -> bool:
    """Whether the records are in a table already, which is whole."""
    return is_parquet(output) and output.is_file() and output.stat().st_size > 0


def write_whole(running: Path, output: Path) -> None:
    """Make the table of a run that is complete, and remove its lines.

    Raises
    ------
    UsageError
        Where something has come to be there meanwhile; the lines stay.
    """
    if running == output:
        return
    if is_table(output):
        raise UsageError(
            f"{output} has come to be there meanwhile, so the records are left in {running}; move "
            f"{output}, and --resume."
        )
    write_parquet(read_records(running), read_records(running), output)
    running.unlink()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file that is whole."""
    if is_parquet(path):
        yield from read_rows(path)
        return
    with path.open("rb") as lines:
        yield from map(json.loads, lines)


def lock(file: FileIO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{path} is being written by another npvlm; let it end first.") from None


def _check(path: Path, expected: Sequence[tuple[Record, Record]]) -> tuple[int, int, int]:
    """Count the records of a file, those with an error, and the bytes of whole lines."""
    kept = errors = size = 0
    with path.open("rb") as lines:
        for line in lines:
            where = f"{path} line {kept + 1}"
            if kept == len(expected):
                raise UsageError(f"{where}: expected {kept} records; is the input another one?")
            if not line.endswith(b"\n"):
                _check_torn(line, expected[kept][0], where)
                break
            record, (always, answered) = _record(line, where), expected[kept]
            failed = "error" in record
            _compare(record, always if failed else {**always, **answered}, where)
            kept, size, errors = kept + 1, size + len(line), errors + failed
    return kept, errors, size


def _check_table(path: Path, expected: Sequence[tuple[Record, Record]]) -> tuple[int, int]:
    """Count the records of a table, which has to hold all, and those with an error."""
    kept = errors = 0
    for kept, record in enumerate(read_rows(path), 1):
        if "index" not in record:
            raise UsageError(f"{path} has no records of a batch in it; name another file.")
        if kept > len(expected):
            break
        (always, answered), failed = expected[kept - 1], "error" in record
        asked = always if failed else {**always, **answered}
        stored = {key: in_table(value, record.get(key)) for key, value in asked.items()}
        _compare(record, stored, f"{path} row {kept - 1}")
        errors += failed
    if kept != len(expected):
        raise UsageError(
            f"{path} has {'more' if kept > len(expected) else kept} records, expected "
            f"{len(expected)}; is the input another one?"
        )
    return kept, errors


def _remove_lines_of(path: Path, expected: Sequence[tuple[Record, Record]]) -> None:
    """Remove the lines of a table that is whole, which a kill may have left; others stay."""
    with suppress(UsageError, OSError):
        if path.is_file() and _check(path, expected)[0] == len(expected) > 0:
            path.unlink()


def _check_torn(line: bytes, expected: Record, where: str) -> None:
    """Refuse a last line without an end that is no beginning of the record that comes next."""
    start = json_line({"index": expected["index"]}).removesuffix("}").encode() + b","
    if not (line.startswith(start) or start.startswith(line)):
        raise _no_record(where)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise _no_record(where)
    return record


def _holds_records(path: Path) -> UsageError:
    return UsageError(f"{path} holds records; --resume goes on, or name another file.")


def _no_record(where: str) -> UsageError:
    return UsageError(f"{where} is no record; did a batch write this file?")


def _compare(record: Record, expected: Record, where: str) -> None:
    """Refuse the answer to another question."""
    for key, value in expected.items():
        if record.get(key) != value:
            raise UsageError(
                f"{where} has {key} {_short(record.get(key))}, expected {_short(value)}; resume "
                "with the same input, question and model, or name another file."
            )


def _short(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    try:
        text = json_line({"": value}).removeprefix('{"": ').removesuffix("}")
    except (TypeError, ValueError):  # a table may hold anything
        text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
