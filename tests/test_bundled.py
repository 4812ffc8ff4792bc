"""The bundled models: what they are, what they know, and how much room they take."""

from __future__ import annotations

import numpy as np
import pytest

import npvlm
from npvlm.api import Model
from npvlm.opening import BUNDLED
from npvlm.work.demo import THINGS, draw_picture
from npvlm.work.scenes import mask_of

TOYS = ("shapes", "shapes2")


@pytest.fixture(scope="module", params=TOYS)
def model(request: pytest.FixtureRequest) -> Model:
    return npvlm.load(request.param)


def test_all_bundled_files_take_less_than_12_mb() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 12e6


def test_the_second_model_has_all_that_paligemma_2_has() -> None:
    text = npvlm.load("shapes2").config.text_config
    assert text.model_type == "gemma2" and text.num_key_value_heads == 2
    assert text.attn_logit_softcapping == 50 and text.final_logit_softcapping == 30
    assert set(text.layer_types) == {"sliding_attention", "full_attention"}
    patches = npvlm.load("shapes2").config.vision_config.num_patches
    assert text.sliding_window is not None and text.sliding_window < patches
    assert text.attention_scale != text.head_dim**-0.5


def test_words_about_the_demo_s_picture_are_true(model: Model) -> None:
    seen = model.look(draw_picture())
    assert model.caption(seen).text == "a red circle and a blue square and an orange star"
    assert model.ask(seen, "how many shapes?").text == "3"
    assert model.ask(seen, "what color is the star?").text == "orange"


def test_things_of_the_demo_s_picture_are_found(model: Model) -> None:
    for thing in THINGS:
        [box] = model.detect(draw_picture(), thing.label).boxes
        edges = [box.x0, box.y0, box.x1, box.y1]
        assert box.label == thing.label
        assert edges == pytest.approx([thing.x0, thing.y0, thing.x1, thing.y1], abs=9)


def test_masks_of_the_demo_s_picture_cover_the_things(model: Model) -> None:
    for thing in THINGS[:2]:
        found = model.segment(draw_picture(), thing.label)
        truth = np.zeros((found.height, found.width), bool)
        truth[thing.y0 : thing.y1, thing.x0 : thing.x1] = np.asarray(mask_of(thing)) > 127
        mask = found.mask(found.boxes[0])
        assert (mask & truth).sum() / (mask | truth).sum() > 0.8


def test_cached_answers_are_those_of_one_pass(model: Model) -> None:
    answer = model.caption(draw_picture())
    scores = model.logits(draw_picture(), answer.prompt, answer.token_ids)
    behind = scores[len(answer.prompt_token_ids) - 1 : -1]
    assert behind.argmax(-1).tolist() == answer.token_ids
