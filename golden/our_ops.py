"""npvlm's side of the goldens per operation, and their limits. Needs no torch.

A golden names its operation and gives the arguments by name; four are no operation of `model.ops`:
`resize` and `pixel_values` are those of `files.pictures`, `visibility` is what `model.cache.Rows`
says, and `cache` is rotary positions and attention through a `LayerCache`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image
from safetensors.numpy import load_file

from golden import ours
from npvlm.files import pictures
from npvlm.files.pictures import Preprocessor
from npvlm.model.cache import LayerCache, Rows
from npvlm.model.tap import closed
from npvlm.model.weights import Array

GOLDEN = Path(__file__).resolve().parent

# Far out, torch's float32 misses rotary angles, which no limit may follow. With exact angles the
# cosine and sine, two products and a sum are rounded, each by 2^-24 at most: together less than 4.
MOST_ROPE = 4 * 2.0**-24


@dataclass(frozen=True, repr=False)
class OpGolden:
    """A stored case: what goes into an operation and what comes out."""

    op: str
    name: str
    inputs: dict[str, Array]
    numbers: dict[str, Any]
    truth: Array  # float64; another type where one result alone is right
    torchs: float | None  # by how much torch's float32 misses the truth, relative

    def given(self, dtype: DTypeLike) -> dict[str, Any]:
        """The arguments, with the float32 inputs in a type."""
        wide = {
            key: value.astype(dtype) if value.dtype == np.float32 else value
            for key, value in self.inputs.items()
        }
        return wide | self.numbers


def read_ops() -> list[OpGolden]:
    """All goldens per operation."""
    record = json.loads((GOLDEN / "ops.json").read_text())
    tensors = load_file(GOLDEN / "ops.safetensors")
    found = []
    for op, cases in record["cases"].items():
        for name, case in cases.items():
            own = {key: tensors[f"{op}.{name}.{key}"] for key in case["shapes"]}
            truth = own.pop("truth")
            own.pop("torch", None)
            torchs = case.get("torch_float32_error")
            found.append(OpGolden(op, name, own, case["numbers"], truth, torchs))
    return found


def serves(golden: OpGolden, ops: ModuleType) -> bool:
    """Whether a namespace has the operation, or those that it consists of."""
    return golden.op in (*ALONE, "cache") or hasattr(ops, golden.op)


def run(golden: OpGolden, ops: ModuleType, dtype: DTypeLike) -> Array:
    """What npvlm makes of a case, computed in a type."""
    given = golden.given(dtype)
    if golden.op in ALONE:
        return ALONE[golden.op](**given)
    if golden.op == "cache":
        return cached(**given, ops=ops)
    more = {"embed": {"dtype": dtype}, "gated": {"tap": closed}}.get(golden.op, {})
    return getattr(ops, golden.op)(**given, **more)


def limit(golden: OpGolden, dtype: DTypeLike) -> float:
    """How far a result of this type may be from the truth, by the error of torch's float32."""
    if golden.torchs is None:
        return 0.0
    if dtype == np.float64:  # a row of the table times the scale is rounded once: nothing is free
        return 0.0 if golden.op == "embed" else ours.limit_float64(golden.torchs)
    narrow = ours.limit_float32(golden.torchs)
    return min(MOST_ROPE, narrow) if golden.op == "rope" else narrow


def error(found: Array, truth: Array) -> float:
    """Relative, as root mean squares; infinite where shapes differ."""
    if found.shape != truth.shape:
        return np.inf
    wide = truth.astype(np.float64)
    return ours.rms(found.astype(np.float64) - wide) / ours.rms(wide)


def resize(picture: Array, **numbers: Any) -> Array:
    """picture [height, width, 3] -> [3, R, R]"""
    given = Image.fromarray(picture)
    return pictures.resize(given, _preprocessor(**numbers)).transpose(2, 0, 1)


def pixel_values(picture: Array, **numbers: Any) -> Array:
    """picture [height, width, 3] -> [3, R, R]"""
    given = pictures.open_picture(Image.fromarray(picture))
    return pictures.pixel_values(given, _preprocessor(**numbers))


def _preprocessor(
    size: int,
    resample: int,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    rescale_factor: float = 1.0,
) -> Preprocessor:
    mean, std = tuple(image_mean or (0.0,) * 3), tuple(image_std or (1.0,) * 3)
    return Preprocessor(size, size, mean, std, rescale_factor, resample)


def visibility(prefix: int, total: int, window: int | None) -> Array:
    """Which rows each token sees, as ones: [T, S]"""
    rows = Rows.of(0, prefix, range(total)).sliding(window)
    at = np.arange(total)
    return ((rows.first[:, None] <= at) & (at < rows.last[:, None])).astype(np.uint8)


def cached(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    prefix: int,
    window: int | None,
    theta: float,
    scale: float,
    cap: float | None,
    *,
    ops: ModuleType,
) -> Array:
    """The prefix at once, then token by token through the cache.

    q [T, H, d], k [T, K, d], v [T, K, d], positions [T] -> [T, H, d]
    """
    cache, mixed = LayerCache(np.zeros_like(k), np.zeros_like(v)), []
    edges = [0, *range(prefix, len(q) + 1)]
    for begin, end in pairwise(edges):
        rows, new = Rows.of(0, prefix, range(begin, end)).sliding(window), slice(begin, end)
        assert np.array_equal(rows.positions, positions[new])
        queries = ops.rope(q[new], rows.positions, theta)
        keys, values = cache.write(rows.slots, ops.rope(k[new], rows.positions, theta), v[new])
        mixed.append(
            ops.attend(queries, keys, values, rows.start, rows.first, rows.last, scale, cap)
        )
    return np.concatenate(mixed)


ALONE: dict[str, Callable[..., Array]] = {
    "resize": resize,
    "pixel_values": pixel_values,
    "visibility": visibility,
}
