"""`npvlm trace`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npvlm.cli.asking import note_image_marks
from npvlm.cli.options import (
    adapter_option,
    model_option,
    open_model,
    precision_option,
    threads_option,
)

if TYPE_CHECKING:
    from npvlm.api import Model
    from npvlm.porting.trace import Trace


@click.command()
@click.argument("image")
@click.option("--prompt", required=True, help='What is asked of the picture, such as "caption en".')
@model_option
@adapter_option
@precision_option
@click.option(
    "--ops",
    type=click.Choice(["kernels", "numpy"]),
    default="numpy",
    show_default=True,
    help="The definitions show every stage; kernels do some stages in one go.",
)
@click.option(
    "--only", metavar="GLOBS", help='Stages to keep, such as "*.layers.0.*,pixel_values".'
)
@click.option(
    "--step",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="0 is the prefill, n the n-th decoding step of the greedy answer.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=".safetensors or .bin (a .json manifest beside it), or a new folder of .npy files.",
)
@click.option(
    "--compact", is_flag=True, help="--save a .json alone: statistics in place of numbers."
)
@click.option("--json", "as_json", is_flag=True, help="The manifest on stdout.")
@threads_option
def trace(
    image: str,
    prompt: str,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    ops: str,
    only: str | None,
    step: int,
    save: Path | None,
    compact: bool,
    as_json: bool,
) -> None:
    """Run a model on IMAGE once and show every stage on the way from picture to scores.

    Each line is a stage: its name, shape, type, mean, standard deviation, first values, and the
    line of npvlm that made it. docs/stages.md says what each is.

    \b
    npvlm trace photo.jpg --prompt "caption en" --only "*.layers.0.*"
    npvlm trace photo.jpg --prompt "caption en" --save reference.safetensors
    """
    from npvlm.porting.dumps import check_place, manifest, save_trace
    from npvlm.porting.floors import floors
    from npvlm.porting.trace import trace as run

    if compact and save is None:
        raise click.UsageError("--compact says how to --save; name a .json there.")
    if save is not None:
        check_place(save, compact)
    opened = open_model(model or "shapes", precision, ops, adapter=adapter)
    note_image_marks(opened, prompt)
    found = run(opened, image, prompt, step=step, only=only)
    if save is not None:
        click.echo("npvlm: four more runs for the noise floors.", err=True)
        save_trace(found, save, floors(found, opened), compact=compact)
        click.echo(f"npvlm: {save} is written.", err=True)
    if as_json:
        click.echo(json.dumps(manifest(found, {})))
    else:
        _show(found, opened)


def _show(found: Trace, model: Model) -> None:
    """A line for each stage, and the token that follows."""
    from npvlm.porting.statistics import describe

    facts = found.facts
    call = f"decoding step {facts['step']}" if facts["step"] else "picture and prompt read at once"
    click.echo(f"{model.called}, {facts['prompt']!r}: {call}")

    wide = max(len(name) for name in found.stages)
    head = f"{'stage':<{wide}}  {'shape':>13}  {'type':>4}  {'mean':>10}  {'std':>9}  first values"
    click.echo(f"{head:<{wide + 90}}made in")
    for name, value in found.stages.items():
        notes = describe(value)
        shape = "x".join(map(str, notes["shape"]))
        first = " ".join(f"{number:.4g}" for number in notes["first"][:4])
        line = (
            f"{name:<{wide}}  {shape:>13}  {notes['dtype']:>4}  {notes['mean']:>10.4g}  "
            f"{notes['std']:>9.4g}  {first}"
        )
        click.echo(f"{line:<{wide + 90}}{found.sources[name]}")
    if (scores := found.stages.get("language_model.logits")) is not None:
        chosen = int(scores[-1].argmax())
        click.echo(f"next token: {chosen}, {model.tokenizer.decode([chosen])!r}")
