"""`npvlm demo`."""

from __future__ import annotations

from pathlib import Path

import click

from npvlm.cli.options import say_when_compiling


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("npvlm-demo.png"),
    show_default=True,
    help="Where the picture goes; the one with boxes goes beside it, as NAME-boxes.png.",
)
def demo(output: Path) -> None:
    """Draw a picture and ask the bundled model about it: caption, count and boxes.

    \b
    npvlm demo
    """
    from npvlm.work.demo import run_demo

    say_when_compiling()
    shown = run_demo(output)
    for prompt, text in shown.answers:
        click.echo(f"{prompt}\n    {text}")
    for box in shown.boxes:
        place = f"x {box.x0:.0f} to {box.x1:.0f}, y {box.y0:.0f} to {box.y1:.0f}"
        click.echo(f"    {box.label}: {place}")
    count = len(shown.boxes)
    said = f"{count} boxes found on {output}, drawn on {shown.drawn} ({shown.seconds:.1f} s)."
    click.echo(said, err=True)
