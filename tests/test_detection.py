"""What `detect` and `segment` give: confidences, masks, datasets."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

import npvlm
from npvlm.answers.confidence import NEAR, PlaceWatch
from npvlm.answers.formats import csv_line
from npvlm.api import Model
from npvlm.work.demo import draw_picture

LABELS = "red circle ; blue square"


@pytest.fixture(scope="module")
def model() -> Model:
    return npvlm.load("shapes")


def chances(model: Model, answer) -> list[float]:
    """Each token's chance, a location's with those near it, from one pass over everything."""
    scores = model.logits(draw_picture(), answer.prompt, answer.token_ids)
    rows = scores[len(answer.prompt_token_ids) - 1 : -1].astype(np.float64)
    shares = np.exp(rows - rows.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    [first], [last] = model.tokenizer.encode("<loc0000>"), model.tokenizer.encode("<loc1023>")
    found = []
    for share, token in zip(shares, answer.token_ids, strict=True):
        near = [token]
        if first <= token <= last:
            near = [i for i in range(first, last + 1) if abs(i - token) <= NEAR]
        found.append(float(share[near].sum()))
    return found


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_confidence_is_the_chance_of_places_nearby_and_of_the_label(model, task: str) -> None:
    found = getattr(model, task)(draw_picture(), LABELS)
    chance = chances(model, found.answer)
    assert np.exp(found.answer.nearby) == pytest.approx(chance, rel=1e-4)
    pieces = [model.tokenizer.piece(token) for token in found.answer.token_ids]
    edges = [0, *(i for i, piece in enumerate(pieces) if piece == "▁;"), len(pieces) - 1]
    assert len(found.boxes) == len(edges) - 1 == 2
    for box, a, b in zip(found.boxes, edges, edges[1:], strict=False):
        own = [i for i in range(a, b) if not pieces[i].startswith("<seg") and pieces[i] != "▁;"]
        assert box.confidence == pytest.approx(math.prod(chance[i] for i in own), rel=1e-4)


@pytest.mark.parametrize("place", [0, 3, 500, 1023])
def test_places_beyond_the_ends_count_for_nothing(model, place: int) -> None:
    [first] = model.tokenizer.encode("<loc0000>")
    watch = PlaceWatch(lambda scores: first + place, model.tokenizer)
    scores = np.random.default_rng(0).standard_normal(model.config.text_config.vocab_size)
    watch(scores)
    near = [i for i in range(1024) if abs(i - place) <= NEAR]
    expected = np.log(np.exp(scores[[first + i for i in near]]).sum()) - scores[first + place]
    assert watch.gains == [pytest.approx(expected)]


def test_a_coco_dataset_counts_from_one_and_has_masks(model) -> None:
    found = model.segment(draw_picture(), LABELS)
    data = found.to_coco()
    assert [c["name"] for c in data["categories"]] == ["red circle", "blue square"]
    assert [i["id"] for i in data["images"]] == [1]
    for number, (box, note) in enumerate(zip(found.boxes, data["annotations"], strict=True), 1):
        assert (note["id"], note["image_id"], note["category_id"]) == (number, 1, number)
        assert note["score"] == box.confidence
        assert note["area"] == found.mask(box).sum()
        assert note["segmentation"]["size"] == [found.height, found.width]


def test_an_answer_that_is_cut_off_has_no_half_box(model) -> None:
    whole = model.detect(draw_picture(), LABELS)
    for length in range(1, len(whole.answer.token_ids)):
        cut = model.detect(draw_picture(), LABELS, max_tokens=length)
        assert [box.label for box in cut.boxes] in ([], ["red circle"])
        assert cut.boxes or cut.unread


@pytest.mark.parametrize("label", ["two\nlines", "a\rb", 'a "b", c', ""])
def test_any_label_is_one_field_of_one_row_of_csv(label: str) -> None:
    rows = io.StringIO(f"{csv_line(['a.png', label, 1])}\n{csv_line(['b.png', label, 2])}\n", "")
    assert list(csv.reader(rows)) == [["a.png", label, "1"], ["b.png", label, "2"]]
