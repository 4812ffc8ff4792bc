"""The shape line of every docstring in model/, held against real calls of a whole run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from npvlm.decoding.generate import logits
from npvlm.model import cache, colpali, gemma, ops, paligemma, siglip
from npvlm.model.tap import closed
from npvlm.model.weights import BFloat16
from tests.tiny import tiny_pixels, tiny_prompt, tiny_weights

NAMED = re.compile(r"(?:(\w+) )?\[([^\]]*)\]")


def shape_line(function: Callable) -> str | None:
    """The line of the docstring that says which shapes become which."""
    lines = (inspect.getdoc(function) or "").splitlines()
    return next((line for line in lines if " -> " in line and "[" in line), None)


def fit(what: str, axes: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Bind the letters of one array to its sizes; a letter means one size in all of a call."""
    letters = axes.replace(",", " ").split()
    if letters[0] == "...":
        letters = letters[1:]
        shape = shape[len(shape) - len(letters) :]
    assert len(letters) == len(shape), f"{what} is [{axes}], got {shape}"
    for letter, size in zip(letters, shape, strict=True):
        expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
        assert size == expected, f"{what}: {letter} is {size} here and {expected} elsewhere"


def checked(function: Callable, seen: set[str]) -> Callable:
    """The function, holding its shape line on every call."""
    left, right = shape_line(function).split(" -> ")

    def call(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        result = function(*args, **kwargs)
        sizes: dict[str, int] = {}
        for name, axes in NAMED.findall(left):
            value = given.get(name, getattr(given.get("rows"), name, None))
            if name and isinstance(value, (np.ndarray, BFloat16)):
                fit(f"{function.__qualname__}({name})", axes, value.shape, sizes)
        results = result if isinstance(result, tuple) else (result,)
        shapes = NAMED.findall(right)
        assert len(shapes) == len(results)
        for (_, axes), value in zip(shapes, results, strict=True):
            fit(f"{function.__qualname__} result", axes, value.shape, sizes)
        seen.add(f"{function.__module__}.{function.__qualname__}")
        return result

    return call


def functions_with_shape_lines(module) -> dict[str, Callable]:
    return {
        name: f
        for name, f in inspect.getmembers(module, inspect.isfunction)
        if f.__module__ == module.__name__ and shape_line(f) and not name.startswith("_")
    }


def test_shape_lines_are_true_on_every_call_of_a_run(config, weights, monkeypatch) -> None:
    seen: set[str] = set()
    expected: set[str] = set()
    for module in (siglip, gemma, paligemma, colpali):
        for name, f in functions_with_shape_lines(module).items():
            expected.add(f"{f.__module__}.{name}")
            monkeypatch.setattr(module, name, checked(f, seen))
    held = {name: checked(f, seen) for name, f in functions_with_shape_lines(ops).items()}
    expected |= {f"{ops.__name__}.{name}" for name in held}
    write = cache.LayerCache.write
    expected.add(f"{write.__module__}.{write.__qualname__}")
    monkeypatch.setattr(cache.LayerCache, "write", checked(write, seen))

    namespace = SimpleNamespace(**held)
    features = paligemma.image_features(
        tiny_pixels(config, 2), weights, config, ops=namespace, tap=closed
    )
    prompt, answer = tiny_prompt(config, 4, pictures=2), np.array([5, 6])
    features = features.reshape(-1, features.shape[-1])
    logits(prompt, answer, features, weights, config, ops=namespace, tap=closed)

    finder = replace(config, embedding_dim=11)
    page = colpali.vectors(
        prompt, features, tiny_weights(finder), finder, ops=namespace, tap=closed
    )
    namespace.max_sim(page[:3], page[:8], 4)

    # Two are reached inside attend, one inside patch_embed, one where a token has been chosen.
    inner = ("softmax", "soft_cap", "squares", "log_softmax")
    elsewhere = {f"{ops.__name__}.{name}" for name in inner}
    assert expected - elsewhere <= seen


def test_every_public_op_has_a_shape_line() -> None:
    public = [
        f
        for name, f in inspect.getmembers(ops, inspect.isfunction)
        if f.__module__ == ops.__name__ and name != "sequences" and not name.startswith("_")
    ]
    assert len(public) > 8
    assert [f.__name__ for f in public if not shape_line(f)] == []


def test_a_wrong_shape_line_is_caught() -> None:
    def transposed(x, w):
        """Claims too much.

        x [T, I], w [O, I] -> [O, T]
        """
        return x @ w.T

    with pytest.raises(AssertionError, match="result: O is 3 here and 9 elsewhere"):
        checked(transposed, set())(np.zeros((3, 7)), np.zeros((9, 7)))
