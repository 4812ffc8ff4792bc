"""`npvlm compare`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from npvlm.cli.options import CLAIMS, adapter_option, claim_option, open_model, threads_option


@click.command()
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("mine", type=click.Path(path_type=Path))
@claim_option
@click.option(
    "--map",
    "names",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='TOML or JSON: "language_model.model.norm" = "final"; {i} stands for a layer number.',
)
@click.option("--only", metavar="GLOBS", help='Stages to compare, such as "*.layers.0.*".')
@click.option("--complete", is_flag=True, help="A stage that MINE does not have is a difference.")
@click.option(
    "--model",
    metavar="NAME|FOLDER",
    help="The reference's model: with its weights more causes can be tried.  [default: the one "
    "that the reference names, if it is there]",
)
@adapter_option
@click.option(
    "--replay",
    "replayed",
    is_flag=True,
    help="Run each stage on MINE's own input too, and tell local from inherited error.",
)
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also a page that shows it, complete in itself.",
)
@threads_option
def compare(
    reference: Path,
    mine: Path,
    precision: str | None,
    names: Path | None,
    only: str | None,
    complete: bool,
    model: str | None,
    adapter: Path | None,
    replayed: bool,
    as_json: bool,
    html: Path | None,
) -> int:
    """Hold the dump MINE of another implementation against a REFERENCE trace.

    MINE is .safetensors, .npz, a folder of .npy, or .bin with a .json that lists its stages. Names
    and layouts are matched where they are those of a known implementation. The first stage that is
    wrong is named, with its likely cause.

    \b
    npvlm compare reference.safetensors mine.safetensors
    npvlm compare reference.safetensors mine.npz --as bfloat16 --html report.html

    Exit codes: 0 the same, 1 they differ, 2 bad use, 3 a file that cannot be read.
    """
    from npvlm.porting.compare import compare as run
    from npvlm.porting.compare import model_of
    from npvlm.porting.names import read_map
    from npvlm.porting.report import page, table

    if adapter is not None and model is None:
        raise click.UsageError("--adapter goes with --model: name the model that it is for.")
    opened = open_model(model, None, "numpy", False, adapter) if model else model_of(reference)
    report = run(
        reference,
        mine,
        precision=CLAIMS[precision] if precision else None,
        names=read_map(names) if names else None,
        only=only,
        complete=complete,
        model=opened,
        replayed=replayed,
    )
    if html is not None:
        page(report, html)
    click.echo(json.dumps(report.to_dict(), allow_nan=False) if as_json else table(report))
    return 0 if report.verdict.same else 1
