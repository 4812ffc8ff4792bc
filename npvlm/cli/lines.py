"""Text that stays on its line and leaves the terminal alone, whatever is in it."""

from __future__ import annotations

import io
from collections.abc import Iterable

from npvlm.answers.lines import harmless


class HarmlessOutput(io.TextIOWrapper):
    """A stream that spells out control characters, which names and answers may hold."""

    def write(self, text: str, /) -> int:
        super().write(harmless(text))
        return len(text)


def line(values: Iterable[str]) -> str:
    """One line of columns with tabs between them."""
    return "\t".join(map(escaped, values))


def escaped(text: str) -> str:
    r"""A text with its backslashes, tabs and line ends written as \\, \t, \n and \r."""
    for character, written in (("\\", r"\\"), ("\t", r"\t"), ("\n", r"\n"), ("\r", r"\r")):
        text = text.replace(character, written)
    return text
