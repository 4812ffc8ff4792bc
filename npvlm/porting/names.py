"""What others call the stages: the names in a port's dump matched with ours.

Names are read without regard to case and to which separators stand between their words. What they
say of tower or decoder and of the layer number is taken literally; nothing is guessed.

Known styles: our own and transformers' module paths, old and new, with the endings that hooks add;
big_vision's; GGUF tensors; the callbacks of llama.cpp's graphs; gemma.cpp's activations.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from npvlm.errors import UsageError, why
from npvlm.files.names import canonical_name
from npvlm.porting.stages import (
    JOINT,
    PICTURE,
    TEXT,
    TEXT_END,
    TEXT_LAYER,
    TOWER,
    TOWER_END,
    TOWER_LAYER,
    TOWER_START,
)

QKV = ("q_proj", "k_proj", "v_proj")
KV = ("k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
UP_GATE = ("up_proj", "gate_proj")

TOWER_LAYERS = f"{TOWER}.encoder.layers"
TEXT_LAYERS = f"{TEXT}.layers"
MOST_LAYERS = 1000  # as many as a config may have

# Words of a path that say whose a name is.
TOWER_WORDS = {"v", "vit", "vision", "visual", "siglip", "img", "image", "clip", "encoder", "tower"}
TEXT_WORDS = {"language", "lm", "llm", "llama", "text", "txt", "decoder", "gemma", "blk"}
OF_BLOCKS = {"v", "encoderblock"}  # v.blk.3, where blk.3 is the decoder's
OTHER_DECODER = "gemma_expert"  # the one of pi0 that acts, beside its PaliGemma
# Parts of a path that say nothing more.
CONTAINERS = {
    *("model", "module", "paligemma", "transformer", "encoder", "decoder"),
    *("vision_tower", "vision_model", "vision", "visual", "vit", "siglip", "img", "clip", "v"),
    *("image_encoder", "language_model", "llm", "llama", "lm", "text", "txt", "gemma"),
}
LAYER = re.compile(r"(?:^|[._])(layers?|blocks?|blk|encoderblock|vit|lm|h|l)[._]?(\d+)(?=[._]|$)")
NUMBERED = re.compile(r"-\d+$")  # as llama.cpp's graph numbers by layers: norm-3
CALLBACK = re.compile(r"(?:(.*)\.)?([a-z]\w*?)[._](\d+)")  # Qcur-3
ENDING = re.compile(r"(?:\.(?:outputs?|out|result|0))+$")

# How others call what has no layer number, the most telling first. "tower:" marks what must be said
# to be the tower's, "bare:" what stands for this only if it is the whole name.
WHOLE = {
    "image.rgb": "image_rgb rgb image_rgb_u8 image_u8",
    "image.resized": "image_resized resized image_resized_u8 resized_u8 resized_image",
    "pixel_values": "pixel_values pixels inp_raw image images input_image",
    "input_ids": "input_ids token_ids inp_tokens tokens ids",
    "positions": "positions position_ids inp_pos pos",
    f"{TOWER}.embeddings.patch_embedding": (
        "embeddings_patch_embedding patch_embedding patch_embeddings patch_embed patch_embd stem "
        "tower:embedding"
    ),
    f"{TOWER}.embeddings": ("with_posemb embed_plus_pos pos_embed tower:embeddings"),
    f"{TOWER}.post_layernorm": (
        "post_layernorm post_ln encoder_norm encoded tower:norm tower:final_norm"
    ),
    "multi_modal_projector": (
        "multi_modal_projector multi_modal_projector_linear mm_projector projector "
        "mm_input_projection mm_0 mmproj tower:head tower:logits image_features zimg"
    ),
    "inputs_embeds": "inputs_embeds input_embeds embeds_scaled inp_scaled",
    # llama.cpp's graph has a "norm" without its weights, too.
    f"{TEXT}.norm": ("result_norm norm final_norm output_norm final_layernorm pre_logits"),
    "language_model.logits": "logits logits_last result_output lm_logits bare:output",
}
LM_HEAD = "lm_head"

ATTENTION = (
    "",
    "self_attn",
    "attn",
    "attention",
    "self_attention",
    "multiheaddotproductattention0",
)
THOUGHT = ("", "mlp", "ffn", "ffw", "feed_forward", "mlpblock0")
# How others call what is inside attention, under any name that attention itself has.
PROJECTIONS = {
    "self_attn.q_proj": "q_proj q query q_einsum wq attn_q query_proj qcur",
    "self_attn.k_proj": "k_proj k key wk attn_k key_proj kcur",
    "self_attn.v_proj": "v_proj v value wv attn_v value_proj vcur value_states",
    "self_attn.attend": (
        "attend o_proj_input out_proj_input attn_vec_einsum_input kqv_out kqv_merged att_out"
    ),
}
FUSED = {
    "qkv_proj qkv qkv_einsum attn_qkv wqkv query_key_value c_attn": QKV,
    "kv_proj kv kv_einsum attn_kv wkv": KV,
}
TOWER_NAMES = {
    "layer_norm1": "layer_norm1 ln1 norm1 layer_inp_normed",
    "self_attn": (
        "self_attn self_attn_out_proj attn_out_proj out_proj attn_out attn_output sa attn "
        "attention multiheaddotproductattention0_out multiheaddotproductattention0 att_sums"
    ),
    "layer_norm2": "layer_norm2 ln2 norm2 ffn_inp_normed",
    "mlp": "mlp mlp_fc2 fc2 mlpblock0_dense1 mlpblock0 ffn_down ffn_out mlp_out ffw_out",
    "": "plus_mlp layer_out layer_output",
}
TOWER_THOUGHT = {
    "mlp.fc1": "fc1 dense0 up linear1",
    "mlp.gelu": "gelu activation_fn act gelu0 fc1_act",
}
TEXT_NAMES = {
    "input_layernorm": "input_layernorm attn_norm pre_attention_norm pre_att_rms_out",
    "self_attn": (
        "self_attn self_attn_o_proj attn_o_proj o_proj attn_output attn_out attn_vec_einsum "
        "attn_attn_vec_einsum attn attention att_sums"
    ),
    "mlp": (
        "mlp mlp_down_proj down_proj ffn_down ffn_out mlp_out mlp_linear mlp_down ffw_out "
        "feed_forward"
    ),
    "": "l_out layer_out layer_output",
}
TEXT_PROJECTIONS = {
    "self_attn.q_rope": "q_rope q_rot q_embed q_roped query_rope query_states qcur_rope qcur_pos",
    "self_attn.k_rope": "k_rope k_rot k_embed k_roped key_rope key_states kcur_rope kcur_pos",
    "self_attn.attend": "encoded",
}
TEXT_THOUGHT = {
    "mlp.gate_proj": "gate_proj gate",
    "mlp.up_proj": "up_proj up",
    "mlp.gated": "gated down_proj_input geglu gate_par",
}
TEXT_FUSED = {
    "gate_up_proj gate_up gating_einsum": GATE_UP,
    "up_gate_proj up_gate": UP_GATE,
}
# The norms behind attention mean two things: in Gemma 1 the one before the MLP has the name that
# in Gemma 2 the one behind attention has.
BEFORE_MLP = "ffn_norm pre_ffw_norm pre_ffw_rms_out pre_mlp_norm"
GEMMA_1_NORMS = {"post_attention_layernorm": f"post_attention_layernorm {BEFORE_MLP}"}
GEMMA_2_NORMS = {
    "post_attention_layernorm": (
        "post_attention_layernorm post_attention_norm attn_post_norm post_attn_norm"
    ),
    "pre_feedforward_layernorm": f"pre_feedforward_layernorm {BEFORE_MLP}",
    "post_feedforward_layernorm": (
        "post_feedforward_layernorm post_ffw_norm ffn_post_norm post_ffn_norm"
    ),
}


@dataclass(frozen=True)
class Found:
    """Where a stage is in a dump.

    name : of the array
    part : if it holds several stages, their last words in the order in which they lie there
    """

    name: str
    part: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Claim:
    """A name that may be a stage's; the lower the rank, the more exactly it says so."""

    rank: int
    place: Found


