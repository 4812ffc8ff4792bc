"""Many pictures: which of them are answered together, and how files are read meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from npvlm.answers.confidence import PlaceWatch
from npvlm.asked import Failed, Seen, Shown
from npvlm.decoding.generate import Token
from npvlm.decoding.prompt import TextStream
from npvlm.model.ops import Index

# Sequences answered together, and prefix tokens read together: more would be faster still, but the
# first answer is there only when all are, and a prefill takes memory for every token.
PACKED_SEQUENCES, PACKED_TOKENS = 8, 4096

Prepared = Failed | tuple[Seen, str]  # a picture and its prompt, ready to be answered


@dataclass
class Started:
    """One answer in the making."""

    index: int
    image: str | list[str]
    pictures: list[Shown]
    prompt: str
    ids: Index
    max_tokens: int
    chooser: PlaceWatch
    text: TextStream
    tokens: list[Token] = field(default_factory=list)


def packs_of(sequences: list[Started], beams: int) -> Iterator[list[Started]]:
    """Neighbours that are few enough and fit together; one alone may be longer.

    A sequence counts as often as it has beams.
    """
    pack: list[Started] = []
    for sequence in sequences:
        tokens = beams * sum(len(s.ids) for s in [*pack, sequence])
        count = beams * (len(pack) + 1)
        if pack and (count > PACKED_SEQUENCES or tokens > PACKED_TOKENS):
            yield pack
            pack = []
        pack.append(sequence)
    if pack:
        yield pack


def read_ahead(
    pairs: Iterable[tuple[Shown, str]], prepare: Callable[[Shown, str], Prepared]
) -> Iterator[list[Prepared]]:
    """Packs of prepared pictures; the files of one are read while the one before is answered.

    Only files are left to a thread: anything else may change when the next one is asked for.
    """

    def pack() -> list[Prepared]:
        first = ahead[:PACKED_SEQUENCES]
        del ahead[:PACKED_SEQUENCES]
        return [entry.result() if isinstance(entry, Future) else entry for entry in first]

    ahead: list[Prepared | Future[Prepared]] = []
    reader = ThreadPoolExecutor(1)
    try:
        for image, prompt in pairs:
            is_file = isinstance(image, (str, Path))
            ahead.append(
                reader.submit(prepare, image, prompt) if is_file else prepare(image, prompt)
            )
            if len(ahead) == 2 * PACKED_SEQUENCES:
                yield pack()
        while ahead:
            yield pack()
    finally:
        reader.shutdown(cancel_futures=True)


class UntilError:
    """What an iterable gives before it raises something, which is kept for later."""

    def __init__(self, source: Iterable[tuple[Shown, str]]) -> None:
        self._source = source
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[Shown, str]]:
        try:
            yield from self._source
        except Exception as error:
            self.error = error
