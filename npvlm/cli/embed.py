"""`npvlm embed`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from npvlm.cli.asking import find_pictures, paths_of, sentence
from npvlm.cli.interruption import Stopped
from npvlm.cli.options import (
    MODEL_VARIABLE,
    open_retriever,
    precision_option,
    quiet_option,
    threads_option,
)
from npvlm.cli.progress import ProgressLine, counted

if TYPE_CHECKING:
    from npvlm.work.embed import Embedded


@click.command()
@click.argument("pages", nargs=-1, required=True, metavar="PAGE...")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The index, a safetensors file.",
)
@click.option(
    "--store",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float16",
    show_default=True,
    help="How vectors are kept: in 4, 2 or 1 bytes a number.",
)
@click.option("--resume", is_flag=True, help="Keep the pages there are, and add the others.")
@click.option(
    "--model",
    envvar=MODEL_VARIABLE,
    metavar="NAME|FOLDER",
    help=f"A ColPali: its folder, or a fetched one's name.  [default: ${MODEL_VARIABLE}]",
)
@precision_option
@threads_option
@quiet_option
def embed(
    pages: tuple[str, ...],
    output: Path,
    store: str,
    resume: bool,
    model: str | None,
    precision: str | None,
    quiet: bool,
) -> int:
    """Make an index of pages, for `npvlm search`, with a ColPali.

    A PAGE is a picture: a file, a folder or a pattern.

    \b
    npvlm embed pages/ -o index.safetensors --model colpali
    npvlm embed pages/ more/ -o index.safetensors --resume --model colpali

    What is done lies in OUTPUT.part until all is: after a kill at any moment, the same command with
    --resume goes on. A page that cannot be read is said and left out, and the exit code is 3.
    """
    from npvlm.work.embed import embed_pages

    if "-" in pages:
        raise click.UsageError("a page is found again by its path, expected files, not stdin.")
    pictures = paths_of(find_pictures(pages))
    opened = open_retriever(model, precision, quiet)
    line, last = ProgressLine("pages", quiet), None

    def tell(progress: Embedded) -> None:
        nonlocal last
        last = progress
        done = progress.done + progress.failed
        line.show(done, progress.total, progress.kept, progress.failed)

    def tell_error(error: str) -> None:
        line.clear()
        click.echo(f"npvlm: {sentence(error)}", err=True)

    try:
        ended = embed_pages(opened, pictures, output, store, tell, tell_error, resume=resume)
    except Stopped:
        line.clear()
        if last is not None:
            note = f"{last.done} of {last.total} pages are done; --resume goes on."
            click.echo(f"npvlm: {note}", err=True)
        raise
    finally:
        line.clear()
    if not quiet:
        new = counted(ended.done - ended.kept, "page")
        click.echo(f"npvlm: {new} more, {ended.pages} in all, in {output}", err=True)
    if ended.failed:
        click.echo(f"npvlm: {counted(ended.failed, 'page')} of {ended.total} left out", err=True)
    return 3 if ended.failed else 0
