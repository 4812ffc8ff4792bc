"""`npvlm bench`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from click.core import ParameterSource

from npvlm.cli.options import (
    adapter_option,
    model_option,
    precision_option,
    say_when_compiling,
    threads_option,
)

SYNTHETIC = [f"paligemma{family}-3b-{size}" for family in ("", "2") for size in (224, 448, 896)]
PROGRAMS = ["transformers", "transformers:bfloat16", "transformers:float32", "llama.cpp"]


@click.command()
@model_option
@adapter_option
@precision_option
@click.option(
    "--synthetic",
    type=click.Choice(SYNTHETIC),
    help="Random bfloat16 weights in the sizes of a published model, in place of --model.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Keep what --synthetic writes, for --model or convert; else it is removed at the end.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures together."
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Text tokens behind each picture.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Tokens of each answer.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Rounds; medians are shown.",
)
@click.option(
    "--against",
    type=click.Choice(PROGRAMS),
    help="Run another program in turns with npvlm, in a process of its own. transformers computes "
    "in float32 against --precision float32, else in bfloat16, unless told; llama.cpp runs a "
    "decoder of random weights in BF16, Q8_0 or Q4_0.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object with everything.")
@threads_option
@click.pass_context
def bench(
    context: click.Context,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    synthetic: str | None,
    save: Path | None,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    against: str | None,
    as_json: bool,
) -> None:
    """Measure speed and memory, and how much of what this machine allows is reached.

    Nothing is downloaded: --synthetic takes random weights of a real size (6 GB of disk and memory
    for a 3B, while it runs).

    \b
    npvlm bench
    npvlm bench --synthetic paligemma-3b-224 --precision int8 --against transformers
    """
    named = context.get_parameter_source("model") is ParameterSource.COMMANDLINE
    if synthetic is not None and named:
        raise click.UsageError("--model and --synthetic exclude each other: name one.")
    if save is not None and synthetic is None:
        raise click.UsageError("--save keeps what --synthetic writes: name a size with it.")
    if adapter is not None and (synthetic is not None or against is not None):
        raise click.UsageError("--adapter is for a --model, and other programs run without it.")
    from npvlm.opening import find_folder
    from npvlm.work.bench import Plan, bench_synthetic
    from npvlm.work.bench import bench as run
    from npvlm.work.synthetic import synthetic_config
    from npvlm.work.table import table

    say_when_compiling()
    plan = Plan(batch, prompt_tokens, new_tokens, repeat)
    if synthetic is None:
        name = model or "shapes"
        called = name if adapter is None else f"{name}+{adapter}"
        report = run(called, find_folder(name), precision, plan, against, _say, adapter)
    else:
        values = synthetic_config(synthetic)
        report = bench_synthetic(synthetic, values, save, precision, plan, against, _say)
    click.echo(json.dumps(report.to_dict()) if as_json else table(report))


def _say(what: str) -> None:
    click.echo(f"npvlm: {what}", err=True)
