"""`npvlm explain`."""

from __future__ import annotations

from pathlib import Path

import click

from npvlm.cli.asking import max_tokens_option, note_image_marks, one_picture, paths_of
from npvlm.cli.options import (
    adapter_option,
    model_option,
    named_model,
    open_model,
    precision_option,
    quiet_option,
    threads_option,
)

METHODS = ("attention", "occlusion")
OUTPUT = Path("npvlm-explain.png")


@click.command()
@click.argument("image")
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help=f"A PNG with the picture once for each word.  [default: {OUTPUT}, unless --html]",
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A page, complete in itself, where pointing at a word lights the picture.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=METHODS[0],
    show_default=True,
    help="Where the model looked; or what it needs, which takes 64 runs.",
)
@click.option("--answer", metavar="TEXT", help="Explain these words in place of the model's own.")
@max_tokens_option
@click.option("--json", "as_json", is_flag=True, help="Words, probabilities and heats on stdout.")
@model_option
@adapter_option
@precision_option
@threads_option
@quiet_option
def explain(
    image: str,
    prompt: str,
    output: Path | None,
    html: Path | None,
    method: str,
    answer: str | None,
    max_tokens: int | None,
    as_json: bool,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    quiet: bool,
) -> None:
    """Show which parts of IMAGE each word of the answer to PROMPT has to do with.

    \b
    npvlm explain photo.png "caption en" --html why.html
    npvlm explain photo.png "caption en" --method occlusion -o why.png

    Attention shows where the model looked as it chose a word, not that this decided it. Occlusion
    covers one part after another and measures how far the odds of the word fall.
    """
    from npvlm.work.gallery import check_output

    output = OUTPUT if output is None and html is None else output
    picture = one_picture(image)
    if output is not None:
        check_output(output, ".png", paths_of([picture]))
    if html is not None:
        check_output(html, ".html", paths_of([picture]))

    def say(what: str) -> None:
        if not quiet:
            click.echo(f"npvlm: {what}", err=True)

    opened = open_model(named_model(model, quiet), precision, "kernels", quiet, adapter)
    if not quiet:
        note_image_marks(opened, prompt)

    def tell(done: int, of: int) -> None:
        if done % 16 == 0:
            say(f"{done} of {of} parts of the picture were covered.")

    found = opened.explain(
        picture,
        prompt,
        answer=answer,
        method=method,
        max_tokens=max_tokens,
        tell=tell,
    )
    click.echo(found.to_json() if as_json else found.answer)
    if output is not None:
        found.draw(output)
        say(f"{output} shows the picture once for each of {len(found.words)} words.")
    if html is not None:
        found.html(html)
        say(f"{html} shows it in a browser.")
