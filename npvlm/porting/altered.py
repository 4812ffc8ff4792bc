"""The definitions with some operations replaced: for rounding, for another order, for mistakes."""

from __future__ import annotations

from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, cast

from npvlm.model import ops
from npvlm.model.tap import Tap
from npvlm.model.weights import Array, BFloat16, Weight


def altered(**replaced: Any) -> ModuleType:
    """A namespace of operations as the model functions take it, with those given in their place.

    Operations that are made of others are made of the replaced ones.
    """

    def patch_embed(pixel_values: Array, w: Array | BFloat16, bias: Weight) -> Array:
        cut, D = ops.squares(pixel_values, w.shape[-1]), len(w)  # [N, P, I]
        y: Array = own.linear(cut.reshape(-1, cut.shape[2]), w.reshape(D, -1), bias)
        return y.reshape(*cut.shape[:2], D)

    def gated(x: Array, gate: Weight, up: Weight, *, tap: Tap) -> Array:
        left = tap("gate_proj", own.linear(x, gate))
        right = tap("up_proj", own.linear(x, up))
        y: Array = own.gelu_tanh(left) * right
        return y

    known = {name: f for name, f in vars(ops).items() if isinstance(f, FunctionType)}
    own = SimpleNamespace(**known | {"patch_embed": patch_embed, "gated": gated} | replaced)
    return cast(ModuleType, own)
