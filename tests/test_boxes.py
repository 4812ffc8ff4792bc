"""Boxes from answers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npvlm.answers.boxes import Box, parse_boxes
from npvlm.answers.confidence import confidence, locations, token_spans

BOX = "<loc0000><loc0000><loc0512><loc0512>"
CODES = "".join(f"<seg{i:03d}>" for i in range(16))


def labels(text: str) -> list[str]:
    return [box.label for box in parse_boxes(text, 8, 8).boxes]


def test_places_come_as_y0_x0_y1_x1_and_count_1024ths() -> None:
    text = "<loc0256><loc0128><loc0512><loc1023> red circle"
    found = parse_boxes(text, 1000, 100)
    assert found.boxes == [Box("red circle", 125, 25, 1000 * 1023 / 1024, 50)]
    assert found.unread == []


def test_places_may_count_1023ds() -> None:
    [box] = parse_boxes("<loc0000><loc0000><loc1023><loc0341>", 300, 100, bins=1023).boxes
    assert (box.x0, box.y0, box.x1, box.y1) == (0, 0, pytest.approx(100), 100)


def test_several_boxes_keep_their_order_and_labels_of_any_letters() -> None:
    text = f"{BOX} it's a №5 (big) <3 ; {BOX} кот;{BOX}"
    assert labels(text) == ["it's a №5 (big) <3", "кот", ""]
    assert parse_boxes(text, 8, 8).unread == []


def test_boxes_without_labels_may_follow_each_other() -> None:
    assert labels(f"{BOX}{BOX}{BOX} cat") == ["", "", "cat"]
    assert labels(f"{BOX} {BOX}") == ["", ""]
    assert labels(f"{BOX} cat {BOX} dog") == ["cat", "dog"]


def test_a_mask_is_sixteen_codes_behind_a_box() -> None:
    [plain, masked] = parse_boxes(f"{BOX} cat ; {BOX} {CODES} dog", 8, 8).boxes
    assert plain.codes == () and masked.codes == tuple(range(16))
    assert masked.label == "dog"


def test_the_box_of_a_broken_mask_is_kept() -> None:
    found = parse_boxes(f"{BOX}<seg001><seg002> cat", 8, 8)
    assert [(box.label, box.codes) for box in found.boxes] == [("cat", ())]
    assert found.unread == ["<seg001><seg002>"]


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<loc0001><loc0002><loc0003> three",
        "<loc0001><loc0002><loc0003>",
        BOX + "<loc0001> five",
        "<loc1024>" * 4,
        "<loc001>" * 4,
        "<loc0500><loc0100><loc0500><loc0200> flat",
        "<loc0100><loc0500><loc0200><loc0400> backwards",
        "<loc0300><loc0100><loc0200><loc0900> upside down",
        "<loc0100><loc0500><loc0200><loc0500> a line",
        CODES,
    ],
)
def test_what_is_no_box_stays_text(text: str) -> None:
    found = parse_boxes(text, 10, 10)
    assert found.boxes == [] and found.unread == [text]


def test_words_before_a_box_and_a_broken_end_are_kept_beside_it() -> None:
    found = parse_boxes(f"look: {BOX} cat ; <loc0001><loc00", 8, 8)
    assert [box.label for box in found.boxes] == ["cat"]
    assert found.unread == ["look:", "<loc0001><loc00"]


def test_what_is_no_box_is_kept_without_the_semicolon_behind_it() -> None:
    assert parse_boxes(f"nothing ;; {BOX} cat; ;", 8, 8).unread == ["nothing"]


def test_the_end_of_an_answer_that_was_cut_off_stays_text() -> None:
    text = f"{BOX} cat ; {BOX} orange st"
    found = parse_boxes(text, 8, 8, whole=False)
    assert [box.label for box in found.boxes] == ["cat"]
    assert found.unread == [f"{BOX} orange st"]


def test_a_box_s_confidence_is_of_its_own_places_and_label() -> None:
    text = f"{BOX}{BOX}{CODES} cat"
    first, second = parse_boxes(text, 8, 8).boxes
    assert [text[slice(*span)] for span in first.spans] == [BOX]
    assert [text[slice(*span)] for span in second.spans] == [BOX, "cat"]
    assert parse_boxes(f"{BOX} ;", 8, 8).boxes[0].spans == ((0, len(BOX)),)


TOKENS = st.sampled_from(
    [
        "<loc0000>",
        "<loc0512>",
        "<loc1023>",
        "<seg000>",
        "<seg127>",
        CODES,
        " ",
        ";",
        "cat",
        "<",
        "ü",
    ]
)


@given(st.lists(TOKENS, max_size=30).map("".join))
def test_no_text_is_lost(text: str) -> None:
    found = parse_boxes(text, 10, 10)
    said = [text[slice(*span)] for box in found.boxes for span in box.spans] + found.unread
    codes = [f"<seg{code:03d}>" for box in found.boxes for code in box.codes]
    parts = re.compile(r"cat|ü|<loc\d{4}>|<seg\d{3}>|<")
    assert sorted(parts.findall("".join([*said, *codes]))) == sorted(parts.findall(text))
    for box in found.boxes:
        assert box.x0 < box.x1 and box.y0 < box.y1 and box.label in text


def test_an_empty_answer_has_no_boxes() -> None:
    found = parse_boxes("", 10, 10)
    assert found.boxes == [] and found.unread == []


class Letters:
    """A tokenizer of one id per byte."""

    bos_id, newline_id, image_id = 0, 10, -1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")

    def is_whole(self, token_id: int) -> bool:
        return 0 < token_id < 128


def test_each_token_knows_its_characters() -> None:
    ids = [*"a√b".encode(), 0]
    assert token_spans(Letters(), ids) == [(0, 1), (1, 3), (1, 3), (1, 3), (1, 3), (3, 3)]


def test_tokens_that_end_within_a_character_share_what_is_shown_for_it() -> None:
    ids = [*"a√".encode()][:-1]
    assert token_spans(Letters(), ids) == [(0, 1), (1, 2), (1, 2)]


class Places(Letters):
    """A tokenizer with one id for each end of the locations."""

    def __init__(self, last: int) -> None:
        self.last = last

    def encode(self, text: str) -> list[int]:
        return {"<loc0000>": [7], "<loc1023>": [self.last]}[text]


def test_locations_are_those_of_a_whole_row_of_ids_else_none() -> None:
    assert locations(Places(7 + 1023)) == range(7, 7 + 1024)
    for tokenizer in (Letters(), Places(7 + 1022), Places(7 - 1023)):
        assert locations(tokenizer) == range(0)


def test_a_part_is_as_likely_as_its_tokens_are_together() -> None:
    spans = [(0, 1), (1, 3), (3, 3)]
    logprobs = [-1.0, -0.5, -7.0]
    assert confidence([(0, 3)], spans, logprobs) == pytest.approx(0.2231, abs=1e-4)
    assert confidence([(0, 1)], spans, logprobs) == pytest.approx(0.3679, abs=1e-4)
    assert confidence([(0, 1), (2, 3)], spans, logprobs) == pytest.approx(0.2231, abs=1e-4)
    assert confidence([(1, 3)], spans, logprobs) == pytest.approx(0.6065, abs=1e-4)


def test_nothing_is_surer_than_certain_and_every_token_has_its_chance() -> None:
    assert confidence([(0, 1)], [(0, 1)], [1e-9]) == 1.0
    with pytest.raises(ValueError, match="shorter"):
        confidence([(0, 1)], [(0, 1), (1, 2)], [-1.0])
