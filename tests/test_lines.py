"""Results as lines of JSON, and text that cannot drive a terminal."""

from __future__ import annotations

import json
import math

import pytest

from npvlm.answers.lines import harmless, json_line


@pytest.mark.parametrize("text", ["é ü 赤", "a\nb", "\u2028", "cat\udcff.png", '"\\'])
def test_any_text_comes_back_from_one_line_of_utf8(text: str) -> None:
    line = json_line({"text": text})
    assert "\n" not in line and json.loads(line.encode("utf-8")) == {"text": text}


def test_letters_stay_letters() -> None:
    assert json_line({"é": "赤"}) == '{"é": "赤"}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_json(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_line({"share": number})


def test_what_steers_a_terminal_is_spelled_out_and_the_rest_stays() -> None:
    assert harmless("a\x1b[31m\tb\n\u202e赤\x7f") == "a\\x1b[31m\tb\n\\u202e赤\\x7f"
