"""Results as JSON, one line each."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any


def json_line(result: Any) -> str:
    """The fields of a dataclass, from which every number reads back the same."""
    text = json.dumps(asdict(result), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()  # as JSON escapes such bytes
