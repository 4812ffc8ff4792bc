"""`npvlm score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from npvlm.cli.asking import note_image_marks, one_picture
from npvlm.cli.lines import escaped
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
    from npvlm.answers.scores import Candidate


@click.command()
@click.argument("image")
@click.argument("prompt")
@click.argument("answers", nargs=-1, required=True, metavar="ANSWER...")
@model_option
@adapter_option
@precision_option
@click.option(
    "--by",
    type=click.Choice(["total", "mean"]),
    default="total",
    show_default=True,
    help="What ranks: the log-probability of the answer, or its mean over the tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, in the order given.")
@quiet_option
@threads_option
def score(
    image: str,
    prompt: str,
    answers: tuple[str, ...],
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    by: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Rank given answers to PROMPT about IMAGE by how probable the model finds them.

    Prints a table, the likeliest first: the log-probability of each ANSWER with its end (total),
    its mean over the tokens, and its share of the probability that all given ones have. A
    backslash, tab or line end is written as \\\\, \\t, \\n. Behind -- an ANSWER may begin with
    a hyphen.

    \b
    npvlm score photo.jpg "answer en is it raining?" yes no
    npvlm score photo.jpg "caption en" "a cat" "a cat on a red sofa" --by mean
    """
    picture = one_picture(image)
    opened = open_model(named_model(model, quiet), precision, "kernels", quiet, adapter)
    if not quiet:
        note_image_marks(opened, prompt)
    scores = opened.score(picture, prompt, answers)
    if as_json:
        click.echo(scores.to_json())
        return
    click.echo(f"{'total':>10} {'mean':>10} {'share':>8}  answer")
    for candidate in scores.ranked(by):
        click.echo(_line(candidate))


def _line(found: Candidate) -> str:
    numbers = f"{found.total:>z10.4f} {found.mean:>z10.4f} {found.share:>8.2%}"
    return f"{numbers}  {escaped(found.text)}"
