"""The named stages between a picture file and the next token: schema 1.

docs/stages.md is this list in words, and the authority for other programs.

Axis letters: N pictures · R picture side · P patches of a picture · T tokens · D hidden_size of the
tower at hand · F intermediate_size · H query heads · K key/value heads · d width of a head ·
V vocabulary · h, w height and width of the picture as it came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from npvlm.config import Config

SCHEMA = 1
TOWER = "vision_tower.vision_model"
TEXT = "language_model.model"

# The stages in the order in which they come to be: name, axes, what it is. {i} counts layers.
PICTURE = (
    ("image.rgb", "h w 3", "the picture in 8 bits: upright, RGB, on white where it is transparent"),
    ("image.resized", "R R 3", "squeezed to a square, aspect not kept, bicubic, in 8 bits"),
    ("pixel_values", "N 3 R R", "scaled to -1 to 1; what the tower reads"),
    ("input_ids", "T", "image tokens, <bos>, the prompt, one newline"),
    ("positions", "T", "what RoPE turns by, counted from 1"),
)
TOWER_START = (
    ("embeddings.patch_embedding", "N P D", "one vector for each square of the picture"),
    ("embeddings", "N P D", "plus the learned position of the square"),
)
TOWER_LAYER = (
    ("layer_norm1", "P D", "normed for attention"),
    ("self_attn.q_proj", "P D", "queries, all heads side by side"),
    ("self_attn.k_proj", "P D", "keys"),
    ("self_attn.v_proj", "P D", "values"),
    ("self_attn.attend", "P H d", "values, weighed and summed, before the output projection"),
    ("self_attn", "P D", "after the output projection: what is added to the stream"),
    ("layer_norm2", "P D", "normed for the MLP"),
    ("mlp.fc1", "P F", "widened"),
    ("mlp.gelu", "P F", "bent"),
    ("mlp", "P D", "narrowed: what is added to the stream"),
    ("", "P D", "the stream after the layer"),
)
TOWER_END = (("post_layernorm", "P D", "the stream, normed"),)
JOINT = (
    ("multi_modal_projector", "P D", "image features, in the decoder's width"),
    (
        "inputs_embeds",
        "T D",
        "image features, then text rows times sqrt(D): what the decoder reads",
    ),
)
TEXT_LAYER = (
    ("input_layernorm", "T D", "normed for attention"),
    ("self_attn.q_proj", "T Hd", "queries, all heads side by side"),
    ("self_attn.k_proj", "T Kd", "keys"),
    ("self_attn.v_proj", "T Kd", "values"),
    ("self_attn.q_rope", "T H d", "queries, turned by their positions"),
    ("self_attn.k_rope", "T K d", "keys, turned"),
    ("self_attn.attend", "T H d", "values, weighed and summed, before the output projection"),
    ("self_attn", "T D", "after the output projection"),
    ("post_attention_layernorm", "T D", "Gemma 1: normed for the MLP; Gemma 2: attention, normed"),
    ("pre_feedforward_layernorm", "T D", "Gemma 2 alone: normed for the MLP"),
    ("mlp.gate_proj", "T F", "the half that is bent"),
    ("mlp.up_proj", "T F", "the half that is gated"),
    ("mlp.gated", "T F", "one times the other"),
    ("mlp", "T D", "narrowed"),
    ("post_feedforward_layernorm", "T D", "Gemma 2 alone: the MLP, normed"),
    ("", "T D", "the stream after the layer"),
)
TEXT_END = (
    ("language_model.model.norm", "T D", "the stream, normed"),
    ("language_model.logits", "1 V", "scores of what comes after the last token, soft-capped"),
)

ONLY_GEMMA_2 = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
EXACT = ("image.rgb", "image.resized", "input_ids", "positions")  # whole numbers: no rounding


@dataclass(frozen=True)
class Stage:
    """One place where a run can be looked at: its name, its axes, and what it is."""

    name: str
    axes: tuple[str, ...]
    meaning: str

    @property
    def exact(self) -> bool:
        """Whether it holds whole numbers, in which every correct port agrees."""
        return self.name in EXACT


def stages(config: Config) -> list[Stage]:
    """Every stage of a model, in the order in which they come to be."""
    text, vision = config.text_config, config.vision_config
    second = text.model_type == "gemma2"
    rows = [*PICTURE, *_within(TOWER, TOWER_START)]
    for i in range(vision.num_hidden_layers):
        rows += _within(f"{TOWER}.encoder.layers.{i}", TOWER_LAYER)
    rows += [*_within(TOWER, TOWER_END), *JOINT]
    own = [row for row in TEXT_LAYER if second or row[0] not in ONLY_GEMMA_2]
    for i in range(text.num_hidden_layers):
        rows += _within(f"{TEXT}.layers.{i}", own)
    return [Stage(name, tuple(axes.split()), meaning) for name, axes, meaning in (*rows, *TEXT_END)]


def shape_of(stage: Stage, config: Config, size: int) -> tuple[int, ...] | None:
    """The shape of a stage that holds `size` numbers, for a single picture; None if none fits."""
    sides = _sides(stage, config)
    known = row_size(stage, config)
    unknown = [axis for axis in stage.axes if axis not in sides]
    if len(unknown) > 1 or size % known or (not unknown and size != known):
        return None
    return tuple(sides.get(axis, size // known) for axis in stage.axes)


def fits(stage: Stage, config: Config, shape: Sequence[int]) -> bool:
    """Whether a stage of this model can have this shape."""
    sides = _sides(stage, config)
    return len(shape) == len(stage.axes) and all(
        sides.get(axis, side) == side for axis, side in zip(stage.axes, shape, strict=True)
    )


def row_size(stage: Stage, config: Config) -> int:
    """How many numbers a stage holds, of each token where its tokens are not fixed."""
    sides = _sides(stage, config)
    return math.prod(sides.get(axis, 1) for axis in stage.axes)


def _sides(stage: Stage, config: Config) -> dict[str, int]:
    """How long each axis is, but T and the sides of the picture as it came."""
    text, vision = config.text_config, config.vision_config
    own = vision if stage.name.startswith(TOWER) else text
    joined = stage.name == "multi_modal_projector"
    return {
        "N": 1,
        "3": 3,
        "R": vision.image_size,
        "P": vision.num_patches,
        "D": config.projection_dim if joined else own.hidden_size,
        "F": own.intermediate_size,
        "H": own.num_attention_heads,
        "d": own.head_dim,
        "K": text.num_key_value_heads,
        "Hd": text.num_attention_heads * text.head_dim,
        "Kd": text.num_key_value_heads * text.head_dim,
        "V": text.vocab_size,
        "1": 1,
    }


def is_fused(name: str) -> bool:
    """Whether a stage is inside an operation that kernels do in one go."""
    return name.endswith((".gate_proj", ".up_proj"))


def chosen(name: str, patterns: str | None) -> bool:
    """Whether a stage is meant by comma-separated globs, such as "*.layers.0.*,inputs_embeds"."""
    if patterns is None:
        return True
    return any(fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


def _within(
    module: str, rows: tuple[tuple[str, str, str], ...] | list[tuple[str, str, str]]
) -> list[tuple[str, str, str]]:
    return [(f"{module}.{name}" if name else module, axes, what) for name, axes, what in rows]
