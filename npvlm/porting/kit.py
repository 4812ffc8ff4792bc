"""What a porter commits to their repository: steps, goldens, pictures, readers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import npvlm
from npvlm.api import Model, load
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.output import new_folder
from npvlm.files.pictures import open_picture, resize, scale_colours
from npvlm.model.weights import Array
from npvlm.opening import find_folder
from npvlm.porting.dumps import save_trace
from npvlm.porting.floors import LEAST, PRECISIONS, Floors, floors, to_bfloat16, to_float16
from npvlm.porting.kit_models import save_random_models
from npvlm.porting.kit_page import TEMPLATE, Golden, page
from npvlm.porting.kit_pictures import MAIN, save_pictures
from npvlm.porting.stages import EXACT, chosen
from npvlm.porting.statistics import rms
from npvlm.porting.trace import Trace, trace

BUNDLED = "shapes"
MODELS = "models"
READERS = ("read_golden.c", "read_golden.rs", "read_golden.mjs")
PROMPT = "caption en"
ASKED = ((MAIN, PROMPT), ("tall", "detect red circle"))  # pictures and prompts of greedy answers
MOST_TOKENS = 20  # of an answer
STEP = 3  # the decoding step that is recorded, where the answer is so long
STEP_STAGES = "positions,language_model.*"

# Bytes of numbers in a kit's runs, shared among its models, and in the golden of a picture, which
# has none of pixel_values: these follow from the 8 bits. What does not fit is described alone;
# these stages are kept before all others.
ROOM, PICTURE_ROOM = 8_000_000, 200_000
KEPT_FIRST = (
    "image.*,input_ids,positions",
    "language_model.logits",
    "pixel_values",
    "inputs_embeds",
    "multi_modal_projector",
    "*.embeddings,*.norm",
    "*.layers.0,*.layers.0.*",
)


def kit(model: str | None, folder: Path, say: Callable[[str], None]) -> None:
    """Write a kit whole or not at all.

    Parameters
    ----------
    model : a bundled model or a checkpoint folder, whose weights stay where they are; None for two
        random models and the bundled one, weights included
    folder : a new one, or an empty one
    say : is told what is done next, which may take minutes

    Raises
    ------
    UsageError
        For a folder that is taken, or a model that is packed: goldens are float32.
    NpvlmError
        For a model that cannot be read, or a place that cannot be written.
    """
    with new_folder(folder) as draft:
        (draft / "pictures").mkdir()
        pictures = save_pictures(draft / "pictures")
        (draft / "readers").mkdir()
        for reader in READERS:
            shutil.copyfile(TEMPLATE.parent / reader, draft / "readers" / reader)
        goldens = []
        own = model is None
        sources = _own_models(draft) if model is None else {_name(model): model}
        for name, source in sources.items():
            opened = load(source, ops="numpy")
            if opened.config.quantization:
                raise UsageError(
                    f"{source} is packed as {opened.precision}, expected a checkpoint as it was "
                    "published: goldens are float32."
                )
            say(f"{name}: runs for goldens and noise floors.")
            called = f"{MODELS}/{name}" if own else name
            place = draft / "goldens" / name
            place.mkdir(parents=True)
            goldens.append(_save_goldens(opened, called, pictures, place, ROOM // len(sources)))
        text = page(goldens, MODELS if own else None)
        (draft / "PORTING.md").write_text(text, encoding="utf-8")
        _save_list(draft)


def _own_models(draft: Path) -> dict[str, str]:
    """Put the models of a kit that names none into it; their folders by name."""
    place = draft / MODELS
    place.mkdir()
    save_random_models(place)
    shutil.copytree(find_folder(BUNDLED), place / BUNDLED)
    return {path.name: str(path) for path in sorted(place.iterdir())}


def _name(model: str) -> str:
    """What a kit calls a model: not where its maker has it."""
    folder = find_folder(model).resolve()
    if folder.parent.name == "snapshots":  # of the hub's cache: models--OWNER--NAME/snapshots/HASH
        return folder.parents[1].name.split("--")[-1]
    return folder.name


def _save_goldens(
    model: Model, called: str, pictures: Mapping[str, Path], folder: Path, room: int
) -> Golden:
    """Write what one model makes of the pictures and prompts."""
    own = {"model": called}
    answers = [_answer(model, pictures[name], prompt) for name, prompt in ASKED]
    lines = ",\n ".join(json.dumps(answer) for answer in answers)
    (folder / "answers.json").write_text(f"[\n {lines}\n]\n")

    found = trace(model, pictures[MAIN], PROMPT)
    found = replace(found, facts=found.facts | own)
    numbers = _kept(found.stages, room)
    _save(found, floors(found, model), folder / "prefill", numbers)

    spoken = [i for i in answers[0]["token_ids"] if i not in model.config.eos_token_ids]
    if not spoken:
        raise NpvlmError(
            f"{called} answers nothing to {PROMPT!r} about a drawn picture, so there is no step "
            "to record; is it a whole checkpoint?"
        )
    step = trace(model, pictures[MAIN], PROMPT, step=min(STEP, len(spoken)), only=STEP_STAGES)
    step = replace(step, facts=step.facts | own)
    _save(step, floors(step, model), folder / "step", _kept(step.stages, room))

    (folder / "pictures").mkdir()
    for name, path in pictures.items():
        run, noise = _picture_run(model, path, found)
        colours = {n: value for n, value in run.stages.items() if n in EXACT}
        _save(run, noise, folder / "pictures" / name, _kept(colours, PICTURE_ROOM))
    shapes = {"prefill": found, "step": step, f"pictures/{MAIN}": found}
    return Golden(
        name=folder.name,
        config=model.config,
        shapes={n: {s: v.shape for s, v in t.stages.items()} for n, t in shapes.items()},
        held=len(numbers) == len(found.stages),
        prompt=PROMPT,
        answer=step.inputs.answer,
    )


def _answer(model: Model, picture: Path, prompt: str) -> dict[str, Any]:
    """A greedy answer with all ids, for JSON."""
    answer = model.generate(picture, prompt, max_tokens=MOST_TOKENS)[0]
    return {
        "picture": f"pictures/{picture.name}",
        "prompt": prompt,
        "prompt_token_ids": answer.prompt_token_ids,
        "max_tokens": MOST_TOKENS,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "stop": answer.stop,
    }


def _picture_run(model: Model, path: Path, run: Trace) -> tuple[Trace, Floors]:
    """The stages of a picture alone and their floors; the rest is as in the whole run."""
    rgb = open_picture(path)
    resized = resize(rgb, model.preprocessor)
    pixels = scale_colours(resized, model.preprocessor)[None]
    stages: dict[str, Array] = {
        "image.rgb": np.asarray(rgb),
        "image.resized": resized,
        "pixel_values": pixels,
    }
    image = {
        "name": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size": [rgb.width, rgb.height],
    }
    noise = {
        "float32": LEAST,
        "bfloat16": _missed(to_bfloat16(pixels), pixels),
        "float16": _missed(to_float16(pixels), pixels),
        "int8": LEAST,  # weights have no part in it
    }
    known = {
        name: noise if name not in EXACT else dict.fromkeys(PRECISIONS, 0.0) for name in stages
    }
    return replace(run, stages=stages, facts=run.facts | {"image": image}), known


def _missed(rounded: Array, value: Array) -> float:
    """The relative error of a rounding, as floors are written."""
    size = rms(value)
    return float(f"{max(LEAST, rms(rounded - value) / size if size else 0.0):.3g}")


def _save(run: Trace, noise: Floors, path: Path, numbers: Mapping[str, Array]) -> None:
    """Write PATH.safetensors with the numbers of some stages, and PATH.json about every stage."""
    some = replace(run, stages=dict(numbers))
    save_trace(some, path.with_suffix(".safetensors"), noise)
    save_trace(run, path.with_suffix(".json"), noise, compact=True)  # in place of that of some


def _kept(stages: Mapping[str, Array], room: int) -> dict[str, Array]:
    """The stages whose numbers are written: all, or as many of the first choices as fit."""
    if sum(value.nbytes for value in stages.values()) <= room:
        return dict(stages)
    kept: set[str] = set()
    for patterns in KEPT_FIRST:
        for name, value in stages.items():
            if chosen(name, patterns) and name not in kept and value.nbytes <= room:
                kept.add(name)
                room -= value.nbytes
    return {name: value for name, value in stages.items() if name in kept}


def _save_list(draft: Path) -> None:
    """Write kit.json: each file with its size and checksum, and who made it."""
    files = {
        path.relative_to(draft).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(draft.rglob("*"))
        if path.is_file()
    }
    notes = {"made_by": f"npvlm {npvlm.__version__}", "files": files}
    (draft / "kit.json").write_text(json.dumps(notes, indent=1) + "\n")
