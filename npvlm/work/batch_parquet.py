"""Parquet on both ends of a batch: pictures that lie in its columns, and records as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npvlm.answers.lines import json_line
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.output import new_file

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"
ROWS_READ = 16  # pictures in memory at once
_ROWS_WRITTEN = 4096  # records of a row group
_IMAGE, _PATH, _PROMPT = "image", "path", "prompt"


def is_parquet(name: str | Path) -> bool:
    """Whether a name is that of a Parquet file."""
    return str(name).lower().endswith(SUFFIX)


def need_pyarrow() -> None:
    """Refuse in a sentence where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise NpvlmError(
            "Parquet needs pyarrow, which is not installed; pip install 'npvlm[ray]'."
        ) from None


class Table:
    """What a Parquet file asks, without its pictures.

    bytes : whether pictures are in it; else its column `image` has paths, as seen from its folder
    groups : how many rows each row group has
    """

    def __init__(self, path: Path) -> None:
        need_pyarrow()
        self._path = path
        with _opened(path) as file:
            schema = file.schema_arrow
            self.bytes = _picture_column(schema, path) is not None
            self._columns = [
                name
                for name, kind in zip(schema.names, schema.types, strict=True)
                if name != _IMAGE and _is_plain(kind)
            ]
            if not self.bytes:
                self._columns.append(_IMAGE)
            elif _has_names(schema):
                self._columns.append(f"{_IMAGE}.{_PATH}")
            count = file.metadata.num_row_groups
            self.groups = [file.metadata.row_group(i).num_rows for i in range(count)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The fields of each row: `image` is the picture's name, None for one that has none."""
        with _opened(self._path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_WRITTEN, columns=self._columns):
                for values in batch.to_pylist() if self._columns else [{}] * len(batch):
                    yield self._fields(values)

    def _fields(self, values: dict[str, Any]) -> dict[str, Any]:
        image = values.get(_IMAGE)
        if self.bytes:
            inside = image.get(_PATH) if isinstance(image, dict) else None
            values[_IMAGE] = values.pop(_PATH, None) or inside
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


def read_pictures(path: Path, group: int, rows: Sequence[int]) -> Iterator[bytes]:
    """The pictures in rows of a row group, in rising order, a few in memory at a time.

    A row without a picture gives no bytes.
    """
    need_pyarrow()
    with _opened(path) as file:
        column = _picture_column(file.schema_arrow, path)
        batches = file.iter_batches(batch_size=ROWS_READ, row_groups=[group], columns=[column])
        wanted, at, first = iter(rows), next(iter(rows), None), 0
        next(wanted, None)
        for batch in batches:
            pictures = batch.column(0)
            while at is not None and at < first + len(batch):
                value = pictures[at - first].as_py()
                yield (value.get("bytes") if isinstance(value, dict) else value) or b""
                at = next(wanted, None)
            first += len(batch)
            if at is None:
                return
    raise NpvlmError(f"{path} has changed while it was read; leave it alone, and --resume.")


def write_parquet(
    records: Iterable[Mapping[str, Any]], again: Iterable[Mapping[str, Any]], path: Path
) -> None:
    """Write records as a table, a column for each field, whole or not at all.

    A field whose values are of no one type that Parquet has is written as JSON text.

    Parameters
    ----------
    records, again : the same records twice: for their types, and to write them
    """
    need_pyarrow()
    import pyarrow.parquet as pq

    schema = _schema_of(records)
    with new_file(path) as draft, pq.ParquetWriter(draft, schema) as writer:
        for some in _by(again, _ROWS_WRITTEN):
            writer.write_table(_table(some, schema))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a table, each without the fields that it does not have."""
    need_pyarrow()
    with _opened(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_WRITTEN):
            yield from map(_without_nulls, batch.to_pylist())


def in_table(value: Any, found: Any) -> Any:
    """What a value has become in a table: JSON, where its column had to be text, as `found` is."""
    stored = _storable(value)
    if isinstance(found, str) and not isinstance(stored, str):
        return _as_json(stored)
    bare = _without_nulls(stored)
    return None if found is None and bare == {} else bare


def _without_nulls(value: Any) -> Any:
    """The same without fields that are null: in a table every struct has the fields of all."""
    if isinstance(value, list):
        return [_without_nulls(inside) for inside in value]
    if isinstance(value, dict):
        return {key: _without_nulls(inside) for key, inside in value.items() if inside is not None}
    return value


def _schema_of(records: Iterable[Mapping[str, Any]]) -> pyarrow.Schema:
    """A type for each field that some record has, in the order of their first coming."""
    import pyarrow as pa

    types: dict[str, pa.DataType] = {}
    for some in _by(records, _ROWS_WRITTEN):
        for name in dict.fromkeys(key for record in some for key in record):
            kind = _type_of([record.get(name) for record in some])
            types[name] = _joined(types.get(name, pa.null()), kind)
    return pa.schema([(n, t if _has_fields(t) else pa.string()) for n, t in types.items()])


def _has_fields(kind: pyarrow.DataType) -> bool:
    """Whether all structs in a type have fields; Parquet stores no others."""
    from pyarrow import types

    if types.is_list(kind):
        return _has_fields(kind.value_type)
    if not types.is_struct(kind):
        return True
    fields = [kind.field(i).type for i in range(kind.num_fields)]
    return bool(fields) and all(map(_has_fields, fields))


def _type_of(values: list[Any]) -> pyarrow.DataType:
    import pyarrow as pa

    try:
        return pa.array(_storable(values)).type
    except (pa.ArrowException, OverflowError):
        return pa.string()


def _joined(one: pyarrow.DataType, other: pyarrow.DataType) -> pyarrow.DataType:
    """The type that holds what either holds; text where there is none."""
    import pyarrow as pa

    try:
        fields = [pa.schema([("", kind)]) for kind in (one, other)]
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _table(records: list[Mapping[str, Any]], schema: pyarrow.Schema) -> pyarrow.Table:
    import pyarrow as pa

    columns = []
    for field in schema:
        values = _storable([record.get(field.name) for record in records])
        if pa.types.is_string(field.type):
            values = [v if v is None or isinstance(v, str) else _as_json(v) for v in values]
        columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _as_json(value: Any) -> str:
    return json_line({"": value}).removeprefix('{"": ').removesuffix("}")


def _storable(value: Any) -> Any:
    """The same, but with the bytes of a name that is no UTF-8 spelled out, as JSON has them."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_storable(inside) for inside in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(inside) for key, inside in value.items()}
    return value


def _by(records: Iterable[Any], count: int) -> Iterator[list[Any]]:
    rest = iter(records)
    while some := list(islice(rest, count)):
        yield some


def _is_plain(kind: pyarrow.DataType) -> bool:
    """Whether records can hold it."""
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating)
    return types.is_boolean(kind) or any(test(kind) for test in tests)


