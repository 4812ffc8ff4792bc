"""A few faults of each kind; `python tests/faults.py` tries them by the hundred."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.faults import FAULTS, Bench, bench_in

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, limits and /dev/full")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with bench_in(seed=5) as made:
        yield made


@pytest.mark.parametrize(
    ("fault", "job"),
    [
        *(("signal", job) for job in ("batch", "convert", "fetch")),
        *(("twice", job) for job in ("batch", "convert")),
        *(("pipe", job) for job in ("caption", "tokens")),
        *(("closed", job) for job in ("chat", "fetch")),
        *(("full", job) for job in ("caption", "fetch")),
        *(("size", job) for job in ("batch", "convert", "fetch")),
        ("memory", "caption"),
        ("cache", "caption"),
    ],
)
def test_what_is_promised_is_kept(bench: Bench, fault: str, job: str) -> None:
    assert FAULTS[fault][0](bench, job) is None
