"""LoRA adapters as PEFT saves them: what is in a folder, and how it changes a model's weights.

A file may spell the modules as any release of transformers does. Every tensor in it is used, or
refused by name: an adapter that is applied in part answers wrongly without a word.

Axis letters: O out features · I in features · r rank · V rows and D width of a table · C channels ·
p side of a square.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npvlm.config import Fields, Values, read_json
from npvlm.errors import NpvlmError
from npvlm.files.checkpoint import INDEX, SINGLE, Stored, grouped, listed, read_header
from npvlm.files.names import EMBED_TOKENS, LM_HEAD, PROJECTION, canonical_name
from npvlm.files.packed import blocks_of
from npvlm.model.weights import Adapted, Weight, unpack

SETTINGS = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_LOW_RANK = re.compile(rf"(.+)\.({'|'.join(_PARTS)})((?:\.[^.]+)*)")
_LEAST_RANK = 16  # a vector of float32: kernels fill up what is narrower, at every call
_KINDS = 12  # tensors named in a message

# Ways to begin that leave the base model as it is; others subtract from it what they put in the
# adapter, which is then right only beside a changed base.
_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
# Settings that training needs and applying does not. Every other one must be off.
_OF_TRAINING = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
}
_READ = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "ensure_weight_tying",
}


@dataclass(frozen=True, eq=False)
class Correction:
    """What is beside one weight: scale * up @ down, and with DoRA the lengths of the rows of both.

    module : as the file spells it
    up [O, r], down [r, I], magnitude [O] or none; shape: of the weight
    """

    module: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    up: NDArray[np.float32]
    down: NDArray[np.float32]
    magnitude: NDArray[np.float32] | None

    @property
    def numbers(self) -> int:
        """How many numbers were trained."""
        factors = self.rank * (math.prod(self.shape[1:]) + self.shape[0])
        return factors + (0 if self.magnitude is None else len(self.magnitude))


@dataclass(frozen=True, eq=False)
class Adapter:
    """An opened adapter; tensors are named as in published checkpoints.

    base : the model that it says it was made for, or ""
    corrections : by the weight that they are beside
    trained : weights that take the place of the model's
    base_layers : weights of the model that were saved with it: they take the place of both tables
        where these are one
    keeps_tied : whether tables that are one shall stay so
    """

    folder: Path
    base: str
    corrections: dict[str, Correction]
    trained: dict[str, Stored]
    base_layers: dict[str, Stored]
    keeps_tied: bool

    def other_base(self, model: str, folder: Path) -> str | None:
        """What to say where the adapter names another base than this model; else None."""
        if not self.base or same_name(self.base, model, folder):
            return None
        return f"{self.folder} was made for {self.base}; it is right if {model} is the same."

    def replace(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The model's weights with those in their place that were trained as a whole.

        Raises
        ------
        NpvlmError
            Where a tensor of the adapter is none of this model's, or of another shape.
        """
        _check_fit(self, weights)
        found = dict(weights)
        for name, stored in self.base_layers.items():
            place = name if name in weights else EMBED_TOKENS
            if not _same_numbers(stored.weight(), weights[place]):
                found[place] = stored.weight()
        if EMBED_TOKENS in self.trained and LM_HEAD not in found:
            found[LM_HEAD] = found[EMBED_TOKENS]  # tied to the table as it was
        return found | {name: stored.weight() for name, stored in self.trained.items()}

    def correct(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """Weights at their precision, as `replace` gave them, with the corrections beside them."""
        found = dict(weights)
        if LM_HEAD not in found and {EMBED_TOKENS, LM_HEAD} & self.corrections.keys():
            found[LM_HEAD] = found[EMBED_TOKENS]  # of tied tables one is corrected, not the other
        return found | {name: _beside(found[name], c, self) for name, c in self.corrections.items()}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / SETTINGS).is_file() and not any(
        (folder / name).exists() for name in (SINGLE, INDEX)
    )