@dataclass(frozen=True)
class Alias:
    """What a word within a layer stands for."""

    stage: str
    rank: int
    part: tuple[str, ...] | None = None


Aliases = dict[str, list[Alias]]


def match(names: Sequence[str], wanted: Sequence[str]) -> dict[str, Found]:
    """Find each wanted stage among the names of a dump; those that are not there are left out.

    Parameters
    ----------
    names : of the arrays in a port's dump
    wanted : full names of stages

    Returns
    -------
    The stages in the order of `wanted`. Of several names for one stage the most exact is taken.
    """
    second = any("feedforward" in stage for stage in wanted) or _is_second(names)
    tables = {TOWER_LAYERS: _tower_aliases(), TEXT_LAYERS: _text_aliases(second)}
    whole = _whole_aliases(second)
    asked, claims = {_spelled(stage): stage for stage in wanted}, dict[str, list[Claim]]()
    owners = _owners(names, tables)
    for name in names:
        for meant, claim in _claims(name, whole, tables, owners):
            if stage := asked.get(_spelled(meant)):
                claims.setdefault(stage, []).append(claim)

    def order(claim: Claim) -> tuple[int, int, str]:
        return claim.rank, len(claim.place.name), claim.place.name

    return {stage: min(claims[stage], key=order).place for stage in wanted if stage in claims}


