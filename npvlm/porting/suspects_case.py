"""What a suspect works with: one stage that a port has wrong, and what went into it.

Axis letters: T tokens · P patches of a picture · D hidden_size of the decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from npvlm.api import Model
from npvlm.config import Config
from npvlm.files.names import expected_shapes
from npvlm.files.pictures import Preprocessor
from npvlm.model import ops
from npvlm.model.cache import Rows
from npvlm.model.ops import Index
from npvlm.model.weights import Array, Weight, Weights
from npvlm.porting.altered import altered
from npvlm.porting.dumps import Dump
from npvlm.porting.kinds import plain
from npvlm.porting.replay import part_of, parts, replay
from npvlm.porting.stages import PICTURE, TEXT, TOWER, chosen, stages
from npvlm.porting.statistics import rms
from npvlm.porting.trace import Inputs, run

# A mistake may make rounding worse, such as scores that are not scaled: 4 times what is the same.
SLACK = 32.0
FAR = 12  # parts of the model that are run for one guess at most
BICUBIC = 3  # as Pillow numbers its filters
INPUTS = tuple(name for name, _, _ in PICTURE)

_LAYER = re.compile(r"(.*\.layers)\.(\d+)(?:\.(.*))?$")


@dataclass(frozen=True)
class Context:
    """What is known of a comparison.

    truth : the reference; a compact one holds no arrays
    config : of the model
    model : the reference's, or None
    values : the port's arrays, in the reference's layout
    floor : the relative error that the precision cannot avoid at the stage
    """

    truth: Dump
    config: Config
    model: Model | None
    values: Mapping[str, Array]
    floor: float

    def reference(self, name: str) -> Array | None:
        """The reference's value of a stage, where it has arrays; ids are in its manifest, too."""
        if name in self.truth.dtypes:
            return plain(self.truth.read(name))
        ids = (self.truth.manifest or {}).get("ids")
        return np.array(ids, np.int64) if name == "input_ids" and ids and not self.step else None

    @property
    def step(self) -> int:
        """Which call the reference shows: 0 is the prefill."""
        return int((self.truth.manifest or {}).get("step", 0))

    @property
    def preprocessor(self) -> Preprocessor:
        """How pictures are prepared; without the model as every published one has it."""
        if self.model is not None:
            return self.model.preprocessor
        half, side = (0.5, 0.5, 0.5), self.config.vision_config.image_size
        return Preprocessor(side, side, half, half, 1 / 255, BICUBIC)


