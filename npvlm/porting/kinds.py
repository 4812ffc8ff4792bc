"""In which way a stage is wrong: another size, another order, another stage, or just wrong numbers.

Axis letters: T rows · D numbers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from npvlm.config import Config
from npvlm.model.weights import Array
from npvlm.porting.dumps import Dump
from npvlm.porting.statistics import rms, sketch

COARSE = 0.02  # relative: more than rounding to 16 bits makes
PLAIN = 1e-3  # how near to 1 a factor is none
NEAR = 8.0  # times the floor: as near as this is the same
LARGEST = 2**24  # numbers of a stage that is searched for a permutation
ROWS = 4096


@dataclass(frozen=True)
class Kind:
    """A kind of difference, and what is to be said about it."""

    name: str
    detail: str


def plain(value: Array) -> Array:
    """Numbers as the reference holds them: float32, or int64 where they are whole."""
    kind = np.int64 if value.dtype.kind in "iub" else np.float32
    return np.ascontiguousarray(value, kind)


def best_scale(value: Array, expected: Array) -> float | None:
    """The factor by which the expected numbers come nearest to the value's."""
    x, y = (a.astype(np.float64).reshape(-1) for a in (expected, value))
    size = float(x @ x)
    return float(x @ y) / size if size else None


def kind_of(
    stage: str,
    mine: Array,
    original: str,
    truth: Dump,
    floor: float,
    config: Config,
) -> Kind:
    """Say how a stage differs from the reference's.

    Parameters
    ----------
    mine : the port's value in the reference's layout
    original : the type it is stored in, such as "BF16"
    truth : the reference; of a compact one only some kinds can be told
    floor : what counts as the same, relative
    """
    near = NEAR * floor
    if mine.size > 1 and float(mine.min()) == float(mine.max()):
        return Kind("constant", f"every number is {float(mine.flat[0]):g}")
    if stage not in truth.dtypes:
        return _kind_of_sketch(mine, truth.described()[stage], near, config)
    expected = truth.read(stage)
    if expected.dtype.kind == "f" and not original.startswith(("F", "BF")):
        return Kind("dtype", f"it is stored as {original}, expected floating-point numbers")
    if other := next(_equal_stages(stage, mine, truth, near), None):
        return Kind("order", f"it holds what is {other} in the reference")
    scale = best_scale(mine, expected)
    if _is_factor(scale, near) and _missed(mine, expected * scale) <= near:
        return Kind("scale", f"it is {scale:.6g} times the reference{_known(scale, config)}")
    if moved := _permutation(mine, expected, near):
        return Kind("permutation", moved)
    return Kind("numeric", _coarser(mine, _missed(mine, expected)) or _numbers(mine, expected))


def _kind_of_sketch(mine: Array, entry: Mapping[str, Any], near: float, config: Config) -> Kind:
    """The same where of the reference only the statistics are known."""
    own, expected = sketch(mine), np.array(entry["sketch"])
    scale = best_scale(own, expected)
    if _is_factor(scale, near) and _missed(own, expected * scale) <= near:
        return Kind("scale", f"it is {scale:.6g} times the reference{_known(scale, config)}")
    detail = (
        _coarser(mine, _missed(own, expected))
        or "the reference has no numbers of this stage, only their sketch"
    )
    return Kind("numeric", detail)


def _is_factor(scale: float | None, near: float) -> TypeGuard[float]:
    """Whether a best fit says that numbers are multiplied, and not just a little off."""
    return scale is not None and abs(scale) > near and abs(scale - 1) > PLAIN


def _coarser(mine: Array, error: float) -> str:
    """Say so where float32 numbers hold no more than 16 bits do, and that may be all."""
    if mine.dtype != np.float32 or error > COARSE:
        return ""
    if not (mine.view(np.uint32) & np.uint32(0xFFFF)).any():
        return "its numbers are rounded to bfloat16: compare --as bfloat16"
    with np.errstate(over="ignore"):
        rounded = np.array_equal(mine.astype(np.float16).astype(np.float32), mine)
    return "its numbers are rounded to float16: compare --as float16" if rounded else ""


def _missed(value: Array, expected: Array) -> float:
    size = rms(expected)
    return rms(value.astype(np.float64) - expected) / size if size else math.inf


def _equal_stages(stage: str, mine: Array, truth: Dump, near: float) -> Iterator[str]:
    """Other stages of the reference that have these numbers."""
    for name, entry in truth.described().items():
        if name != stage and tuple(entry["shape"]) == mine.shape and name in truth.dtypes:
            size = entry["rms"]
            # Root mean squares that are far apart save reading the numbers.
            if abs(rms(mine) - size) <= max(near, 1e-5) * size and (
                _missed(mine, truth.read(name)) <= near
            ):
                yield name


def _known(scale: float, config: Config) -> str:
    """What a factor is, where it is one that ports get wrong."""
    text, vision = config.text_config, config.vision_config
    widths = {
        "the decoder's hidden_size": text.hidden_size,
        "the tower's hidden_size": vision.hidden_size,
        "the decoder's head_dim": text.head_dim,
        "the tower's head_dim": vision.head_dim,
    }
    for name, width in widths.items():
        for factor, said in ((math.sqrt(width), f"sqrt({width})"), (width, f"{width}")):
            for value, form in ((factor, said), (1 / factor, f"1/{said}")):
                if math.isclose(abs(scale), value, rel_tol=1e-4):
                    return f", which is {'-' if scale < 0 else ''}{form} ({name})"
    return ""


def _permutation(mine: Array, expected: Array, near: float) -> str | None:
    """Say whether rows or columns are the reference's in another order."""
    if mine.ndim < 2 or mine.size > LARGEST:
        return None
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (mine, expected))
    for one, two, what in ((a, b, "rows"), (a.T, b.T, "columns")):
        if 1 < len(one) <= ROWS:
            order = _nearest(one, two)
            moved = np.flatnonzero(order != np.arange(len(order)))
            once = len(set(order.tolist())) == len(order)
            if len(moved) and once and _missed(one, two[order]) <= near:
                here, there = (
                    _place(int(i), what, mine.shape) for i in (moved[0], order[moved[0]])
                )
                return (
                    f"its {what} are the reference's in another order: {what[:-1]} {here} is the "
                    f"reference's {there}"
                )
    return None


def _place(number: int, what: str, shape: tuple[int, ...]) -> str:
    """A row's number; by its axes, such as [token, head], where it has several."""
    if what == "columns" or len(shape) == 2:
        return str(number)
    return f"[{', '.join(str(int(i)) for i in np.unravel_index(number, shape[:-1]))}]"


def _nearest(one: Array, two: Array) -> Array:
    """For each row of one the nearest row of two."""
    distance = (two * two).sum(axis=1) - 2 * (one @ two.T)
    found: Array = np.argmin(distance, axis=1)
    return found


def _numbers(mine: Array, expected: Array) -> str:
    """Where the largest difference is, or how many whole numbers differ."""
    if expected.dtype.kind != "f":
        wrong = np.flatnonzero((mine != expected).reshape(-1))
        at = int(wrong[0])
        return (
            f"{len(wrong):,} of {mine.size:,} numbers differ, the first at {at}: "
            f"{mine.flat[at]}, expected {expected.flat[at]}"
        )
    at = int(np.argmax(np.abs(mine.astype(np.float64) - expected)))
    place = ", ".join(str(int(i)) for i in np.unravel_index(at, mine.shape))
    return (
        f"the largest difference is at [{place}]: {float(mine.flat[at]):.6g}, expected "
        f"{float(expected.flat[at]):.6g}"
    )
