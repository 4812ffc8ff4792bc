"""`npvlm search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npvlm.cli.asking import sentence
from npvlm.cli.lines import line
from npvlm.cli.options import (
    open_retriever,
    precision_option,
    quiet_option,
    threads_option,
)
from npvlm.cli.progress import counted

if TYPE_CHECKING:
    from npvlm.answers.match import Match
    from npvlm.files.index import PageIndex
    from npvlm.retrieval import Hit, Retriever


@click.command()
@click.argument("index", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("query")
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Pages at most."
)
@click.option(
    "--heat",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Draw each page found, once for each word, lit where it fits, into a new folder.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each page.")
@click.option(
    "--model",
    metavar="NAME|FOLDER",
    help="The ColPali that made the index.  [default: where the index says that it lay]",
)
@precision_option
@threads_option
@quiet_option
def search(
    index: Path,
    query: str,
    top: int,
    heat: Path | None,
    as_json: bool,
    model: str | None,
    precision: str | None,
    quiet: bool,
) -> int:
    """Find the pages of INDEX that fit QUERY best: place, score and path of each.

    \b
    npvlm search index.safetensors "revenue by region in 2023" --top 3 --model colpali
    npvlm search index.safetensors "revenue by region" --heat found --model colpali
    """
    from npvlm.answers.lines import json_line
    from npvlm.errors import NpvlmError
    from npvlm.files.index import open_index
    from npvlm.work.gallery import make_folder

    named = open_index(index)
    if heat is not None:
        _check(heat, named)
    opened = _open(model, named, precision, quiet)
    found = opened.open(index)
    failed = 0
    hits = opened.search(found, query, top)
    if heat is not None:
        make_folder(heat)
    for hit in hits:
        match = None
        if heat is not None:
            try:
                match = opened.match(found, hit, query)
                match.draw(heat / f"{hit.rank}-{Path(hit.page.path).stem}.png")
            except NpvlmError as error:
                failed += 1
                click.echo(f"npvlm: {sentence(str(error))}", err=True)
        click.echo(json_line(_facts(hit, match)) if as_json else line(_columns(hit)))
    if heat is not None and not quiet:
        click.echo(f"npvlm: {counted(len(hits) - failed, 'page')} drawn in {heat}", err=True)
    return 3 if failed else 0


def _open(model: str | None, index: PageIndex, precision: str | None, quiet: bool) -> Retriever:
    """The model that is named, else the one that the index names."""
    from npvlm.errors import NpvlmError

    if model is not None:
        return open_retriever(model, precision, quiet)
    try:
        return open_retriever(index.origin.model, precision, quiet)
    except NpvlmError as error:
        raise type(error)(
            f"{index.file} names its model: {str(error).rstrip('.')}; name it with --model."
        ) from None


def _check(folder: Path, index: PageIndex) -> None:
    """Drawings must not take the place of a page, nor stand among those of another query."""
    from npvlm.errors import UsageError
    from npvlm.files.output import check_new

    place = folder.resolve()
    for around in {Path(page.path).resolve().parent for page in index.pages}:
        if place.is_relative_to(around):
            raise UsageError(
                f"{folder} is where pages of {index.file} are, in {around}, and drawings would be "
                "taken for some; name a folder elsewhere."
            )
    check_new(folder)


def _columns(hit: Hit) -> list[str]:
    return [str(hit.rank), f"{hit.score:.4f}", hit.page.path]


def _facts(hit: Hit, match: Match | None) -> dict[str, Any]:
    """A page for JSON; with its words where they were looked at."""
    facts: dict[str, Any] = {"rank": hit.rank, "score": hit.score, "page": hit.page.path}
    facts |= {"width": hit.page.width, "height": hit.page.height}
    return facts if match is None else facts | {"words": match.facts()}
