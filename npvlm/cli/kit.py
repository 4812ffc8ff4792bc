"""`npvlm kit`."""

from __future__ import annotations

from pathlib import Path

import click

from npvlm.cli.options import threads_option


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o",
    "--output",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A new folder, or an empty one.",
)
@threads_option
def kit(model: str | None, folder: Path) -> None:
    """Write all that it takes to check another implementation against MODEL.

    That is twelve steps (PORTING.md), reference dumps, pictures, and readers in C, Rust and
    JavaScript, to be committed to the other implementation's repository. Without MODEL: two random
    models, one of each family, and the bundled one, weights included, in less than 10 MB. Of a
    published model the weights stay where they are, and it takes some minutes.

    \b
    npvlm kit -o kit
    npvlm kit paligemma-3b-mix-224 -o kit-3b
    """
    from npvlm.porting.kit import kit as run

    run(model, folder, lambda what: click.echo(f"npvlm: {what}", err=True))
    click.echo(f"npvlm: {folder} is written; begin with {folder / 'PORTING.md'}.", err=True)
