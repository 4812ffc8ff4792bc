"""npvlm's side of ColPali's goldens: its own run, and what is compared. Needs no torch.

Axis letters: N pages · R picture side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from npvlm.model import colpali, paligemma
from npvlm.model.tap import closed
from npvlm.model.weights import Array
from npvlm.retrieval import Retriever


def run(
    retriever: Retriever,
    pixels: Array,
    page_ids: Sequence[int],
    query_ids: Sequence[Sequence[int]],
    dtype: DTypeLike,
) -> dict[str, Array]:
    """The vectors of every page and query, and the scores, computed in a type, by name.

    pixels [N, 3, R, R]
    """
    model, ops = retriever.model, retriever.model.ops
    w, config = model.weights, model.config
    features = paligemma.image_features(pixels.astype(dtype), w, config, ops=ops, tap=closed)
    none = np.empty((0, features.shape[-1]), dtype)

    def vectors(ids: Sequence[int], features: Array) -> Array:
        return colpali.vectors(np.array(ids), features, w, config, ops=ops, tap=closed)

    pages = [vectors(page_ids, own) for own in features]
    queries = [vectors(ids, none) for ids in query_ids]
    rows = np.concatenate(pages)
    found = {f"page.{n}": page for n, page in enumerate(pages)}
    found |= {f"query.{n}": query for n, query in enumerate(queries)}
    scores = [ops.max_sim(query, rows, len(page_ids)) for query in queries]
    return found | {"scores": np.stack(scores)}
