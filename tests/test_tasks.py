"""Prompts as PaliGemma was trained on them, and what is refused."""

from __future__ import annotations

import pytest

from npvlm.answers import tasks
from npvlm.errors import UsageError


def test_prompts_are_those_that_the_model_was_trained_on() -> None:
    assert tasks.caption_prompt() == "caption en"
    assert tasks.caption_prompt("pt-br") == "caption pt-br"
    assert tasks.caption_prompt("zh-TW") == "caption zh-TW"
    assert tasks.ask_prompt(" how many? ") == "answer en how many?"
    assert tasks.ask_prompt("wie viele?", "de") == "answer de wie viele?"
    assert tasks.ocr_prompt() == "ocr"
    assert tasks.detect_prompt("cat;  small   dog ;; cat") == "detect cat ; small dog"
    assert tasks.detect_prompt(["dog", " cat "]) == "detect dog ; cat"
    assert tasks.segment_prompt(("a  b", "c")) == "segment a b ; c"


@pytest.mark.parametrize(
    ("prompt", "task", "most"),
    [
        ("ocr", "ocr", 512),
        ("detect cat", "detect", 256),
        ("  segment\tcat", "segment", 512),
        ("caption en", "caption", 100),
        ("detectcat", "detectcat", 100),
        (" ", "", 100),
    ],
)
def test_the_first_word_says_the_task_and_how_long_an_answer_may_be(prompt, task, most) -> None:
    assert tasks.task_of(prompt) == task
    assert tasks.max_tokens(prompt) == most


def test_a_prompt_says_its_labels_again() -> None:
    assert tasks.labels_of("detect cat ; small dog") == ["cat", "small dog"]
    assert tasks.labels_of("detect cat") == ["cat"]
    assert tasks.labels_of("detect") == tasks.labels_of("") == []


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (5, "labels are of type int"),
        (None, "labels are of type NoneType"),
        (["cat", 5], "a label is no text"),
        ("", "no label is given"),
        ([], "no label is given"),
        (" ; ;", "no label is given"),
        ([" ", "\n"], "no label is given"),
        (["dog", "a;b"], "'a;b' holds a semicolon"),
    ],
)
def test_labels_that_are_none_are_refused(labels, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tasks.split_labels(labels)


@pytest.mark.parametrize("lang", ["", "e", "english", "en-", "en-b", "en-latin", "e1", "en de", 5])
def test_what_is_no_language_code_is_refused(lang) -> None:
    for prompt in (tasks.caption_prompt, lambda lang: tasks.ask_prompt("why?", lang)):
        with pytest.raises(UsageError, match="no language code"):
            prompt(lang)


@pytest.mark.parametrize(
    ("question", "says"), [(5, "of type int"), ("", "empty"), (" \n", "empty")]
)
def test_a_question_that_is_none_is_refused(question, says: str) -> None:
    with pytest.raises(UsageError, match=f"the question is {says}"):
        tasks.ask_prompt(question)
