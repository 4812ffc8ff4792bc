"""Checks of Google's checkpoints against what others have published that these answer.

Their pictures are not npvlm's to ship. One expectation needs none: a picture of zeros.

Axis letters: P patches of a picture · D width of the decoder · R picture side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from npvlm.api import Model
from npvlm.files.names import EMBED_TOKENS
from npvlm.model import gemma, paligemma
from npvlm.model.cache import Rows, new_cache
from npvlm.model.tap import closed
from npvlm.model.weights import Array
from npvlm.work.checks.finding import NOTE, OK, WRONG, Check, Finding
from npvlm.work.kinds import Name

TOKENS = 30  # of an answer at most; all that are expected are shorter


@dataclass(frozen=True)
class Expectation:
    """A published answer of a published checkpoint.

    sure : whether any correct program gives it. In 16 bits, or with packed weights, another answer
        may come of rounding alone
    """

    checkpoint: str
    picture: str
    prompt: str
    answer: str
    sure: bool


# Sources: tests of transformers (models/paligemma), its issue 31425, its docs of paligemma2.
ANSWERS = (
    Expectation("paligemma-3b-pt-224", "cow_beach_1.png", "", "cow on the beach", True),
    Expectation(
        "paligemma-3b-pt-224",
        "cow_beach_1.png",
        "answer en Where is the cow standing?",
        "beach",
        True,
    ),
    Expectation(
        "paligemma-3b-pt-224",
        "shoe.png",
        "detect shoe",
        "<loc0051><loc0309><loc0708><loc0646> shoe",
        False,
    ),
    Expectation(
        "paligemma2-3b-mix-224",
        "pipeline-cat-chonk.jpeg",
        "Where is the cat standing?",
        "snow",
        False,
    ),
)


@dataclass(frozen=True)
class HiddenState:
    """What the decoder makes of the first image token of a picture of zeros, after its last norm.

    ids : of the text behind the picture, without a <bos>; picture and text all see each other
    first : the first numbers of that vector
    tolerance : of the source, both absolute and relative; it ran the float32 weights
    """

    checkpoint: str
    ids: tuple[int, ...]
    first: tuple[float, ...]
    tolerance: float


# Source: keras-hub, pali_gemma_backbone_test.py, whose preset is this checkpoint.
ZERO_PICTURE = HiddenState(
    "paligemma-3b-mix-224",
    (1169, 2068, 7586, 21831, 13),
    (-0.449851, 1.431027, -0.713446, 0.417485, -0.640859),
    0.01,
)


def published_checks(
    model: Model,
    name: Name | None,
    pictures: Path | None,
    answers: Sequence[Expectation] = ANSWERS,
    hidden: HiddenState = ZERO_PICTURE,
) -> list[tuple[str, Check]]:
    """The checks that there are for a checkpoint of this name.

    Parameters
    ----------
    name : what it is called; where only its config.json says so it may be a fine-tuned one, and
        differences are no more than noted
    pictures : a folder with the pictures under their published names
    """
    known = [e for e in answers if name is not None and e.checkpoint == name.name]
    checks: list[tuple[str, Check]] = []
    if name is not None and name.name == hidden.checkpoint:
        checks.append(("picture of zeros", partial(_check_hidden, model, name, hidden)))
    for number, expected in enumerate(known if pictures is not None else (), 1):
        assert name is not None and pictures is not None
        title = f"published answer {number}"
        checks.append((title, partial(_ask, title, model, name, pictures, expected)))
    if known and pictures is None:
        files = ", ".join(dict.fromkeys(e.picture for e in known))
        checks.append(_noted(f"{len(known)} are known: give --pictures FOLDER with {files}"))
    if pictures is not None and not known:
        checks.append(_noted(f"none is known for {name.name if name else 'this checkpoint'}"))
    return checks


def _noted(says: str) -> tuple[str, Check]:
    title = "published answers"
    return title, partial(Finding, title, NOTE, says)


def _ask(title: str, model: Model, name: Name, pictures: Path, expected: Expectation) -> Finding:
    picture = pictures / expected.picture
    asked = f"{expected.prompt!r} about {expected.picture}"
    if not picture.is_file():
        return Finding(title, NOTE, f"{asked} is not asked: {picture} is not there")
    [answer] = model.generate(picture, expected.prompt, max_tokens=TOKENS)
    if answer.text == expected.answer:
        return Finding(title, OK, f"{asked}: {answer.text!r}")
    said = f"{asked}: {answer.text!r}, expected {expected.answer!r}"
    doubt = _doubt(name, expected.sure and model.precision in ("float32", "bfloat16"))
    return Finding(title, NOTE if doubt else WRONG, said + doubt)


def _check_hidden(model: Model, name: Name, expected: HiddenState) -> Finding:
    found = first_hidden_state(model, expected.ids)[: len(expected.first)]
    truth = np.array(expected.first)
    apart = np.abs(found - truth)
    fine = bool(np.all(apart <= expected.tolerance * (1 + np.abs(truth))))
    said = f"the first hidden state is {np.max(apart):.4f} off, expected about {expected.tolerance}"
    if fine:
        return Finding("picture of zeros", OK, said)
    exact = isinstance(model.weights[EMBED_TOKENS], np.ndarray) and model.precision == "float32"
    doubt = _doubt(name, exact)
    return Finding("picture of zeros", NOTE if doubt else WRONG, said + doubt)


def first_hidden_state(model: Model, ids: Sequence[int]) -> Array:
    """What the first of all tokens has become behind the last norm, for a picture of zeros.

    -> [D]
    """
    config, w, ops = model.config, model.weights, model.ops
    side, patches = config.vision_config.image_size, config.vision_config.num_patches
    pixels = np.zeros((1, 3, side, side), np.float32)
    features = paligemma.image_features(pixels, w, config, ops=ops, tap=closed)[0]  # [P, D]
    every = np.array([*[config.image_token_index] * patches, *ids])
    x = paligemma.embed(every, features, w, config, ops=ops, tap=closed)
    text, decoder = config.text_config, w.scope("language_model")
    cache = new_cache(text, len(x), x.dtype)
    rows = Rows.of(0, len(x), range(len(x)))
    return gemma.hidden_states(x, decoder, text, cache, rows, np.array([0]), ops=ops, tap=closed)[0]


def _doubt(name: Name, sure: bool) -> str:
    """Why a difference need not be a mistake, or nothing where it must be one."""
    if not name.own:
        return f"; {name.where}, from which it may have been fine-tuned"
    return "" if sure else "; rounding alone can do that here"
