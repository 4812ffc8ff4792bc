"""`npvlm models`."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from npvlm.work.models import Listed, Listing

NAME = 33  # columns for the longest name
COLUMNS = ("float32", "bfloat16", "int8", "int4")


@click.command()
@click.argument("words", metavar="[WORD]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Those fine-tuned for one task as well.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with everything, in bytes.")
def models(words: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """List the models there are, what they need, and whether this machine has it.

    \b
    npvlm models                  the bundled ones, and Google's for general use
    npvlm models mix 448          whose names have both words
    npvlm models documents        fine-tuned for that

    Memory is that of the weights and of a run on one picture.
    """
    from npvlm.work.models import list_models

    listing = list_models(words)
    if not listing.models:
        raise click.UsageError(f"no model has {' and '.join(words)} in its name or purpose.")
    if as_json:
        click.echo(json.dumps(listing.to_dict()))
        return
    tuned = [m for m in listing.models if m.kind == "ft" and m.name.startswith("paligemma-")]
    hidden = [] if words or everything else tuned
    click.echo("\n".join(_table(listing, [m for m in listing.models if m not in hidden])))
    if hidden:
        click.echo(
            f"{len(hidden)} more are PaliGemma 3B tuned for one task each: documents, charts, "
            "counting, masks, ...:\n`npvlm models --all`, `npvlm models documents`."
        )


def _table(listing: Listing, shown: list[Listed]) -> list[str]:
    """Rows under headings that say what they are for, and what the columns mean."""
    memory = listing.memory_free
    known = "an unknown amount" if memory is None else f"{memory / 1e9:.1f} GB"
    head = "".join(title.rjust(10) for title in ("fetch", *COLUMNS))
    lines = [
        f"Free here: {known} of memory, {listing.disk_free / 1e9:.1f} GB of disk.",
        "GB to fetch, and GB of memory at each precision; ! is more than is free.",
        "",
        f"{'':{NAME}}{head}  here",
    ]
    for purpose, group in groupby(shown, key=lambda model: model.purpose):
        lines += ["", purpose, *map(_row, group)]
    licences = {model.licence: model for model in shown}
    named = (f"{licence} ({_whose(model)})" for licence, model in licences.items())
    return [
        *lines,
        "",
        "float32 computes on weights as they are stored. int8 and int4 are packed in memory, or",
        "once for all by `npvlm convert`, which takes as much disk again.",
        f"Licences: {', '.join(named)}.",
    ]


def _row(model: Listed) -> str:
    needs = [model.needs[precision] for precision in COLUMNS]
    disk = needs[0].disk_suffices
    cells = [_cell(model.fetch, disk) if model.fetch else "-  "]
    cells += [_cell(need.memory, need.memory_suffices is not False) for need in needs]
    numbers = "".join(cell.rjust(10) for cell in cells)
    return f"  {model.name:{NAME - 2}}{numbers}  {model.here}".rstrip()


def _cell(count: int, suffices: bool) -> str:
    return f"{count / 1e9:.1f}{' ' if suffices else '!'}"


def _whose(model: Listed) -> str:
    return "accepted on a model's page" if model.repo else "what is in the box"