@dataclass(frozen=True, eq=False)
class Case:
    """A stage to be explained, and the ways to compute it.

    given : the values that are gone on with, all of stages before it
    between : it and the stages before it that the port does not show: where a mistake can be
    base : operations that stand in for the definitions
    """

    stage: str
    mine: Array
    context: Context
    given: Mapping[str, Array]
    between: tuple[str, ...]
    weights: Weights
    base: Mapping[str, Any]

    @property
    def config(self) -> Config:
        return self.context.config

    @property
    def patches(self) -> int:
        return self.config.vision_config.num_patches

    @cached_property
    def ops(self) -> ModuleType:
        """The operations as they should be."""
        return altered(**self.base)

    @cached_property
    def right(self) -> dict[str, Array]:
        """What the reference makes of the same input, stage by stage."""
        return self.stages()

    @property
    def tokens(self) -> int:
        """Tokens of the call; 0 where nothing says how many there are."""
        if self.context.step:
            return 1
        found = self.given.get("input_ids", self.context.reference("input_ids"))
        return len(found) if found is not None else 0

    @property
    def rows(self) -> Rows | None:
        """Where the tokens stand; of a later step's cache nothing is known but the token itself."""
        if not self.context.step:
            return None if not self.tokens else Rows.of(0, self.tokens, range(self.tokens))
        place = self.given.get("positions", self.context.reference("positions"))
        none = np.zeros(1, np.int64)
        return None if place is None else Rows(place, none, none, none, none + 1, none > 0)

    @property
    def layer(self) -> tuple[str, int] | None:
        """The module that holds the layers, and the number of the stage's own."""
        found = _LAYER.match(self.stage)
        return (found[1], int(found[2])) if found else None

    @property
    def start(self) -> str:
        """The stage that the layer reads, or the end of the model."""
        ends = f"{TEXT}.layers", self.config.text_config.num_hidden_layers
        module, i = self.layer or ends
        first = f"{TOWER}.embeddings" if module.startswith(TOWER) else "inputs_embeds"
        return f"{module}.{i - 1}" if i else first

    def concerns(self, globs: tuple[str, ...]) -> bool:
        """Whether a mistake at such stages could show here first."""
        return any(chosen(name, ",".join(globs)) for name in self.between)

    def inside(self, name: str) -> Array | None:
        """The value of another stage of the same layer, as it is on the way to this one."""
        module, i = self.layer or ("", 0)
        full = f"{module}.{i}.{name}"
        return self.given.get(full, self.right.get(full))

    def run(
        self,
        *,
        config: Config | None = None,
        weights: Mapping[str, Weight] | None = None,
        rows: Rows | None = None,
        given: Mapping[str, Array] | None = None,
        **replaced: Callable[..., Array],
    ) -> Array | None:
        """The stage with another config, other weights, rows, inputs or operations."""
        found = self.stages(config=config, weights=weights, rows=rows, given=given, **replaced)
        return found.get(self.stage)

    def stages(
        self,
        *,
        config: Config | None = None,
        weights: Mapping[str, Weight] | None = None,
        rows: Rows | None = None,
        given: Mapping[str, Array] | None = None,
        **replaced: Callable[..., Array],
    ) -> dict[str, Array]:
        """Every stage on the way, computed likewise."""
        alone = self.context.step and self.stage.startswith("language_model")
        if self.stage in INPUTS or (alone and self.start not in self.given):
            return {}  # the token of a later step cannot be made from the prompt
        w = Weights({**self.weights, **weights}) if weights else self.weights
        values = {**self.given, **(given or {})}
        namespace = altered(**{**self.base, **replaced})
        with np.errstate(all="ignore"):  # some mistakes overflow
            where = rows or self.rows
            return replay(values, w, config or self.config, self.stage, where, ops=namespace)

    def without_norms(self, *names: str) -> Callable[..., Array]:
        """Either kind of norm, but for those that have these weights: they let all through."""
        left_out = [self.weights[name] for name in names]

        def norm(x: Array, weight: Weight, *rest: Any) -> Array:
            if any(weight is w for w in left_out):
                return x
            kind = self.ops.layer_norm if len(rest) == 2 else self.ops.rms_norm
            y: Array = kind(x, weight, *rest)
            return y

        return norm

    def whole_run(self, config: Config) -> Array | None:
        """The stage at a later step, from the picture on, with another config."""
        model, truth = self.context.model, self.context
        pixels, ids = truth.reference("pixel_values"), truth.reference("input_ids")
        if model is None or pixels is None or ids is None or truth.truth.manifest is None:
            return None
        found: dict[str, Array] = {}

        def keep(name: str, value: Array) -> Array:
            if name == self.stage:
                found[name] = value.copy()
            return value

        inputs = Inputs(pixels, pixels, pixels, ids, truth.truth.manifest["answer"])
        run(inputs, model.weights, config, ops=ops, tap=keep)
        return found.get(self.stage)


# What it is in particular, and what the stage would hold; None where that cannot be computed.
Guess = tuple[str, Array | None]


@dataclass(frozen=True)
class Suspect:
    """A known mistake.

    globs : the stages at which it shows first
    sentence : what the port does, and what is right
    guesses : what the stage of a case would be, in each form the mistake takes
    tolerance : relative, where two programs that make the same mistake still differ
    """

    id: str
    globs: tuple[str, ...]
    sentence: str
    guesses: Callable[[Case], Iterator[Guess]]
    tolerance: float = 0.0


