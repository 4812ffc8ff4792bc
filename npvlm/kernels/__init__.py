"""The speed: twins of the hot operations of `npvlm.model.ops`, in numba. Same names, same meaning.

Kernels are compiled when they are first called and kept in `compiling.FOLDER`. Operations that are
not hot are the definitions themselves.
"""

from __future__ import annotations

from npvlm.kernels.compiling import kept

with kept():
    from npvlm.kernels.attention import attend
    from npvlm.kernels.elementwise import (
        gelu_tanh,
        layer_norm,
        log_softmax,
        rms_norm,
        rope,
        soft_cap,
        softmax,
        unit,
    )
    from npvlm.kernels.matching import max_sim
    from npvlm.kernels.products import embed, gated, linear, patch_embed

__all__ = [
    "attend",
    "embed",
    "gated",
    "gelu_tanh",
    "layer_norm",
    "linear",
    "log_softmax",
    "max_sim",
    "patch_embed",
    "rms_norm",
    "rope",
    "soft_cap",
    "softmax",
    "unit",
]
