"""Results as JSON, one line each."""

from __future__ import annotations

import json
from typing import Any


def json_line(values: dict[str, Any]) -> str:
    """One line in which any text survives, a file's name that is no UTF-8 included.

    Every number reads back the same.
    """
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()  # as JSON escapes such bytes
