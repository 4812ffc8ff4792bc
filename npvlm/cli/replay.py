"""`npvlm replay`."""

from __future__ import annotations

from pathlib import Path

import click

from npvlm.cli.options import (
    CLAIMS,
    adapter_option,
    claim_option,
    model_option,
    open_model,
    threads_option,
)


@click.command()
@click.argument("stage")
@click.option(
    "--input",
    "mine",
    type=click.Path(path_type=Path),
    required=True,
    metavar="MINE",
    help="A dump of another implementation.",
)
@click.option(
    "--map",
    "names",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='TOML or JSON: "language_model.model.norm" = "final".',
)
@claim_option
@model_option
@adapter_option
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="The stage as an .npy file."
)
@threads_option
def replay(
    stage: str,
    mine: Path,
    names: Path | None,
    precision: str | None,
    model: str | None,
    adapter: Path | None,
    save: Path | None,
) -> int:
    """Compute STAGE as the reference does, from the nearest stages that MINE has before it.

    Where MINE has the stage too, the two are held together: what differs then is that stage's own
    mistake, and none that it was handed.

    \b
    npvlm replay language_model.model.layers.3.self_attn.attend --input mine.npz

    Exit codes: 0 the same or nothing to compare, 1 they differ, 2 bad use, 3 a file that cannot be
    read.
    """
    from npvlm.porting.names import read_map
    from npvlm.porting.port import replay_stage

    opened = open_model(model or "shapes", None, "numpy", adapter=adapter)
    known = read_map(names) if names else None
    claimed = CLAIMS[precision] if precision else None
    said, same = replay_stage(stage, mine, opened, known, save, claimed)
    click.echo(said)
    return 0 if same else 1
