"""What every parser promises of any input: a value or one sentence, and nothing else touched."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from npvlm.errors import NpvlmError

T = TypeVar("T")

# What no file may bring about: code that is run, a program that is started, a line to elsewhere.
_DEEDS = ("exec", "import", "pickle.", "marshal.", "subprocess.", "os.", "socket.", "ctypes.")
_TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # the order of letters
_HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
_heard: list[tuple[str, str]] | None = None
_listening = False


def value_or_sentence(parse: Callable[..., T], *given: Any) -> T | None:
    """What a parser gives, or None where it refuses; a refusal must be a sentence of one line."""
    try:
        return parse(*given)
    except NpvlmError as error:
        said = str(error)
        assert said and _is_one_line(said), f"no single line: {said[:400]!r}"
        return None


def _is_one_line(text: str) -> bool:
    """Whether a text stays on its line and can be printed; the bytes of a path may be any."""
    if text.isascii() and text.isprintable():
        return True
    text.encode("utf-8", "surrogateescape")
    kinds = {unicodedata.category(c) for c in text}
    steers = kinds & {"Cc", "Zl", "Zp"} or set(text) & _TURNING
    return len(text.splitlines()) == 1 and not steers


@contextmanager
def touching_only(*allowed: Path) -> Iterator[None]:
    """Hold that meanwhile no file is opened but these, or those within them, and nothing is run."""
    global _heard
    _listen()
    _heard = []
    try:
        yield
    finally:
        heard, _heard = _heard, None
    for event, subject in heard:
        assert event == "open", f"{event} of {subject}"
        path = Path(subject)
        assert any(path == a or path.is_relative_to(a) for a in allowed), f"opened {subject}"


def _listen() -> None:
    """Hear what Python says of files and programs; such a hook cannot be taken away again."""
    global _listening
    if not _listening:
        _listening = True
        sys.addaudithook(_hear)


def _hear(event: str, details: tuple[Any, ...]) -> None:
    if _heard is None:
        return
    if event == "open" or (event.startswith(_DEEDS) and event not in _HARMLESS):
        _heard.append((event, str(details[0]) if details else ""))
