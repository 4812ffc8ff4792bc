"""Every kernel against its definition, on small random inputs.

Axis letters: O, I out and in features · H query heads · K key/value heads · d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from npvlm import kernels
from npvlm.kernels.packing import PACKERS as PACKERS_OF_KERNELS
from npvlm.model import ops as definitions
from npvlm.model.tap import closed
from npvlm.model.weights import (
    PACKERS,
    Array,
    BFloat16,
    BFloat16Product,
    Int8,
    Packer,
    Weight,
    round_to_bfloat16,
    unpack,
)
from npvlm.work.checks.finding import Finding, settle

ROWS, OUTPUTS, INPUTS = 7, 70, 330  # of no full tile, block or step

# Errors are relative: the root of their mean square over that of the truth, in float64.
ONE_ROUNDING = 2.0**-24.3  # elementwise: a result is rounded once, and exp and tanh add their own
SUMS = 3 * 2.0**-24 * math.log2(INPUTS / 64)  # products are summed in float32
BOTH = 2 * SUMS  # two products, or scores and what is mixed by them
LOGARITHM = 2.0**-46  # float64


@dataclass(frozen=True)
class Case:
    """An operation on some inputs: what the kernel gives, the truth, and how far off it may be."""

    name: str
    found: Callable[[], Array]
    truth: Callable[[], Array]
    limit: float


def check_kernels() -> Finding:
    """Hold all kernels against their definitions."""
    wrong, nearest, names = [], (0.0, ""), set()
    for case in cases():
        error = relative_error(case.found(), case.truth())
        names.add(case.name.split(" ")[0])
        if not error <= case.limit:
            wrong.append(f"{case.name} is {error:.1e} off, expected at most {case.limit:.1e}")
        elif case.limit:
            nearest = max(nearest, (error / case.limit, case.name))
    if wrong:
        return settle("kernels = definitions", False, "; ".join(wrong))
    share, name = nearest
    said = f"{len(names)} kernels; {name} comes nearest to its limit, {share:.0%} of it"
    return settle("kernels = definitions", True, said)


def relative_error(found: Array, truth: Array) -> float:
    """How far off, for whole numbers (packed weights) the share of those that differ."""
    if found.shape != truth.shape:
        return np.inf
    if found.dtype.kind in "iu":
        return float(np.mean(found != truth))
    difference = found.astype(np.float64) - truth
    return float(np.sqrt(np.mean(difference**2) / np.mean(truth.astype(np.float64) ** 2)))


def cases() -> Iterator[Case]:
    """Every kernel, and linear layers for every kind of weight."""
    yield from _elementwise()
    yield from _products()
    yield from _attention()
    yield from _matching()
    yield from _packing()


def _numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _elementwise() -> Iterator[Case]:
    x, gain, bias = _numbers(1, ROWS, INPUTS), _numbers(2, INPUTS), _numbers(3, INPUTS)
    heads, places = _numbers(4, ROWS, 5, 66), np.arange(ROWS) * 37
    yield _case("layer_norm", (x,), (gain, bias, 1e-6), ONE_ROUNDING)
    yield _case("rms_norm", (x,), (gain, 1e-6), ONE_ROUNDING)
    yield _case("rope", (heads,), (places, 10000.0), ONE_ROUNDING)
    yield _case("soft_cap", (30 * x,), (30.0,), ONE_ROUNDING)
    yield _case("softmax", (3 * x,), (), ONE_ROUNDING)
    yield _case("gelu_tanh", (x,), (), ONE_ROUNDING)
    yield _case("unit", (x,), (), ONE_ROUNDING)
    yield _case("log_softmax", (3 * x[0],), (), LOGARITHM)


def _case(name: str, exact: tuple[Array, ...], rest: tuple[Any, ...], limit: float) -> Case:
    """An operation whose first arguments are float64 for the truth."""
    wide = (array.astype(np.float64) for array in exact)
    found, truth = (getattr(ops, name.split(" ")[0]) for ops in (kernels, definitions))
    return Case(name, partial(found, *exact, *rest), partial(truth, *wide, *rest), limit)


def _products() -> Iterator[Case]:
    x, bias = _numbers(5, ROWS, INPUTS), _numbers(6, OUTPUTS)
    gates = _stored(_numbers(7, OUTPUTS, INPUTS) * np.float32(0.05))
    ups = _stored(_numbers(8, OUTPUTS, INPUTS) * np.float32(0.05))
    for kind, gate in gates.items():
        read = _as_read(x, gate)
        whole = isinstance(gate, Int8)  # sums of whole numbers: nothing is left to round
        yield Case(
            f"linear {kind}",
            partial(kernels.linear, x, gate, bias),
            partial(definitions.linear, read, gate, bias),
            0.0 if whole else SUMS,
        )
        yield Case(
            f"gated {kind}",
            partial(kernels.gated, x, gate, ups[kind], tap=closed),
            partial(definitions.gated, read, gate, ups[kind], tap=closed),
            BOTH,
        )
    pixels, patches = _numbers(9, 2, 3, 20, 20), _numbers(10, OUTPUTS, 3, 6, 6)
    yield _case("patch_embed", (pixels,), (patches, bias), SUMS)
    ids, table = np.array([0, 3, OUTPUTS - 1]), round_to_bfloat16(_numbers(11, OUTPUTS, INPUTS))
    yield Case(
        "embed",
        partial(kernels.embed, ids, table, 3.0, np.float32),
        partial(definitions.embed, ids, table, 3.0, np.float64),
        ONE_ROUNDING,
    )


def _stored(w: Array) -> dict[str, Weight]:
    """Weights w [O, I] as each precision has them."""
    rounded = round_to_bfloat16(w)
    return {
        "float32": w,
        "float16": w.astype(np.float16),
        "bfloat16": rounded,
        "bfloat16 inputs": BFloat16Product(rounded.bits),
        "int8": PACKERS["int8"](w),
        "int4": PACKERS["int4"](w),
    }


def _as_read(x: Array, w: Weight) -> Array:
    """The inputs of the truth: float64, but where a weight says how they are rounded."""
    if isinstance(w, BFloat16Product):
        return unpack(round_to_bfloat16(x), np.float64)
    return x.astype(np.float64) if isinstance(w, np.ndarray | BFloat16) else x


def _attention() -> Iterator[Case]:
    """A few tokens behind a hundred, grouped heads; once with a soft-cap and a window."""
    before, (H, K, d) = 100, (6, 2, 40)
    q, seen = _numbers(12, ROWS, H, d), before + ROWS
    k, v = _numbers(13, seen, K, d), _numbers(14, seen, K, d)
    start, last = np.zeros(ROWS, np.int64), before + np.arange(ROWS) + 1
    for name, first, cap in (
        ("attend", start, None),
        ("attend in a window", np.maximum(start, last - 30), 2.0),
    ):
        yield _case(name, (q, k, v), (start, first, last, d**-0.5, cap), BOTH)


def _matching() -> Iterator[Case]:
    """A query and two pages, of vectors kept in each way that an index has."""
    q, pages = _numbers(16, ROWS, INPUTS), _numbers(17, 2 * OUTPUTS, INPUTS)
    for kind, kept in _stored(pages).items():
        if kind in ("float32", "float16", "int8"):
            yield Case(
                f"max_sim {kind}",
                partial(kernels.max_sim, q, kept, OUTPUTS),
                partial(definitions.max_sim, _as_read(q, kept), kept, OUTPUTS),
                0.0 if kind == "int8" else SUMS,
            )


def _packing() -> Iterator[Case]:
    w = _numbers(15, OUTPUTS, INPUTS)
    for kind, pack in PACKERS.items():
        yield Case(
            f"pack_{kind}",
            partial(_bits, PACKERS_OF_KERNELS[kind], w),
            partial(_bits, pack, w),
            0.0,
        )


def _bits(pack: Packer, w: Array) -> Array:
    """All that a packed weight is made of, as bytes."""
    arrays = (value for value in vars(pack(w)).values() if isinstance(value, np.ndarray))
    return np.concatenate([np.ascontiguousarray(a).view(np.uint8).ravel() for a in arrays])