def found_in(
    held: Sequence[str], wanted: Sequence[str], named: Mapping[str, str] | None, dump: Path
) -> dict[str, Found]:
    """Find stages among the names of a dump, first by a map, then as `match` does.

    Parameters
    ----------
    named : what `read_map` gave; of a stage in layers some may be missing, not all

    Raises
    ------
    UsageError
        For a name that the map has and the dump has not.
    """
    asked = {stage: name for stage, name in (named or {}).items() if stage in wanted}
    found = {stage: Found(name) for stage, name in asked.items() if name in held}
    kinds = {_without_layer(stage) for stage in found}
    for stage, name in asked.items():
        if _without_layer(stage) not in kinds:
            raise UsageError(f"{dump} has no {name!r}, which the map names for {stage}.")
    return match(held, wanted) | found


def unmatched(names: Iterable[str], found: Mapping[str, Found]) -> list[str]:
    """The names that no stage was found under, in their order."""
    used = {place.name for place in found.values()}
    return [name for name in names if name not in used]


def suggest(name: str, wanted: Iterable[str]) -> list[str]:
    """The stages whose names come closest to an unknown one, at most three."""
    short = {_squashed(stage): stage for stage in wanted}
    near = difflib.get_close_matches(_squashed(name), short, n=3, cutoff=0.5)
    return [short[key] for key in near]


def read_map(path: Path) -> dict[str, str]:
    """Read a file that says how a port calls the stages.

    It is TOML or JSON, a name for each stage: `"language_model.model.norm" = "final"`. Where both
    have `{i}` the line is meant for every layer.

    Returns
    -------
    Names by stage, for as many layers as a model could have.

    Raises
    ------
    UsageError
        Where it cannot be read, is something else, or names a stage that there is not.
    """
    try:
        text = path.expanduser().read_bytes().decode("utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is no map ({why(error)}), expected TOML, a line "
            '"stage" = "name in your dump" for each stage, or JSON if it ends in .json.'
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} is no map, expected a name for each stage.")
    known, named = _patterns(), dict[str, str]()
    for stage, name in values.items():
        if not isinstance(name, str):
            hint = "; put the stage's name in quotes" if isinstance(name, dict) else ""
            raise UsageError(f"{path}: {stage} is {name!r}, expected the name of an array{hint}.")
        if _without_layer(stage) not in known:
            near = suggest(stage, known)
            like = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"{path}: {stage} is no stage, expected one of docs/stages.md{like}")
        if ("{i}" in stage) != ("{i}" in name):
            raise UsageError(
                f"{path}: {stage} = {name!r} has {{i}} on one side only, expected it in both names "
                "or in none."
            )
        layers = range(MOST_LAYERS) if "{i}" in stage else range(1)
        named |= {stage.replace("{i}", f"{i}"): name.replace("{i}", f"{i}") for i in layers}
    return named


def _without_layer(stage: str) -> str:
    """A stage with {i} for its layer number."""
    return re.sub(r"\.layers\.\d+(?=\.|$)", ".layers.{i}", stage)


