"""Noise floors: how far the reference is from itself when it is computed less exactly.

A port in bfloat16 cannot be nearer to the reference than bfloat16 allows, and how near that is
differs from stage to stage. So nothing here is a fixed tolerance: the reference is run again, as
each precision would run it, and what it then misses by is the floor.

Axis letters: T tokens · S keys · H query heads · K key/value heads · d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from npvlm.api import Model
from npvlm.files.packed import at_precision
from npvlm.model import ops
from npvlm.model.ops import Index
from npvlm.model.tap import Tap
from npvlm.model.weights import (
    PACKERS,
    Array,
    Weight,
    Weights,
    round_to_bfloat16,
    unpack,
)
from npvlm.porting.altered import altered
from npvlm.porting.stages import EXACT
from npvlm.porting.statistics import rms
from npvlm.porting.trace import Inputs, Trace, run

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
LEAST = 2.0**-22  # of a number in float32: what two roundings of it can differ by, twice over

ROWS = 4096  # of a weight, widened at a time

Cast = Callable[[Array], Array]
Floors = dict[str, dict[str, float]]


def floors(trace: Trace, model: Model) -> Floors:
    """The relative error of each stage in each precision: root mean squares, over the reference's.

    - float32: the sums of every product in another order.
    - bfloat16, float16: weights, the result of every operation and the stream rounded, as a port
      does whose tensors have that type; sums are float32.
    - int8: the weights of npvlm's own int8, and inputs in 8 bits.

    Parameters
    ----------
    trace : of the model, in float32
    model : the same; its weights may be of any floating type
    """
    found: Floors = {name: {} for name in trace.stages}
    for precision in PRECISIONS:
        if precision == "int8" and model.config.quantization:
            continue  # packed already: there is nothing to compare with

        def note(name: str, value: Array, precision: str = precision) -> Array:
            if name in trace.stages:
                found[name][precision] = _floor(value, trace.stages[name])
            return value

        _again(trace.inputs, model, precision, note)
    for name in EXACT:
        if name in found:
            found[name] = dict.fromkeys(PRECISIONS, 0.0)
    return found


def _floor(value: Array, reference: Array) -> float:
    """The relative error; at most 1, where a precision holds nothing of a stage (float16 can)."""
    size = rms(reference)
    with np.errstate(over="ignore", invalid="ignore"):
        error = rms(value - reference) / size if size else 0.0
    return float(f"{min(max(error, LEAST), 1.0):.3g}") if not math.isnan(error) else 1.0


def _again(inputs: Inputs, model: Model, precision: str, tap: Tap) -> None:
    """A less exact run."""
    weights, namespace, to = less_exact(model, precision)
    inputs = replace(inputs, pixel_values=to(inputs.pixel_values))
    tap("pixel_values", inputs.pixel_values)
    run(inputs, weights, model.config, ops=namespace, tap=lambda n, value: tap(n, to(value)))


def less_exact(model: Model, precision: str) -> tuple[Weights, ModuleType, Cast]:
    """What another precision computes with: weights, operations, and how it keeps a result."""
    to = {"bfloat16": to_bfloat16, "float16": to_float16}.get(precision)
    if to is not None:
        return model.weights, rounding(to), to
    if precision == "int8":
        return Weights(at_precision(model.weights, "int8", PACKERS)), model.ops, _as_it_is
    return model.weights, reordered(), _as_it_is


def _as_it_is(value: Array) -> Array:
    return value


def to_bfloat16(value: Array) -> Array:
    """Numbers as bfloat16 holds them, in float32."""
    return unpack(round_to_bfloat16(value), np.float32)


def to_float16(value: Array) -> Array:
    """Numbers as float16 holds them, in float32; what is too large for it is infinite there."""
    with np.errstate(over="ignore"):
        return value.astype(np.float16).astype(np.float32)


def reordered() -> ModuleType:
    """The definitions with the sums of products in another order, and in one run."""

    def linear(x: Array, w: Weight, bias: Weight | None = None) -> Array:
        y = np.empty((len(x), len(w)), x.dtype)
        for start in range(0, len(w), ROWS):  # a whole table would be gigabytes
            rows = slice(start, start + ROWS)
            y[:, rows] = x[:, ::-1] @ unpack(w[rows], x.dtype)[:, ::-1].T
        return y if bias is None else y + unpack(bias, x.dtype)

    def attend(q: Array, k: Array, v: Array, *rest: Any) -> Array:
        return ops.attend(q[..., ::-1], k[..., ::-1], v, *rest)

    return altered(linear=linear, attend=attend)


def rounding(to: Cast) -> ModuleType:
    """The definitions as a port computes them that rounds the result of every operation."""

    def linear(x: Array, w: Weight, bias: Weight | None = None) -> Array:
        stored = to(w) if isinstance(w, np.ndarray) and w.dtype == np.float32 else w
        return to(ops.linear(to(x), stored, bias))

    def attend(
        q: Array,
        k: Array,
        v: Array,
        start: Index,
        first: Index,
        last: Index,
        scale: float,
        cap: float | None = None,
    ) -> Array:
        """Scores, soft-cap and weights rounded too, as by a port without a fused attention."""
        (H, K), mixed = (q.shape[1], k.shape[1]), np.empty_like(q)
        at = np.arange(len(k))
        visible = (first[:, None] <= at) & (at < last[:, None])  # [T, S]
        for h in range(H):
            group = h // (H // K)
            scores = to(to(q[:, h] @ k[:, group].T) * np.float32(scale))  # [T, S]
            if cap is not None:
                scores = to(ops.soft_cap(scores, cap))
            weights = to(ops.softmax(np.where(visible, scores, -np.inf)))
            mixed[:, h] = to(weights @ v[:, group])
        return mixed

    def rounded(operation: Callable[..., Array]) -> Callable[..., Array]:
        return lambda x, *rest: to(operation(to(x), *rest))

    others = ("layer_norm", "rms_norm", "rope", "soft_cap", "gelu_tanh")
    return altered(
        linear=linear,
        attend=attend,
        embed=lambda *arguments: to(ops.embed(*arguments)),
        **{name: rounded(getattr(ops, name)) for name in others},
    )
