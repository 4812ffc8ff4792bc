"""Option types and options that several commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import click

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
    return click.option(
        "--model",
        "--model_path",
        "model",
        envvar="NPVLM_MODEL",
        metavar="NAME|FOLDER",
        help="A bundled model or a checkpoint folder.  [default: $NPVLM_MODEL, else shapes]",
    )(command)
