"""`npvlm generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from npvlm.cli.asking import Tail, note_image_marks
from npvlm.cli.lines import line
from npvlm.cli.options import (
    Finite,
    adapter_option,
    model_option,
    named_model,
    open_model,
    ops_option,
    precision_option,
    quiet_option,
    threads_option,
)

if TYPE_CHECKING:
    from npvlm.api import Answer, Model
    from npvlm.decoding.sampling import Sampling


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option(
    "--image_file_path", "more_images", multiple=True, help="An IMAGE more, after the others."
)
@click.option("--prompt", help='What to do, such as "caption en".  [required]')
@model_option
@adapter_option
@precision_option
@click.option(
    "--max-tokens",
    "--max_tokens_to_generate",
    "max_tokens",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Most tokens of an answer.",
)
@click.option("--temperature", type=Finite(min=0), help="Draw tokens; 0 is greedy always.")
@click.option(
    "--top-k",
    "--top_k",
    "top_k",
    type=click.IntRange(min=1),
    help="Draw among the N likeliest. Off unless given: no hidden 50 as in transformers.",
)
@click.option(
    "--top-p",
    "--top_p",
    "top_p",
    type=Finite(min=0, min_open=True, max=1),
    help="Draw among the likeliest that reach this probability together.",
)
@click.option(
    "--do_sample",
    type=click.BOOL,
    metavar="True|False",
    help="True: temperature 0.8 and top-p 0.9 unless given. False: greedy.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the draws.  [default: a new one]")
@click.option(
    "--beams",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Write N answers side by side and give the likeliest, whole; draws nothing.",
)
@click.option("--together", is_flag=True, help="All pictures in front of one prompt, one answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per answer.")
@ops_option
@click.option("--only_cpu", type=click.BOOL, metavar="True|False", help="Accepted; always so.")
@quiet_option
@threads_option
def generate(
    images: tuple[str, ...],
    more_images: tuple[str, ...],
    prompt: str | None,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    max_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    do_sample: bool | None,
    seed: int | None,
    beams: int,
    together: bool,
    as_json: bool,
    ops: str,
    only_cpu: bool | None,
    quiet: bool,
) -> None:
    """Answer one prompt about each IMAGE.

    One picture streams its answer to stdout; several print PATH<tab>ANSWER lines, in which a
    backslash, tab or line end is written as \\\\, \\t, \\n. Everything else goes to stderr.
    Greedy unless --temperature above 0, --top-k, --top-p or --do_sample True is given.

    \b
    npvlm generate photo.jpg --prompt "caption en" --model paligemma-3b-mix-224
    npvlm generate before.jpg after.jpg --together --prompt "answer en what changed?"
    """
    pictures = [*images, *more_images]
    if not pictures:
        raise click.UsageError("Missing IMAGE: name at least one picture.")
    if prompt is None:
        raise click.UsageError('Missing --prompt, such as --prompt "caption en".')
    if do_sample is False:
        temperature = 0.0
    elif do_sample:
        temperature = 0.8 if temperature is None else temperature
        top_p = 0.9 if top_p is None else top_p

    from npvlm.decoding.sampling import Sampling, draw_seed

    sampling = Sampling(temperature, top_k, top_p)
    if beams > 1 and not sampling.greedy:
        raise click.UsageError("--beams draws nothing: leave it out, or the options that draw.")
    if seed is None and not sampling.greedy:
        seed = draw_seed()
        _note(f"seed {seed}", quiet)
    if only_cpu is False:
        _note("--only_cpu False changes nothing: npvlm runs on the CPU.", quiet)
    answer(
        open_model(named_model(model, quiet), precision, ops, quiet, adapter),
        [pictures] if together else pictures,
        prompt,
        sampling,
        max_tokens,
        seed,
        beams,
        as_json,
        quiet,
    )


def answer(
    model: Model,
    pictures: list[str] | list[list[str]],
    prompt: str,
    sampling: Sampling,
    max_tokens: int,
    seed: int | None,
    beams: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the model and print: a stream for one answer, a line for each of several."""
    from npvlm.api import Piece

    if not quiet:
        note_image_marks(model, prompt)
    tail = Tail()
    streaming = len(pictures) == 1 and not as_json
    for event in model.events(
        pictures, prompt, sampling, max_tokens=max_tokens, seed=seed, beams=beams
    ):
        if isinstance(event, Piece):
            if streaming:
                click.echo(event.text, nl=False)
            continue
        click.echo(event.to_json() if as_json else "" if streaming else _line(event))
        tail.add(event)
    if not quiet:
        tail.print()


def _note(what: str, quiet: bool) -> None:
    if not quiet:
        click.echo(f"npvlm: {what}", err=True)


def _line(answer: Answer) -> str:
    """One line for one answer, whatever is in it."""
    return line([str(answer.image), answer.text])
