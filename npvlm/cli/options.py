"""Option types and options that several commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npvlm.cli.interruption import hold, release
from npvlm.config import PACKED, PRECISIONS, read_config

if TYPE_CHECKING:
    from npvlm.api import Model
    from npvlm.retrieval import Retriever

MODEL_VARIABLE = "NPVLM_MODEL"
_THREAD_VARIABLES = (
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Finite(click.FloatRange):
    """A number in a range; unlike click's own type it refuses nan and inf."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return float(number)


def _use_threads(ctx: click.Context, param: click.Parameter, threads: int | None) -> int | None:
    """Tell the libraries, which read it when NumPy is first imported."""
    if threads is not None:
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    return threads


def threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --threads."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        callback=_use_threads,
        expose_value=False,
        help="CPU threads to use.  [default: all cores]",
    )(command)


def model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --model."""

    def named(context: click.Context, option: click.Parameter, given: str | None) -> str | None:
        if given == "":
            raise click.UsageError("--model names nothing; name a model, or leave it out.")
        return given

    return click.option(
        "--model",
        "--model_path",
        "model",
        callback=named,
        envvar=MODEL_VARIABLE,
        metavar="NAME|FOLDER",
        help="A bundled or fetched model, or a checkpoint folder.  "
        "[default: $NPVLM_MODEL, else shapes]",
    )(command)


def adapter_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --adapter."""

    def the_one(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> Any:
        if len(given) > 1:
            raise click.UsageError("--adapter is given twice, and one is applied: merge the other.")
        if "" in given:
            raise click.UsageError("--adapter names nothing; name a folder, or leave it out.")
        return Path(given[0]) if given else None

    return click.option(
        "--adapter",
        multiple=True,
        callback=the_one,
        metavar="FOLDER",
        help="A LoRA for the model, as PEFT saves it.",
    )(command)


def precision_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --precision."""
    return click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="Of the products with weights.  [default: what the model was converted for, else "
        "float32]",
    )(command)


# What a port may be said to compute in, with the names that others have for it.
CLAIMS = {name: name for name in ("float32", "bfloat16", "float16", "int8")}
CLAIMS |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def claim_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --as."""
    return click.option(
        "--as",
        "precision",
        type=click.Choice(list(CLAIMS)),
        help="What the port computes in.  [default: what its arrays are stored in]",
    )(command)


def ops_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --ops."""
    return click.option(
        "--ops",
        type=click.Choice(["kernels", "numpy"]),
        default="kernels",
        show_default=True,
        help="Compute with the kernels, or with their definitions in plain NumPy.",
    )(command)


def quiet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add -q."""
    return click.option(
        "-q", "--quiet", is_flag=True, help="Nothing on stderr but what goes wrong."
    )(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json."""
    return click.option(
        "--json", "as_json", is_flag=True, help="One JSON object per picture, with everything."
    )(command)


def named_model(model: str | None, quiet: bool = False) -> str:
    """The model that was named, else the bundled one; that it is a toy is said."""
    if model is None and not quiet:
        note = "the toy `shapes` answers: it knows drawn shapes and digits; --model names another."
        click.echo(f"npvlm: {note}", err=True)
    return model or "shapes"


def open_model(
    model: str,
    precision: str | None,
    ops: str,
    quiet: bool = False,
    adapter: Path | None = None,
) -> Model:
    """Load a model; what takes a while the first time is said, unless it is to be quiet."""
    from npvlm.api import load
    from npvlm.errors import NpvlmError
    from npvlm.files.checkpoint import left_out
    from npvlm.opening import find_place

    try:
        place = find_place(model)
    except NpvlmError as error:
        if os.environ.get(MODEL_VARIABLE) != model:
            raise
        raise NpvlmError(f"${MODEL_VARIABLE}: {error}") from None
    if not quiet:
        _say_what_is_made(place, precision)
    if ops == "kernels":
        say_when_compiling(quiet)
    opened = load(model, precision, ops, adapter)
    if not quiet:
        _say_when_crowded(opened)
        if place.is_dir() and (left := left_out(place)):
            click.echo(f"npvlm: {left}", err=True)
        if opened.adapter and (other := opened.adapter.other_base(model, place)):
            click.echo(f"npvlm: {other}", err=True)
    return opened


def _say_what_is_made(place: Path, precision: str | None) -> None:
    """Say on stderr what `load` makes of weights that `npvlm convert` could make once for all."""
    if place.is_file():
        from npvlm.files.big_vision import convert_command, open_big_vision

        notes = open_big_vision(place).remarks()
        notes.append(
            f"weights go into memory at each start; a folder maps them: {convert_command(place)}"
        )
    elif precision in PACKED and read_config(place).quantization is None:
        notes = [
            f"weights are packed as {precision} in memory; `npvlm convert` does so once for all."
        ]
    else:
        notes = []
    for note in notes:
        click.echo(f"npvlm: {note}", err=True)


def _say_when_crowded(model: Model) -> None:
    """Say on stderr that weights are read from disk at every step, where memory holds too few."""
    from npvlm.files.memory import available_memory, said_bytes
    from npvlm.files.needs import mapped_bytes

    mapped, free = mapped_bytes(model.weights), available_memory()
    if free is not None and mapped > free:
        note = (
            f"{said_bytes(mapped)} of weights and {said_bytes(free)} of memory: they are read from "
            "disk again and again, which is slow; `npvlm convert` makes them smaller."
        )
        click.echo(f"npvlm: {note}", err=True)


def open_retriever(model: str | None, precision: str | None, quiet: bool) -> Retriever:
    """Load a ColPali; what takes a while the first time is said, unless it is to be quiet."""
    from npvlm.retrieval import load_retriever

    if model is None:
        raise click.UsageError("no ColPali is bundled: --model names one.")
    say_when_compiling(quiet)
    return load_retriever(model, precision)


def say_when_compiling(quiet: bool = False) -> None:
    """Say on stderr, once, that kernels are compiled, if they are, and let signals wait for it."""
    from npvlm.kernels.compiling import tell_of_compiling, wrap_compiler

    if not quiet:
        tell_of_compiling(lambda what: click.echo(f"npvlm: {what}", err=True))
    wrap_compiler(hold, release)
