"""How much each token of an answer looked at each patch: attention weights, computed once more.

Kernels never store them, so they are computed from the queries and keys that a tap sees.

Axis letters: A tokens of the answer · S tokens of the sequence · P patches of the picture ·
H query heads · K key/value heads · d width of a head.
"""

from __future__ import annotations

import re

import numpy as np

from npvlm.answers.reading import answer_rows
from npvlm.config import TextConfig
from npvlm.model.cache import Rows
from npvlm.model.ops import Index, soft_cap, softmax
from npvlm.model.weights import Array

_STAGE = re.compile(r"language_model\.model\.layers\.(\d+)\.self_attn\.([qk])_rope")


def attention_weights(
    q: Array, k: Array, first: Index, last: Index, scale: float, cap: float | None
) -> Array:
    """The weights by which `ops.attend` mixes the values of one sequence that begins at row 0.

    q [A, H, d], k [S, K, d], first [A], last [A] -> [H, A, S]
    """
    (H, K), at = (q.shape[1], k.shape[1]), np.arange(len(k))
    keys = np.repeat(k, H // K, axis=1).transpose(1, 2, 0)  # [H, d, S]
    scores = q.transpose(1, 0, 2) @ keys * scale  # [H, A, S]
    if cap is not None:
        scores = soft_cap(scores, cap)
    visible = (first[:, None] <= at) & (at < last[:, None])  # [A, S]
    return softmax(np.where(visible, scores, -np.inf))


class AttentionTap:
    """A tap that keeps how the tokens of an answer look at the picture, layer by layer.

    It is for one run of `read_answer`, where the picture stands in the first rows.
    """

    def __init__(self, config: TextConfig, prompt: int, answer: int, patches: int) -> None:
        self._config, self._patches = config, patches
        self._rows, self._wanted = answer_rows(prompt, answer)
        self._queries: Array
        self.layers: dict[int, Array] = {}  # [H, A, P] of each layer that sees all of the picture

    def __call__(self, name: str, value: Array) -> Array:
        """Take the queries as they pass, and weigh the keys that pass after them."""
        if found := _STAGE.fullmatch(name):
            layer, what = int(found[1]), found[2]
            if what == "q":
                # The last layer asks for the wanted rows alone.
                few = len(value) == len(self._wanted)
                self._queries = value if few else value[self._wanted]
            elif (seen := self._seen(layer)).first.max() == 0:
                self.layers[layer] = self._weigh(value, seen)
        return value

    def mean(self) -> Array:
        """The mean over all heads of all layers that see the whole picture [A, P].

        A sliding layer whose window ends inside the picture says where the window is, not where
        the model looks.
        """
        return np.mean([weights.mean(0) for weights in self.layers.values()], axis=0)

    def _seen(self, layer: int) -> Rows:
        """What the wanted tokens see in a layer."""
        sliding = self._config.layer_types[layer] == "sliding_attention"
        window = self._config.sliding_window if sliding else None
        return self._rows.sliding(window).at(self._wanted)

    def _weigh(self, keys: Array, seen: Rows) -> Array:
        """The weights over the picture [H, A, P]."""
        scale, cap = self._config.attention_scale, self._config.attn_logit_softcapping
        weights = attention_weights(self._queries, keys, seen.first, seen.last, scale, cap)
        return weights[..., : self._patches]
