"""What is asked: pictures and prompts as they are given, checked, named and paired.

Axis letters: P patches of a picture · D width of the decoder · R height and width as it is read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from npvlm.answers.lines import json_line
from npvlm.errors import UsageError
from npvlm.files.pictures import Picture
from npvlm.model.weights import Array


@dataclass(frozen=True, eq=False)
class Seen:
    """A picture as the model reads it, to ask about it again and again.

    name : how answers call it
    source : the picture
    width, height : in pixels, upright
    pixels : float32 [3, R, R]
    features : what the image tower makes of it [P, D], once it has looked
    """

    name: str
    source: Picture = field(repr=False)
    width: int
    height: int
    pixels: NDArray[np.float32] = field(repr=False)
    features: Array | None = field(default=None, repr=False)


Shown = Picture | Seen  # what may be asked about


@dataclass(frozen=True)
class Failed:
    """A question about a picture that could not be answered, and why, in one sentence."""

    image: str
    prompt: str
    error: str

    def to_dict(self) -> dict[str, Any]:
        """The three fields."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON with the three fields."""
        return json_line(self.to_dict())


def check_whole(name: str, number: Any, least: int) -> None:
    """Refuse what is no whole number, or too small a one."""
    if type(number) is not int:
        raise UsageError(f"{name} is {number!r}, expected a whole number.")
    if number < least:
        raise UsageError(f"{name} is {number}, expected {least} or more.")


def check_text(name: str, text: Any) -> None:
    """Refuse what is no text."""
    if not isinstance(text, str):
        raise UsageError(f"{name} is of type {type(text).__name__}, which is no text.")


def texts_of(name: str, given: Any) -> list[str]:
    """One text or several, as a list."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    texts = [*given] if several else [given]
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} hold something that is no text, expected one or several.")
    return texts


def is_one(value: Any) -> bool:
    """Whether this is one picture, not several."""
    kinds = (str, Path, bytes, Image.Image, np.ndarray, Seen)
    return isinstance(value, kinds) or hasattr(value, "read")


def check_several(value: Any) -> None:
    """Refuse what can be neither a picture nor several."""
    if not isinstance(value, Iterable) or hasattr(value, "__array__"):
        raise UsageError(
            f"a picture is of type {type(value).__name__}, expected a path, an open file or its "
            "bytes, a PIL image or a uint8 array."
        )


def check_picture(value: Any) -> None:
    """Refuse anything but one picture."""
    if not is_one(value):
        check_several(value)
        raise UsageError(
            f"a {type(value).__name__} is given where one picture is expected; batch takes "
            "several, for an answer each."
        )


def as_list(value: Any) -> list[Any]:
    """One picture or several, as a list."""
    if is_one(value):
        return [value]
    check_several(value)
    return list(value)


def pairs_of(
    images: Shown | Iterable[Shown], prompts: str | Iterable[str]
) -> Iterator[tuple[Shown, str]]:
    """Each picture with its prompt, taken as they are asked for."""
    several: Iterable[Any] = [images] if is_one(images) else images  # type: ignore[assignment]
    check_several(several)
    if isinstance(prompts, str):
        return zip(several, repeat(prompts), strict=False)
    if not isinstance(prompts, Iterable):
        kind = type(prompts).__name__
        raise UsageError(f"prompts are of type {kind}, expected one text or several.")
    return _one_each(several, prompts)


def _one_each(images: Iterable[Shown], prompts: Iterable[str]) -> Iterator[tuple[Shown, str]]:
    """Pairs of both; that one kind runs out first is found when it does."""
    missing: Any = object()
    for image, prompt in zip_longest(images, prompts, fillvalue=missing):
        if image is missing or prompt is missing:
            raise UsageError(
                "there are not as many prompts as pictures, expected one for each, or one for all."
            )
        yield image, prompt


def layers_of(given: Any, count: int) -> list[int]:
    """One number of a layer or several, as a list; negative ones count from the end."""
    try:
        numbers = [operator.index(n) for n in (given if isinstance(given, Iterable) else [given])]
    except TypeError:
        numbers = []
    if not numbers or not all(-count <= n < count for n in numbers):
        wrong = [n for n in numbers if not -count <= n < count]
        found = f"layer {wrong[0]} is asked for" if wrong else f"layers is {given!r}"
        raise UsageError(f"{found}, expected numbers from {-count} to {count - 1}.")
    return [n % count for n in numbers]


def key_of(picture: Shown) -> str | int:
    """The same for the same picture: its path, or the identity of one in memory."""
    return str(picture) if isinstance(picture, (str, Path)) else id(picture)


def names_of(given: Any, pictures: Sequence[Shown]) -> str | list[str]:
    """How an answer calls its pictures: a list where one was given."""
    return name_of(given) if is_one(given) else [name_of(picture) for picture in pictures]


def name_of(picture: Shown) -> str:
    """How an answer calls its picture."""
    if isinstance(picture, Seen):
        return picture.name
    if isinstance(picture, (str, Path)):
        return str(picture)
    return str(getattr(picture, "filename", "") or getattr(picture, "name", ""))
