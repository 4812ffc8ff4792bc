"""The kernels, held against the definitions in float64, and against themselves bit for bit."""

from __future__ import annotations

import inspect
import math

import numba
import numpy as np
import pytest

from npvlm import kernels
from npvlm.kernels import attention, inputs, products
from npvlm.kernels.matrices import has_matrices, takes
from npvlm.kernels.tiles import TALL
from npvlm.model import ops as definitions
from npvlm.model.tap import closed
from npvlm.model.weights import (
    Adapted,
    BFloat16Product,
    Weight,
    pack_int4,
    pack_int8,
    round_to_bfloat16,
    unpack,
)

KINDS = ("float32", "float16", "bfloat16", "bfloat16 products", "int8", "int4")
# Rows of no, one and several tiles; columns that fill no block; inputs that end inside a step.
SIZES = [(1, 71, 72), (5, 64, 588), (8, 130, 2304), (7, 9, 10), (TALL + 1, 66, 1152), (200, 70, 33)]


def stored(w: np.ndarray, kind: str) -> Weight:
    """Weights w [O, I] as a checkpoint of that kind has them."""
    rounded = round_to_bfloat16(w)
    return {
        "float32": lambda: w,
        "float16": lambda: w.astype(np.float16),
        "bfloat16": lambda: rounded,
        "bfloat16 products": lambda: BFloat16Product(rounded.bits),
        "int8": lambda: pack_int8(w),
        "int4": lambda: pack_int4(w),
    }[kind]()


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_every_kernel_has_the_arguments_of_its_definition() -> None:
    assert len(kernels.__all__) > 10
    for name in kernels.__all__:
        ours, theirs = getattr(kernels, name), getattr(definitions, name)
        assert list(inspect.signature(ours).parameters) == list(
            inspect.signature(theirs).parameters
        )
        assert ours is theirs or "Twin of ops." in (ours.__doc__ or "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrected_weight_is_the_weight_and_its_correction(rng, kind) -> None:
    base, up, down = stored(numbers(rng, 70, 96), kind), numbers(rng, 70, 16), numbers(rng, 16, 96)
    gain, bias, x = rng.random(70) + 0.5, numbers(rng, 70), numbers(rng, 9, 96)
    w = Adapted(base, down, up, 0.3, gain)
    correction = x.astype(np.float64) @ down.T @ up.T * 0.3
    for ops in (kernels, definitions):
        expected = (ops.linear(x, base) + correction) * gain + bias
        np.testing.assert_allclose(ops.linear(x, w, bias), expected, rtol=1e-5, atol=1e-4)
    merged = unpack(base, np.float64) + 0.3 * up.astype(np.float64) @ down
    np.testing.assert_allclose(w.unpack(), merged * gain[:, None], rtol=1e-12)
    np.testing.assert_array_equal(w[3:9].unpack(), w.unpack()[3:9])


@pytest.mark.parametrize("rank", [16, 64, 150])
@pytest.mark.parametrize("outputs", [40, 64, 600])
def test_rows_with_a_correction_are_the_same_in_any_company(rng, rank, outputs) -> None:
    base, up, down = (numbers(rng, *size) for size in ((outputs, 48), (outputs, rank), (rank, 48)))
    x, gain = numbers(rng, 203, 48), rng.random(outputs) + 0.5
    w = Adapted(base, down, up, 0.3, gain)
    y, gated = kernels.linear(x, w), kernels.gated(x, w, w, tap=closed)
    truth = definitions.linear(x.astype(np.float64), w)
    assert np.sqrt(np.mean((y - truth) ** 2) / np.mean(truth**2)) < 2.0**-22
    for rows in (slice(0, 1), slice(5, 9), slice(100, 107), slice(202, 203), slice(190, 203)):
        np.testing.assert_array_equal(kernels.linear(x[rows], w), y[rows])
        np.testing.assert_array_equal(kernels.gated(x[rows], w, w, tap=closed), gated[rows])


def test_corrected_and_bare_weights_gate_each_other(rng) -> None:
    base, up, down = numbers(rng, 70, 96), numbers(rng, 70, 16), numbers(rng, 16, 96)
    up = up.astype(np.float64)
    x, w, other = numbers(rng, 9, 96) * 0.2, Adapted(base, down, up, 0.3), pack_int8(base)
    for gate, wide in ((w, w), (w, base), (base, w), (base, other)):
        expected = kernels.gelu_tanh(kernels.linear(x, gate)) * kernels.linear(x, wide)
        np.testing.assert_array_equal(kernels.gated(x, gate, wide, tap=closed), expected)


@pytest.mark.parametrize("gain", [None, np.linspace(0.5, 1.5, 70)], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_rows_of_a_corrected_table_are_its_definition_and_the_same_in_any_company(rng, kind, gain):
    base, up, down = stored(numbers(rng, 70, 96), kind), numbers(rng, 70, 16), numbers(rng, 16, 96)
    table, ids = Adapted(base, down, up, 0.3, gain), rng.integers(0, 70, 23)
    rows = kernels.embed(ids, table, 9.7, np.float32)
    truth = definitions.embed(ids, table, 9.7, np.float64)
    assert np.sqrt(np.mean((rows - truth) ** 2) / np.mean(truth**2)) < 2.0**-23
    for i in range(23):
        np.testing.assert_array_equal(
            kernels.embed(ids[i : i + 1], table, 9.7, np.float32)[0], rows[i]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_is_its_definition_up_to_rounding(rng, kind, size) -> None:
    rows, outputs, inputs = size
    w, bias = stored(numbers(rng, outputs, inputs), kind), numbers(rng, outputs)
    x = numbers(rng, rows, inputs)
    y = kernels.linear(x, w, bias)
    if kind == "int8":  # whole numbers: nothing is left to round differently
        np.testing.assert_array_equal(y, definitions.linear(x, w, bias))
        return
    wide = unpack(round_to_bfloat16(x), np.float64) if kind == "bfloat16 products" else x
    truth = definitions.linear(wide.astype(np.float64), w, bias)
    if kind == "int4":
        truth = definitions.linear(x, w, bias).astype(np.float64)
    error = np.sqrt(np.mean((y - truth) ** 2) / np.mean(truth**2))
    assert error < 3 * 2.0**-24 * max(1, np.log2(inputs / 64))


@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_nearer_to_the_truth_than_its_definition(rng, kind) -> None:
    """With float32 sums; those of the definition are made by the BLAS of the machine."""
    if kind in ("int8", "int4"):
        pytest.skip("the definition sums whole numbers, exactly")
    x, w = numbers(rng, 64, 4304), stored(numbers(rng, 96, 4304), kind)
    inputs = unpack(round_to_bfloat16(x), np.float32) if kind == "bfloat16 products" else x
    truth = inputs.astype(np.float64) @ unpack(w, np.float64).T
    ours = np.mean((kernels.linear(x, w) - truth) ** 2)
    assert ours <= np.mean((definitions.linear(x, w) - truth) ** 2)


with_unit = pytest.mark.skipif(not has_matrices(), reason="this CPU has no matrix unit")
# Rows of a tile, of two, of many and of a part; inputs that end inside a step, and after a chunk.
SQUARES = [(16, 16, 64), (17, 48, 100), (32, 64, 2048), (47, 80, 4304), (201, 208, 1152)]


@with_unit
@pytest.mark.parametrize("gate", [False, True], ids=["linear", "gated"])
@pytest.mark.parametrize("size", SQUARES, ids=str)
def test_whole_numbers_have_the_same_bits_in_the_matrix_unit_and_out_of_it(
    rng, monkeypatch, size, gate: bool
) -> None:
    rows, outputs, inputs = size
    x, w, other = (
        numbers(rng, rows, inputs),
        *(pack_int8(numbers(rng, outputs, inputs)) for _ in range(2)),
    )
    assert takes(w, rows)

    def product() -> np.ndarray:
        return kernels.gated(x, w, other, tap=closed) if gate else kernels.linear(x, w)

    inside = product()
    monkeypatch.setattr(products, "takes", lambda *_: False)
    np.testing.assert_array_equal(product(), inside)


@with_unit
@pytest.mark.parametrize("size", SQUARES, ids=str)
def test_bfloat16_in_the_matrix_unit_are_summed_alike_for_any_rows(rng, size) -> None:
    _, outputs, inputs = size
    x = numbers(rng, 201, inputs)
    w = stored(numbers(rng, outputs, inputs), "bfloat16 products")
    assert takes(w, 1)
    together = kernels.linear(x, w)
    for rows in (1, 2, 15, 16, 17, 31, 33, 48, 192):
        np.testing.assert_array_equal(kernels.linear(x[:rows], w), together[:rows])
        np.testing.assert_array_equal(kernels.linear(x[-rows:], w), together[-rows:])
    wide = unpack(round_to_bfloat16(x), np.float64)
    truth = wide @ unpack(w, np.float64).T
    error = np.sqrt(np.mean((together - truth) ** 2) / np.mean(truth**2))
    assert error < 5 * 2.0**-24 * max(1, np.log2(inputs / 64))


def test_the_matrix_unit_is_left_alone_where_it_does_not_fit(rng) -> None:
    assert not takes(stored(numbers(rng, 70, 128), "bfloat16 products"), 32)
    assert not takes(pack_int8(numbers(rng, 64, 128)), 15)
    for kind in ("float32", "bfloat16", "int4"):
        assert not takes(stored(numbers(rng, 64, 128), kind), 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_has_the_bits_that_it_has_among_others(rng, kind) -> None:
    x, w = numbers(rng, 201, 1152), stored(numbers(rng, 70, 1152), kind)
    together = kernels.linear(x, w)
    for rows in (1, 2, 3, 4, 5, 7, 8, 13, 192):
        np.testing.assert_array_equal(kernels.linear(x[:rows], w), together[:rows])
        np.testing.assert_array_equal(kernels.linear(x[-rows:], w), together[-rows:])


@pytest.mark.parametrize("kind", KINDS)
def test_linear_reads_weights_at_any_address(rng, kind) -> None:
    x, w = numbers(rng, 3, 70), stored(numbers(rng, 9, 70), kind)
    expected = kernels.linear(x, w)
    for values in (
        (v for v in vars(w).values() if isinstance(v, np.ndarray))
        if not isinstance(w, np.ndarray)
        else (w,)
    ):
        room = np.zeros(values.nbytes + 1, np.uint8)
        moved = np.ndarray(values.shape, values.dtype, room, 1)
        moved[...] = values
        if values is w:
            np.testing.assert_array_equal(kernels.linear(x, moved), expected)
        elif values.ndim == 2 and values.dtype.itemsize < 4:
            name = next(n for n, v in vars(w).items() if v is values)
            other = type(w)(**{**vars(w), name: moved})
            np.testing.assert_array_equal(kernels.linear(x, other), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gated_is_the_bent_product_times_the_other(rng, kind) -> None:
    x = numbers(rng, 9, 96)
    gate, up = (stored(numbers(rng, 70, 96) * 0.2, kind) for _ in range(2))
    y = kernels.gated(x, gate, up, tap=closed)
    apart = kernels.gelu_tanh(kernels.linear(x, gate)) * kernels.linear(x, up)
    np.testing.assert_array_equal(y, apart)


def test_gated_takes_two_weights_that_are_stored_unlike(rng) -> None:
    x, w = numbers(rng, 3, 96), numbers(rng, 70, 96) * 0.2
    for one in KINDS:
        for other in KINDS:
            gate, up = stored(w, one), stored(w[::-1].copy(), other)
            y = kernels.gated(x, gate, up, tap=closed)
            truth = definitions.gated(x, gate, up, tap=closed)
            np.testing.assert_allclose(y, truth, atol=1e-4 * np.abs(truth).max())


def test_nan_in_a_row_stays_in_that_row(rng) -> None:
    x = numbers(rng, 8, 96)
    x[3, 5] = np.nan
    for kind in KINDS:
        y = kernels.linear(x, stored(numbers(rng, 20, 96), kind))
        assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, axis=0)).all()


# Heads, key/value heads, width, cap, window
ATTENTION = [
    (8, 1, 256, None, None),
    (16, 16, 72, None, None),
    (6, 2, 10, 2.0, None),
    (6, 2, 40, 2.0, 30),
    (8, 4, 256, 50.0, 100),
]


def scene(rng, T: int, H: int, K: int, d: int, window: int | None) -> tuple:
    """T tokens that see what came before, in a slab whose other rows are no numbers."""
    begin, before = 7, 150
    rows = begin + before + T
    q, k, v = numbers(rng, T, H, d), numbers(rng, rows + 20, K, d), numbers(rng, rows + 20, K, d)
    for slab in (k, v):
        slab[:begin], slab[rows:] = np.nan, np.nan
    start = np.full(T, begin)
    last = begin + before + np.arange(T) + 1
    first = start if window is None else np.maximum(start, last - window)
    return q, k, v, start, first, last


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attend_is_its_definition_up_to_rounding(rng, case) -> None:
    H, K, d, cap, window = case
    q, k, v, *rows = scene(rng, 70, H, K, d, window)
    wide = (a.astype(np.float64) for a in (q, k, v))
    truth = definitions.attend(*wide, *rows, d**-0.5, cap)
    error = np.sqrt(np.mean((kernels.attend(q, k, v, *rows, d**-0.5, cap) - truth) ** 2))
    narrow = np.sqrt(np.mean((definitions.attend(q, k, v, *rows, d**-0.5, cap) - truth) ** 2))
    assert error <= 1.2 * narrow


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_a_token_attends_alone_as_it_does_among_others(rng, case) -> None:
    H, K, d, cap, window = case
    q, k, v, *rows = scene(rng, 70, H, K, d, window)
    together = kernels.attend(q, k, v, *rows, d**-0.5, cap)
    for t in (0, 1, 33, 69):
        one = slice(t, t + 1)
        alone = kernels.attend(q[one], k, v, *(r[one] for r in rows), d**-0.5, cap)
        np.testing.assert_array_equal(alone[0], together[t])


def test_tokens_of_one_run_may_begin_to_see_in_different_blocks(rng) -> None:
    """The end of a prefix sees all of it, the first answer tokens a window: first jumps by 150."""
    q, k, v, start, _, last = scene(rng, 6, 8, 4, 32, None)
    first = start + np.array([0, 0, 0, 70, 130, 150])
    together = kernels.attend(q, k, v, start, first, last, 0.2)
    wide = (a.astype(np.float64) for a in (q, k, v))
    truth = definitions.attend(*wide, start, first, last, 0.2)
    np.testing.assert_allclose(together, truth, atol=2e-6)
    for t in range(6):
        one = slice(t, t + 1)
        alone = kernels.attend(q[one], k, v, start[one], first[one], last[one], 0.2)
        np.testing.assert_array_equal(alone[0], together[t])


def test_attend_does_not_depend_on_where_its_sequence_lies(rng) -> None:
    q, k, v, start, first, last = scene(rng, 20, 4, 2, 24, None)
    base = kernels.attend(q, k, v, start, first, last, 0.2)
    for moved in (-7, 1, 13):
        k2, v2 = (np.roll(a, moved, axis=0) for a in (k, v))
        other = kernels.attend(q, k2, v2, start + moved, first + moved, last + moved, 0.2)
        np.testing.assert_array_equal(other, base)


def test_one_thread_gives_the_bits_of_two(rng) -> None:
    x = numbers(rng, 70, 300)
    q, k, v, *rows = scene(rng, 70, 8, 2, 40, None)
    results = []
    before = numba.get_num_threads()
    try:
        for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(threads)
            weights = [stored(numbers(np.random.default_rng(3), 140, 300), kind) for kind in KINDS]
            results.append(
                [kernels.linear(x, w) for w in weights] + [kernels.attend(q, k, v, *rows, 0.1)]
            )
    finally:
        numba.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_tiles_are_as_few_and_as_low_as_can_be() -> None:
    assert inputs.tile_height(1) == 1
    for rows in range(2, 60):
        height = inputs.tile_height(rows)
        assert -(-rows // height) == -(-rows // TALL) and products.ROWS % height == 0
    assert attention.QUERIES % TALL == 0


STORES = ("float32", "float16", "int8")
# Rows of a query, pages, vectors of a page, numbers of a vector.
PAGES = [(1, 3, 1, 17), (5, 4, 66, 40), (TALL + 1, 2, 130, 128), (200, 3, 70, 33), (7, 5, 64, 9)]


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("size", PAGES, ids=str)
def test_max_sim_is_its_definition_up_to_rounding(rng, kind, size) -> None:
    rows, count, each, width = size
    pages = stored(numbers(rng, count * each, width), kind)
    q = numbers(rng, rows, width)
    found = kernels.max_sim(q, pages, each)
    if kind == "int8":
        np.testing.assert_array_equal(found, definitions.max_sim(q, pages, each))
        return
    truth = definitions.max_sim(q.astype(np.float64), pages, each)
    assert found.dtype == np.float32 and found.shape == (count,)
    # Products may cancel; what is rounded on the way is as large as the vectors are long.
    lengths = [np.linalg.norm(unpack(v, np.float64), axis=1).mean() for v in (q, pages)]
    error = np.sqrt(np.mean((found - truth) ** 2)) / (rows * math.prod(lengths))
    assert error < 2.0**-24


@pytest.mark.parametrize("kind", STORES)
def test_a_page_scores_the_same_alone_among_others_and_with_any_threads(rng, kind) -> None:
    each, count = 70, 9
    pages, q = stored(numbers(rng, count * each, 128), kind), numbers(rng, 23, 128)
    together = kernels.max_sim(q, pages, each)
    for n in range(count):
        alone = kernels.max_sim(q, pages[n * each : (n + 1) * each], each)
        np.testing.assert_array_equal(alone, together[n : n + 1])
    np.testing.assert_array_equal(kernels.max_sim(q, pages[4 * each :], each), together[4:])
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        np.testing.assert_array_equal(kernels.max_sim(q, pages, each), together)
    finally:
        numba.set_num_threads(threads)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_page_with_a_number_that_is_none_scores_none(rng, bad) -> None:
    pages, q = numbers(rng, 3 * 70, 20), numbers(rng, 25, 20)
    packed = pack_int8(pages)
    packed.scales[80] = pages[80, 3] = bad
    for kept in (pages, pages.astype(np.float16), packed):
        found = kernels.max_sim(q, kept, 70)
        assert not np.isfinite(found[1]) and np.isfinite(found[[0, 2]]).all()


def test_no_pages_have_no_scores(rng, ops) -> None:
    assert ops.max_sim(numbers(rng, 3, 20), numbers(rng, 0, 20), 7).shape == (0,)
