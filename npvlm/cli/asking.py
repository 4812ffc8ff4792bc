"""What the commands that ask about pictures share: pictures in, answers out, a tail line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

if TYPE_CHECKING:
    from npvlm.answers.answer import Answer, Seconds
    from npvlm.answers.boxes import Box
    from npvlm.answers.detection import Detection
    from npvlm.api import Model

STDIN = "-"


def max_tokens_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --max-tokens."""
    return click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        help="Most tokens of an answer.  [default: what the task needs]",
    )(command)


def find_pictures(names: Sequence[str]) -> list[Path | BinaryIO]:
    """What was named: files, folders, patterns, and `-` for a picture on stdin.

    Raises
    ------
    UsageError
        Where nothing is named, or stdin twice.
    NpvlmError
        Where a name stands for no picture.
    """
    from npvlm.errors import UsageError
    from npvlm.files.listing import list_pictures

    if not names:
        raise click.UsageError("Missing IMAGE: name at least one picture.")
    if names.count(STDIN) > 1:
        raise UsageError("- is named twice, expected one picture on stdin.")
    if STDIN not in names:
        return [*list_pictures(names)]
    at = names.index(STDIN)
    before, after = names[:at], names[at + 1 :]
    return [*_list(before), _stdin(), *_list(after)]


def is_one(names: Sequence[str]) -> bool:
    """Whether one picture is named, not a folder or pattern that happens to hold one."""
    return len(names) == 1 and (names[0] == STDIN or _is_file(names[0]))


def _is_file(name: str) -> bool:
    return os.path.isfile(name)  # noqa: PTH113 (Path.is_file raises where a name is too long)


def paths_of(pictures: Sequence[Path | BinaryIO]) -> list[Path]:
    """Those of the pictures that are files."""
    return [picture for picture in pictures if isinstance(picture, Path)]


def one_picture(name: str) -> Path | BinaryIO:
    """The one picture that was named, on stdin perhaps."""
    pictures = find_pictures([name])
    if len(pictures) > 1:
        raise click.UsageError(f"{name} is {len(pictures)} pictures, expected one.")
    return pictures[0]


def _list(names: Sequence[str]) -> list[Path]:
    from npvlm.files.listing import list_pictures

    return list_pictures(names) if names else []


def _stdin() -> BinaryIO:
    """The picture on stdin, all of it, under the name `-`."""
    from npvlm.errors import NpvlmError
    from npvlm.files.pictures import read_bounded

    content = read_bounded(sys.stdin.buffer, "stdin")
    if not content:
        raise NpvlmError("stdin is empty, expected a picture.")
    picture = io.BytesIO(content)
    picture.name = STDIN
    return picture


def split_last(arguments: Sequence[str], wanted: str) -> tuple[Sequence[str], str]:
    """The pictures, and the question or labels behind them.

    Raises
    ------
    click.UsageError
        Where one of the two is missing.
    NpvlmError
        Where a picture is not there.
    """
    from npvlm.errors import NpvlmError

    usage = f"expected IMAGE... and {wanted} as the last argument."
    if len(arguments) < 2:
        given = "nothing is" if not arguments else f"only {arguments[0]!r} is"
        raise click.UsageError(f"{given} given, {usage}")
    if _is_file(arguments[-1]):
        raise click.UsageError(f"{arguments[-1]!r} is a file, {usage}")
    for name in arguments[:-1]:
        if not (name == STDIN or set(name) & set("*?[") or os.path.lexists(name)):
            words = "; several words go in quotes" if len(arguments) > 2 else ""
            raise NpvlmError(f"{name!r} is no file or folder, {usage.removesuffix('.')}{words}.")
    return arguments[:-1], arguments[-1]


