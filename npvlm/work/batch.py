"""Ask about any number of pictures and keep a record of each; go on where an earlier run ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from npvlm.answers import tasks
from npvlm.api import Failed, Model
from npvlm.files.pictures import said_name
from npvlm.work.batch_input import Item
from npvlm.work.batch_output import open_records
from npvlm.work.batch_parquet import read_pictures
from npvlm.work.memory import Memory, PeakMemory

# What answers items one by one, in order, with at most so many tokens: `answer`, or a cluster's.
Engine = Callable[[Model, Sequence[Item], int | None], Generator[dict[str, Any], None, None]]

# What an answer has besides: item.head says the first two, timings differ from run to run, every
# answer is greedy, and the ids of the prompt are 256 or more of which nearly all are the same one.
_NAMELESS = "the picture"  # how errors call the bytes of one
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
    engine: Engine | None = None,
) -> tuple[Progress, Memory | None]:
    """Write a record for each item, in order, each as soon as it is there.

    Parameters
    ----------
    tell : is told at the beginning and after each record how far things are
    tell_error : is told of each picture, or list with a broken line, why there is no answer
    max_tokens : most tokens of an answer; by default what its task needs
    resume : go on after the records that the file holds
    engine : what answers; by default the model, in this process

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
        with closing((engine or answer)(model, asked, max_tokens)) as answers:
            for item, record in zip(asked, answers, strict=True):
                records.append(record)
                if "error" in record:
                    tell_error(item.path, record["error"])
                tokens += len(record.get("token_ids", ()))
                tell(now())
    return now(), peak.memory


def answer(
    model: Model,
    items: Sequence[Item],
    max_tokens: int | None = None,
    pictures: Iterable[Path | bytes] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Give the record of each item, in order: its answer, or why there is none.

    `pictures` are those of the items that can be asked, where somebody else has read them.
    """
    asked = [item for item in items if item.error is None]
    images = pictures_of(asked) if pictures is None else pictures
    prompts = (item.prompt or "" for item in asked)
    results = model.batch(images, prompts, max_tokens=max_tokens)
    for item in items:
        if item.error is not None:
            yield {**item.head, "error": item.error}
            continue
        result = next(results)
        if isinstance(result, Failed):
            yield {**item.head, "error": _named(result.error, item)}
            continue
        said = {k: v for k, v in result.to_dict().items() if k not in _DROPPED}
        yield {**item.head, **said, **_settings(model, item, max_tokens)}


def pictures_of(items: Sequence[Item]) -> Iterator[Path | bytes]:
    """The picture of each item: its path, or its bytes from a Parquet file, read when asked for."""
    for (path, group), some in groupby(items, group_of):
        if group is None:
            yield from (item.path for item in some)
        else:
            yield from read_pictures(path, group, [item.stored.row for item in some if item.stored])


def group_of(item: Item) -> tuple[Path, int | None]:
    """The file of a picture, and its row group there: what is best read in one go."""
    return item.path, item.stored.group if item.stored else None


def _named(error: str, item: Item) -> str:
    """An error about bytes, which have no name of their own."""
    nameless = item.stored is not None and error.startswith(_NAMELESS)
    return said_name(item.image or "") + error.removeprefix(_NAMELESS) if nameless else error


def _settings(model: Model, item: Item, max_tokens: int | None) -> dict[str, Any]:
    """What an answer depends on besides the picture and the prompt."""
    limit = max_tokens or tasks.max_tokens(item.prompt or "")
    return {"model": model.called, "precision": model.precision, "max_tokens": limit}