def _has_names(schema: pyarrow.Schema) -> bool:
    from pyarrow import types

    kind = schema.field(_IMAGE).type
    return types.is_struct(kind) and kind.get_field_index(_PATH) >= 0


def _picture_column(schema: pyarrow.Schema, path: Path) -> str | None:
    """The column with pictures; None where `image` has their paths."""
    from pyarrow import types

    found = schema.get_field_index(_IMAGE)
    kind = schema.types[found] if found >= 0 else None
    if kind is not None and (types.is_string(kind) or types.is_large_string(kind)):
        return None
    inside = kind is not None and types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    held = kind.field("bytes").type if kind is not None and inside else kind
    if held is None or not (types.is_binary(held) or types.is_large_binary(held)):
        raise UsageError(
            f"{path} has the columns {', '.join(schema.names)[:200]}, expected `image`, the bytes "
            "of pictures, a struct with `bytes`, or paths; rename or convert it."
        )
    return f"{_IMAGE}.bytes" if inside else _IMAGE


@contextmanager
def _opened(path: Path) -> Iterator[ParquetFile]:
    """A Parquet file; what is wrong with it is said in one sentence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Bytes are read as they are come to: a row group may be larger than the memory.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            yield file
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0][:200]
        raise NpvlmError(f"{path} is no Parquet file that can be read ({reason}).") from None
    except OSError as error:
        raise NpvlmError(f"{path} cannot be read: {error.strerror or error}.") from None