def _patterns() -> list[str]:
    """Every stage of either family, with {i} for the layer number."""
    found = [name for name, _, _ in (*PICTURE, *JOINT, *TEXT_END)]
    found += [f"{TOWER}.{name}" for name, _, _ in (*TOWER_START, *TOWER_END)]
    for layers, rows in ((TOWER_LAYERS, TOWER_LAYER), (TEXT_LAYERS, TEXT_LAYER)):
        found += [_within(layers, "{i}", name) for name, _, _ in rows]
    return found


# Spelling


def _dotted(name: str) -> str:
    """Lower case, with a dot for each separator of parts; underscores stay."""
    name = re.sub(r"layernorm_([01])", lambda m: f"ln{int(m[1]) + 1}", name.lower())
    name = name.replace("+", "plus_")
    return re.sub(r"[^a-z0-9_]+", ".", name).strip(".")


def _squashed(name: str) -> str:
    """Letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _spelled(name: str) -> str:
    """A name without its separators, but for those between two numbers."""
    kept = re.sub(r"(?<=[0-9])[^a-z0-9]+(?=[0-9])", "+", name.lower())
    return re.sub(r"[^a-z0-9+]", "", kept)


def _words(path: str) -> set[str]:
    return set(re.split(r"[._]", path))


def _within(layers: str, i: int | str, name: str) -> str:
    return f"{layers}.{i}.{name}" if name else f"{layers}.{i}"


# Aliases


def _listed(names: Mapping[str, str], under: Sequence[str] = ("",)) -> Iterator[tuple[str, Alias]]:
    """Aliases of stages, each alone and under each of the given modules."""
    for stage, aliases in names.items():
        for rank, alias in enumerate(aliases.split()):
            for module in under:
                yield _squashed(module + alias), Alias(stage, rank)


def _fused(
    names: Mapping[str, tuple[str, ...]], module: str, under: Sequence[str]
) -> Iterator[tuple[str, Alias]]:
    """Names of arrays that hold several stages side by side."""
    for aliases, part in names.items():
        for alias, inside, word in product(aliases.split(), under, part):
            # Rank 50: a stage that is there by itself as well is taken from there.
            yield _squashed(inside + alias), Alias(f"{module}.{word}", 50, part)


def _collected(aliases: Iterable[tuple[str, Alias]]) -> Aliases:
    found: Aliases = {}
    for key, alias in aliases:
        known = found.setdefault(key, [])
        if alias.stage not in [other.stage for other in known]:
            known.append(alias)
    return found


def _tower_aliases() -> Aliases:
    return _collected(
        [
            *_listed(TOWER_NAMES),
            *_listed(PROJECTIONS, ATTENTION),
            *_listed(TOWER_THOUGHT, THOUGHT),
            *_fused(FUSED, "self_attn", ATTENTION),
        ]
    )


def _text_aliases(second: bool) -> Aliases:
    return _collected(
        [
            *_listed(TEXT_NAMES | (GEMMA_2_NORMS if second else GEMMA_1_NORMS)),
            *_listed(PROJECTIONS, ATTENTION),
            *_listed(TEXT_PROJECTIONS, ATTENTION),
            *_listed(TEXT_THOUGHT, THOUGHT),
            *_fused(FUSED, "self_attn", ATTENTION),
            *_fused(TEXT_FUSED, "mlp", THOUGHT),
        ]
    )


def _whole_aliases(second: bool) -> dict[tuple[str, str], Alias]:
    """By what a name must be said to be ("" for nothing) and its letters."""
    names = dict(WHOLE)
    if not second:
        # Gemma 2's scores are soft-capped behind that layer: its own output is no stage.
        names["language_model.logits"] += f" {LM_HEAD}"
    found = {}
    for stage, aliases in names.items():
        for rank, alias in enumerate(aliases.split()):
            owner, _, word = alias.rpartition(":")
            found[owner, _squashed(word)] = Alias(stage, rank)
    return found


def _is_second(names: Iterable[str]) -> bool:
    """Whether names are of norms that Gemma 2 alone has."""
    only = ("post_attention_norm", "attn_post_norm", "post_ffw_norm", "ffn_post_norm")
    marks = [_squashed(word) for word in (*only, "feedforward_layernorm")]
    return any(mark in _squashed(name) for name in names for mark in marks)


# Reading a name


@dataclass(frozen=True)
class Parsed:
    """A name within a layer: what is before the number, the number, the rest, and how it is built.

    callback : the number came last, as in Qcur-3
    """

    prefix: str
    layer: int
    rest: str
    callback: bool

    @property
    def group(self) -> tuple[str, bool]:
        """Names of one group are one tower's."""
        return self.prefix, self.callback


