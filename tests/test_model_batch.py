"""Model.batch: pictures as they come, answers in order, and what ends it early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm import api, packs
from npvlm.work.demo import draw_picture

QUESTION = "answer en how many shapes?"
COUNT = 20  # more than two packs


@pytest.fixture(scope="module")
def model() -> npvlm.Model:
    return npvlm.load("shapes")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures that the model tells apart: every third one is blank."""
    folder, whole = tmp_path_factory.mktemp("pictures"), draw_picture()
    blank = Image.new("RGB", whole.size, "white")
    paths = [folder / f"{i:02}.png" for i in range(COUNT)]
    for i, path in enumerate(paths):
        (blank if i % 3 == 0 else whole).save(path)
    return paths


@pytest.fixture(scope="module")
def expected(model: npvlm.Model, paths: list[Path]) -> list[str]:
    texts = [answer.text for answer in model.generate(paths, QUESTION)]
    assert len(set(texts)) > 1
    return texts


def texts(results: Iterable[Any]) -> list[str]:
    return [result.text for result in results]


def until_it_raises(results: Iterator[Any]) -> tuple[list[Any], Exception]:
    """What was answered, and what ended it."""
    found: list[Any] = []
    with pytest.raises(Exception) as caught:
        while True:
            found.append(next(results))
    assert not isinstance(caught.value, StopIteration)
    return found, caught.value


# Pictures that are there only until the next one is asked for


def reused_buffer(paths: list[Path]) -> Iterator[Any]:
    with Image.open(paths[0]) as first:
        buffer = np.array(first.convert("RGB"))
    for path in paths:
        with Image.open(path) as picture:
            buffer[:] = np.array(picture.convert("RGB"))
        yield buffer
        buffer[:] = 255


def reused_picture(paths: list[Path]) -> Iterator[Any]:
    with Image.open(paths[0]) as first:
        canvas = first.convert("RGB")
    for path in paths:
        with Image.open(path) as picture:
            canvas.paste(picture)
        yield canvas
        canvas.paste("white", (0, 0, *canvas.size))


def closed_pictures(paths: list[Path]) -> Iterator[Any]:
    for path in paths:
        with Image.open(path) as picture:
            yield picture


def closed_files(paths: list[Path]) -> Iterator[Any]:
    for path in paths:
        with path.open("rb") as file:
            yield file


def contents(paths: list[Path]) -> Iterator[Any]:
    return (path.read_bytes() for path in paths)


def of_all_kinds(paths: list[Path]) -> Iterator[Any]:
    kinds = [closed_pictures, closed_files, contents, iter]
    for i, path in enumerate(paths):
        yield from kinds[i % 4]([path])


@pytest.mark.parametrize(
    "given",
    [reused_buffer, reused_picture, closed_pictures, closed_files, contents, of_all_kinds],
)
def test_a_picture_need_not_outlast_its_turn(
    model, paths, expected, given: Callable[[list[Path]], Iterator[Any]]
) -> None:
    assert texts(model.batch(given(paths), QUESTION)) == expected


def test_at_most_two_packs_are_taken_before_the_first_answer(model, paths) -> None:
    taken = 0

    def counted() -> Iterator[Path]:
        nonlocal taken
        for path in paths * 3:
            taken += 1
            yield path

    results = model.batch(counted(), "ocr", max_tokens=1)
    assert taken == 0
    for given in range(1, 40):
        next(results)
        assert taken <= given + 2 * packs.PACKED_SEQUENCES - 1
    results.close()


# What ends a batch early


class CameraError(Exception):
    pass


@pytest.mark.parametrize("count", [0, 8, 17])
@pytest.mark.parametrize("error", [CameraError("unplugged"), ValueError("mine")], ids=repr)
def test_what_came_before_an_error_of_the_caller_is_answered(
    model, paths, expected, count: int, error: Exception
) -> None:
    def broken() -> Iterator[Path]:
        yield from paths[:count]
        raise error

    for prompts in (QUESTION, [QUESTION] * 50):
        found, raised = until_it_raises(model.batch(broken(), prompts))
        assert texts(found) == expected[:count]
        assert raised is error

    def broken_prompts() -> Iterator[str]:
        yield from [QUESTION] * count
        raise error

    found, raised = until_it_raises(model.batch(paths, broken_prompts()))
    assert texts(found) == expected[:count]
    assert raised is error


