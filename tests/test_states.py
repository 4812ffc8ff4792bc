"""Features, hidden states and attention: the numbers inside, as transformers names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import npvlm
from golden import ours
from npvlm.api import Failed, Model, Seen
from npvlm.errors import NpvlmError, UsageError
from npvlm.model import siglip
from npvlm.model.weights import Array

GOLDEN = Path(ours.__file__).parent
TOWER, TEXT = "vision_tower.vision_model", "language_model.model"
PROMPT = "caption en"


@pytest.fixture(scope="module", params=["pg1", "pg2", "pg2-f16-sharded"])
def golden(request: pytest.FixtureRequest) -> tuple[Model, dict[str, Array]]:
    """A checkpoint, and what transformers makes of the first prompt in float64."""
    return npvlm.load(GOLDEN / request.param), load_file(GOLDEN / f"{request.param}.safetensors")


@pytest.fixture(scope="module", params=["pg1", "pg2"])
def model(request: pytest.FixtureRequest) -> Model:
    return npvlm.load(GOLDEN / request.param)


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def layers(model: Model) -> int:
    return model.config.text_config.num_hidden_layers


def near(found: Array, truth: Array) -> bool:
    return ours.rms(found - truth.reshape(found.shape)) < 1e-6 * ours.rms(truth)


def test_features_are_those_of_transformers_before_and_behind_the_projector(golden) -> None:
    model, truth = golden
    shown = Image.fromarray(truth["0.picture.0"])
    assert near(model.features(shown), truth["0.multi_modal_projector"])
    tower = model.features(shown, projected=False)
    assert near(tower, truth[f"0.{TOWER}.post_layernorm"])
    assert model.features(shown).dtype == tower.dtype == np.float32


def test_hidden_states_are_numbered_as_in_transformers(golden) -> None:
    """The stored run goes on with an answer: what the prompt becomes is the same without it."""
    model, truth = golden
    shown, L = Image.fromarray(truth["0.picture.0"]), layers(model)
    states = model.hidden_states(shown, PROMPT, range(L + 1))
    names = ["inputs_embeds", *(f"{TEXT}.layers.{i}" for i in range(L - 1)), f"{TEXT}.norm"]
    assert len(states) == len(names)
    for state, name in zip(states, names, strict=True):
        assert near(state, truth[f"0.{name}"][: len(state)]), name


def test_one_number_gives_one_array_and_several_a_stack(model: Model, picture) -> None:
    L, T = layers(model), len(model.hidden_states(picture, PROMPT))
    states = model.hidden_states(picture, PROMPT, range(L + 1))
    assert states.shape == (L + 1, T, model.config.text_config.hidden_size)
    for n in range(L + 1):
        np.testing.assert_array_equal(model.hidden_states(picture, PROMPT, n), states[n])
        np.testing.assert_array_equal(model.hidden_states(picture, PROMPT, n - L - 1), states[n])
    some = model.hidden_states(picture, PROMPT, [np.int64(2), 0, 2])
    np.testing.assert_array_equal(some, states[[2, 0, 2]])
    np.testing.assert_array_equal(model.hidden_states(picture, PROMPT), states[-1])


def test_layers_behind_those_asked_for_are_not_run(model: Model, picture, monkeypatch) -> None:
    from npvlm.model import gemma

    run: list[object] = []
    real = gemma.layer
    monkeypatch.setattr(gemma, "layer", lambda *a, **k: run.append(0) or real(*a, **k))
    for n in range(layers(model) + 1):
        run.clear()
        model.hidden_states(picture, PROMPT, n)
        assert len(run) == n
    run.clear()
    model.attention(picture, PROMPT, 1)
    assert len(run) == 2


def test_the_last_state_scores_what_logits_scores(model: Model, picture) -> None:
    text = model.config.text_config
    scores = model.ops.linear(
        model.hidden_states(picture, PROMPT),
        model.weights.get(
            "language_model.lm_head.weight",
            model.weights["language_model.model.embed_tokens.weight"],
        ),
    )
    if text.final_logit_softcapping:
        scores = model.ops.soft_cap(scores, text.final_logit_softcapping)
    np.testing.assert_array_equal(scores, model.logits(picture, PROMPT, []))


def test_several_pictures_stand_in_front_of_one_prompt(model: Model, picture) -> None:
    pictures = [picture, picture.transpose(Image.Transpose.ROTATE_90)]
    states, P = model.hidden_states(pictures, PROMPT, 0), model.config.vision_config.num_patches
    assert len(states) == len(model.hidden_states(picture, PROMPT, 0)) + P
    for i, one in enumerate(pictures):
        np.testing.assert_array_equal(states[i * P : (i + 1) * P], model.features(one))


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_every_precision_has_insides(precision: str, picture) -> None:
    model = npvlm.load(GOLDEN / "pg2", precision)
    exact = npvlm.load(GOLDEN / "pg2")
    for found, true in (
        (model.features(picture), exact.features(picture)),
        (model.hidden_states(picture, PROMPT, 2), exact.hidden_states(picture, PROMPT, 2)),
        (model.attention(picture, PROMPT), exact.attention(picture, PROMPT)),
    ):
        assert found.shape == true.shape and found.dtype == np.float32
        assert 1e-4 < ours.rms(found - true) / ours.rms(true) < 0.5


def test_attention_mixes_the_values_to_what_the_model_goes_on_with(model: Model, picture) -> None:
    text, L = model.config.text_config, layers(model)
    weights = model.attention(picture, PROMPT, range(L))
    T = weights.shape[-1]
    assert weights.shape == (L, text.num_attention_heads, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    stages: dict[str, Array] = {}

    def keep(name: str, value: Array) -> Array:
        stages[name] = value
        return value

    ids = model.ids_of(PROMPT, 1, 0)
    ours_run(model, ids, model.features(picture), keep)
    group = text.num_attention_heads // text.num_key_value_heads
    for i in range(L):
        at = f"{TEXT}.layers.{i}.self_attn"
        values = stages[f"{at}.v_proj"].reshape(T, text.num_key_value_heads, text.head_dim)
        mixed = np.einsum("hts,shd->thd", weights[i], np.repeat(values, group, axis=1))
        attended = stages[f"{at}.attend"]
        np.testing.assert_allclose(mixed[-len(attended) :], attended, atol=1e-5)


def ours_run(model: Model, ids: Array, features: Array, tap: Callable[[str, Array], Array]) -> None:
    from npvlm.decoding.generate import logits

    none = np.array([], np.int64)
    logits(ids, none, features, model.weights, model.config, ops=model.ops, tap=tap)


@pytest.mark.parametrize("asked", [99, -99, [], [0, 99], 0.5, "1", [None], None])
def test_layers_that_there_are_not_are_refused(model: Model, picture, asked) -> None:
    for look in (model.hidden_states, model.attention):
        with pytest.raises(UsageError, match=r"expected numbers from -\d to \d\."):
            look(picture, PROMPT, asked)


def test_the_norm_is_no_layer_of_attention(model: Model, picture) -> None:
    with pytest.raises(UsageError, match="is asked for, expected numbers"):
        model.attention(picture, PROMPT, layers(model))


def test_what_is_no_picture_or_text_is_refused(model: Model, picture, tmp_path: Path) -> None:
    for wrong in (None, 3, [picture]):
        with pytest.raises(UsageError):
            model.features(wrong)
    with pytest.raises(UsageError):
        model.hidden_states(picture, 3)
    with pytest.raises(UsageError, match="needs a picture"):
        model.hidden_states([], PROMPT)
    with pytest.raises(NpvlmError, match="cannot be opened"):
        model.features(tmp_path / "absent.png")


def test_a_seen_picture_is_not_looked_at_again(model: Model, picture, monkeypatch) -> None:
    seen, expected = model.look(picture), model.hidden_states(picture, PROMPT)
    features = model.features(picture)

    def called(*arguments: object, **named: object) -> None:
        raise AssertionError("the tower looks again")

    monkeypatch.setattr(siglip, "patch_features", called)
    np.testing.assert_array_equal(model.features(seen), features)
    np.testing.assert_array_equal(model.hidden_states(seen, PROMPT), expected)


def test_many_pictures_are_looked_at_in_order_and_the_unreadable_are_named(
    model: Model, picture, tmp_path: Path
) -> None:
    given: list[object] = []
    for i in range(21):
        turned = picture.rotate(17 * i)
        turned.save(tmp_path / f"{i}.png")
        given.append([turned, tmp_path / f"{i}.png", tmp_path / "absent.png"][i % 3])
    found = list(model.look_all(given))
    assert len(found) == 21
    for i, (one, asked) in enumerate(zip(found, given, strict=True)):
        if i % 3 == 2:
            assert isinstance(one, Failed) and one.image == str(asked) and "absent" in one.error
        else:
            assert isinstance(one, Seen) and one.features is not None
            np.testing.assert_array_equal(one.features, model.features(asked))