def cases(stage: str, mine: Array, context: Context) -> Iterator[Case]:
    """The ways to look at a stage: from its layer's input, or from further back.

    Where the port does not show that input, it may be that of the reference, or what the port's
    last value before it leads to.

    Without the model's weights only what needs none can be tried, or those that the stage itself
    tells of, from the values right before it.
    """
    names = [one.name for one in stages(context.config)]
    before = names[: names.index(stage)]
    own = {name: plain(context.values[name]) for name in before if name in context.values}
    if stage in INPUTS or context.model is None:
        others = {name: context.reference(name) for name in before if name not in own}
        given = own | {name: value for name, value in others.items() if value is not None}
        unknown, base = _unknown(context)
        case = Case(stage, mine, context, given, (stage,), unknown, base)
        yield replace(case, weights=Weights({**unknown, **_told_weights(case)}))
        return
    w = context.model.weights
    chain = parts(w, context.config, ops=ops)
    last = [part.name for part in chain].index(part_of(stage))
    starts = [chain[last].reads]
    if context.step == 0:  # a later step starts from a cache, which no stage shows
        starts += [("multi_modal_projector", "input_ids"), ("pixel_values", "input_ids")]
    tried: set[tuple[str, ...]] = set()
    for wanted in starts:
        others = {name: context.reference(name) for name in wanted if name not in own}
        given = own | {name: value for name, value in others.items() if value is not None}
        ready = [i for i in range(last + 1) if all(name in given for name in chain[i].reads)]
        passed = tuple(part.name for part in chain[max(ready, default=last) : last + 1])
        if ready and len(passed) <= FAR and passed not in tried:
            tried.add(passed)
            hidden = [name for name in before if name not in own]
            between = [name for name in hidden if _maker(name, stage) in passed]
            yield Case(stage, mine, context, given, (*between, stage), w, {})


def _maker(name: str, stage: str) -> str:
    """The part in which a mistake at one stage would first act on another."""
    if name == "positions":
        return part_of(stage) if stage.startswith(TEXT) else ""
    if name in INPUTS:
        return "merge" if name == "input_ids" else "start"
    return part_of(name)


def relative_error(mine: Array, value: Array) -> float:
    """Root mean square of the difference, over that of the value; the shapes may differ."""
    a, b = (x.astype(np.float64).reshape(-1) for x in (mine, value))
    size = rms(b)
    return rms(a - b) / size if size else (math.inf if a.any() else 0.0)


def _unknown(context: Context) -> tuple[Weights, dict[str, Any]]:
    """Weights that nobody has, and operations that make nothing of them.

    Text rows are known all the same, from the reference's inputs_embeds.
    """
    text = context.config.text_config
    shapes = expected_shapes(context.config)
    weights = Weights({n: np.broadcast_to(np.float32(np.nan), s) for n, s in shapes.items()})
    rows = context.reference("inputs_embeds")

    def linear(x: Array, w: Weight, bias: Weight | None = None) -> Array:
        return np.full((len(x), len(w)), np.nan, np.float32)

    def embed(ids: Index, table: Weight, scale: float, dtype: DTypeLike) -> Array:
        if rows is None or len(rows) != len(ids):
            return np.full((len(ids), text.hidden_size), np.nan, dtype)
        return (rows * (scale / math.sqrt(text.hidden_size))).astype(dtype)

    return weights, {"linear": linear, "embed": embed}


def _told_weights(c: Case) -> dict[str, Weight]:
    """Weights that a stage of the reference tells of: those of a norm, or the learned positions.

    A norm acts on each column alone, so a line through what it reads and gives has its weights.
    """
    y = c.context.reference(c.stage)
    patches = c.given.get(f"{TOWER}.embeddings.patch_embedding")
    if y is None:
        return {}
    if c.stage == f"{TOWER}.embeddings" and patches is not None:
        return {f"{c.stage}.position_embedding.weight": (y - patches)[0]}
    unknown, read = c.weights.get(f"{c.stage}.weight"), list[Array]()

    def norm(x: Array, weight: Weight, *rest: Any) -> Array:
        width, eps = x.shape[-1], rest[-1]
        none, one = np.zeros(width, x.dtype), np.ones(width, x.dtype)
        in_tower = len(rest) == 2
        y: Array = c.ops.layer_norm(x, one, none, eps) if in_tower else c.ops.rms_norm(x, none, eps)
        if weight is unknown:
            read.append(y)
        return y

    c.run(rms_norm=norm, layer_norm=norm)
    if not read or not np.isfinite(read[0]).all():
        return {}
    x, y = (a.astype(np.float64).reshape(-1, a.shape[-1]) for a in (read[0], y))
    with np.errstate(all="ignore"):  # a column of zeros tells nothing
        if not c.stage.startswith(TOWER):
            return {f"{c.stage}.weight": ((x * y).sum(0) / (x * x).sum(0) - 1).astype(np.float32)}
        centred = x - x.mean(0)
        gain = (centred * y).sum(0) / (centred * centred).sum(0)
        told = {"weight": gain, "bias": y.mean(0) - gain * x.mean(0)}
    return {f"{c.stage}.{name}": value.astype(np.float32) for name, value in told.items()}
