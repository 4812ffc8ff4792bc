"""Ask about any number of pictures and keep a record of each; go on where an earlier run ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npvlm.answers import tasks
from npvlm.api import Failed, Model
from npvlm.work.batch_input import Item
from npvlm.work.batch_output import open_records
from npvlm.work.memory import Memory, PeakMemory

# What an answer has besides: item.head says the first two, timings differ from run to run, every
# answer is greedy, and the ids of the prompt are 256 or more of which nearly all are the same one.
_DROPPED = ("image", "prompt", "seconds", "seed", "prompt_token_ids")


@dataclass(frozen=True)
class Progress:
    """Where a batch is.

    total : pictures of the whole input, or of this shard
    kept : records that an earlier run left
    done : records there are, those included
    errors : how many of all records say why there is no answer
    tokens : of the answers of this run
    seconds : since this run began
    """

    total: int
    kept: int
    done: int
    errors: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Pictures of this run in a second."""
        return (self.done - self.kept) / self.seconds if self.seconds else 0.0


def run_batch(
    model: Model,
    items: Sequence[Item],
    output: Path,
    tell: Callable[[Progress], None],
    tell_error: Callable[[Path, str], None],
    *,
    max_tokens: int | None = None,
    resume: bool = False,
) -> tuple[Progress, Memory | None]:
    """Write a record for each item, in order, each as soon as it is there.

    Parameters
    ----------
    tell : is told at the beginning and after each record how far things are
    tell_error : is told of each picture, or list with a broken line, why there is no answer
    max_tokens : most tokens of an answer; by default what its task needs
    resume : go on after the records that the file holds

    Returns
    -------
    How it ended, and the most memory it took.

    Raises
    ------
    UsageError, NpvlmError
        As `open_records`; and for a model that cannot answer anything.
    """
    model.batch((), (), max_tokens=max_tokens)  # a wrong number is found before the file is touched
    expected = [(item.head, _settings(model, item, max_tokens)) for item in items]
    began, tokens = time.perf_counter(), 0
    with open_records(output, expected, resume) as records, PeakMemory() as peak:
        kept = records.kept

        def now() -> Progress:
            seconds = time.perf_counter() - began
            return Progress(len(items), kept, records.kept, records.errors, tokens, seconds)

        tell(now())
        asked = items[kept:]
        for item, record in zip(asked, answer(model, asked, max_tokens), strict=True):
            records.append(record)
            if "error" in record:
                tell_error(item.path, record["error"])
            tokens += len(record.get("token_ids", ()))
            tell(now())
    return now(), peak.memory


def answer(
    model: Model, items: Sequence[Item], max_tokens: int | None = None
) -> Iterator[dict[str, Any]]:
    """Give the record of each item, in order: its answer, or why there is none."""
    asked = [item for item in items if item.error is None]
    images, prompts = (item.path for item in asked), (item.prompt or "" for item in asked)
    results = model.batch(images, prompts, max_tokens=max_tokens)
    for item in items:
        if item.error is not None:
            yield {**item.head, "error": item.error}
            continue
        result = next(results)
        if isinstance(result, Failed):
            yield {**item.head, "error": result.error}
            continue
        said = {k: v for k, v in result.to_dict().items() if k not in _DROPPED}
        yield {**item.head, **said, **_settings(model, item, max_tokens)}


def _settings(model: Model, item: Item, max_tokens: int | None) -> dict[str, Any]:
    """What an answer depends on besides the picture and the prompt."""
    limit = max_tokens or tasks.max_tokens(item.prompt or "")
    return {"model": model.called, "precision": model.precision, "max_tokens": limit}
