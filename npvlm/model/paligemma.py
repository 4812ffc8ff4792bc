"""PaliGemma: pictures become tokens in front of a prompt, and Gemma goes on from there.

Axis letters: N pictures · P patches of a picture · T tokens in this call · D hidden_size of the
decoder · I hidden_size of the tower · V vocabulary · R picture side.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from npvlm.config import Config
from npvlm.model import gemma, siglip
from npvlm.model.cache import LayerCache, Rows
from npvlm.model.ops import Index
from npvlm.model.tap import Tap, within
from npvlm.model.weights import Array, Weights


def image_features(
    pixel_values: Array, w: Weights, config: Config, *, ops: ModuleType, tap: Tap
) -> Array:
    """See pictures: one vector of the decoder's width for each patch. Needed once per picture.

    pixel_values [N, 3, R, R] -> [N, P, D]
    Source: PaliGemma, arXiv 2407.07726; PaliGemma 2, arXiv 2412.03555.
    """
    tower = "vision_tower.vision_model"
    patches = siglip.patch_features(
        pixel_values, w.scope(tower), config.vision_config, ops=ops, tap=within(tap, tower)
    )
    N, P, D = patches.shape
    return project(patches.reshape(N * P, D), w, ops=ops, tap=tap).reshape(N, P, -1)


def project(patches: Array, w: Weights, *, ops: ModuleType, tap: Tap) -> Array:
    """Bring what the tower saw to the decoder's width: one linear layer.

    patches [T, I] -> [T, D]
    """
    linear = w.scope("multi_modal_projector.linear")
    return tap("multi_modal_projector", ops.linear(patches, linear["weight"], linear["bias"]))


def embed(
    ids: Index, features: Array, w: Weights, config: Config, *, ops: ModuleType, tap: Tap
) -> Array:
    """Put image features where the image tokens are, and scaled text rows everywhere else.

    The features are not scaled by sqrt(D), the text rows are. Image tokens look up row 0 first, as
    their id may lie behind the end of the table.

    ids [T], features [M, D] -> [T, D]
    """
    is_image = ids == config.image_token_index
    text = w.scope("language_model")
    x = gemma.embed(np.where(is_image, 0, ids), text, config.text_config, features.dtype, ops=ops)
    x[is_image] = features
    return tap("inputs_embeds", x)


def forward(
    x: Array,
    w: Weights,
    config: Config,
    cache: Sequence[LayerCache],
    rows: Rows,
    wanted: Index,
    *,
    ops: ModuleType,
    tap: Tap,
) -> Array:
    """Run the decoder on the tokens of a call and score what comes after the `wanted` ones.

    A prefill wants the last token of each sequence, a decoding step every token.

    x [T, D], wanted [W] -> [W, V]
    """
    text = w.scope("language_model")
    tap = within(tap, "language_model")
    hidden = gemma.hidden_states(
        x, text, config.text_config, cache, rows, wanted, ops=ops, tap=within(tap, "model")
    )
    return gemma.logits(hidden, text, config.text_config, ops=ops, tap=tap)
