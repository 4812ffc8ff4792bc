"""`npvlm convert`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from npvlm.cli.options import adapter_option, say_when_compiling
from npvlm.files.memory import said_bytes


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(["bfloat16", "int8", "int4"]),
    help="bfloat16: an ordinary checkpoint. int8, int4: packed, for npvlm alone.  [default: as "
    "weights are stored]",
)
@adapter_option
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The tokenizer.model to put into DST.  [default: that of SRC]",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1, max=100_000),
    metavar="N",
    help="Make the model one for pictures of N x N pixels, its positions resampled.",
)
def convert(
    source: str,
    destination: Path,
    precision: str | None,
    adapter: Path | None,
    tokenizer: Path | None,
    image_size: int | None,
) -> None:
    """Write the checkpoint SRC as DST: as published, with smaller weights or an adapter merged.

    SRC is any model; an .npz file of big_vision; or a folder with a PaliGemma inside another model,
    or with another model's config.json. DST is a new or an empty folder, which appears when it is
    whole.

    \b
    npvlm convert paligemma-3b-mix-224 small --precision int8
    npvlm convert paligemma-3b-pt-224 mine --adapter lora --precision bfloat16
    npvlm convert pt_224.bf16.npz pt-224 --tokenizer paligemma_tokenizer.model
    npvlm convert paligemma-3b-pt-224 pt-336 --image-size 336
    """
    from npvlm.work.convert import convert as run

    say_when_compiling()
    progress = Progress()
    try:
        run(
            source,
            destination,
            precision,
            progress,
            adapter,
            tokenizer=tokenizer,
            image_size=image_size,
            say=lambda what: click.echo(f"npvlm: {what}", err=True),
        )
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
        line = f"{done} of {weights} weights, {said_bytes(written)} of {said_bytes(total)}"
        click.echo(f"\r{line}" if self.terminal else line, nl=not self.terminal, err=True)
        self.begun = self.terminal

    def end_line(self) -> None:
        """Let what is said next begin a line of its own."""
        if self.begun:
            click.echo(err=True)
