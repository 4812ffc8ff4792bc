"""Small changes to valid input, which get deeper into a parser than noise does.

Every choice is left to `pick(n)`, a number below n: hypothesis draws it, or a fuzzer's seed does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

Pick = Callable[[int], int]
Place = tuple[Any, Any]  # an object or a list, and a key of it

_DEEP: list[Any] = []
for _ in range(60):
    _DEEP = [_DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 8, 255, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1e-300, 1e30, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "a", "0", "-1", "1e9", "null", "F32", "BF16", "I8", "{i}", "\0", "\n", "\x1b[2J"),
    *("\ud800", "\udc80", "\u202e", "é", "😀", "../x", "/etc/passwd", "a" * 300, "__metadata__"),
    *([], {}, [0], [[]], [None], {"": 0}, {"a": {"a": {}}}, [1, 2, 3, 4], [0, 2**63], _DEEP),
)
NUMBERS = (0, 1, 7, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
PIECES = (
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u0000",
    b"\0",
    b"\xff",
    b"\n",
    b"\x80",
    b"-",
)


def change(value: Any, pick: Pick) -> Any:
    """A JSON document with one place in it changed; the document itself is spent."""
    places = list(_places(value))
    if not places:
        return VALUES[pick(len(VALUES))]
    holder, key = places[pick(len(places))]
    held, way = holder[key], pick(8)
    if way == 0:
        del holder[key]
    elif way == 1:
        other, its = places[pick(len(places))]
        holder[key] = json.loads(json.dumps(other[its]))  # a value from elsewhere
    elif way == 2 and isinstance(holder, dict):
        holder[str(VALUES[pick(len(VALUES))])] = holder.pop(key)
    elif way == 2:
        holder.append(held)
    elif way == 3 and type(held) is int:
        holder[key] = held + (1, -1, 8, -8, 2**31)[pick(5)]
    elif way == 3 and isinstance(held, str):
        holder[key] = held[: pick(len(held) + 1)]
    elif way == 4:
        holder[key] = [held]
    else:
        holder[key] = VALUES[pick(len(VALUES))]
    return value


def _places(value: Any) -> Iterator[Place]:
    """Every place in a document that holds something."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield value, key
        yield from _places(value[key])


def damaged(data: bytes, pick: Pick) -> bytes:
    """Bytes with one place in them changed."""
    at = pick(len(data) + 1)
    end = min(len(data), at + 1 + pick(16))
    match pick(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[end:]
        case 2:
            return data[:end] + data[at:]
        case 3:
            return data[:at] + struct.pack("<Q", NUMBERS[pick(len(NUMBERS))]) + data[at + 8 :]
        case 4:
            return data[:at] + PIECES[pick(len(PIECES))] + data[at:]
        case 5:
            return data[:at] + PIECES[pick(len(PIECES))] + data[end:]
        case _:
            return data[:at] + bytes([pick(256)]) + data[at + 1 :]


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of this header, whatever it says."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data
