"""`npvlm features`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from npvlm.cli.asking import find_pictures, paths_of, sentence
from npvlm.cli.options import (
    adapter_option,
    model_option,
    named_model,
    open_model,
    precision_option,
    quiet_option,
    threads_option,
)
from npvlm.cli.progress import ProgressLine, counted

if TYPE_CHECKING:
    from npvlm.api import Failed


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="A .safetensors file, which appears when it is whole.",
)
@click.option(
    "--hidden",
    type=int,
    multiple=True,
    metavar="LAYER",
    help="Also what the decoder carries after this layer of all tokens of --prompt; 0 is what "
    "enters the first, -1 what leaves the last norm. May be given several times.",
)
@click.option(
    "--attention",
    type=int,
    multiple=True,
    metavar="LAYER",
    help="Also how much each token of pictures and --prompt looks at each other one in this layer; "
    "0 is the first, -1 the last. May be given several times.",
)
@click.option("--prompt", help="What the decoder reads behind each picture, for these two.")
@model_option
@adapter_option
@precision_option
@quiet_option
@threads_option
def features(
    images: tuple[str, ...],
    output: Path,
    hidden: tuple[int, ...],
    attention: tuple[int, ...],
    prompt: str | None,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    quiet: bool,
) -> int:
    """Write what the model sees on each IMAGE as numbers, for programs that go on from there.

    An IMAGE is a file, a folder, a pattern, or - for stdin. FILE has the tensor `features`, float32
    [pictures, patches, width], as the decoder reads them; `hidden.LAYER` [pictures, tokens, width]
    for each --hidden, and `attention.LAYER` [pictures, heads, tokens, tokens] for each --attention.
    Its metadata list the pictures (`images`, JSON), in the order of the rows. A picture that cannot
    be read has no row, and is said.

    \b
    npvlm features photos/ -o features.safetensors --model paligemma-3b-pt-224
    npvlm features photo.png --prompt "caption en" --hidden 2 --hidden -1 -o states.safetensors

    Exit codes: 0 all are in the file, 3 some could not be read, or a problem that ended it; 2, 130,
    143 as everywhere.
    """
    if bool(hidden or attention) != (prompt is not None):
        raise click.UsageError("--prompt goes with --hidden or --attention: give both, or none.")
    from npvlm.files.output import check_replaces
    from npvlm.work.features import FORMAT, save_features
    from npvlm.work.gallery import check_output

    pictures = find_pictures(images)
    check_output(output, ".safetensors", paths_of(pictures))
    check_replaces(output, FORMAT)
    opened = open_model(named_model(model, quiet), precision, "kernels", quiet, adapter)
    line, failed = ProgressLine("pictures", quiet), 0

    def tell_failed(found: Failed) -> None:
        nonlocal failed
        failed += 1
        line.clear()
        click.echo(f"npvlm: {sentence(found.error)}", err=True)

    def tell(done: int) -> None:
        line.show(done, len(pictures), errors=failed)

    try:
        kept = save_features(opened, pictures, output, hidden, attention, prompt, tell_failed, tell)
    finally:
        line.clear()
    if failed:
        of = f"{failed} of {len(pictures)} pictures"
        click.echo(f"npvlm: {of} could not be read and have no row.", err=True)
    if not quiet:
        click.echo(f"npvlm: {output} has {counted(kept, 'picture')}.", err=True)
    return 3 if failed else 0