def open_adapter(folder: Path) -> Adapter:
    """Read a folder that PEFT has saved: its settings, and all of its tensors.

    Raises
    ------
    NpvlmError
        In one sentence: what is missing, damaged or of a kind that npvlm does not know.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise NpvlmError(f"{folder} is {found}, expected a folder with {SETTINGS} and {TENSORS}.")
    if not (folder / SETTINGS).is_file():
        if (folder / "config.json").is_file():
            what = "is a model"
        elif (folder / TENSORS).is_file():
            what = f"has no {SETTINGS}"
        else:
            what = "is no adapter"
        raise NpvlmError(f"{folder} {what}, expected a folder with {SETTINGS} and {TENSORS}.")
    values = read_json(folder / SETTINGS)
    _check_settings(values, folder)
    if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
        raise NpvlmError(
            f"{folder} has its weights in {PICKLE}, a pickle, which may run any code when it is "
            f"opened; expected {TENSORS}: save the adapter again with a PEFT of today."
        )
    if not (folder / TENSORS).exists():
        raise NpvlmError(f"{folder} has no {TENSORS}; copy it from where the adapter was made.")
    settings = _Settings(values, f"{folder / SETTINGS}: ")
    parts: dict[str, dict[str, Stored]] = {}
    trained: dict[str, Stored] = {}
    base_layers: dict[str, Stored] = {}
    owns: set[str] = set()  # names of adapters
    for tensor in read_header(folder / TENSORS):
        if ".original_module." in tensor.name:  # as it was before training: nothing reads it
            continue
        _check_numbers(tensor)
        if place := _low_rank(tensor):
            module, key, own = place
            where = parts.setdefault(module, {})
            owns.add(own)
        else:
            where, key = _whole(tensor.name, trained, base_layers, settings)
        if key in where and not _are_equal(where[key], tensor):
            raise NpvlmError(
                f"{tensor.file}: {where[key].name} and {tensor.name} are the same tensor; save one "
                "adapter alone."
            )
        where[key] = tensor
    if len(owns) > 1:
        names = listed(sorted(repr(own) for own in owns))
        raise NpvlmError(f"{folder / TENSORS} holds the adapters {names}; save one alone.")
    if not parts and not trained and not base_layers:
        raise NpvlmError(f"{folder / TENSORS} holds no tensor; save the adapter again.")
    corrections: dict[str, Correction] = {}
    for module, factors in parts.items():
        name = canonical_name(f"{module}.weight")
        if name in corrections:
            raise NpvlmError(
                f"{folder / TENSORS}: {module} and {corrections[name].module} are the same module; "
                "save one adapter alone."
            )
        corrections[name] = _correction(module, factors, settings, folder / TENSORS)
    base = values.get("base_model_name_or_path")
    named, keeps_tied = base if isinstance(base, str) else "", settings.keeps_tied
    return Adapter(folder, named, corrections, trained, base_layers, keeps_tied)


def same_name(base: str, model: str, folder: Path) -> bool:
    """Whether a base, as an adapter names it, may be this model: by the last part of its name."""

    def last(name: str) -> str:
        return re.split(r"[/\\]|--", name.rstrip("/\\").partition("@")[0])[-1].lower()

    return last(base) in {last(model), *(last(part) for part in folder.resolve().parts)}


class _Settings:
    """How much a correction counts: what the settings say of a module's rank and alpha."""

    def __init__(self, values: Values, where: str) -> None:
        fields = Fields(values, where, {"r": 8})
        self.where = where
        self.rslora, self.dora = fields.flag("use_rslora", False), fields.flag("use_dora", False)
        self.keeps_tied = fields.flag("ensure_weight_tying", False)
        self._rank, self._alpha = fields.whole("r"), _number(values.get("lora_alpha", 8), where)
        self._ranks = fields.part("rank_pattern", {})
        self._alphas = fields.part("alpha_pattern", {})
        saved = fields.get("modules_to_save")
        self._saved = [str(module) for module in saved] if isinstance(saved, list) else []

    def is_saved(self, module: str) -> bool:
        """Whether a module was trained as a whole."""
        return any(module.endswith(saved) for saved in self._saved)

    def rank(self, module: str) -> Any:
        """The rank that a module is said to have."""
        return self._of(self._ranks, module, self._rank)

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's two factors is multiplied by."""
        alpha = _number(self._of(self._alphas, module, self._alpha), f"{self.where}alpha_pattern ")
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _of(self, patterns: Values, module: str, default: Any) -> Any:
        """The first pattern counts that fits the end of a module's name, as the file spells it.

        So it was called in training, where a pattern in another spelling did nothing.
        """
        for pattern, value in patterns.items():
            try:
                fits = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise NpvlmError(f"{self.where}{pattern!r} is no pattern ({error}).") from None
            if fits.match(module):
                return value
        return default


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e30:
        raise NpvlmError(f"{where}lora_alpha is {value!r:.60}, expected a number up to 1e30.")
    return float(value)


