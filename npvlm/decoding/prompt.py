"""The layout of what the decoder reads: pictures, then `<bos>`, the prompt, and one newline."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from npvlm.model.ops import Index

QUERY_PADS = 10


class Tokenizer(Protocol):
    """What this package needs of a tokenizer."""

    @property
    def bos_id(self) -> int: ...
    @property
    def newline_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def image_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def is_whole(self, token_id: int) -> bool: ...


def layout(tokenizer: Tokenizer, prompt: str, image_tokens: int) -> Index:
    """Lay out one sequence: image tokens, `<bos>`, prompt, newline.

    PaliGemma was trained with exactly one newline behind the prompt, so trailing ones are dropped
    (two in a row would be another token).

    Parameters
    ----------
    prompt : text in which `<image>` has no meaning any more
    image_tokens : placeholders of all its pictures together, patches x pictures

    Returns
    -------
    ids [T], int64
    """
    text = tokenizer.encode(prompt.rstrip("\n"))
    images = [tokenizer.image_id] * image_tokens
    return np.array([*images, tokenizer.bos_id, *text, tokenizer.newline_id])


def query_layout(tokenizer: Tokenizer, query: str) -> Index:
    """Lay out what ColPali finds pages by: `<bos>`, the text, ten `<pad>`, newline.

    The padding is read like text: ColPali was trained to put there what else it may look for.

    Parameters
    ----------
    query : with what stands in front of it, "Question: " as published

    Returns
    -------
    ids [T], int64
    """
    padding = [tokenizer.pad_id] * QUERY_PADS
    text = tokenizer.encode(query)
    return np.array([tokenizer.bos_id, *text, *padding, tokenizer.newline_id])


class TextStream:
    """Text that grows token by token, handed out as soon as it can no longer change.

    A character may be spelled by several byte tokens, and what a run of them says is known only
    when it ends: until then it is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """What the next token adds to the text that is certain."""
        self._held.append(token)
        return self.finish() if self._tokenizer.is_whole(token) else ""

    def finish(self) -> str:
        """What was still held back."""
        text = self._tokenizer.decode(self._held)
        self._held = []
        return text
