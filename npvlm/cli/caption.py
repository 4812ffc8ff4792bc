"""`npvlm caption`, `npvlm ask` and `npvlm ocr`: answers in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npvlm.cli.asking import (
    answer_all,
    find_pictures,
    is_one,
    max_tokens_option,
    split_last,
    stream,
)
from npvlm.cli.lines import line
from npvlm.cli.options import (
    adapter_option,
    json_option,
    model_option,
    named_model,
    open_model,
    precision_option,
    quiet_option,
    threads_option,
)

if TYPE_CHECKING:
    from npvlm.answers.answer import Answer
    from npvlm.answers.detection import Detection

_LANG = "A language's code, such as de or pt-br, if the model knows it."


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what the three have in common."""
    for option in (
        threads_option,
        quiet_option,
        json_option,
        max_tokens_option,
        precision_option,
        adapter_option,
        model_option,
    ):
        command = option(command)
    return command


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option("--lang", default="en", show_default=True, help=_LANG)
@_options
def caption(images: tuple[str, ...], lang: str, **given: Any) -> int:
    """Say what is on each IMAGE.

    An IMAGE is a file, a folder, a pattern, or - for stdin. One file streams its answer; anything
    else prints PATH<tab>ANSWER lines, in which a backslash, tab or line end is written as
    \\\\, \\t, \\n.

    \b
    npvlm caption photo.jpg --model paligemma-3b-mix-224
    npvlm caption holiday/ --lang de
    """
    from npvlm.answers.tasks import caption_prompt

    return _answer(images, caption_prompt(lang), **given)


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE... QUESTION")
@click.option("--lang", default="en", show_default=True, help=_LANG)
@_options
def ask(images: tuple[str, ...], lang: str, **given: Any) -> int:
    """Answer a QUESTION about each IMAGE.

    An IMAGE is a file, a folder, a pattern, or - for stdin. Output as of `npvlm caption`.

    \b
    npvlm ask photo.jpg "what is the man holding?"
    npvlm ask *.jpg "how many people are there?" --json
    """
    from npvlm.answers.tasks import ask_prompt

    pictures, question = split_last(images, "a QUESTION")
    return _answer(pictures, ask_prompt(question, lang), **given)


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE...")
@_options
def ocr(images: tuple[str, ...], **given: Any) -> int:
    """Read the text on each IMAGE.

    An IMAGE is a file, a folder, a pattern, or - for stdin. Output as of `npvlm caption`.

    \b
    npvlm ocr sign.jpg
    scan | npvlm ocr -
    """
    from npvlm.answers.tasks import ocr_prompt

    return _answer(images, ocr_prompt(), **given)


def _answer(
    images: Sequence[str],
    prompt: str,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    max_tokens: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Ask, and print each answer as it comes."""
    pictures = find_pictures(images)
    opened = open_model(named_model(model, quiet), precision, "kernels", quiet, adapter)
    if is_one(images) and not as_json:
        stream(opened, pictures[0], prompt, max_tokens, quiet)
        return 0

    def show(result: Answer | Detection) -> None:
        answer: Any = result
        click.echo(answer.to_json() if as_json else line([str(answer.image), answer.text]))

    return answer_all(opened, pictures, prompt, max_tokens, show, quiet)
