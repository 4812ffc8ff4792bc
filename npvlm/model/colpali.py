"""ColPali: a PaliGemma that writes nothing; its last hidden states become vectors to find pages by.

Axis letters: T tokens of a sequence · M image tokens among them · D hidden_size of the decoder ·
E width of the vectors.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from npvlm.config import Config
from npvlm.model import gemma, paligemma
from npvlm.model.cache import Rows, new_cache
from npvlm.model.ops import Index
from npvlm.model.tap import Tap, within
from npvlm.model.weights import Array, Weights


def vectors(
    ids: Index, features: Array, w: Weights, config: Config, *, ops: ModuleType, tap: Tap
) -> Array:
    """Read a page or a query, and point to what each of its tokens has become: a unit vector each.

    A page is a picture and one sentence that is the same for all; a query is text alone, and
    `features` is empty then. Either is all prefix: its tokens see each other, both ways.

    ids [T], features [M, D] -> [T, E]
    Source: ColPali, arXiv 2407.01449.
    """
    x = paligemma.embed(ids, features, w, config, ops=ops, tap=tap)
    text, T = w.scope("language_model"), len(ids)
    cache, rows = new_cache(config.text_config, T, x.dtype), Rows.of(0, T, range(T))
    hidden = gemma.hidden_states(
        x, text, config.text_config, cache, rows, np.arange(T),
        ops=ops, tap=within(tap, "language_model.model"),
    )  # fmt: skip
    return tap("embeddings", ops.unit(project(hidden, w, ops=ops, tap=tap)))


def project(hidden: Array, w: Weights, *, ops: ModuleType, tap: Tap) -> Array:
    """Narrow the decoder's last states to the vectors' width: one linear layer, with a bias.

    hidden [T, D] -> [T, E]
    """
    layer = w.scope("embedding_proj_layer")
    return tap("embedding_proj_layer", ops.linear(hidden, layer["weight"], layer["bias"]))
