"""Any part of a model on somebody else's numbers: what a stage should be, given what went into it.

The model runs as ever, but at each stage whose value is given, it goes on with that one. So each
stage shows what the reference makes of the port's own input, and an early mistake is not blamed on
what comes after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from npvlm.config import Config
from npvlm.model import gemma, paligemma, siglip
from npvlm.model.cache import Rows, new_cache
from npvlm.model.tap import Tap, within
from npvlm.model.weights import Array, Weights
from npvlm.porting.stages import TEXT, TOWER

Stages = Mapping[str, Array]

_LAYER = re.compile(r"(.*)\.layers\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Part:
    """A piece of the model that can run alone: what it reads, and how to run it."""

    name: str
    reads: tuple[str, ...]
    run: Callable[[Stages, Tap], None]


def parts(w: Weights, config: Config, rows: Rows | None = None, *, ops: ModuleType) -> list[Part]:
    """The model in pieces, in order: each layer is one.

    rows : where the tokens of the prefill stand and what they see; as the model has it by default
    """
    vision, text = config.vision_config, config.text_config
    tower, decoder = w.scope(TOWER), w.scope("language_model")
    inner = w.scope(TEXT)

    def start(values: Stages, tap: Tap) -> None:
        siglip.embed(_pixels(values), tower, ops=ops, tap=within(tap, TOWER))

    def tower_layer(i: int) -> Callable[[Stages, Tap], None]:
        name = f"encoder.layers.{i}"

        def run(values: Stages, tap: Tap) -> None:
            x = values[tower_input(i)]
            x = x.reshape(-1, x.shape[-1])  # [P, D]
            first = np.zeros(len(x), np.int64)
            own = within(tap, f"{TOWER}.{name}")
            last = first + len(x)
            x = siglip.layer(x, tower.scope(name), vision, first, last, ops=ops, tap=own)
            tap(f"{TOWER}.{name}", x)

        return run

    def tower_input(i: int) -> str:
        return f"{TOWER}.encoder.layers.{i - 1}" if i else f"{TOWER}.embeddings"

    def join(values: Stages, tap: Tap) -> None:
        norm, x = tower.scope("post_layernorm"), values[tower_input(vision.num_hidden_layers)]
        x = x.reshape(-1, x.shape[-1])
        x = ops.layer_norm(x, norm["weight"], norm["bias"], vision.layer_norm_eps)
        paligemma.project(tap(f"{TOWER}.post_layernorm", x), w, ops=ops, tap=tap)

    def merge(values: Stages, tap: Tap) -> None:
        features = values["multi_modal_projector"]
        paligemma.embed(values["input_ids"], features, w, config, ops=ops, tap=tap)

    def text_layer(i: int) -> Callable[[Stages, Tap], None]:
        sliding = config.text_config.layer_types[i] == "sliding_attention"
        window = text.sliding_window if sliding else None

        def run(values: Stages, tap: Tap) -> None:
            x, name = values[text_input(i)], f"{TEXT}.layers.{i}"
            T = len(x)
            cache = new_cache(text, T, x.dtype)[i]
            seen = (rows or Rows.of(0, T, range(T))).sliding(window)
            every, own = slice(None), within(tap, name)
            layer = inner.scope(f"layers.{i}")
            tap(name, gemma.layer(x, layer, text, cache, seen, every, ops=ops, tap=own))

        return run

    def text_input(i: int) -> str:
        return f"{TEXT}.layers.{i - 1}" if i else "inputs_embeds"

    def end(values: Stages, tap: Tap) -> None:
        x = values[text_input(text.num_hidden_layers)]
        x = ops.rms_norm(x, inner["norm.weight"], text.rms_norm_eps)
        x = tap(f"{TEXT}.norm", x)
        gemma.logits(x[-1:], decoder, text, ops=ops, tap=within(tap, "language_model"))

    tower_layers = range(vision.num_hidden_layers)
    text_layers = range(text.num_hidden_layers)
    return [
        Part("start", ("pixel_values",), start),
        *(Part(f"tower {i}", (tower_input(i),), tower_layer(i)) for i in tower_layers),
        Part("join", (tower_input(vision.num_hidden_layers),), join),
        Part("merge", ("multi_modal_projector", "input_ids"), merge),
        *(Part(f"text {i}", (text_input(i),), text_layer(i)) for i in text_layers),
        Part("end", (text_input(text.num_hidden_layers),), end),
    ]


def part_of(stage: str) -> str:
    """The name of the part that makes a stage."""
    if found := _LAYER.match(stage):
        return f"{'tower' if found[1].startswith(TOWER) else 'text'} {found[2]}"
    if stage.startswith(f"{TOWER}.embeddings"):
        return "start"
    if stage in (f"{TOWER}.post_layernorm", "multi_modal_projector"):
        return "join"
    return "merge" if stage == "inputs_embeds" else "end"


def replay(
    given: Stages,
    w: Weights,
    config: Config,
    wanted: str | None = None,
    rows: Rows | None = None,
    *,
    ops: ModuleType,
) -> dict[str, Array]:
    """What the reference makes of given values, stage by stage.

    Parameters
    ----------
    given : values of stages, in the reference's layout and in float32; those of whole numbers as
        they are. From each on, the model goes on with it
    wanted : one stage: only what leads from the nearest given values to it is run, and nothing
        behind its own layer; by default every part whose input is there or can be made
    rows : see `parts`

    Returns
    -------
    Each stage that could be computed, as it was before a given value took its place. A stage whose
    inputs are neither given nor to be made is missing.
    """
    chain = parts(w, config, rows, ops=ops)
    if wanted is not None:
        last = [part.name for part in chain].index(part_of(wanted))
        ready = [i for i in range(last + 1) if all(name in given for name in chain[i].reads)]
        chain = chain[max(ready, default=0) : last + 1]
    values, computed = dict(given), dict[str, Array]()

    def substitute(name: str, value: Array) -> Array:
        computed[name] = value
        values[name] = given.get(name, value)
        return values[name]

    for part in chain:
        if all(name in values for name in part.reads):
            part.run(values, substitute)
    return computed


def _pixels(values: Stages) -> Array:
    pixels = values["pixel_values"]
    return pixels.reshape(-1, *pixels.shape[-3:])
