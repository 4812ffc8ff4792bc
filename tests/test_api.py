"""The public face, on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm import api, packs
from npvlm.work.demo import draw_picture

PROMPTS = ["caption en", "answer en how many circles?", "detect blue square"]


@pytest.fixture(scope="module")
def model() -> npvlm.Model:
    return npvlm.load("shapes")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three different pictures as files."""
    folder = tmp_path_factory.mktemp("pictures")
    whole = draw_picture()
    parts = [whole, whole.crop((200, 0, 448, 448)), whole.transpose(Image.Transpose.ROTATE_90)]
    for i, part in enumerate(parts):
        part.save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(3)]


def what_was_said(answers: Sequence[npvlm.Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def test_one_prompt_serves_all_pictures_and_several_go_one_each(model, pictures) -> None:
    shared = model.generate(pictures, PROMPTS[0])
    assert [answer.prompt for answer in shared] == [PROMPTS[0]] * 3
    assert [answer.image for answer in shared] == [str(path) for path in pictures]
    mixed = model.generate(pictures, PROMPTS)
    for answer, picture, prompt in zip(mixed, pictures, PROMPTS, strict=True):
        assert answer.prompt == prompt
        assert answer.token_ids == model.generate(picture, prompt)[0].token_ids


def test_answers_do_not_depend_on_how_sequences_are_packed(model, pictures, monkeypatch) -> None:
    together = model.generate(pictures * 2, PROMPTS * 2, temperature=2.0, seed=3)
    monkeypatch.setattr(packs, "PACKED_TOKENS", 1)
    apart = model.generate(pictures * 2, PROMPTS * 2, temperature=2.0, seed=3)
    assert what_was_said(together) == what_was_said(apart)
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_picture_that_comes_twice_is_looked_at_once(model, pictures, monkeypatch) -> None:
    seen = []
    look = api.paligemma.image_features

    def counted(pixels, *args, **kwargs):
        seen.append(len(pixels))
        return look(pixels, *args, **kwargs)

    monkeypatch.setattr(api.paligemma, "image_features", counted)
    first, second = pictures[:2]
    model.generate([first, second, first, first], PROMPTS[0], max_tokens=2)
    assert seen == [2]


def test_pictures_in_memory_are_the_pictures_of_their_files(model, pictures) -> None:
    from_file = model.generate(pictures[0], PROMPTS[0])
    with Image.open(pictures[0]) as opened, pictures[0].open("rb") as stream:
        from_memory = model.generate(opened, PROMPTS[0])
        from_stream = model.generate(stream, PROMPTS[0])
    assert what_was_said(from_file) == what_was_said(from_memory) == what_was_said(from_stream)
    assert from_memory[0].image == from_stream[0].image == str(pictures[0])


def test_stream_yields_pieces_that_join_to_the_text(model, pictures) -> None:
    pieces = list(model.stream(pictures[0], PROMPTS[0]))
    assert len(pieces) > 3
    assert "".join(pieces) == model.generate(pictures[0], PROMPTS[0])[0].text


def test_logits_agree_with_what_generate_says_it_saw(model, pictures) -> None:
    [answer] = model.generate(pictures[0], PROMPTS[2])
    scores = model.logits(pictures[0], PROMPTS[2], answer.token_ids)
    rows = len(answer.prompt_token_ids) + len(answer.token_ids)
    assert scores.dtype == np.float32
    assert scores.shape == (rows, model.config.text_config.vocab_size)
    behind = scores[len(answer.prompt_token_ids) - 1 : -1].astype(np.float64)
    assert behind.argmax(-1).tolist() == answer.token_ids
    sure = behind - np.log(np.exp(behind).sum(-1, keepdims=True))
    chosen = sure[np.arange(len(behind)), answer.token_ids]
    np.testing.assert_allclose(chosen, answer.logprobs, atol=1e-4)


def test_logits_of_two_pictures_and_no_answer(model, pictures) -> None:
    scores = model.logits(pictures[:2], "caption en", [])
    patches = model.config.vision_config.num_patches
    assert len(scores) == 2 * patches + 2 + len(model.tokenizer.encode("caption en"))


def test_trailing_newlines_of_a_prompt_change_nothing(model, pictures) -> None:
    plain, ended = model.generate(pictures[:1] * 2, ["caption en", "caption en\n\n"])
    assert plain.prompt_token_ids == ended.prompt_token_ids


def test_json_keeps_numbers_and_text(model, pictures) -> None:
    [answer] = model.generate(pictures[0], "caption en é", seed=5, top_k=5)
    read = json.loads(answer.to_json())
    assert read["logprobs"] == answer.logprobs
    assert read["prompt"] == "caption en é" and "é" in answer.to_json()
    assert read["seed"] == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": ["a", "b"]}, "2 prompts for 1 picture"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"images": np.zeros((8, 8, 3))}, r"float64 \[8, 8, 3\], expected uint8"),
        ({"images": np.zeros((8, 8, 2), np.uint8)}, r"uint8 \[8, 8, 2\]"),
        ({"images": np.zeros((0, 8, 3), np.uint8)}, r"uint8 \[0, 8, 3\]"),
        ({"images": [None]}, "NoneType"),
        ({"images": [[[np.zeros((8, 8, 3), np.uint8)]]]}, "a list is given where one picture"),
        ({"images": [[None]]}, "NoneType"),
        ({"prompts": [5]}, "no text"),
        ({"prompts": None}, "no text"),
        ({"max_tokens": [5, 6]}, "2 numbers of max_tokens for 1 pictures"),
        ({"max_tokens": []}, "0 numbers of max_tokens for 1 pictures"),
        ({"max_tokens": "x"}, "max_tokens is 'x'"),
        ({"beams": 0}, "beams is 0, expected 1 or more"),
        ({"temperature": float("nan")}, "temperature"),
        ({"images": [[]]}, "picture"),
        ({"max_tokens": 10**30}, "at most 8192 together"),
        ({"max_tokens": 8192}, "max_position_embeddings"),
        ({"prompts": "word " * 9000}, "max_position_embeddings"),
        ({"prompts": "\ud800"}, "UTF-8"),
    ],
)
def test_bad_use_is_refused_before_any_work(model, pictures, arguments, says) -> None:
    given = {"images": pictures[0], "prompts": "caption en"} | arguments
    with pytest.raises(npvlm.UsageError, match=says):
        model.generate(**given)


