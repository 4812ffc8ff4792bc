"""`npvlm convert`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from npvlm.cli.options import adapter_option, say_other_base, say_when_compiling


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(["bfloat16", "int8", "int4"]),
    help="bfloat16: an ordinary checkpoint. int8, int4: packed, for npvlm alone. May be left out "
    "with --adapter: then weights keep their types.",
)
@adapter_option
def convert(source: str, destination: Path, precision: str | None, adapter: Path | None) -> None:
    """Write the checkpoint SRC again as DST, with smaller weights or an adapter merged into them.

    SRC is any model; DST is a new or an empty folder, which appears when it is whole.

    \b
    npvlm convert paligemma-3b-mix-224 small --precision int8
    npvlm convert paligemma-3b-pt-224 mine --adapter lora --precision bfloat16
    """
    if precision is None and adapter is None:
        raise click.UsageError("nothing would change: name a --precision, an --adapter or both.")
    from npvlm.api import find_folder
    from npvlm.files.adapters import open_adapter
    from npvlm.work.convert import convert as run

    say_when_compiling()
    if adapter is not None:
        say_other_base(open_adapter(adapter.expanduser()), source, find_folder(source))
    progress = Progress()
    try:
        run(source, destination, precision, progress, adapter)
    finally:
        progress.end_line()
    click.echo(f"{destination} is written.", err=True)


class Progress:
    """How far it is, on stderr: a line that changes every second on a terminal, else few lines."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.seconds = 1 if self.terminal else 30
        self.said = time.monotonic()
        self.begun = False

    def __call__(self, done: int, weights: int, written: int, total: int) -> None:
        now = time.monotonic()
        if done < weights and now - self.said < self.seconds:
            return
        self.said = now
        line = f"{done} of {weights} weights, {written / 1e9:.2f} of {total / 1e9:.2f} GB"
        click.echo(f"\r{line}" if self.terminal else line, nl=not self.terminal, err=True)
        self.begun = self.terminal

    def end_line(self) -> None:
        """Let what is said next begin a line of its own."""
        if self.begun:
            click.echo(err=True)
