"""One run of a model with every stage written down, and where in the code each was made."""

from __future__ import annotations

import hashlib
import linecache
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np
from PIL import Image

import npvlm
from npvlm.api import Model
from npvlm.config import Config
from npvlm.decoding.generate import generate
from npvlm.decoding.prompt import layout
from npvlm.errors import UsageError
from npvlm.files.pictures import open_picture, resize, scale_colours
from npvlm.model import gemma, paligemma
from npvlm.model.cache import Rows, new_cache
from npvlm.model.ops import Index
from npvlm.model.tap import Tap, within
from npvlm.model.weights import Array, Weights
from npvlm.opening import find_place, read_values
from npvlm.porting.stages import SCHEMA, chosen

PACKAGE = Path(npvlm.__file__).parent
LIBRARIES = ("numpy", "pillow")
HANDING_ON = ("tap.py", "trace.py")  # files between a stage and what writes it down


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a run begins with: the picture in three states, the ids, and the answer so far.

    rgb [h, w, 3] uint8, resized [R, R, 3] uint8, pixel_values [1, 3, R, R], ids [T], answer [A]
    """

    rgb: Array
    resized: Array
    pixel_values: Array
    ids: Index
    answer: Sequence[int]

    @property
    def positions(self) -> Index:
        """The places of the tokens that the traced call reads, counted from 1."""
        T, A = len(self.ids), len(self.answer)
        return np.arange(T, dtype=np.int64) + 1 if A == 0 else np.array([T + A], np.int64)


@dataclass(frozen=True, eq=False)
class Trace:
    """The stages of a run in the order in which they came to be.

    stages : by name
    sources : for each the line that made it, "npvlm/model/siglip.py:31"
    inputs : what the run began with
    facts : what a manifest says about the run as a whole
    """

    stages: dict[str, Array]
    sources: dict[str, str]
    inputs: Inputs
    facts: dict[str, Any]


def trace(
    model: Model,
    picture: str | Path | Image.Image,
    prompt: str,
    *,
    step: int = 0,
    only: str | None = None,
) -> Trace:
    """Run a model once and write down every stage.

    Parameters
    ----------
    model : Model
        It runs with the operations it was loaded for: with "kernels" the stages inside fused
        operations are missing.
    picture : path or PIL image
    prompt : str
    step : int
        0 is the prefill of picture and prompt; n is the n-th step after it, of greedy decoding.
    only : str, optional
        Comma-separated globs of the stages to keep.

    Raises
    ------
    UsageError
        Where the answer ends before the step.
    NpvlmError
        For a picture that cannot be read.
    """
    if step < 0:
        raise UsageError(f"step is {step}, expected 0 (the prefill) or a later one.")
    rgb = open_picture(picture)
    inputs = prepare(model, rgb, prompt, step)

    stages: dict[str, Array] = {}
    sources: dict[str, str] = {}

    def record(name: str, value: Array) -> Array:
        if chosen(name, only):
            stages[name] = value.copy()
            sources[name] = _caller()
        return value

    for name, value, maker in (
        ("image.rgb", inputs.rgb, open_picture),
        ("image.resized", inputs.resized, resize),
        ("pixel_values", inputs.pixel_values, scale_colours),
        ("input_ids", inputs.ids, layout),
        ("positions", inputs.positions, Rows.of),
    ):
        if chosen(name, only):
            stages[name], sources[name] = value, _line(maker.__code__, None)
    run(inputs, model.weights, model.config, ops=model.ops, tap=record)
    if not stages:
        raise UsageError(f"{only!r} names no stage; see docs/stages.md for their names.")
    return Trace(stages, sources, inputs, _facts(model, picture, rgb, prompt, inputs))


def prepare(model: Model, picture: Image.Image, prompt: str, step: int = 0) -> Inputs:
    """What a run begins with; the answer before a later step is the greedy one."""
    resized = resize(picture, model.preprocessor)
    pixels = scale_colours(resized, model.preprocessor)[None]
    ids = model.ids_of(prompt, 1, max(1, step))
    answer = model.generate(picture, prompt, max_tokens=step)[0].token_ids if step else []
    if len(answer) < step or (answer and answer[-1] in model.config.eos_token_ids):
        raise UsageError(
            f"step is {step}, but the answer ends after {len(answer)} tokens; name an earlier one."
        )
    return Inputs(np.asarray(picture), resized, pixels, ids, answer)


def run(inputs: Inputs, w: Weights, config: Config, *, ops: ModuleType, tap: Tap) -> None:
    """Show a tap every stage from the picture to the logits, of all tokens of the call.

    The answer's tokens are read one by one through the cache; the last of these calls is shown.
    """
    features = paligemma.image_features(inputs.pixel_values, w, config, ops=ops, tap=tap)
    features = features.reshape(-1, features.shape[-1])
    if inputs.answer:
        _run_step(inputs, features, w, config, ops, tap)
        return
    x = paligemma.embed(inputs.ids, features, w, config, ops=ops, tap=tap)
    text, T = w.scope("language_model"), len(x)
    cache = new_cache(config.text_config, T, x.dtype)
    rows = Rows.of(0, T, range(T))
    inner = within(tap, "language_model")
    hidden = gemma.hidden_states(
        x, text, config.text_config, cache, rows, np.arange(T), ops=ops, tap=within(inner, "model")
    )
    gemma.logits(hidden[-1:], text, config.text_config, ops=ops, tap=inner)


def _run_step(
    inputs: Inputs,
    features: Array,
    w: Weights,
    config: Config,
    ops: ModuleType,
    tap: Tap,
) -> None:
    """Decode the answer that is given, and show the call that reads its last token."""
    given = list(inputs.answer)
    calls = 0

    def late(name: str, value: Array) -> Array:
        return tap(name, value) if calls == len(given) else value

    choose: Callable[[Array], int] = lambda scores: given[calls] if calls < len(given) else 0  # noqa: E731
    limits = [len(given) + 1]
    steps = generate([inputs.ids], features, w, config, [choose], limits, ops=ops, tap=late)
    for _ in steps:
        calls += 1


def _caller() -> str:
    """The line of npvlm that handed a stage to the tap."""
    frame = sys._getframe(2)
    while Path(frame.f_code.co_filename).name in HANDING_ON and frame.f_back is not None:
        frame = frame.f_back
    return _line(frame.f_code, frame.f_lineno)


def _line(code: CodeType, number: int | None) -> str:
    """Where some code stands, "npvlm/model/siglip.py:31"; by default where it is defined."""
    path = Path(code.co_filename).relative_to(PACKAGE).as_posix()
    if number is None:
        number = code.co_firstlineno
        while linecache.getline(code.co_filename, number).lstrip().startswith("@"):
            number += 1
    return f"npvlm/{path}:{number}"


def _facts(
    model: Model, picture: str | Path | Image.Image, rgb: Image.Image, prompt: str, inputs: Inputs
) -> dict[str, Any]:
    """What a manifest says of the run as a whole."""
    named = None if isinstance(picture, Image.Image) else Path(picture)
    data = named.read_bytes() if named else rgb.tobytes()
    return {
        "schema": SCHEMA,
        "made_by": f"npvlm {npvlm.__version__}",
        "model": model.name,
        "adapter": str(model.adapter.folder) if model.adapter else None,
        "config": read_values(find_place(model.name)),
        "prompt": prompt,
        "ids": inputs.ids.tolist(),
        "step": len(inputs.answer),
        "answer": list(inputs.answer),
        "precision": model.precision,
        "ops": "numpy" if model.ops.__name__ == "npvlm.model.ops" else "kernels",
        "image": {
            "name": named.name if named else None,
            "sha256": hashlib.sha256(data).hexdigest(),
            "size": [rgb.width, rgb.height],
        },
        "versions": {name: version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
    }
