"""The config.json of a model of which the weights alone are at hand, told from their shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npvlm.config import Values
from npvlm.errors import NpvlmError
from npvlm.files.names import EMBED_TOKENS, LM_HEAD, POSITIONS
from npvlm.files.published import GEMMA, GEMMA2, IMAGE_TOKEN, TEXT, VISION, whole_config

_HEAD_DIM = 256  # of every published decoder that does not say
_LAYER = "language_model.model.layers."
_TOWER = "vision_tower.vision_model."
_BLOCK = f"{_TOWER}encoder.layers."


@dataclass(frozen=True)
class Heads:
    """How attention's weights are shared among heads, which their shapes do not tell."""

    query: int
    key_value: int
    head_dim: int
    tower: int


def deduce_config(
    shapes: Mapping[str, tuple[int, ...]], heads: Heads | None, dtype: str
) -> tuple[dict[str, Any], bool]:
    """Write the config.json of a model whose weights have these shapes.

    What shapes do not tell is as published: soft-caps, window, eps, and the scale of the scores.
    Where no published decoder has these shapes, that scale follows from the width of a head.

    Parameters
    ----------
    shapes : of the tensors, by their published names
    heads : where they are known; else the model must have the sizes of a published one
    dtype : for `torch_dtype`

    Returns
    -------
    The contents of config.json, and whether a published decoder has these shapes.

    Raises
    ------
    NpvlmError
        Where tensors that tell are not there, or the sizes are none that are known.
    """
    gemma2 = any("pre_feedforward_layernorm" in name for name in shapes)
    table = _shape(shapes, EMBED_TOKENS if EMBED_TOKENS in shapes else LM_HEAD, 2)
    told = {
        "hidden_size": table[1],
        "num_hidden_layers": _count(shapes, _LAYER),
        "intermediate_size": _shape(shapes, f"{_LAYER}0.mlp.gate_proj.weight", 2)[0],
    }
    rows = [_shape(shapes, f"{_LAYER}0.self_attn.{x}_proj.weight", 2)[0] for x in "qk"]
    text = next((t for t in TEXT.values() if _tells(t, gemma2, told, rows, heads)), None)
    known = text is not None
    if text is None:
        if heads is None:
            raise NpvlmError(
                f"{told['num_hidden_layers']} layers of {table[1]} are no published PaliGemma's, "
                "and shapes do not tell how many heads they have; put the config.json of the "
                "model that it began from beside the weights"
            )
        text = _unpublished(gemma2, told, heads)
    vision = _tower(shapes, heads)
    image_token = min(table[0], IMAGE_TOKEN)
    return whole_config({**text, "vocab_size": table[0]}, vision, image_token, dtype), known


def _tells(text: Values, gemma2: bool, told: Values, rows: list[int], heads: Heads | None) -> bool:
    """Whether a published decoder has these sizes."""
    head_dim = text.get("head_dim", _HEAD_DIM)
    its = Heads(text["num_attention_heads"], text["num_key_value_heads"], head_dim, 0)
    return (
        (text["model_type"] == "gemma2") == gemma2
        and all(text[key] == value for key, value in told.items())
        and [its.query * head_dim, its.key_value * head_dim] == rows
        and (heads is None or heads.head_dim == head_dim)
    )


def _unpublished(gemma2: bool, told: Values, heads: Heads) -> dict[str, Any]:
    scale = {"query_pre_attn_scalar": heads.head_dim} if gemma2 else {}
    return {
        **(GEMMA2 if gemma2 else GEMMA),
        **told,
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.key_value,
        "head_dim": heads.head_dim,
        **scale,
    }


def _tower(shapes: Mapping[str, tuple[int, ...]], heads: Heads | None) -> dict[str, Any]:
    width, _, patch, _ = _shape(shapes, f"{_TOWER}embeddings.patch_embedding.weight", 4)
    told = {
        "hidden_size": width,
        "intermediate_size": _shape(shapes, f"{_BLOCK}0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(shapes, _BLOCK),
        "patch_size": patch,
    }
    if heads is not None:
        told["num_attention_heads"] = heads.tower
    elif any(VISION[key] != value for key, value in told.items()):
        raise NpvlmError(
            f"the image tower, {told['num_hidden_layers']} layers of {width}, is that of no "
            "published PaliGemma; put the config.json of the model that it began from beside it"
        )
    patches = _shape(shapes, POSITIONS, 2)[0]
    return VISION | told | {"image_size": side_of(patches) * patch}


def side_of(patches: int) -> int:
    """How many patches lie side by side in a square picture of so many.

    Raises
    ------
    NpvlmError
        Where they make no square.
    """
    side = math.isqrt(patches)
    if side * side != patches or side == 0:
        raise NpvlmError(f"{POSITIONS} has {patches} rows, expected a square number: a row a patch")
    return side


def _count(shapes: Mapping[str, tuple[int, ...]], start: str) -> int:
    """How many layers there are, by the highest number that a name has."""
    number = re.compile(re.escape(start) + r"(\d{1,4})\.")
    found = [int(match[1]) for name in shapes if (match := number.match(name))]
    return max(found, default=-1) + 1


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise NpvlmError(f"{name} is not among the weights; are they a PaliGemma's?")
    if len(shapes[name]) != axes:
        raise NpvlmError(f"{name} is {list(shapes[name])}, expected {axes} axes")
    return shapes[name]
