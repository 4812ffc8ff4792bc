"""Weights as they are stored: plain arrays, or small value objects with an `unpack`.

Axis letters: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class BFloat16:
    """Numbers in bfloat16, kept as their 16 bits: the upper half of a float32.

    Indexing and reshaping act on the bits, so a memory-mapped weight stays one.
    """

    bits: NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: Any) -> BFloat16:
        return BFloat16(self.bits[index])

    def reshape(self, *shape: int) -> BFloat16:
        return BFloat16(self.bits.reshape(*shape))

    def unpack(self) -> NDArray[np.float32]:
        """The same numbers as float32; every bfloat16 is one, so nothing is rounded."""
        return np.left_shift(self.bits, 16, dtype=np.uint32).view(np.float32)


Weight = Array | BFloat16


def unpack(weight: Weight, dtype: DTypeLike) -> Array:
    """The numbers of a weight as an array of `dtype`; no copy where it is one already."""
    values = weight.unpack() if isinstance(weight, BFloat16) else weight
    return values.astype(dtype, copy=False)


class Weights(dict[str, Weight]):
    """Tensors under their published names; `scope` narrows them to one module.

    `w.scope("layers.3.self_attn")["q_proj.weight"]` is `w["layers.3.self_attn.q_proj.weight"]`.
    A scope is made once and kept, so that a decoding step spends no time on names.
    """

    def __init__(self, tensors: dict[str, Weight]) -> None:
        super().__init__(tensors)
        self._scopes: dict[str, Weights] = {}

    def scope(self, module: str) -> Weights:
        if module not in self._scopes:
            start = module + "."
            inner = {name[len(start) :]: w for name, w in self.items() if name.startswith(start)}
            self._scopes[module] = Weights(inner)
        return self._scopes[module]
