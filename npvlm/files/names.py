"""Which tensors a PaliGemma has, and the other names they have been given.

The published checkpoints' spelling is the one used everywhere; `canonical_name` maps every other
spelling that transformers has written onto it, for tensors and for modules alike.

Axis letters: D hidden_size of the decoder or the tower, F intermediate_size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from npvlm.config import Config, TextConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]

_PROJECTOR = "multi_modal_projector.linear.weight"
_MODEL = re.compile(r"(^|\.)model\.$")

EMBED_TOKENS = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
PROJECTION = "embedding_proj_layer"
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


def canonical_name(name: str) -> str:
    """Return the published spelling of a tensor or module, whatever release wrote it.

    Newer releases put `model.` in front of everything, call the decoder `language_model` where it
    was `language_model.model`, leave `vision_model` out, and move `lm_head` to the top. ColPali is
    a PaliGemma under `vlm.` with a projection beside it; colpali-engine says `model.` and
    `custom_text_proj`.
    """
    name = name.removeprefix("vlm.").removeprefix("model.").removeprefix("model.")
    if rest := _after("custom_text_proj.", name):
        return f"{PROJECTION}.{rest}"
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    if rest := _after("language_model.", name):
        inner = rest.startswith(("model.", "lm_head"))
        return name if inner else f"language_model.model.{rest}"
    if rest := _after("vision_tower.", name):
        inner = rest.startswith("vision_model.")
        return name if inner else f"vision_tower.vision_model.{rest}"
    return name


def prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names of each PaliGemma among tensors: "" for a model alone.

    A model that has a PaliGemma inside, such as a robot's policy, puts its own words in front. It
    is found by its projector, of which it has one. ColPali's own words are not in front of it.
    """
    names = list(names)
    published = [canonical_name(name) for name in names]
    if _PROJECTOR in published and any(name.startswith(PROJECTION) for name in published):
        return [""]
    starts = [name.removesuffix(_PROJECTOR) for name in names if name.endswith(_PROJECTOR)]
    whole = [_MODEL.sub(r"\1", start) for start in starts if start == "" or start.endswith(".")]
    return sorted(set(whole))


def spelling(names: Iterable[str]) -> str:
    """Say whose spelling tensors have: that of the published checkpoints, or of a later release."""
    names = list(names)
    tower = [name for name in names if "vision_tower." in name]
    if not tower:
        return "none that is known"
    newer = {name.startswith("model.") for name in tower}
    inner = {"vision_tower.vision_model." in name for name in tower}
    if len(newer) > 1 or len(inner) > 1:
        return "mixed"
    return {
        (False, True): "as published",
        (False, False): "as saved by transformers 5",
        (True, True): "modules of transformers 4.52 and later",
        (True, False): "modules of transformers 5",
    }[newer.pop(), inner.pop()]


def expected_shapes(config: Config) -> Shapes:
    """List every tensor that a model of this config has, with its shape.

    `language_model.lm_head.weight` is among them only where the tables are not tied. ColPali scores
    no words and has none, but a projection.
    """
    text, vision = config.text_config, config.vision_config
    shapes = {
        **_decoder(text),
        **_projector(config.projection_dim, vision.hidden_size),
        **_tower(vision),
    }
    if config.embedding_dim is not None:
        shapes.pop(LM_HEAD, None)
        shapes[f"{PROJECTION}.weight"] = config.embedding_dim, text.hidden_size
        shapes[f"{PROJECTION}.bias"] = (config.embedding_dim,)
    return shapes


def multiplies(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a linear layer multiplies its inputs by this tensor.

    Every matrix is such a weight but the table of positions, which is only added. The embedding
    table is one: it is the output layer as well. The patches' kernel, a convolution, is none.
    """
    return len(shape) == 2 and name != POSITIONS


def _decoder(text: TextConfig) -> Shapes:
    D, F, V = text.hidden_size, text.intermediate_size, text.vocab_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    layer: Shapes = {
        "self_attn.q_proj.weight": (queries, D),
        "self_attn.k_proj.weight": (keys, D),
        "self_attn.v_proj.weight": (keys, D),
        "self_attn.o_proj.weight": (D, queries),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    if text.model_type == "gemma2":
        layer["pre_feedforward_layernorm.weight"] = (D,)
        layer["post_feedforward_layernorm.weight"] = (D,)

    shapes: Shapes = {EMBED_TOKENS: (V, D), "language_model.model.norm.weight": (D,)}
    if not text.tie_word_embeddings:
        shapes[LM_HEAD] = (V, D)
    for i in range(text.num_hidden_layers):
        start = f"language_model.model.layers.{i}."
        shapes |= {start + name: shape for name, shape in layer.items()}
    return shapes


def _projector(projection_dim: int, width: int) -> Shapes:
    return {
        "multi_modal_projector.linear.weight": (projection_dim, width),
        "multi_modal_projector.linear.bias": (projection_dim,),
    }


def _tower(vision: VisionConfig) -> Shapes:
    D, F, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    layer: Shapes = {}
    for norm in ("layer_norm1", "layer_norm2"):
        layer |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{part}.weight": (D, D), f"self_attn.{part}.bias": (D,)}
    layer |= {"mlp.fc1.weight": (F, D), "mlp.fc1.bias": (F,)}
    layer |= {"mlp.fc2.weight": (D, F), "mlp.fc2.bias": (D,)}

    start = "vision_tower.vision_model."
    shapes: Shapes = {
        f"{start}embeddings.patch_embedding.weight": (D, vision.num_channels, patch, patch),
        f"{start}embeddings.patch_embedding.bias": (D,),
        POSITIONS: (vision.num_patches, D),
        f"{start}post_layernorm.weight": (D,),
        f"{start}post_layernorm.bias": (D,),
    }
    for i in range(vision.num_hidden_layers):
        at = f"{start}encoder.layers.{i}."
        shapes |= {at + name: shape for name, shape in layer.items()}
    return shapes


def _after(start: str, name: str) -> str:
    """Return what follows `start` in `name`, or nothing where it does not begin so."""
    return name[len(start) :] if name.startswith(start) else ""
