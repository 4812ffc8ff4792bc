"""Checkpoints as big_vision writes them, PaliGemma's first form: which arrays, and what becomes.

An .npz of few, large arrays: the layers of a tower are stacked on the first axis, and weights keep
the axes of their einsum. A published tensor is a view of one array whose axes change places.

Axis letters: L layers of the decoder · D its hidden_size · F its intermediate_size · H query heads
· K key/value heads · d head_dim · V rows of the table · B layers of the tower · I its hidden_size ·
E its intermediate_size · h its heads · e their width · P patches · p, q sides of a patch · c
colours · 1 and 2 axes of that many.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.errors import NpvlmError
from npvlm.files.checkpoint import listed
from npvlm.files.deduced import Heads, deduce_config
from npvlm.files.links import refuse_link_out, refuse_links_out
from npvlm.files.masks import FILES as MASKS
from npvlm.files.names import EMBED_TOKENS, POSITIONS
from npvlm.files.npz import Npz
from npvlm.model.weights import Array, BFloat16

TOKENIZERS = ("tokenizer.model", "paligemma_tokenizer.model")  # big_vision says the second

_PARAMS = "params/"
_TABLE = "llm/embedder/input_embedding"
_TYPES = {"<f4": "float32", "<f2": "float16", "|V2": "bfloat16", "<u2": "bfloat16"}
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MOST_LAYERS = 1000
_LISTED = 6


@dataclass(frozen=True)
class _Place:
    """Where a published tensor lies.

    axes : of the array, a letter each; the first of a stack is the layer
    to : the tensor's axes, each of one letter or of several that become one
    half : which of two that share an array
    """

    array: str
    axes: str
    to: str
    half: int | None = None


def _norm(scale: str, axes: str) -> _Place:
    return _Place(scale, axes, axes[-1])


def _tower() -> dict[str, _Place]:
    start, block = "vision_tower.vision_model.", "img/Transformer/encoderblock/"
    attention, mlp = f"{block}MultiHeadDotProductAttention_0/", f"{block}MlpBlock_0/"
    places = {
        f"{start}embeddings.patch_embedding.weight": _Place(
            "img/embedding/kernel", "pqcI", "I c p q"
        ),
        f"{start}embeddings.patch_embedding.bias": _Place("img/embedding/bias", "I", "I"),
        POSITIONS: _Place("img/pos_embedding", "1PI", "P I"),
        f"{start}post_layernorm.weight": _norm("img/Transformer/encoder_norm/scale", "I"),
        f"{start}post_layernorm.bias": _norm("img/Transformer/encoder_norm/bias", "I"),
        "multi_modal_projector.linear.weight": _Place("img/head/kernel", "ID", "D I"),
        "multi_modal_projector.linear.bias": _Place("img/head/bias", "D", "D"),
    }
    at = f"{start}encoder.layers.*."
    for i in (0, 1):
        places[f"{at}layer_norm{i + 1}.weight"] = _norm(f"{block}LayerNorm_{i}/scale", "BI")
        places[f"{at}layer_norm{i + 1}.bias"] = _norm(f"{block}LayerNorm_{i}/bias", "BI")
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        name = f"{at}self_attn.{ours}_proj"
        places[f"{name}.weight"] = _Place(f"{attention}{theirs}/kernel", "BIhe", "he I")
        places[f"{name}.bias"] = _Place(f"{attention}{theirs}/bias", "Bhe", "he")
    places[f"{at}self_attn.out_proj.weight"] = _Place(f"{attention}out/kernel", "BheI", "I he")
    places[f"{at}self_attn.out_proj.bias"] = _Place(f"{attention}out/bias", "BI", "I")
    places[f"{at}mlp.fc1.weight"] = _Place(f"{mlp}Dense_0/kernel", "BIE", "E I")
    places[f"{at}mlp.fc1.bias"] = _Place(f"{mlp}Dense_0/bias", "BE", "E")
    places[f"{at}mlp.fc2.weight"] = _Place(f"{mlp}Dense_1/kernel", "BEI", "I E")
    places[f"{at}mlp.fc2.bias"] = _Place(f"{mlp}Dense_1/bias", "BI", "I")
    return places


def _decoder(gemma2: bool) -> dict[str, _Place]:
    """PaliGemma 1 calls the norm before the MLP what 2 calls the one behind attention."""
    at, layers = "language_model.model.layers.*.", "llm/layers/"
    norms = {
        "input_layernorm": "pre_attention_norm",
        "post_attention_layernorm": "post_attention_norm" if gemma2 else "pre_ffw_norm",
    }
    if gemma2:
        norms["pre_feedforward_layernorm"] = "pre_ffw_norm"
        norms["post_feedforward_layernorm"] = "post_ffw_norm"
    pairs, gates = f"{layers}attn/kv_einsum/w", f"{layers}mlp/gating_einsum"
    return {
        EMBED_TOKENS: _Place(_TABLE, "VD", "V D"),
        "language_model.model.norm.weight": _norm("llm/final_norm/scale", "D"),
        f"{at}self_attn.q_proj.weight": _Place(f"{layers}attn/q_einsum/w", "LHDd", "Hd D"),
        f"{at}self_attn.k_proj.weight": _Place(pairs, "L2KDd", "Kd D", 0),
        f"{at}self_attn.v_proj.weight": _Place(pairs, "L2KDd", "Kd D", 1),
        f"{at}self_attn.o_proj.weight": _Place(f"{layers}attn/attn_vec_einsum/w", "LHdD", "D Hd"),
        f"{at}mlp.gate_proj.weight": _Place(gates, "L2DF", "F D", 0),
        f"{at}mlp.up_proj.weight": _Place(gates, "L2DF", "F D", 1),
        f"{at}mlp.down_proj.weight": _Place(f"{layers}mlp/linear", "LFD", "D F"),
        **{
            f"{at}{ours}.weight": _norm(f"{layers}{theirs}/scale", "LD")
            for ours, theirs in norms.items()
        },
    }


@dataclass(frozen=True, eq=False)
class Turned:
    """A tensor whose rows are put together from a stored array when they are asked for.

    view : the array with its axes in the tensor's order, not yet joined
    shape : of the tensor
    joined : how many axes of the view make the tensor's first
    """

    view: Array
    shape: tuple[int, ...]
    joined: int
    bfloat16: bool

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array | BFloat16:
        """Gather rows, from as few heads as hold them."""
        start, stop, _ = rows.indices(len(self))
        each = math.prod(self.view.shape[1 : self.joined])
        first, last = start // each, -(-stop // each)
        block = self.view[first:last].reshape(-1, *self.shape[1:])
        block = block[start - first * each : stop - first * each]
        return BFloat16(block) if self.bfloat16 else block

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.view.nbytes

    def whole(self) -> Array | BFloat16:
        """Put all rows together, in memory."""
        block = np.empty(self.shape, self.view.dtype)
        block.reshape(self.view.shape)[...] = self.view
        return BFloat16(block) if self.bfloat16 else block


@dataclass(frozen=True)
class BigVision:
    """A checkpoint of big_vision.

    config : what its shapes say config.json to be
    known : whether a published decoder has these shapes; else the scale of its scores is a guess
    weights : under their published names; no row is read before it is asked for
    dtype : of the weights, or of most of them
    arrays : the names of those that the weights are made of
    others : what else the file holds, by its first name, and how many arrays that is
    """

    npz: Npz
    config: dict[str, Any]
    known: bool
    weights: dict[str, Turned]
    dtype: str
    arrays: list[str]
    others: dict[str, int]

    def remarks(self) -> list[str]:
        """What is left out of the file and what it does not tell, a sentence each."""
        said = []
        if self.others:
            what = listed([f"{name} ({count})" for name, count in self.others.items()], _LISTED)
            said.append(f"arrays that are no weights of a PaliGemma are left out: {what}.")
        text = self.config["text_config"]
        if text["model_type"] == "gemma2":
            said.append(
                "an .npz does not tell the soft-caps: those of Google's pretrained models are set; "
                "a model that was tuned without them needs null in their place in the config.json "
                "that `npvlm convert` writes."
            )
            if not self.known:
                said.append(
                    "no published decoder has these sizes: the scale of the scores is taken from "
                    f"the width of a head (query_pre_attn_scalar {text['query_pre_attn_scalar']})."
                )
        return said

    def check(self) -> None:
        """Read the weights once and hold them against the sums in the file.

        Raises
        ------
        NpvlmError
            Where they are not what was written.
        """
        self.npz.check(self.arrays)

    def stored(self) -> list[tuple[str, int]]:
        """The type of each array, as safetensors calls it, and its bytes."""
        arrays = [self.npz.array(name) for name in self.arrays]
        return [(_STORED[_TYPES[array.dtype.str]], array.nbytes) for array in arrays]


def find_npz(place: Path) -> Path | None:
    """The checkpoint of big_vision that a place is: an .npz file, or a folder with one alone.

    Raises
    ------
    NpvlmError
        For a folder with several and no safetensors, or with a link that leads out of it: a link
        that is named may lead anywhere, but not what would be opened beside it.
    """
    try:
        if place.is_file():
            if place.suffix != ".npz":
                return None
            for name in (*TOKENIZERS, *MASKS):
                refuse_link_out(place.parent / name)
            return place
        if not place.is_dir() or any(place.glob("*.safetensors*")):
            return None
        found = sorted(file for file in place.glob("*.npz") if file.name not in MASKS)
    except OSError:  # a name too long for a file, or a folder that may not be read
        return None
    if len(found) > 1:
        names = [file.name for file in found]
        raise NpvlmError(
            f"{place} holds {len(found)} .npz files ({listed(names, _LISTED)}); name one."
        )
    if found:
        refuse_links_out(place)
    return found[0] if found else None


def find_tokenizer(file: Path) -> Path | None:
    """The vocabulary that lies beside a file of big_vision, which holds none."""
    return next((file.parent / n for n in TOKENIZERS if (file.parent / n).is_file()), None)


def convert_command(file: Path) -> str:
    """What to type to make a folder of an .npz file."""
    return f"npvlm convert {shlex.quote(str(file))} {shlex.quote(file.name.split('.')[0] or 'new')}"


def open_big_vision(path: Path) -> BigVision:
    """Find the weights of a PaliGemma in an .npz file. None is read.

    Raises
    ------
    NpvlmError
        For a file that is damaged, or arrays that are missing, unexpected, or of shapes or types
        that make no PaliGemma.
    """
    npz = Npz(path)
    names = npz.names
    prefix = _prefix(path, names)
    gemma2 = any(name.startswith(f"{prefix}llm/layers/post_") for name in names)
    places = _tower() | _decoder(gemma2)
    needed = dict.fromkeys(prefix + place.array for place in places.values())
    inside = [n for n in names if n.startswith((f"{prefix}img/", f"{prefix}llm/"))]
    missing = sorted(set(needed) - set(names))
    unexpected = [name for name in inside if name not in needed]
    if missing or unexpected:
        kinds = (("missing", missing), ("unexpected", unexpected))
        said = [f"{len(which)} {kind} ({listed(which, _LISTED)})" for kind, which in kinds if which]
        raise NpvlmError(
            f"{path}: arrays are not those of a PaliGemma {1 + gemma2}: {'; '.join(said)}; "
            "is it the checkpoint of another model?"
        )
    arrays = {place.array: npz.array(prefix + place.array) for place in places.values()}
    sizes = _sizes(path, prefix, places, arrays)
    types = {name: _type(path, prefix + name, array) for name, array in arrays.items()}
    weights = {
        name: weight
        for pattern, place in places.items()
        for name, weight in _weights(pattern, place, arrays[place.array], types[place.array])
    }
    dtype = Counter(types.values()).most_common(1)[0][0]
    heads = Heads(sizes["H"], sizes["K"], sizes["d"], sizes["h"])
    try:
        config, known = deduce_config({n: w.shape for n, w in weights.items()}, heads, dtype)
    except NpvlmError as error:
        raise NpvlmError(f"{path}: {error}") from None
    others = Counter(n.removeprefix(_PARAMS).split("/")[0] for n in names if n not in needed)
    return BigVision(npz, config, known, weights, dtype, list(needed), dict(others))


def _prefix(path: Path, names: Iterable[str]) -> str:
    """What stands before the names of the weights."""
    found = [name.removesuffix(_TABLE) for name in names if name.endswith(_TABLE)]
    found = [start for start in found if start == "" or start.endswith("/")]
    if _PARAMS in found:
        return _PARAMS
    if len(found) > 1:
        raise NpvlmError(
            f"{path} holds {len(found)} models ({listed(found, _LISTED)}), expected one, or one "
            "in params/"
        )
    if not found:
        raise NpvlmError(
            f"{path} has no array {_TABLE}, expected a PaliGemma as big_vision saves it"
        )
    return found[0]


def _sizes(
    path: Path, prefix: str, places: dict[str, _Place], arrays: dict[str, Array]
) -> dict[str, int]:
    """What each letter stands for, the same in every array."""
    sizes = {"1": 1, "2": 2, "c": 3}
    for place in places.values():
        shape = arrays[place.array].shape
        fits = len(shape) == len(place.axes) and 0 not in shape
        if fits:
            for letter, size in zip(place.axes, shape, strict=True):
                fits &= sizes.setdefault(letter, size) == size
        if not fits:
            expected = ", ".join(str(sizes.get(letter, letter)) for letter in place.axes)
            raise NpvlmError(
                f"{path}: {prefix}{place.array} is {list(shape)}, expected [{expected}] as in the "
                "other arrays"
            )
    layers = max(sizes["L"], sizes["B"])
    if layers > _MOST_LAYERS:
        raise NpvlmError(f"{path} has {layers} layers, expected at most {_MOST_LAYERS}")
    if sizes["p"] != sizes["q"] or sizes["h"] * sizes["e"] != sizes["I"] or sizes["d"] % 2:
        raise NpvlmError(
            f"{path}: patches of {sizes['p']} x {sizes['q']}, {sizes['h']} heads of {sizes['e']} "
            f"for a width of {sizes['I']} and a head_dim of {sizes['d']} make no PaliGemma"
        )
    return sizes


def _type(path: Path, name: str, array: Array) -> str:
    if array.dtype.str not in _TYPES:
        raise NpvlmError(
            f"{path}: {name} is {array.dtype}, expected float32, float16 or the bits of bfloat16"
        )
    return _TYPES[array.dtype.str]


def _weights(pattern: str, place: _Place, array: Array, dtype: str) -> Iterable[tuple[str, Turned]]:
    """The published tensors that one place stands for: one, or one for each layer."""
    axes = place.axes
    if dtype == "bfloat16":
        array = array.view(np.uint16)
    if "*" not in pattern:
        yield pattern, _turned(array, axes, place.to, dtype)
        return
    for i, layer in enumerate(array):
        part, rest = (layer, axes[1:]) if place.half is None else (layer[place.half], axes[2:])
        yield pattern.replace("*", str(i)), _turned(part, rest, place.to, dtype)


def _turned(array: Array, axes: str, to: str, dtype: str) -> Turned:
    array = array.reshape(array.shape[axes.count("1") :])  # an axis of one stands first
    axes, groups = axes.replace("1", ""), to.split()
    view = array.transpose([axes.index(letter) for letter in "".join(groups)])
    shape = tuple(math.prod(array.shape[axes.index(a)] for a in group) for group in groups)
    return Turned(view, shape, len(groups[0]), dtype == "bfloat16")
