"""The public face, on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm import api
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
    monkeypatch.setattr(api, "PACKED_TOKENS", 1)
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
        ({"prompts": [5]}, "no text"),
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


@pytest.mark.parametrize("ids", [[-1], [10**6], [[1, 2]]])
def test_answer_ids_that_are_none_are_refused(model, pictures, ids) -> None:
    with pytest.raises(npvlm.UsageError, match="answer_ids"):
        model.logits(pictures[0], "caption en", ids)


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
