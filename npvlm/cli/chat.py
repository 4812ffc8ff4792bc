"""`npvlm chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npvlm.cli.asking import (
    STDIN,
    Tail,
    box_columns,
    max_tokens_option,
    note_image_marks,
    one_picture,
)
from npvlm.cli.lines import line as columns
from npvlm.cli.options import (
    adapter_option,
    model_option,
    named_model,
    open_model,
    precision_option,
    quiet_option,
    threads_option,
)

if TYPE_CHECKING:
    from npvlm.api import Answer, Model, Seen

TASKS = ("answer", "cap", "caption", "describe", "detect", "ocr", "question", "segment")
HINT = "Type a prompt, such as caption en, detect cat ; dog, or a question; quit or Ctrl-D ends."
ALONE = "Each line stands alone: PaliGemma does not remember what was said before."
ENDS = ("quit", "exit")


@click.command()
@click.argument("image")
@model_option
@adapter_option
@precision_option
@max_tokens_option
@quiet_option
@threads_option
def chat(
    image: str,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    max_tokens: int | None,
    quiet: bool,
) -> None:
    """Ask about one IMAGE line by line; it is looked at once.

    Each line stands alone: PaliGemma is no chat model and does not remember what was said before. A
    line that begins with no task (caption, detect, ...) is asked as a question: answer en LINE.
    Lines are typed, or come down a pipe; quit or exit ends.

    \b
    npvlm chat photo.jpg --model paligemma-3b-mix-224
    npvlm chat photo.jpg < questions.txt
    """
    if image == STDIN:
        raise click.UsageError("the lines come from stdin, so the picture cannot: name a file.")
    picture = one_picture(image)
    from npvlm.answers.tasks import max_tokens as usual
    from npvlm.answers.tasks import task_of
    from npvlm.api import Piece
    from npvlm.decoding.sampling import Sampling
    from npvlm.errors import UsageError

    opened = open_model(named_model(model, quiet), precision, "kernels", quiet, adapter)
    seen = opened.look(picture)
    if not quiet:
        typed = sys.stdin.isatty()
        click.echo(f"{HINT}\n{ALONE}" if typed else ALONE, err=True)
    for line in _lines():
        prompt = line if task_of(line) in TASKS else f"answer en {line}"
        if not quiet:
            note_image_marks(opened, prompt)
        tail, finds = Tail(), task_of(prompt) in ("detect", "segment")
        try:
            limit = max_tokens or usual(prompt)
            for event in opened.events(seen, prompt, Sampling(), max_tokens=limit):
                if not isinstance(event, Piece):
                    click.echo(_boxes(opened, event, seen) if finds else "")
                    tail.add(event)
                elif not finds:
                    click.echo(event.text, nl=False)
        except UsageError as error:  # too long, or no text: the next line may be better
            click.echo(f"npvlm: {error}", err=True)
        if not quiet:
            tail.print()


def _boxes(model: Model, answer: Answer, seen: Seen) -> str:
    """The things of an answer, one on each line; an answer without any as it is."""
    found = model.detection(answer, seen)
    return "\n".join(columns(box_columns(box)) for box in found.boxes) or answer.text


def _lines() -> Iterator[str]:
    """What is typed, or comes down a pipe, without empty lines, until it ends or a line says so."""
    typing = sys.stdin.isatty() and sys.stdout.isatty()
    if typing:
        import readline  # noqa: F401 (importing it makes lines editable)
    while True:
        try:
            line = input("> ") if typing else input()
        except EOFError:
            if typing:
                click.echo()
            return
        if line.strip().lower() in ENDS:
            return
        if line.strip():
            yield line.strip()
