"""Words of answers whose characters are spelled by several tokens."""

from __future__ import annotations

import pytest

from npvlm.answers.words import Span, split_words, sureness
from tests.test_boxes import Letters


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a赤", ["a", "赤"]),
        ("a√b c", ["a√b ", "c"]),
        ("√", ["√"]),
        (" a  b", [" a  ", "b"]),
    ],
)
def test_tokens_that_spell_a_character_together_are_in_one_word(text: str, words: list) -> None:
    found = split_words(Letters(), [*text.encode()])
    assert [word.text for word in found] == words
    edges = [0]
    for word in words:
        edges.append(edges[-1] + len(word.encode()))
    spans = zip(words, edges, edges[1:], strict=False)
    assert found == [Span(word, start, stop) for word, start, stop in spans]


@pytest.mark.parametrize(
    ("probability", "said"),
    [(0.0, "under 1%"), (0.0099, "under 1%"), (0.01, "1%"), (0.994, "99%"), (1.0, "100%")],
)
def test_a_word_is_said_to_be_as_sure_as_it_was(probability: float, said: str) -> None:
    assert sureness("red", probability) == f"{said} sure"
