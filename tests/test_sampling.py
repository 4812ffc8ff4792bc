"""How tokens are chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npvlm import kernels
from npvlm.decoding.sampling import Chooser, Sampling
from npvlm.errors import UsageError
from npvlm.model import ops

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


def kept(sampling: Sampling, logits: np.ndarray = LOGITS) -> dict[int, float]:
    """The ids that can be drawn, with their probabilities; the kernels' are the same."""
    p = sampling.probabilities(logits, ops=ops)
    np.testing.assert_allclose(sampling.probabilities(logits, ops=kernels), p, rtol=1e-6)
    return {int(i): round(float(p[i]), 6) for i in np.flatnonzero(p)}


def test_greedy_unless_something_asks_for_a_draw() -> None:
    assert Sampling().greedy
    assert Sampling(temperature=0.0, top_k=3, top_p=0.5).greedy
    assert not Sampling(temperature=0.1).greedy
    assert not Sampling(top_k=3).greedy
    assert not Sampling(top_p=0.5).greedy


def test_greedy_takes_the_first_of_equals() -> None:
    assert Chooser(Sampling(), None, ops=ops)(np.array([1.0, 3.0, 3.0])) == 1


def test_temperature_sharpens_and_flattens() -> None:
    assert kept(Sampling(temperature=1.0)) == {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.25, 4: 0.2}
    squares = np.array([0.01, 0.16, 0.0025, 0.0625, 0.04])
    p = Sampling(temperature=0.5).probabilities(LOGITS, ops=ops)
    np.testing.assert_allclose(p, squares / squares.sum(), rtol=1e-6)


def test_a_tiny_temperature_leaves_only_the_likeliest() -> None:
    assert kept(Sampling(temperature=5e-324)) == {1: 1.0}


def test_top_k_keeps_the_likeliest_and_ties() -> None:
    assert list(kept(Sampling(top_k=2))) == [1, 3]
    assert list(kept(Sampling(top_k=99))) == [0, 1, 2, 3, 4]
    assert list(kept(Sampling(top_k=2), np.array([1.0, 2.0, 1.0, 0.0]))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "ids"),
    [(1e-9, [1]), (0.39, [1]), (0.5, [1, 3]), (0.8, [1, 3, 4]), (0.94, [0, 1, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, ids: list[int]) -> None:
    assert list(kept(Sampling(top_p=p))) == ids


def test_top_p_drops_what_is_not_needed_to_reach_p_exactly() -> None:
    assert len(kept(Sampling(top_p=0.5), np.zeros(4))) == 2
    assert len(kept(Sampling(top_p=0.75), np.zeros(4))) == 3


def test_filters_come_in_the_order_temperature_top_k_top_p() -> None:
    # After top-k 2 the two have 0.615 and 0.385: top-p 0.6 then keeps one; before it, three.
    assert list(kept(Sampling(top_k=2, top_p=0.6))) == [1]
    # A low temperature makes the first alone reach p.
    assert list(kept(Sampling(temperature=0.2, top_p=0.6))) == [1]


def test_draws_follow_the_distribution() -> None:
    chooser = Chooser(Sampling(temperature=1.0), 3, ops=ops)
    counts = np.bincount([chooser(LOGITS) for _ in range(4000)], minlength=5) / 4000
    # 4 standard deviations of a share of 0.4 among 4,000
    np.testing.assert_allclose(counts, np.exp(LOGITS), atol=4 * math.sqrt(0.24 / 4000))


def test_a_seed_repeats_its_draws_and_each_token_takes_one_number() -> None:
    sampling = Sampling(temperature=2.0)
    one, other, third = (Chooser(sampling, seed, ops=ops) for seed in (5, 5, 6))
    first = [one(LOGITS) for _ in range(50)]
    assert first == [other(LOGITS) for _ in range(50)]
    assert first != [third(LOGITS) for _ in range(50)]
    reached = np.cumsum(sampling.probabilities(LOGITS, ops=ops), dtype=np.float64)
    random = np.random.default_rng(5)
    assert first == [int(np.searchsorted(reached, random.random() * reached[-1])) for _ in first]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    chooser = Chooser(Sampling(temperature=1.0), 0, ops=ops)
    assert {chooser(logits) for _ in range(200)} == {1, 3}


def test_log_softmax_is_exact_far_from_zero() -> None:
    halves = ops.log_softmax(np.array([1e4, 1e4], np.float32))
    np.testing.assert_allclose(halves, [-math.log(2)] * 2, rtol=1e-15)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -0.1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_numbers_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match="expected"):
        Sampling(**bad)
