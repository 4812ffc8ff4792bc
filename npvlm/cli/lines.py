"""Text that stays on its line, whatever is in it."""

from __future__ import annotations

from collections.abc import Iterable


def line(values: Iterable[str]) -> str:
    """One line of columns with tabs between them."""
    return "\t".join(map(escaped, values))


def escaped(text: str) -> str:
    r"""A text with its backslashes, tabs and line ends written as \\, \t, \n and \r."""
    for character, written in (("\\", r"\\"), ("\t", r"\t"), ("\n", r"\n"), ("\r", r"\r")):
        text = text.replace(character, written)
    return text
