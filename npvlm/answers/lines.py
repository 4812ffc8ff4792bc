"""Results as JSON, one line each; and text that cannot drive the terminal it is shown on."""

from __future__ import annotations

import json
import re
from typing import Any

from npvlm.errors import STEERING

_CONTROL = re.compile(rf"(?![\t\n])[{STEERING}]")


def json_line(values: dict[str, Any]) -> str:
    """One line in which any text survives, a file's name that is no UTF-8 included.

    Every number reads back the same.
    """
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    text = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.encode("utf-8", "backslashreplace").decode()  # as JSON escapes such bytes


def harmless(text: str) -> str:
    r"""A text with its control characters spelled out, as \x1b, but for tabs and line ends."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
