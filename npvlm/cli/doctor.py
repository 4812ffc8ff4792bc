"""`npvlm doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from npvlm.cli.options import adapter_option, say_when_compiling, threads_option


@click.command()
@click.argument("model", required=False)
@click.option(
    "--pictures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Pictures of published expectations, such as cow_beach_1.png, for Google's checkpoints.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object with all checks, at the end."
)
@adapter_option
@threads_option
def doctor(model: str | None, pictures: Path | None, as_json: bool, adapter: Path | None) -> int:
    """Check this machine, this installation and, where it is named, MODEL.

    Every check is a line as it is done: ok, WRONG or note (worth knowing), and figures. Kernels are
    held against their definitions and the bundled model against its goldens, bit for bit; MODEL's
    tokenizer, that it computes the same through the cache or not and packed or alone, and that its
    scores are finite. Some seconds, and a few tokens of MODEL.

    \b
    npvlm doctor
    npvlm doctor paligemma-3b-pt-224 --pictures FOLDER

    Exit codes: 0 nothing is wrong, 1 something is, 2 bad use, 3 there is no such model.
    """
    if pictures is not None and model is None:
        raise click.UsageError("--pictures are for checking a MODEL: name one.")
    if adapter is not None and model is None:
        raise click.UsageError("--adapter is for a MODEL: name the one that it is for.")
    from npvlm.work.checks.finding import WRONG
    from npvlm.work.doctor import doctor as run

    say_when_compiling()
    findings = []
    for found in run(model, pictures, adapter):
        findings.append(found)
        if not as_json:
            click.echo(f"{found.verdict:<5}  {found.name}: {found.says}")
    wrong = sum(found.verdict == WRONG for found in findings)
    if as_json:
        checks = [asdict(found) for found in findings]
        click.echo(json.dumps({"fine": not wrong, "checks": checks}))
    else:
        click.echo(f"{len(findings)} checks, {wrong or 'none'} wrong.", err=True)
    return 1 if wrong else 0
