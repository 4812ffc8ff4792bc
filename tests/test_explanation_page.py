"""The page of an explanation, read as a browser reads it."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from npvlm.answers.explanation import Explanation, Word
from npvlm.answers.explanation_page import TOLD, page
from npvlm.answers.heat import wash
from tests.test_explain import BOX, Tags


def heat(row: int, column: int, most: float = 1.0) -> np.ndarray:
    found = np.zeros((5, 5))
    found[row, column] = most
    return found


WORDS = [
    Word("a", [5], 0.25, heat(0, 2)),
    Word(" <red>", [6], 0.004, heat(2, 4)),
    Word(f" {BOX}", [7], 0.5, heat(4, 0)),
    Word(" flat", [8], 1.0, np.full((5, 5), 0.2)),
]


def explanation(**changes: object) -> Explanation:
    values = {
        "image": "folder/my photo.png",
        "picture": Image.new("RGB", (2000, 500), (10, 200, 30)),
        "prompt": "caption <en>",
        "answer": "a <red> thing",
        "own": True,
        "model": "shapes & co",
        "precision": "int8",
        "method": "attention",
        "layers": [0],
        "words": WORDS,
    }
    return Explanation(**(values | changes))


def elements(text: str, name: str, kind: str = "") -> list[dict[str, str]]:
    found = [attributes for tag, attributes in Tags(text).found if tag == name]
    return [a for a in found if not kind or a.get("class") == kind]


def decoded(source: str) -> Image.Image:
    head, code = source.split(",", 1)
    picture = Image.open(io.BytesIO(base64.b64decode(code, validate=True)))
    assert head == f"data:image/{picture.format.lower()};base64"
    return picture


def test_each_word_says_how_sure_it_was_and_where_it_is_brightest() -> None:
    buttons = elements(page(explanation()), "button")
    assert [(b["id"], b["aria-description"], b["style"]) for b in buttons] == [
        ("word-1", "25% sure; brightest upper centre", "--share:0.250"),
        ("word-2", "under 1% sure; brightest middle right", "--share:0.004"),
        ("word-3", "50% sure of these places; brightest lower left", "--share:0.500"),
        ("word-4", "100% sure; no single part matters", "--share:1.000"),
    ]
    assert {(b["type"], b["aria-pressed"]) for b in buttons} == {("button", "false")}
    found = re.findall(r"<button[^>]*>([^<]*)</button>", page(explanation()))
    assert found == ["a", "&lt;red&gt;", "(box)", "flat"]


@pytest.mark.parametrize(("side", "names"), [(3, "LMR"), (6, "LLMMRR")])
def test_thirds_are_named_by_where_the_patch_has_its_middle(side: int, names: str) -> None:
    words = []
    for at in range(side):
        found = np.full((side, side), -1.0)
        found[at, at] = 1.0
        words.append(Word("a", [5], 0.25, found))
    said = {"L": "upper left", "M": "middle centre", "R": "lower right"}
    for button, name in zip(elements(page(explanation(words=words)), "button"), names, strict=True):
        assert button["aria-description"] == f"25% sure; brightest {said[name]}"


def test_each_heat_is_its_wash_with_a_ring_where_one_part_stands_out() -> None:
    text = page(explanation())
    assert [a["id"] for a in elements(text, "div", "heat")] == [f"heat-{i}" for i in range(1, 5)]
    sources = [a["src"] for a in elements(text, "img") if a["alt"] == ""]
    for word, source in zip(WORDS, sources, strict=True):
        expected = wash(word.heat, (128, 32), "attention")
        assert decoded(source).convert("RGBA").tobytes() == expected.tobytes()
    places = ["left:50.00%;top:10.00%", "left:90.00%;top:50.00%", "left:10.00%;top:90.00%"]
    assert [a["style"] for a in elements(text, "i")] == places
    assert re.findall(r'id="heat-4"><img[^>]*>(.*?)</div>', text) == [""]


@pytest.mark.parametrize(
    ("size", "shown", "stretched"),
    [
        ((2000, 500), (1024, 256), (128, 32)),
        ((3, 900), (3, 900), (1, 128)),
        ((900, 3), (900, 3), (128, 1)),
    ],
)
def test_the_picture_is_whole_and_no_larger_than_a_page_needs(size, shown, stretched) -> None:
    picture = Image.new("RGB", size, (10, 200, 30))
    text = page(explanation(picture=picture))
    [source] = [a["src"] for a in elements(text, "img") if a["alt"] == "my photo.png"]
    assert decoded(source).size == shown and picture.size == size
    assert (
        max(
            abs(a - b) for a, b in zip(decoded(source).getpixel((0, 0)), (10, 200, 30), strict=True)
        )
        < 4
    )
    assert f"aspect-ratio: {size[0]} / {size[1]}" in text
    assert {decoded(a["src"]).size for a in elements(text, "img") if a["alt"] == ""} == {stretched}


@pytest.mark.parametrize("method", TOLD)
def test_the_page_tells_how_it_was_made_and_what_the_light_shows(method: str) -> None:
    text = page(explanation(method=method))
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)
    assert facts == [
        ("picture", "my photo.png"),
        ("model", "shapes &amp; co"),
        ("precision", "int8"),
        ("method", method),
    ]
    told = re.search(r'<div class="told">(.*?)</div>', text, re.S)[1]
    assert re.findall(r"<p>(.*?)</p>", told, re.S) == [
        part.strip() for part in TOLD[method].split("\n\n")
    ]
    assert "<title>caption &lt;en&gt;: a &lt;red&gt; thing</title>" in text
    assert "<h1>caption &lt;en&gt;</h1>" in text


@pytest.mark.parametrize(
    ("around", "within"),
    [
        (r'<div class="words" id="words">(.*?)</div>', "button"),
        (r'alt="my photo.png">(.*?)</div>\s*<figcaption', "div"),
        (r'<div class="told">(.*?)</div>', "p"),
        (r"<dl>(.*?)</dl>", "div"),
    ],
)
def test_nothing_stands_between_the_parts(around: str, within: str) -> None:
    inside = re.search(around, page(explanation()), re.S)[1]
    assert re.sub(f"<{within}.*?</{within}>", "", inside, flags=re.S).split() == []


def test_the_page_says_whose_answer_it_is_and_copes_without_names() -> None:
    assert "<h2>The model's answer</h2>" in page(explanation())
    assert "<h2>The answer that was given</h2>" in page(explanation(own=False))
    assert next(a["alt"] for a in elements(page(explanation(image="")), "img")) == "a picture"
    long = page(explanation(prompt="p" * 300))
    assert f"<title>{'p' * 120}</title>" in long and f"<h1>{'p' * 300}</h1>" in long
