"""inf and nan in a weight: named when it is used, and never an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import npvlm
from npvlm.api import Model
from npvlm.errors import NpvlmError
from npvlm.files.packed import at_precision
from npvlm.model.weights import PACKERS, Weights, is_finite, round_to_bfloat16, unpack
from npvlm.work.demo import draw_picture

ROOT = Path(__file__).resolve().parent.parent
TEXT, TOWER = "language_model.model", "vision_tower.vision_model"
# With soft-caps, inf in the last two gives plain scores: the caps themselves.
DAMAGED = [
    f"{TOWER}.embeddings.patch_embedding.bias",
    f"{TOWER}.encoder.layers.0.mlp.fc1.weight",
    "multi_modal_projector.linear.weight",
    f"{TEXT}.layers.0.self_attn.q_proj.weight",
    f"{TEXT}.layers.1.mlp.gate_proj.weight",
    f"{TEXT}.norm.weight",
    f"{TEXT}.embed_tokens.weight",
]


def damaged(model: Model, name: str, value: float, precision: str = "float32") -> Model:
    """The model with one number of a tensor replaced: of the table, in a row nobody reads."""
    weights = dict(model.weights)
    numbers = np.array(unpack(weights[name], np.float32))
    numbers[(30, 0) if name.endswith("embed_tokens.weight") else (0,) * numbers.ndim] = value
    weights[name] = numbers
    return replace(
        model, weights=Weights(at_precision(weights, precision, PACKERS)), precision=precision
    )


@pytest.fixture(scope="module", params=["pg1", "pg2"])
def model(request: pytest.FixtureRequest) -> Model:
    return npvlm.load(ROOT / "golden" / request.param, ops="numpy")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", DAMAGED)
def test_the_tensor_that_holds_no_number_is_named(model: Model, name: str, value: float) -> None:
    for precision in ("float32", "bfloat16", "int8", "int4"):
        with pytest.raises(NpvlmError, match=f"^{name} holds inf or nan, expected numbers"):
            damaged(model, name, value, precision).generate(draw_picture(), "caption en")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("ask", ["logits", "score", "beams", "drawn", "explain"])
def test_every_way_to_ask_names_it(model: Model, ask: str) -> None:
    broken, picture = damaged(model, f"{TEXT}.norm.weight", np.inf), draw_picture()
    asked = {
        "logits": lambda: broken.logits(picture, "caption en", []),
        "score": lambda: broken.score(picture, "caption en", ["a", "b"]),
        "beams": lambda: broken.generate(picture, "caption en", beams=2),
        "drawn": lambda: broken.generate(picture, "caption en", temperature=1.0, seed=0),
        "explain": lambda: broken.explain(picture, "caption en", answer="a"),
    }
    with pytest.raises(NpvlmError, match=r"norm\.weight holds inf or nan"):
        asked[ask]()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_that_overflow_by_themselves_are_no_answer_either(model: Model) -> None:
    names = [f"{TEXT}.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    huge = {name: np.full_like(unpack(model.weights[name], np.float32), 3e38) for name in names}
    broken = replace(model, weights=Weights(dict(model.weights) | huge))
    with pytest.raises(NpvlmError, match="although its weights are"):
        broken.generate(draw_picture(), "caption en")


def test_saturated_scores_of_sound_weights_are_answers() -> None:
    model = npvlm.load(ROOT / "golden" / "pg2", ops="numpy")
    name = f"{TEXT}.norm.weight"
    steep = Weights(dict(model.weights) | {name: unpack(model.weights[name], np.float32) * 1e6})
    assert replace(model, weights=steep).generate(draw_picture(), "caption en", max_tokens=2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_a_broken_number_is_found_wherever_it_lies(kind: str, value: float) -> None:
    rows = 33 if kind in PACKERS else 2048  # of plain ones more than are looked at at a time
    for place in (None, (0, 0), (rows // 2, 7), (rows - 1, 1023)):
        numbers = np.ones((rows, 1024), np.float32)
        if place:
            numbers[place] = value
        weight = {
            "float32": lambda n: n,
            "float16": lambda n: n.astype(np.float16),
            "bfloat16": round_to_bfloat16,
            **PACKERS,
        }[kind](numbers)
        assert is_finite(weight) == (place is None)
