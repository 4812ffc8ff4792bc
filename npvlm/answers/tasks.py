"""The prompts that PaliGemma was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from npvlm.errors import UsageError

# Most tokens of an answer, by the prompt's first word. A box takes four and its label, a mask
# sixteen more.
_MAX_TOKENS = {"ocr": 512, "detect": 256, "segment": 512}
_MAX_TOKENS_OF_OTHERS = 100


def task_of(prompt: str) -> str:
    """The first word of a prompt, which says what is to be done."""
    return (prompt.split(maxsplit=1) or [""])[0]


def max_tokens(prompt: str) -> int:
    """Most tokens of an answer, where nobody says."""
    return _MAX_TOKENS.get(task_of(prompt), _MAX_TOKENS_OF_OTHERS)


def caption_prompt(lang: str = "en") -> str:
    """Ask what is on the picture. `lang` is a language's code, such as "en" or "de"."""
    return f"caption {_language(lang)}"


def ask_prompt(question: str, lang: str = "en") -> str:
    """Ask a question; the answer comes in the language named."""
    if not isinstance(question, str):
        raise UsageError(f"the question is of type {type(question).__name__}, expected words.")
    if not question.strip():
        raise UsageError("the question is empty, expected words.")
    return f"answer {_language(lang)} {question.strip()}"


def ocr_prompt() -> str:
    """Ask for the text on the picture."""
    return "ocr"


def detect_prompt(labels: str | Sequence[str]) -> str:
    """Ask where things are; several labels come as a list, or with semicolons between them."""
    return f"detect {' ; '.join(split_labels(labels))}"


def segment_prompt(labels: str | Sequence[str]) -> str:
    """Ask for the outlines of things; labels as for `detect_prompt`."""
    return f"segment {' ; '.join(split_labels(labels))}"


def split_labels(labels: str | Sequence[str]) -> list[str]:
    """The labels one by one, each once.

    Raises
    ------
    UsageError
        There is none, or something is no text.
    """
    if not isinstance(labels, Iterable):
        kind = type(labels).__name__
        raise UsageError(f'labels are of type {kind}, expected text, such as "cat ; dog".')
    parts = labels.split(";") if isinstance(labels, str) else [*labels]
    if not all(isinstance(part, str) for part in parts):
        raise UsageError('a label is no text, expected texts, such as "cat".')
    named = list(dict.fromkeys(" ".join(part.split()) for part in parts if part.strip()))
    if not named:
        raise UsageError('no label is given, expected one or several, such as "cat ; dog".')
    if split := [label for label in named if ";" in label]:
        raise UsageError(f"the label {split[0]!r} holds a semicolon, expected one label.")
    return named


def labels_of(prompt: str) -> list[str]:
    """The labels that a `detect` or `segment` prompt asks for."""
    return split_labels(prompt.split(maxsplit=1)[1]) if len(prompt.split()) > 1 else []


def _language(lang: str) -> str:
    if not isinstance(lang, str) or not re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z]{2,4})?", lang):
        raise UsageError(f"{lang!r} is no language code, expected one such as en, de or pt-br.")
    return lang
