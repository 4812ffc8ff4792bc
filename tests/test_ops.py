"""The definitions, held against the formulas of the papers and against their own laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npvlm.model import ops as definitions
from npvlm.model.tap import closed
from npvlm.model.weights import PACKERS, BFloat16, Int8, quantize, rotate, unpack

FLOATS = [np.float32, np.float64]


def bf16(values: np.ndarray) -> BFloat16:
    """The upper halves of float32 numbers (cut, not rounded)."""
    return BFloat16((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))


def test_bfloat16_is_the_upper_half_of_a_float32() -> None:
    numbers = np.array([0.0, 1.0, -2.5, 3.140625, np.inf, 1e-40], np.float32)
    np.testing.assert_array_equal(bf16(numbers).unpack()[:5], numbers[:5])
    bits = np.arange(2**16, dtype=np.uint16)
    np.testing.assert_array_equal(BFloat16(bits).unpack().view(np.uint32), bits.astype("u4") << 16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_op_returns_the_dtype_it_was_given(ops, rng, dtype) -> None:
    x = rng.standard_normal((5, 8)).astype(dtype)
    w, b = bf16(rng.standard_normal((7, 8))), rng.standard_normal(7).astype(np.float32)
    gain = rng.standard_normal(8).astype(np.float16)
    heads = x.reshape(5, 2, 4)
    at = np.arange(5)
    pixels = rng.standard_normal((1, 3, 4, 4)).astype(dtype)
    results = {
        "linear": ops.linear(x, w, b),
        "patch_embed": ops.patch_embed(pixels, bf16(rng.standard_normal((6, 3, 2, 2))), b[:6]),
        "embed": ops.embed(at, w, math.sqrt(8), dtype),
        "layer_norm": ops.layer_norm(x, gain, gain, 1e-6),
        "rms_norm": ops.rms_norm(x, gain, 1e-6),
        "rope": ops.rope(heads, at, 10000.0),
        "soft_cap": ops.soft_cap(x, 30.0),
        "softmax": ops.softmax(x),
        "attend": ops.attend(heads, heads, heads, at * 0, at * 0, at + 1, 0.5, 2.0),
        "gated": ops.gated(x, w, w, tap=closed),
        "gelu_tanh": ops.gelu_tanh(x),
    }
    assert {name: y.dtype for name, y in results.items()} == dict.fromkeys(results, np.dtype(dtype))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_linear_is_the_product_with_the_unpacked_weight_in_every_block(
    ops, rng, kind, monkeypatch
) -> None:
    monkeypatch.setattr(definitions, "BLOCK", 30)  # several blocks, the last one short
    monkeypatch.setattr(definitions, "RUN", 4)  # several runs, the last one short
    x, w = rng.standard_normal((5, 9)), rng.standard_normal((11, 9))
    stored = bf16(w) if kind == "bfloat16" else w.astype(kind)
    bias = rng.standard_normal(11)
    expected = np.einsum("ti,oi->to", x, unpack(stored, np.float64)) + bias
    np.testing.assert_allclose(ops.linear(x, stored, bias), expected, rtol=0, atol=1e-13)


def test_linear_widens_each_row_once_and_never_more_than_a_block(rng, monkeypatch) -> None:
    """To the type of the inputs: no wider."""
    widened = []

    def recorded(weight, dtype):
        wide = unpack(weight, dtype)
        widened.append((len(wide), wide.dtype))
        return wide

    monkeypatch.setattr(definitions, "BLOCK", 30)
    monkeypatch.setattr(definitions, "unpack", recorded)
    x = rng.standard_normal((2, 9)).astype(np.float32)
    definitions.linear(x, rng.standard_normal((11, 9)).astype(np.float16))
    assert widened == [(rows, np.float32) for rows in (3, 3, 3, 2)]


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_sums_of_whole_numbers_are_rounded_to_float32_before_the_scales_come(rng, pack) -> None:
    spread = rng.uniform(0.5, 1, (4, 2**13)).astype(np.float32)
    x = rotate(spread, 1024)  # so that its rotation, its own inverse, has sums over 2**24
    w = pack(x[::-1])
    values, scales = quantize(rotate(x, w.block))
    stored = w.values if isinstance(w, Int8) else w.rotated()
    sums = values.astype(np.float64) @ stored.T.astype(np.float64)
    assert not np.array_equal(sums, sums.astype(np.float32))
    factors = scales[:, None] * (w.scales if isinstance(w, Int8) else 1)
    np.testing.assert_array_equal(definitions.linear(x, w), sums.astype(np.float32) * factors)


def test_patch_embed_is_a_convolution_whose_stride_is_its_kernel(ops, rng) -> None:
    pixels, w = rng.standard_normal((2, 3, 11, 11)), rng.standard_normal((5, 3, 4, 4))
    bias = rng.standard_normal(5)
    y = ops.patch_embed(pixels, w, bias)
    assert y.shape == (2, 4, 5)  # the last 3 rows and columns fill no square
    for n, row, column in np.ndindex(2, 2, 2):
        square = pixels[n, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        expected = np.sum(square * w, axis=(1, 2, 3)) + bias
        np.testing.assert_allclose(y[n, row * 2 + column], expected, rtol=1e-12)


def test_layer_norm_gives_mean_zero_and_variance_one(ops, rng) -> None:
    x = rng.standard_normal((4, 40)) * 3 + 5
    y = ops.layer_norm(x, np.ones(40), np.zeros(40), 1e-6)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-14)
    np.testing.assert_allclose(y.var(-1), x.var(-1) / (x.var(-1) + 1e-6), rtol=1e-12)
    gain, bias = rng.standard_normal(40), rng.standard_normal(40)
    np.testing.assert_allclose(ops.layer_norm(x, gain, bias, 1e-6), y * gain + bias, atol=1e-14)


def test_rms_norm_changes_only_the_length_when_its_weight_is_zero(ops, rng) -> None:
    x = rng.standard_normal((4, 40)) * 3
    y = ops.rms_norm(x, np.zeros(40), 1e-6)
    np.testing.assert_allclose(np.mean(y * y, -1), 1, rtol=1e-6)
    np.testing.assert_allclose(y / x, np.broadcast_to((y / x)[:, :1], y.shape), rtol=1e-12)
    np.testing.assert_allclose(ops.rms_norm(x, np.full(40, 0.5), 1e-6), 1.5 * y, rtol=1e-12)


def test_norms_add_eps_to_the_mean_square(ops) -> None:
    x = np.array([[3.0, -3.0]])
    np.testing.assert_allclose(ops.rms_norm(x, np.zeros(2), 16.0), x / 5, rtol=1e-15)
    np.testing.assert_allclose(ops.layer_norm(x, np.ones(2), np.zeros(2), 16.0), x / 5, rtol=1e-15)


def test_norms_keep_a_row_of_zeros_finite(ops) -> None:
    zeros, ones = np.zeros((1, 6), np.float32), np.ones(6, np.float32)
    assert not ops.rms_norm(zeros, ones, 1e-6).any()
    np.testing.assert_array_equal(ops.layer_norm(zeros, ones, ones, 1e-6), np.ones((1, 6)))


def test_rope_leaves_position_zero_alone(ops, rng) -> None:
    x = rng.standard_normal((3, 2, 8))
    np.testing.assert_array_equal(ops.rope(x, np.zeros(3, int), 10000.0), x)


def test_rope_turns_dimension_j_with_j_plus_half_by_the_papers_angle(ops) -> None:
    x = np.zeros((1, 1, 6))
    x[0, 0, 1] = 1.0
    angle = 9 * 10000.0 ** (-2 * 1 / 6)
    expected = [0, math.cos(angle), 0, 0, math.sin(angle), 0]
    np.testing.assert_allclose(ops.rope(x, np.array([9]), 10000.0)[0, 0], expected, atol=1e-15)
    slower = 9 * 50.0 ** (-2 * 1 / 6)
    expected = [0, math.cos(slower), 0, 0, math.sin(slower), 0]
    np.testing.assert_allclose(ops.rope(x, np.array([9]), 50.0)[0, 0], expected, atol=1e-15)


def test_rope_makes_scores_depend_on_the_distance_alone(ops, rng) -> None:
    q, k = rng.standard_normal((2, 1, 1, 12))

    def score(query: int, key: int) -> float:
        at = [ops.rope(x, np.array([p]), 10000.0) for x, p in ((q, query), (k, key))]
        return float(np.sum(at[0] * at[1]))

    assert score(20, 3) == pytest.approx(score(1020, 1003), abs=1e-12)
    assert score(20, 3) != pytest.approx(score(20, 4), abs=1e-3)


def test_rope_is_exact_to_rounding_at_large_positions(ops, rng) -> None:
    x, at = rng.standard_normal((1, 1, 16)).astype(np.float32), np.array([8000])
    truth = ops.rope(x.astype(np.float64), at, 10000.0)
    np.testing.assert_allclose(ops.rope(x, at, 10000.0), truth, rtol=0, atol=4e-7)


def test_soft_cap_keeps_small_values_and_bounds_large_ones(ops) -> None:
    x = np.array([[-1e9, -0.001, 0.0, 0.001, 1e9]])
    np.testing.assert_allclose(ops.soft_cap(x, 5.0), [[-5, -0.001, 0, 0.001, 5]], rtol=1e-7)


def test_softmax_sums_to_one_gives_masked_entries_zero_and_survives_large_scores(ops) -> None:
    y = ops.softmax(np.array([[1e4, -np.inf, 1e4 - math.log(3)]]))
    np.testing.assert_allclose(y, [[0.75, 0, 0.25]], rtol=1e-10)
    assert y[0, 1] == 0


def one_query(q, k, v, scale, cap):
    """Attention of one query over all keys, from the formula."""
    scores = np.array([math.fsum(q * key) for key in k]) * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    weights = np.exp(scores - scores.max())
    return (weights[:, None] * v).sum(0) / weights.sum()


@pytest.mark.parametrize("cap", [None, 1.5])
def test_attend_follows_the_formula_for_every_head_and_interval(ops, rng, cap) -> None:
    H, K, d = 6, 2, 5
    start = np.array([0, 0, 0, 4, 4, 4])
    first, last = np.array([0, 0, 0, 4, 5, 4]), np.array([3, 3, 2, 6, 8, 8])
    q, k, v = (rng.standard_normal((n, h, d)) for n, h in ((6, H), (9, K), (9, K)))
    y = ops.attend(q, k, v, start, first, last, 0.7, cap)
    for t, h in np.ndindex(6, H):
        seen = slice(first[t], last[t])
        expected = one_query(q[t, h], k[seen, h // 3], v[seen, h // 3], 0.7, cap)
        np.testing.assert_allclose(y[t, h], expected, rtol=1e-12)


def test_attend_is_blind_to_rows_outside_the_interval(ops, rng) -> None:
    q, k, v = (rng.standard_normal((4, 1, 3)) for _ in range(3))
    first, last = np.full(4, 1), np.full(4, 3)
    seen = ops.attend(q, k, v, first, first, last, 1.0)
    k[0], v[0], k[3], v[3] = np.nan, np.nan, np.inf, np.inf
    np.testing.assert_array_equal(ops.attend(q, k, v, first, first, last, 1.0), seen)


def test_attend_scores_one_head_of_one_sequence_at_a_time(rng, monkeypatch) -> None:
    scored = []
    softmax = definitions.softmax
    monkeypatch.setattr(definitions, "softmax", lambda x: (scored.append(x.shape), softmax(x))[1])
    start = np.array([0, 0, 2, 2, 2])
    q, k, v = (rng.standard_normal((5, 2, 3)) for _ in range(3))
    definitions.attend(q, k, v, start, start, np.array([2, 2, 5, 5, 4]), 1.0)
    assert scored == [(2, 2), (2, 2), (3, 3), (3, 3)]


def test_gelu_follows_its_formula_and_limits(ops) -> None:
    x = np.array([-30.0, -1.0, 0.0, 1.0, 30.0])
    inner = [math.sqrt(2 / math.pi) * (t + 0.044715 * t**3) for t in x]
    expected = [0.5 * t * (1 + math.tanh(u)) for t, u in zip(x, inner, strict=True)]
    np.testing.assert_allclose(ops.gelu_tanh(x), expected, atol=1e-15)
    assert ops.gelu_tanh(x)[0] == 0 and ops.gelu_tanh(x)[-1] == 30


def test_gated_bends_one_product_and_multiplies_by_the_other(ops, rng) -> None:
    x, gate, up = (rng.standard_normal((n, 8)) for n in (3, 5, 5))
    shown = {}
    y = ops.gated(x, gate, up, tap=lambda name, value: shown.setdefault(name, value))
    np.testing.assert_allclose(y, ops.gelu_tanh(x @ gate.T) * (x @ up.T), rtol=1e-13)
    assert list(shown) == ["gate_proj", "up_proj"]


def test_embed_scales_text_rows(ops, rng) -> None:
    table = rng.standard_normal((9, 6)).astype(np.float32)
    y = ops.embed(np.array([3, 0, 3]), table, math.sqrt(6), np.float32)
    np.testing.assert_array_equal(y, (table[[3, 0, 3]].astype("f8") * math.sqrt(6)).astype("f4"))
