"""npvlm: PaliGemma and PaliGemma 2 on a plain CPU, with NumPy and numba.

import npvlm
model = npvlm.load("shapes")
print(model.generate("picture.png", "caption en")[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npvlm.api import Answer, Box, Detection, Explanation, Failed, Model, Scores, Seen, load
    from npvlm.errors import NpvlmError, UsageError
    from npvlm.retrieval import Retriever, load_retriever

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Box",
    "Detection",
    "Explanation",
    "Failed",
    "Model",
    "NpvlmError",
    "Retriever",
    "Scores",
    "Seen",
    "UsageError",
    "load",
    "load_retriever",
]


def __getattr__(name: str) -> Any:
    """Import the public face when it is first asked for: `--help` must not wait for NumPy."""
    if name in ("NpvlmError", "UsageError"):
        from npvlm import errors

        return getattr(errors, name)
    if name in ("Retriever", "load_retriever"):
        from npvlm import retrieval

        return getattr(retrieval, name)
    if name in __all__:
        from npvlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'npvlm' has no attribute {name!r}")
