"""The examples in docstrings say what is so."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from npvlm import api
from npvlm.work.demo import draw_picture


def test_examples_of_the_public_face_are_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"model": api.load("shapes"), "picture": draw_picture()}
    result = doctest.testmod(api, extraglobs=known)
    assert result.failed == 0
    assert result.attempted >= 15
