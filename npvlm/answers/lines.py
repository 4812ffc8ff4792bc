"""Results as JSON, one line each."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def json_line(result: DataclassInstance) -> str:
    """The fields of a result, from which every number reads back the same."""
    text = json.dumps(asdict(result), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()  # as JSON escapes such bytes
