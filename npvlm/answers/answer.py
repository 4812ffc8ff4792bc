"""What the model says about a picture, and how sure it was."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from npvlm.answers.lines import json_line


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of the packed call that gave an answer, by part."""

    image: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class Answer:
    """What the model says about a picture (or several at once), and how sure it was.

    image : the picture as it was given, a list where one was given
    prompt : as it was given
    text : the answer without special tokens
    token_ids : every generated id, an eos that ended it included
    logprobs : for each of them the natural logarithm of the model's own probability, after the
        soft-cap and before temperature and filters
    nearby : the same, but a location with those that lie within a hundredth of the picture's side
    prompt_token_ids : everything the decoder read, image ids included
    stop : "eos" or "length"
    model : the model as it was named
    precision : "float32", "bfloat16", "int8" or "int4"
    seed : of the random draws; None where the answer is greedy
    seconds : of the packed call that this answer was part of
    """

    image: str | list[str]
    prompt: str
    text: str
    token_ids: list[int]
    logprobs: list[float]
    nearby: list[float] = field(repr=False)
    prompt_token_ids: list[int]
    stop: str
    model: str
    precision: str
    seed: int | None
    seconds: Seconds

    @property
    def logprob(self) -> float:
        """The logarithm of the probability of the whole answer: the sum over its tokens."""
        return math.fsum(self.logprobs)

    def to_dict(self) -> dict[str, Any]:
        """The fields but for `nearby`, and `logprob` last."""
        values = asdict(self)
        del values["nearby"]
        return values | {"logprob": self.logprob}

    def to_json(self) -> str:
        """One line of JSON with these fields, from which every number reads back the same."""
        return json_line(self.to_dict())