@pytest.mark.parametrize(
    "ids", [[-1], [10**6], [[1, 2]], [10**30], ["a"], "a", [1e30], [1.7], 5, None, np.array([1.0])]
)
def test_answer_ids_that_are_none_are_refused(model, pictures, ids) -> None:
    with pytest.raises(npvlm.UsageError, match="answer_ids"):
        model.logits(pictures[0], "caption en", ids)


def test_answer_ids_may_be_an_array(model, pictures) -> None:
    given = model.logits(pictures[0], "ocr", np.array([5, 6]))
    np.testing.assert_array_equal(given, model.logits(pictures[0], "ocr", [5, 6]))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda model, p: model.detect(p, 3), "labels are of type int, expected text"),
        (lambda model, p: model.detect(p, None), "labels are of type NoneType"),
        (lambda model, p: model.detect(p, [3]), "a label is no text"),
        (lambda model, p: model.segment(p, [b"cat"]), "a label is no text"),
        (lambda model, p: model.detect(p, "cat", bins=7), "bins is 7"),
        (lambda model, p: model.ask(p, None), "the question is of type NoneType"),
        (lambda model, p: model.ask(p, "who?", None), "None is no language code"),
        (lambda model, p: model.caption(p, None), "None is no language code"),
        (lambda model, p: model.explain(p, None), "prompt is of type NoneType"),
        (lambda model, p: model.explain(p, "ocr", answer=3), "answer is of type int"),
        (lambda model, p: model.explain(p, "ocr", answer=0), "answer is of type int"),
        (lambda model, p: model.score(p, "ocr", None), "answers hold something that is no text"),
        (lambda model, p: model.score(p, "ocr", ["a", 3]), "answers hold something that is no"),
        (lambda model, p: model.score(p, None, "a"), "prompt is of type NoneType"),
        (lambda model, p: model.logits(p, None, []), "prompt is of type NoneType"),
        (lambda model, p: list(model.stream(p, None)), "no text"),
        (lambda model, p: model.caption(None), "a picture is of type NoneType"),
        (lambda model, p: model.look(7), "a picture is of type int"),
    ],
)
def test_what_is_no_text_or_picture_is_refused_in_a_sentence(model, pictures, ask, says) -> None:
    with pytest.raises(npvlm.UsageError, match=says) as caught:
        ask(model, pictures[0])
    assert "\n" not in str(caught.value)