@pytest.mark.parametrize("count", [0, 11])
def test_bad_use_is_said_when_it_comes_and_what_came_before_is_answered(
    model, paths, expected, count: int
) -> None:
    good, asked = paths[:count], [QUESTION] * count
    cases: list[tuple[Any, Any, str]] = [
        ([*good, paths[0]], asked, "as many prompts as pictures"),
        (good, [*asked, "ocr"], "as many prompts as pictures"),
        (paths, [*asked, 7], "a prompt is of type int, which is no text"),
        (paths, [*asked, None], "a prompt is of type NoneType, which is no text"),
        ([*good, None], QUESTION, "a picture is of type NoneType"),
        ([*good, [paths[0]]], QUESTION, "a list is given where one picture is expected"),
    ]
    for images, prompts, says in cases:
        found, raised = until_it_raises(model.batch(images, prompts))
        assert texts(found) == expected[:count]
        assert type(raised) is npvlm.UsageError and says in str(raised)


def test_a_missing_mask_decoder_is_said_when_a_mask_is_asked_for(model, paths, monkeypatch) -> None:
    def missing(folder: Path) -> Path:
        raise npvlm.NpvlmError("there is no mask decoder")

    monkeypatch.setattr(api, "find_mask_decoder", missing)
    fresh = npvlm.load("shapes")
    prompts = ["ocr", "ocr", "segment red circle", "ocr"]
    found, raised = until_it_raises(fresh.batch(paths[:4], prompts, max_tokens=1))
    assert len(found) == 2 and "no mask decoder" in str(raised)


# What is refused, and what is taken


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_tokens": "x"}, "max_tokens is 'x', expected a whole number"),
        ({"max_tokens": 0}, "max_tokens is 0, expected 1 or more"),
        ({"max_tokens": 10**6}, "too many, expected at most 8192 together"),
        ({"bins": 7}, "bins is 7"),
        ({"images": None}, "a picture is of type NoneType"),
        ({"images": 5}, "a picture is of type int"),
        ({"prompts": None}, "prompts are of type NoneType"),
    ],
)
def test_bad_numbers_and_kinds_are_refused_at_once(model, paths, arguments, says: str) -> None:
    def untouched() -> Iterator[Path]:
        raise AssertionError("a picture was asked for")
        yield

    given = {"images": untouched(), "prompts": "ocr"} | arguments
    with pytest.raises(npvlm.UsageError, match=says):
        model.batch(**given)


def test_one_picture_is_a_batch_of_one(model, paths, expected) -> None:
    path = paths[1]
    with Image.open(path) as picture, path.open("rb") as file:
        kinds = [path, str(path), picture, file, path.read_bytes(), np.array(picture)]
        for image in [*kinds, model.look(path)]:
            assert texts(model.batch(image, QUESTION)) == [expected[1]]
            if hasattr(image, "seek"):
                image.seek(0)
    [result] = model.batch("absent.png", "ocr")
    assert (result.image, type(result)) == ("absent.png", npvlm.Failed)


def test_a_picture_or_prompt_that_fails_leaves_the_rest_alone(model, paths, expected) -> None:
    images = [paths[0], b"no picture", "", paths[1], paths[2], np.zeros((4, 4)), paths[3]]
    prompts = [QUESTION] * 7
    prompts[4] = "detect ;"
    results = list(model.batch(images, prompts))
    failed = [i for i, result in enumerate(results) if isinstance(result, npvlm.Failed)]
    assert failed == [1, 2, 4, 5]
    assert texts(results[i] for i in (0, 3, 6)) == [expected[i] for i in (0, 1, 3)]