def _check_settings(values: Values, folder: Path) -> None:
    """Refuse other kinds of adapters, and settings that would change what is computed."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise NpvlmError(
            f"{folder} is an adapter of type {kind!r}, expected LORA; npvlm applies no other."
        )
    begin = values.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower() not in _BEGINNINGS:
        raise NpvlmError(
            f"{folder} began as {begin!r}, which changes the base model too; save it again as a "
            "plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)."
        )
    on = [name for name in values.keys() - _OF_TRAINING - _READ if values[name]]
    if on:
        raise NpvlmError(
            f"{folder / SETTINGS} sets {listed(sorted(on))}, which npvlm does not know; expected a "
            "plain LoRA (merge it with PEFT, and convert the merged model)."
        )


def _check_numbers(tensor: Stored) -> None:
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise NpvlmError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype}, expected F32, F16 or BF16."
        )
    weight = tensor.weight()
    blocks = blocks_of(weight) if tensor.shape and tensor.nbytes else ()
    if not all(np.isfinite(unpack(weight[rows], np.float32)).all() for rows in blocks):
        raise NpvlmError(
            f"{tensor.file}: {tensor.name} holds inf or nan, expected numbers; copy the adapter "
            "again, or take an earlier one of its training."
        )


def _same_numbers(w: Weight, other: Weight) -> bool:
    """Whether a saved table is the model's: in other bytes perhaps, which need twice the room."""
    return all(
        np.array_equal(unpack(w[rows], np.float32), unpack(other[rows], np.float32))
        for rows in blocks_of(w)
    )


def _are_equal(first: Stored, second: Stored) -> bool:
    """Whether a tensor is there twice, as PEFT saves the bias of a whole module."""
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    return same and np.array_equal(first.array(), second.array())


def _bare(name: str) -> str:
    """A name without what PEFT puts in front of it."""
    while name.startswith(_PREFIX):
        name = name.removeprefix(_PREFIX)
    return name


def _low_rank(tensor: Stored) -> tuple[str, str, str] | None:
    """The module and the part of a tensor that corrects, and the name of its adapter, or ""."""
    found = _LOW_RANK.fullmatch(tensor.name)
    if not found:
        return None
    module, part, end = found[1], found[2], found[3].removesuffix(".weight")
    if end.endswith(".bias"):
        raise NpvlmError(
            f"{tensor.file}: {tensor.name} is a bias inside a LoRA (lora_bias), which npvlm does "
            "not apply; merge it with PEFT, and convert the merged model."
        )
    return (_bare(module), part, end.removeprefix(".")) if end.count(".") <= 1 else None


def _whole(
    name: str,
    trained: dict[str, Stored],
    base_layers: dict[str, Stored],
    settings: _Settings,
) -> tuple[dict[str, Stored], str]:
    """Where a tensor belongs that takes the place of a model's, and its published name."""
    bare = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", _bare(name))
    plain = bare.replace(".base_layer.", ".")
    is_table = canonical_name(plain) in (EMBED_TOKENS, LM_HEAD)
    is_base = plain != bare or not settings.is_saved(plain.removesuffix(".weight"))
    return base_layers if is_table and is_base else trained, canonical_name(plain)


def _correction(
    module: str, parts: dict[str, Stored], settings: _Settings, file: Path
) -> Correction:
    """Put the factors of a module together, those of a table turned as a weight's lie."""
    is_table = any(part.startswith("lora_embedding") for part in parts)
    names = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A", "lora_B")
    missing = [name for name in names if name not in parts]
    if missing:
        there = next(iter(parts.values())).name
        raise NpvlmError(f"{file}: {there} has no {missing[0]} beside it; save the adapter again.")
    first, second = (parts.pop(name) for name in names)
    magnitude = parts.pop("lora_magnitude_vector", None)
    if parts:
        raise NpvlmError(f"{file}: {next(iter(parts.values())).name} has no place in a LoRA.")
    down, up = (unpack(tensor.weight(), np.float32) for tensor in (first, second))
    sizes = f"{list(down.shape)} and {list(up.shape)}"
    if is_table:
        down, up = up.T, down.T
    rank, last = (down.shape[0], up.shape[1]) if down.ndim in (2, 4) and up.ndim > 1 else (0, 1)
    if rank != last or rank == 0 or up.size != len(up) * rank:
        raise NpvlmError(f"{file}: {first.name} and what is beside it are {sizes}, of no one rank.")
    if settings.rank(module) != rank:
        raise NpvlmError(
            f"{file}: {first.name} is of rank {rank}, but {SETTINGS} says "
            f"{settings.rank(module)!r}, by which it is scaled; do the two belong together?"
        )
    return Correction(
        module=module,
        shape=(len(up), *down.shape[1:]),
        rank=rank,
        scale=settings.scale(module, rank),
        up=_filled(up.reshape(len(up), rank).T).T,  # in memory as kernels read it, by rank
        down=_filled(down.reshape(rank, -1)),
        magnitude=_lengths(magnitude, up, settings, first, file),
    )


