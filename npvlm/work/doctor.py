"""The doctor: what npvlm runs on, whether it computes as it should, and whether a model does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from npvlm.api import Model, load
from npvlm.errors import NpvlmError
from npvlm.files.memory import available_memory
from npvlm.files.names import EMBED_TOKENS
from npvlm.files.needs import weight_bytes, working_bytes
from npvlm.opening import find_folder
from npvlm.work.checks.bundled import NAME, check_definitions, check_files, check_goldens
from npvlm.work.checks.finding import NOTE, OK, WRONG, Check, Finding, run_check
from npvlm.work.checks.machine import machine_checks
from npvlm.work.checks.published import published_checks
from npvlm.work.checks.running import Trial
from npvlm.work.checks.twins import check_kernels
from npvlm.work.checks.words import check_words
from npvlm.work.demo import draw_picture
from npvlm.work.kinds import published_name, raw_values

STEPS = 12  # tokens of the bundled model's answers
FEW = 4  # of any other's, which may be large

Named = tuple[str, Check]


def doctor(
    model: str | None = None, pictures: Path | None = None, adapter: Path | None = None
) -> Iterator[Finding]:
    """Check the machine, the installation and the bundled model, then a model of one's own.

    Findings are given one by one, as they are made; nothing is written.

    Parameters
    ----------
    model : a bundled model or a checkpoint folder
    pictures : a folder with the pictures of published expectations
    adapter : a LoRA to check that model with

    Raises
    ------
    NpvlmError
        Where there is no such model; whatever else is wrong is a finding.
    """
    folder = find_folder(model) if model is not None else None
    for name, check in _own_checks():
        yield run_check(name, check)
    yield from _model_checks(NAME, find_folder(NAME), None, STEPS)
    if model is not None and folder is not None and (model != NAME or adapter is not None):
        yield from _model_checks(model, folder, pictures, FEW, adapter)


def _own_checks() -> list[Named]:
    return [
        *machine_checks(),
        ("kernels = definitions", check_kernels),
        ("bundled files", check_files),
        ("golden logits", check_goldens),
        ("model = definitions", check_definitions),
    ]


def _model_checks(
    name: str, folder: Path, pictures: Path | None, steps: int, adapter: Path | None = None
) -> Iterator[Finding]:
    """Load a model, then run it and its tokenizer; a model that does not load is one finding."""
    try:
        model = load(name, adapter=adapter)
    except NpvlmError as error:
        yield Finding("load", WRONG, str(error))
        return
    yield Finding("load", OK, f"{model.called}, {model.precision}")
    called = published_name(name, folder, raw_values(folder))
    for title, check in (
        ("room", lambda: _check_room(model)),
        ("tokenizer ids", lambda: check_words(model, folder)),
        *Trial(model, draw_picture(), steps).checks(),
        *(published_checks(model, called, pictures) if adapter is None else ()),
    ):
        yield run_check(title, check)


def _check_room(model: Model) -> Finding:
    """Whether the weights fit into memory; what is mapped runs all the same, slowly."""
    stored = model.weights[EMBED_TOKENS]
    number = stored.itemsize if isinstance(stored, np.ndarray) else 2
    needed = weight_bytes(model.config, model.precision, number) + working_bytes(model.config)
    said, free = f"about {needed / 1e9:.1f} GB with {model.precision}", available_memory()
    if free is None:
        return Finding("room", NOTE, f"{said}; the system does not say what is free")
    said += f", {free / 1e9:.1f} GB free"
    return Finding("room", OK if needed <= free else NOTE, said)
