"""An explanation as a result: its words, its JSON and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npvlm.answers.explaining import words_of
from npvlm.answers.explanation import Explanation, Word
from tests.test_boxes import Letters

HEAT = np.array([[0.0, 0.123456789], [1 / 3, -2.5e-7]])


def explanation(**changes: object) -> Explanation:
    values = {
        "image": "a.png",
        "picture": Image.new("RGB", (301, 99)),
        "prompt": "caption é",
        "answer": "a cat",
        "own": False,
        "model": "shapes",
        "precision": "int8",
        "method": "occlusion",
        "layers": [0, 2],
        "words": [Word("a", [5], 0.25, HEAT), Word(" cat", [6, 7], 1.0, HEAT.T)],
    }
    return Explanation(**(values | changes))


def test_json_says_everything_but_the_picture() -> None:
    heat = [[0.0, 0.123457], [0.333333, -2.5e-07]]
    turned = [[0.0, 0.333333], [0.123457, -2.5e-07]]
    text = explanation().to_json()
    assert "\n" not in text
    assert json.loads(text) == {
        "image": "a.png",
        "size": [301, 99],
        "prompt": "caption é",
        "answer": "a cat",
        "own": False,
        "model": "shapes",
        "precision": "int8",
        "method": "occlusion",
        "layers": [0, 2],
        "words": [
            {"text": "a", "token_ids": [5], "probability": 0.25, "peak": [75, 74], "heat": heat},
            {
                "text": " cat",
                "token_ids": [6, 7],
                "probability": 1.0,
                "peak": [225, 24],
                "heat": turned,
            },
        ],
    }


def test_a_page_of_a_text_that_is_no_utf8_is_written_all_the_same(tmp_path: Path) -> None:
    explanation(prompt="caption é \udcff").html(tmp_path / "page.html")
    assert "<h1>caption é ?</h1>" in (tmp_path / "page.html").read_bytes().decode("utf-8")


@pytest.mark.parametrize(("method", "together"), [("attention", np.mean), ("occlusion", np.sum)])
def test_a_word_has_the_heat_and_the_chances_of_its_tokens_together(method, together) -> None:
    heats = np.random.default_rng(0).random((5, 4))
    logprobs = np.log([0.5, 0.5, 0.25, 1.0, 0.125])
    first, second = words_of(Letters(), [*b"ab cd"], logprobs, heats, method)
    assert (first.text, second.text) == ("ab ", "cd")
    assert (first.token_ids, second.token_ids) == ([97, 98, 32], [99, 100])
    assert [first.probability, second.probability] == pytest.approx([0.0625, 0.125])
    np.testing.assert_array_equal(first.heat, together(heats[:3], axis=0).reshape(2, 2))
    np.testing.assert_array_equal(second.heat, together(heats[3:], axis=0).reshape(2, 2))


def test_no_word_is_likelier_than_certain() -> None:
    [word] = words_of(Letters(), [97], np.array([1e-9]), np.ones((1, 4)), "attention")
    assert word.probability == 1.0
