"""What this machine allows, and how much of it the linear layers of a model reach.

Axis letters: T tokens of a call · O, I out and in features.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import numpy as np

from npvlm.files.names import EMBED_TOKENS
from npvlm.kernels.bandwidth import read_bandwidth
from npvlm.model.weights import Adapted, Array, Weight
from npvlm.work.rounds import Inputs, Opened, look, write

LINEAR_OPS = ("linear", "gated")  # the operations that multiply by weight matrices
PRODUCT_ROWS, PRODUCT_OUT = 288, 16384  # of the one large product that is measured alone
TIMES = 5


@dataclass(frozen=True)
class Limits:
    """Rates per second, medians over the passes; fractions are taken within each pass.

    bandwidth : bytes that all threads read, best of 5 before and 5 after
    decode_bytes : bytes of the weights that one decoding step reads
    decode_rate : those over the whole step; decode_linear_rate over its linear layers alone
    product : T, I and O of the large product; product_rate : its operations, best of 5
    prefill_linear_rate : operations of the decoder's linear layers in a prefill
    """

    bandwidth: float
    decode_bytes: int
    decode_rate: float
    decode_fraction: float
    decode_linear_rate: float
    decode_linear_fraction: float
    product: tuple[int, int, int]
    product_rate: float
    prefill_linear_rate: float
    prefill_linear_fraction: float


class LinearClock:
    """Operations whose linear layers are timed and counted: hand a model `ops` instead of its own.

    seconds inside them · bytes of the weights they read · operations, a multiply-add being two
    """

    def __init__(self, ops: ModuleType) -> None:
        self.ops = ModuleType("clocked")
        vars(self.ops).update(vars(ops))
        for name in LINEAR_OPS:
            if hasattr(ops, name):
                setattr(self.ops, name, self._timed(getattr(ops, name)))
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.seconds, self.bytes, self.operations = 0.0, 0, 0

    def _timed(self, op: Callable[..., Array]) -> Callable[..., Array]:
        def timed(x: Array, *weights: Any, **options: Any) -> Array:
            began = time.perf_counter()
            y = op(x, *weights, **options)
            self.seconds += time.perf_counter() - began
            for weight in weights:
                if len(getattr(weight, "shape", ())) == 2:
                    self.bytes += stored_bytes(weight)
                    self.operations += 2 * len(x) * math.prod(weight.shape)
            return y

        return timed


def measure_limits(model: Opened, inputs: Inputs, new_tokens: int, repeat: int) -> Limits:
    """Measure machine and model in turns, as the speed of a shared machine drifts."""
    passes = [_one_pass(model, inputs, new_tokens) for _ in range(repeat)]
    medians = {
        field.name: statistics.median(getattr(one, field.name) for one in passes)
        for field in fields(Limits)
        if field.type == "float"
    }
    return replace(passes[0], **medians)


def stored_bytes(weight: Weight) -> int:
    """How much a weight takes as it is stored, scales and a correction included."""
    if isinstance(weight, np.ndarray):
        return weight.nbytes
    base = stored_bytes(weight.base) if isinstance(weight, Adapted) else 0
    own = [part for name, part in vars(weight).items() if name != "base"]
    return base + sum(part.nbytes for part in own if isinstance(part, np.ndarray))


def _one_pass(model: Opened, inputs: Inputs, new_tokens: int) -> Limits:
    """Measure the machine before and after a run with the clock; the better bandwidth counts."""
    bandwidth = read_bandwidth(TIMES)
    clock = LinearClock(model.ops)
    clocked = replace(model, ops=clock.ops)
    features = look(clocked, inputs)
    steps = write(clocked, inputs, features, new_tokens)

    clock.reset()
    next(steps)
    prefill_rate = clock.operations / clock.seconds

    clock.reset()
    began = time.perf_counter()
    for _ in steps:
        pass
    decode_rate = clock.bytes / (time.perf_counter() - began)
    linear_rate = clock.bytes / clock.seconds

    product, product_rate = _large_product(model)
    bandwidth = max(bandwidth, read_bandwidth(TIMES))
    return Limits(
        bandwidth=bandwidth,
        decode_bytes=clock.bytes // (new_tokens - 1),
        decode_rate=decode_rate,
        decode_fraction=decode_rate / bandwidth,
        decode_linear_rate=linear_rate,
        decode_linear_fraction=linear_rate / bandwidth,
        product=product,
        product_rate=product_rate,
        prefill_linear_rate=prefill_rate,
        prefill_linear_fraction=prefill_rate / product_rate,
    )


def _large_product(model: Opened) -> tuple[tuple[int, int, int], float]:
    """One large linear layer by itself: its T, I and O, and its operations per second."""
    w = model.weights[EMBED_TOKENS][:PRODUCT_OUT]
    out, width = w.shape
    x = np.random.default_rng(0).standard_normal((PRODUCT_ROWS, width), np.float32)
    seconds = []
    for _ in range(1 + TIMES):  # the first one warms up
        began = time.perf_counter()
        model.ops.linear(x, w)
        seconds.append(time.perf_counter() - began)
    operations = 2 * PRODUCT_ROWS * width * out
    return (PRODUCT_ROWS, width, out), operations / min(seconds[1:])
