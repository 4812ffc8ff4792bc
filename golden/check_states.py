"""Hold npvlm's features, hidden states and attention against those of transformers.

`check.py` runs it on its checkpoints.
"""

from __future__ import annotations

import numpy as np
from transformers import PaliGemmaForConditionalGeneration

from golden import oracle, ours
from golden.oracle import Case
from npvlm.api import Model


def compare(
    name: str,
    models: tuple[Model, ...],
    float32: PaliGemmaForConditionalGeneration,
    float64: PaliGemmaForConditionalGeneration,
    cases: list[Case],
) -> list[str]:
    """Every layer of every prompt, and the picture before and after the projector; differences."""
    differences = []
    for number, case in enumerate(cases):
        torchs = oracle.insides(float32, case.pixels, case.ids)
        with oracle.lifted():
            truth = oracle.insides(float64, case.pixels, case.ids)
        for model in models:
            layers = range(model.config.text_config.num_hidden_layers + 1)
            seen = [model.features(picture) for picture in case.pictures]
            towers = [model.features(picture, projected=False) for picture in case.pictures]
            found = {
                "features": np.stack(seen),
                "tower": np.stack(towers),
                "hidden states": model.hidden_states(case.pictures, case.prompt, layers),
                "attention": model.attention(case.pictures, case.prompt, layers[:-1]),
            }
            for what, value in found.items():
                # Layer by layer: the last is of another size than the others.
                pairs = zip(value, truth[what], torchs[what], strict=True)
                for layer, (own, true, theirs) in enumerate(pairs):
                    error, limit = ours.rms(own - true), ours.limit_float32(ours.rms(theirs - true))
                    if not error <= limit:
                        where = f"{name}, prompt {number}, {what} {layer}"
                        differences.append(f"{where}: off by {error:.1e}, limit {limit:.1e}")
    return differences
