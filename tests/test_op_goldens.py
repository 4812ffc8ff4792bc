"""Every operation gives what transformers and torch gave: the stored cases, without torch.

Every error is relative: its root mean square over that of the truth, computed in float64.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from golden import our_ops
from golden.our_ops import ALONE, GOLDEN, OpGolden
from npvlm import kernels
from npvlm.model import ops as definitions

GOLDENS = our_ops.read_ops()
OPS = list(dict.fromkeys(golden.op for golden in GOLDENS))
SERVED = [(ops, g) for ops in (definitions, kernels) for g in GOLDENS if our_ops.serves(g, ops)]
EACH_DTYPE = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def name(value: OpGolden | ModuleType) -> str:
    return value.__name__ if isinstance(value, ModuleType) else f"{value.op}-{value.name}"


@EACH_DTYPE
@pytest.mark.parametrize(("ops", "golden"), SERVED, ids=name)
def test_every_case_is_as_near_to_the_truth_as_torch(
    golden: OpGolden, ops: ModuleType, dtype: type
) -> None:
    found = our_ops.run(golden, ops, dtype)
    if golden.op in ALONE:  # pictures and whole numbers have types of their own
        assert found.dtype == golden.truth.dtype
    elif golden.op == "log_softmax":
        assert found.dtype == np.float64
    else:
        assert found.dtype == dtype
    assert our_ops.error(found, golden.truth) <= our_ops.limit(golden, found.dtype)


@EACH_DTYPE
@pytest.mark.parametrize("op", OPS)
def test_no_limit_is_a_hundred_times_what_is_measured(
    op: str, ops: ModuleType, dtype: type
) -> None:
    shares = []
    for golden in (g for served, g in SERVED if served is ops and g.op == op):
        found = our_ops.run(golden, ops, dtype)
        limit = our_ops.limit(golden, found.dtype)
        shares += [our_ops.error(found, golden.truth) / limit] if limit else []
    assert not shares or max(shares) >= 0.01, shares


def public(module: ModuleType) -> set[str]:
    """The operations that a module defines."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return {
        name
        for name, f in functions
        if f.__module__ == module.__name__ and not name.startswith("_")
    }


def test_every_operation_has_cases() -> None:
    assert len(public(definitions)) > 10
    for op in public(definitions) | set(kernels.__all__):
        assert sum(golden.op == op for golden in GOLDENS) >= 3, f"{op} has no goldens"
    assert set(OPS) == public(definitions) | set(ALONE) | {"cache"}
    assert {golden.op for ops, golden in SERVED if ops is kernels} == set(OPS) - {"squares"}


def test_attention_is_held_for_one_key_head_for_two_and_for_all() -> None:
    for op in ("attend", "cache"):
        heads = [(g.inputs["q"].shape[1], g.inputs["k"].shape[1]) for g in GOLDENS if g.op == op]
        assert {K for _, K in heads} >= {1, 2}
        assert any(K == H > 2 for H, K in heads)


@pytest.mark.parametrize("op", ["visibility", "cache"])
def test_some_windows_hide_what_the_answer_would_see(op: str) -> None:
    windows = [g for g in GOLDENS if g.op == op and g.numbers["window"] is not None]
    lengths = [len(golden.truth) for golden in windows]
    assert any(n > g.numbers["window"] for g, n in zip(windows, lengths, strict=True))
    assert any(g.numbers["prefix"] > g.numbers["window"] for g in windows)


def test_the_intervals_of_attention_say_what_the_masks_say() -> None:
    """A wrong interval is no rounding error: it is far over every limit."""
    golden = next(g for g in GOLDENS if name(g) == "attend-window")
    hidden = golden.inputs | {"first": golden.inputs["start"]}
    wrong = OpGolden("attend", "no_window", hidden, golden.numbers, golden.truth, golden.torchs)
    found = our_ops.run(wrong, definitions, np.float64)
    assert our_ops.error(found, golden.truth) > 0.01


def test_no_input_is_a_plain_zero_or_one() -> None:
    """Zeros hide a forgotten gain, bias or `1 + weight`."""
    for golden in GOLDENS:
        for key, value in golden.inputs.items():
            if value.dtype == np.float32:
                assert value.min() < value.max(), f"{name(golden)} {key}"
                assert np.count_nonzero(value) == value.size, f"{name(golden)} {key}"


def test_torchs_errors_are_those_of_its_stored_results() -> None:
    tensors = load_file(GOLDEN / "ops.safetensors")
    for golden in GOLDENS:
        torchs = tensors.get(f"{golden.op}.{golden.name}.torch")
        assert (torchs is None) == (golden.torchs is None)
        if torchs is not None:
            assert torchs.dtype == np.float32 and golden.truth.dtype == np.float64
            assert our_ops.error(torchs, golden.truth) == pytest.approx(golden.torchs, rel=1e-6)


def test_the_file_is_the_one_that_its_provenance_names_and_is_small() -> None:
    record = json.loads((GOLDEN / "ops.json").read_text())
    stored = (GOLDEN / "ops.safetensors").read_bytes()
    assert record["sha256"] == {"ops.safetensors": hashlib.sha256(stored).hexdigest()}
    assert len(stored) + (GOLDEN / "ops.json").stat().st_size < 10**6