ONE_PICTURE = {
    "caption": (),
    "ask": ("how many circles?",),
    "ocr": (),
    "detect": ("circle",),
    "segment": ("circle",),
    "explain": ("ocr",),
    "look": (),
    "prepare": (),
}


@pytest.mark.parametrize("task", ONE_PICTURE)
def test_a_task_takes_one_picture(model, pictures, task: str) -> None:
    for several in (pictures, pictures[:1], tuple(pictures), iter(pictures)):
        with pytest.raises(npvlm.UsageError, match="one picture is expected; batch takes several"):
            getattr(model, task)(several, *ONE_PICTURE[task])


@pytest.mark.parametrize("task", ["caption", "ask", "ocr", "detect", "segment"])
def test_no_tokens_is_not_the_default_number_of_tokens(model, pictures, task: str) -> None:
    for wrong in (0, False):
        with pytest.raises(npvlm.UsageError, match=f"max_tokens is {wrong}"):
            getattr(model, task)(pictures[0], *ONE_PICTURE[task], max_tokens=wrong)


def test_the_bytes_of_a_file_are_a_picture(model, pictures) -> None:
    content = pictures[0].read_bytes()
    answer, again = model.generate([content, pictures[0]], PROMPTS[0])
    assert answer.image == "" and answer.token_ids == again.token_ids
    found = model.detect(content, "red circle")
    assert found.boxes == model.detect(pictures[0], "red circle").boxes
    assert found.drawn().size == (found.width, found.height)
    with pytest.raises(npvlm.NpvlmError, match="no picture of a kind that npvlm reads"):
        model.caption(content[:3])


def test_one_seed_serves_all_answers_of_a_call(model, pictures) -> None:
    """So each can be drawn again alone."""
    drawn = model.generate(pictures[:1] * 3, PROMPTS[0], temperature=3.0)
    assert len({answer.seed for answer in drawn}) == 1
    assert len({answer.text for answer in drawn}) == 1
    alone = model.generate(pictures[0], PROMPTS[0], temperature=3.0, seed=drawn[0].seed)
    assert what_was_said(alone) == what_was_said(drawn[:1])


def test_every_kind_of_result_is_found_in_the_package() -> None:
    for name in npvlm.__all__:
        assert getattr(npvlm, name).__name__ == name
    assert set(api.__all__) - set(npvlm.__all__) == {"Piece", "Seconds"}


def test_logits_need_a_picture(model) -> None:
    with pytest.raises(npvlm.UsageError, match="picture"):
        model.logits([], "caption en", [])


@pytest.mark.parametrize("name", ["absent", "a" * 5000, "two\nlines"])
def test_an_unknown_model_is_refused_with_the_names_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(npvlm.NpvlmError, match="shapes") as caught:
        npvlm.load(f"{tmp_path}/{name}/")
    assert "\n" not in str(caught.value)


def test_a_list_of_one_picture_stays_a_list_in_the_answer(model, pictures) -> None:
    one, listed = model.generate([pictures[0], [pictures[0]]], PROMPTS[1])
    assert (one.image, listed.image) == (str(pictures[0]), [str(pictures[0])])
    assert one.token_ids == listed.token_ids


def test_a_model_prints_as_one_line(model) -> None:
    assert "shapes" in repr(model) and len(repr(model)) < 2500
    assert model != npvlm.load("shapes")