def answer_all(
    model: Model,
    pictures: Sequence[Path | BinaryIO],
    prompt: str,
    max_tokens: int | None,
    show: Callable[[Answer | Detection], None],
    quiet: bool,
    bins: int = 1024,
) -> int:
    """Ask about each picture and show what comes; the exit code.

    A picture that cannot be read is said on stderr, and the others are answered all the same.
    """
    from npvlm.api import Failed

    if not quiet:
        note_image_marks(model, prompt)
    tail, failed = Tail(), 0
    for result in model.batch(pictures, prompt, max_tokens=max_tokens, bins=bins):
        if isinstance(result, Failed):
            failed += 1
            click.echo(f"npvlm: {sentence(result.error)}", err=True)
            continue
        show(result)
        tail.add(result)
        if not quiet:
            note_cut_off(result)
    if not quiet:
        tail.print()
    if failed and len(pictures) > 1:
        click.echo(f"npvlm: {failed} of {len(pictures)} pictures were not answered.", err=True)
    return 3 if failed else 0


def stream(
    model: Model, picture: Path | BinaryIO, prompt: str, max_tokens: int | None, quiet: bool
) -> None:
    """Ask about one picture and print the answer as it is written."""
    from npvlm.answers.tasks import max_tokens as usual
    from npvlm.api import Piece
    from npvlm.decoding.sampling import Sampling

    if not quiet:
        note_image_marks(model, prompt)
    limit = max_tokens or usual(prompt)
    tail = Tail()
    for event in model.events(picture, prompt, Sampling(), max_tokens=limit):
        if isinstance(event, Piece):
            click.echo(event.text, nl=False)
        else:
            click.echo()
            tail.add(event)
            if not quiet:
                note_cut_off(event)
    if not quiet:
        tail.print()


def note_image_marks(model: Model, prompt: str) -> None:
    """Say that a typed `<image>` is not part of what is asked."""
    if removed := model.tokenizer.strip_image_marks(prompt)[1]:
        note = f"{removed} <image> removed from the prompt; pictures go first anyway."
        click.echo(f"npvlm: {note}", err=True)


def note_cut_off(result: Answer | Detection) -> None:
    """Say that an answer would have gone on."""
    answer = _answer_of(result)
    if answer.stop == "length":
        name = "" if isinstance(answer.image, list) else f"{answer.image}: "
        count = len(answer.token_ids)
        note = f"{name}cut off after {count} tokens; --max-tokens allows more."
        click.echo(f"npvlm: {note}", err=True)


def _answer_of(result: Answer | Detection) -> Answer:
    """The answer itself, without what was found in it."""
    from npvlm.answers.detection import Detection

    return result.answer if isinstance(result, Detection) else result


def sentence(text: str) -> str:
    """A text with an end."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


class Tail:
    """The line at the end, on stderr: how much was read, how fast it was, what memory it took."""

    def __init__(self) -> None:
        self._pictures = self._prompt = self._tokens = 0
        self._first = self._decode = 0.0
        self._pack: Seconds | None = None  # answers of one pack share their seconds

    def add(self, result: Answer | Detection) -> None:
        """Count an answer."""
        answer = _answer_of(result)
        self._pictures += 1
        self._prompt = len(answer.prompt_token_ids)
        self._tokens += len(answer.token_ids) - 1
        if answer.seconds is not self._pack:
            self._pack = answer.seconds
            self._first += answer.seconds.image + answer.seconds.prefill
            self._decode += answer.seconds.decode

    def print(self) -> None:
        """Say it, if there is anything to say."""
        if not self._pictures:
            return
        if self._pictures > 1:
            parts = [f"{self._pictures} pictures in {self._first + self._decode:.1f} s"]
        else:
            parts = [f"{self._prompt} prompt tokens, first token after {self._first:.2f} s"]
        if self._tokens and self._decode:
            parts.append(f"{self._tokens / self._decode:.1f} tokens/s")
        if peak := _peak():
            parts.append(f"peak memory {peak / 1e9:.2f} GB")
        click.echo(f"npvlm: {', '.join(parts)}", err=True)


def _peak() -> int | None:
    from npvlm.work.memory import peak_memory

    return peak_memory()


def box_columns(box: Box) -> list[str]:
    """A box in words: label, x0, y0, x1, y1, confidence."""
    edges = [f"{edge:.0f}" for edge in (box.x0, box.y0, box.x1, box.y1)]
    return [box.label, *edges, f"{box.confidence:.2f}"]