def _filled(factor: NDArray[np.float32]) -> NDArray[np.float32]:
    """A factor with zeros up to the rank that kernels read at once: they add nothing."""
    room = (0, max(0, _LEAST_RANK - len(factor)))
    return np.ascontiguousarray(np.pad(factor, (room, (0, 0))))


def _lengths(
    tensor: Stored | None, up: NDArray[Any], settings: _Settings, first: Stored, file: Path
) -> NDArray[np.float32] | None:
    """The lengths that DoRA gives to the rows of a matrix."""
    if (tensor is not None) != settings.dora:
        found = "a" if tensor is not None else "no"
        said = "true" if settings.dora else "false"
        raise NpvlmError(
            f"{file}: {first.name} has {found} lora_magnitude_vector beside it, but use_dora is "
            f"{said} in {SETTINGS}; do the two belong together?"
        )
    if tensor is None:
        return None
    if up.ndim != 2 or "lora_embedding" in first.name:
        raise NpvlmError(f"{file}: {tensor.name} is of a table or a convolution, expected a layer.")
    values: NDArray[np.float32] = unpack(tensor.weight(), np.float32)
    if values.size != len(up):
        raise NpvlmError(f"{file}: {tensor.name} is {list(values.shape)}, expected [{len(up)}].")
    return values.reshape(-1)


def _check_fit(adapter: Adapter, weights: Mapping[str, Weight]) -> None:
    """Hold what the adapter changes against the weights that there are, in one message."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    tied = LM_HEAD not in shapes
    if EMBED_TOKENS in shapes and f"{PROJECTION}.weight" not in shapes:  # a ColPali has no head
        shapes.setdefault(LM_HEAD, shapes[EMBED_TOKENS])
    wanted = [(name, c.module, c.shape) for name, c in adapter.corrections.items()]
    for tensors in (adapter.trained, adapter.base_layers):
        wanted += [(name, tensor.name, tensor.shape) for name, tensor in tensors.items()]
    unknown = {_bare(spelled): "" for name, spelled, _ in wanted if name not in shapes}
    misshapen = {
        _bare(spelled): f" is for {list(shape)}, which is {list(shapes[name])} here"
        for name, spelled, shape in wanted
        if name in shapes and shape != shapes[name]
    }
    faults = [
        f"{len(names)} {kind} ({listed(grouped(names), _KINDS)})"
        for kind, names in (("of another shape", misshapen), ("that it does not have", unknown))
        if names
    ]
    if faults:
        made = f"; it was made for {adapter.base}" if adapter.base else ""
        raise NpvlmError(
            f"{adapter.folder} does not fit the model: it changes modules, {' and '.join(faults)}"
            f"{made}: name that model."
        )
    tables = {EMBED_TOKENS, LM_HEAD} & (adapter.corrections.keys() | adapter.trained.keys())
    if tied and tables and adapter.keeps_tied:
        raise NpvlmError(
            f"{adapter.folder} changes tables that stay tied (ensure_weight_tying), which npvlm "
            "does not apply; merge it with PEFT, and convert the merged model."
        )


def _beside(weight: Weight, c: Correction, adapter: Adapter) -> Adapted:
    """A weight with its correction; the lengths of DoRA take a look at every row."""
    assert not isinstance(weight, Adapted)
    adapted = Adapted(weight, c.down, c.up, c.scale)
    if c.magnitude is None:
        return adapted
    lengths = [np.linalg.norm(adapted[rows].unpack(), axis=1) for rows in blocks_of(adapted)]
    with np.errstate(all="ignore"):
        gain = c.magnitude / np.concatenate(lengths)
    if not np.isfinite(gain).all():
        raise NpvlmError(
            f"{adapter.folder}: a row of {c.module} has no length, which DoRA divides by."
        )
    return Adapted(weight, c.down, c.up, c.scale, gain)