def _parsed(dotted: str) -> Parsed | None:
    """Read the layer number of a name; None if it has none."""
    if at := LAYER.search(dotted):
        word = "" if at[1] in ("layer", "layers") else at[1]
        prefix = ".".join(part for part in (dotted[: at.start()], word) if part)
        return Parsed(prefix, int(at[2]), dotted[at.end() :].strip("._"), False)
    if last := CALLBACK.fullmatch(dotted):
        return Parsed(last[1] or "", int(last[3]), last[2], True)
    return None


def _readings(rest: str, aliases: Aliases) -> Iterator[Alias]:
    """What the part behind the layer number stands for, with or without what a hook added."""
    if not rest:
        yield Alias("", 0)
        return
    plain = ENDING.sub("", f".{rest}").strip(".")
    for text, worse in ((rest, 0), (plain, 100)):
        if not text:
            yield Alias("", worse)
            return
        if known := aliases.get(_squashed(text)):
            yield from (Alias(one.stage, one.rank + worse, one.part) for one in known)
            return


def _owner(prefix: str) -> str | None:
    """Whose a name is by the words before its layer number; None if they do not say."""
    words = _words(prefix)
    tower, text = bool(words & TOWER_WORDS), bool(words & TEXT_WORDS)
    if words & OF_BLOCKS:
        return TOWER_LAYERS
    if tower == text:
        return None
    return TOWER_LAYERS if tower else TEXT_LAYERS


def _owners(
    names: Iterable[str], tables: Mapping[str, Aliases]
) -> dict[tuple[str, bool], str | None]:
    """Whose the names of each group are: by its words, or as all of them can only be one's."""
    known: dict[tuple[str, bool], str | None] = {}
    only: dict[tuple[str, bool], set[str]] = {}
    for name in names:
        parsed = _parsed(_dotted(name))
        if parsed is None:
            continue
        known[parsed.group] = _owner(parsed.prefix)
        fitting = [layers for layers in tables if any(_readings(parsed.rest, tables[layers]))]
        if len(fitting) == 1:
            only.setdefault(parsed.group, set()).update(fitting)
    for group, owner in known.items():
        told = only.get(group, set())
        if owner is None and len(told) == 1:
            known[group] = next(iter(told))
    return known


def _claims(
    name: str,
    whole: Mapping[tuple[str, str], Alias],
    tables: Mapping[str, Aliases],
    owners: Mapping[tuple[str, bool], str | None],
) -> Iterator[tuple[str, Claim]]:
    """Every stage that a name may be meant for."""
    yield name, Claim(-2, Found(name))
    yield canonical_name(name), Claim(-1, Found(name))
    dotted = _dotted(name)
    if OTHER_DECODER in dotted:
        return
    if not NUMBERED.search(name) and (alias := _whole(dotted, whole)):
        yield alias.stage, Claim(alias.rank, Found(name))
        return
    parsed = _parsed(dotted)
    layers = owners.get(parsed.group) if parsed else None
    if parsed is None or layers is None:
        return
    for alias in _readings(parsed.rest, tables[layers]):
        stage = _within(layers, parsed.layer, alias.stage)
        yield stage, Claim(alias.rank, Found(name, alias.part))


def _whole(dotted: str, whole: Mapping[tuple[str, str], Alias]) -> Alias | None:
    """The stage outside all layers that a name is meant for."""
    parts = dotted.split(".")
    while len(parts) > 1 and parts[0] in CONTAINERS:
        parts.pop(0)
    rest = ".".join(parts)
    words = _words(dotted.removesuffix(rest))
    tower, text = bool(words & TOWER_WORDS), bool(words & TEXT_WORDS)
    owners = ("tower", "") if tower else ("",) if len(dotted) > len(rest) else ("bare", "")
    for name in (rest, ENDING.sub("", rest)):
        for owner in owners:
            alias = whole.get((owner, _squashed(name)))
            # Neither half of the model has a stage of the other's.
            if (
                alias
                and not (tower and alias.stage.startswith("language_model"))
                and not (text and alias.stage.startswith(TOWER))
            ):
                return alias
    return None
