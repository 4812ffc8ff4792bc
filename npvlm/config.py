"""What config.json says about a PaliGemma, checked and with the published defaults filled in.

Field names are Hugging Face's, letter for letter; only those that the computation needs are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from npvlm.errors import NpvlmError, why

Values = Mapping[str, Any]

# How exact the products with weights are; docs/format.md says what each keeps.
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
PACKED = ("int8", "int4")
FORMAT_VERSION = 1

# Class defaults of transformers: what a field means when a file leaves it out.
_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
_GEMMA = {
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "vocab_size": 256000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
}
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
# What a part means that is left out altogether.
_WHOLE_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_WHOLE_TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257152,
}
_IMAGE_TOKEN_INDEX = 256000
_EMBEDDING_DIM = 128  # of ColPali
_PROJECTION_DIM = 2048

_MOST = 2**31 - 1
_MOST_LAYERS = 1000
_SHOWN = 60
# Bytes of a file of settings, or of a header: published ones have a tenth of it, and what JSON
# holds takes twenty times its bytes in memory.
LARGEST_JSON = 2**23


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @property
    def num_patches(self) -> int:
        """Patches of one picture, which is also its number of image tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TextConfig:
    """The Gemma decoder; fields that only Gemma 2 has are None under Gemma 1."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    query_pre_attn_scalar: float | None
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    sliding_window: int | None
    layer_types: tuple[str, ...]
    tie_word_embeddings: bool

    @property
    def attention_scale(self) -> float:
        """What queries times keys are multiplied by: Gemma 2 does not always use its head_dim."""
        scale: float = float(self.query_pre_attn_scalar or self.head_dim) ** -0.5
        return scale


@dataclass(frozen=True)
class Config:
    """One PaliGemma, or one ColPali."""

    text_config: TextConfig
    vision_config: VisionConfig
    projection_dim: int
    image_token_index: int
    eos_token_ids: tuple[int, ...]
    """Ids that end an answer; empty when no file names one: then the tokenizer's own eos does."""
    quantization: str | None
    """The precision that the files' weights are packed for; None for weights as published."""
    embedding_dim: int | None = None
    """Width of ColPali's vectors; None for a PaliGemma, which writes text."""


class Fields:
    """A JSON object whose fields are read one by one, each refused in a sentence when it is wrong.

    A field that is absent, or null where null means "not set", has its default.
    """

    def __init__(self, values: Values, where: str, defaults: Values | None = None) -> None:
        self.values = values
        self.where = where
        self.defaults: Values = defaults or {}

    def get(self, key: str) -> Any:
        """Return the field, or its default when it is absent or null."""
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def wrong(self, key: str, expected: str, hint: str = "") -> NpvlmError:
        """Build the sentence that says what the field is and what was expected."""
        found = _shown(self.get(key)) if self.get(key) is not None else "absent"
        return NpvlmError(
            f"{self.where}{key} is {found}, expected {expected}{hint and '; ' + hint}"
        )

    def whole(self, key: str, *, least: int = 1, most: int = _MOST) -> int:
        """Read a whole number from `least` to `most`."""
        value = self.get(key)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def positive(self, key: str) -> float:
        """Read a finite number above zero."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value <= 1e30:
            raise self.wrong(key, "a finite number above 0")
        return float(value)

    def positive_or_none(self, key: str) -> float | None:
        """Read a finite number above zero; an explicit null switches it off."""
        if key in self.values and self.values[key] is None:
            return None
        return self.positive(key)

    def flag(self, key: str, default: bool) -> bool:
        """Read true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[Any, ...], hint: str = "") -> None:
        """Refuse a field that is given and is none of the values that are supported."""
        value = self.values.get(key)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise self.wrong(key, " or ".join(json.dumps(a) for a in allowed), hint)

    def part(self, key: str, defaults: Values) -> Values:
        """Read an object inside this one, or `defaults` when it is left out."""
        value = self.values.get(key)
        if value is None:
            return defaults
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value


def read_config(folder: Path) -> Config:
    """Read what a checkpoint folder says about its model.

    Parameters
    ----------
    folder : Path
        A folder with config.json, and generation_config.json where there is one.

    Returns
    -------
    Config

    Raises
    ------
    NpvlmError
        No such file, no JSON, no PaliGemma, or a value that makes no sense.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise NpvlmError(
            f"{folder} is {found}, expected a folder with config.json and model.safetensors"
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        raise NpvlmError(
            f"{folder} holds an adapter, expected a whole model; name its base as the model, and "
            "this folder with --adapter"
        )
    values = read_json(folder / "config.json")
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else None
    return parse_config(values, generation, f"{folder}/")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, or say in a sentence why there is none.

    Raises
    ------
    NpvlmError
        The file is missing, unreadable, no JSON, or JSON of another kind.
    """
    if not path.is_file():
        found = "no regular file" if path.exists() else "missing"
        raise NpvlmError(f"{path} is {found}; copy it from where the model was published")
    content = read_small(path, LARGEST_JSON)
    try:
        values = parse_json(content)
    except RecursionError:
        raise NpvlmError(f"{path} is nested too deeply to be a model's file") from None
    except ValueError as error:  # no UTF-8, no JSON, a number with too many digits
        raise NpvlmError(f"{path} is no JSON ({why(error)}); fetch the file again") from None
    if not isinstance(values, dict):
        raise NpvlmError(f"{path} holds {_shown(values)}, expected a JSON object")
    return values


def read_small(path: Path, most: int) -> bytes:
    """Read a file that may have `most` bytes; a larger one is refused before it is read.

    Raises
    ------
    NpvlmError
        It is larger, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise NpvlmError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise NpvlmError(
            f"{path} has {path.stat().st_size:,} bytes, expected at most {most:,}; "
            "is it another file by that name?"
        )
    return content


def parse_json(content: bytes) -> Any:
    """Read JSON whose objects have each key once: of two, another program may take the other.

    Raises
    ------
    ValueError, RecursionError
        For what is no such JSON.
    """
    return json.loads(content.decode("utf-8"), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, other in pairwise(keys) if key == other)
        raise ValueError(f"{twice[:_SHOWN]!r} is there twice")
    return values


def parse_config(values: Values, generation: Values | None = None, where: str = "") -> Config:
    """Build a Config from the contents of config.json and generation_config.json.

    Parameters
    ----------
    values : mapping
        The contents of config.json, as any release of transformers writes them.
    generation : mapping or None
        The contents of generation_config.json.
    where : str
        Put before the file names in errors; ends with a slash.

    Returns
    -------
    Config

    Raises
    ------
    NpvlmError
        One sentence that names the field.
    """
    at = f"{where}config.json: "
    whole = Fields(values, at, {"embedding_dim": _EMBEDDING_DIM})
    embedding_dim = None
    if values.get("model_type") == "colpali":  # as transformers has it: around a PaliGemma
        embedding_dim = whole.whole("embedding_dim")
        values, at = whole.part("vlm_config", {"model_type": "paligemma"}), f"{at}vlm_config."
    elif values.get("architectures") == ["ColPali"]:  # as colpali-engine has it: a PaliGemma
        embedding_dim = _EMBEDDING_DIM
    if values.get("model_type") != "paligemma":
        raise _other_model(f"{where}config.json", values)
    defaults = {"projection_dim": _PROJECTION_DIM, "image_token_index": _IMAGE_TOKEN_INDEX}
    top = Fields(values, at, defaults)
    if any(part.get("quantization_config") is not None for part in (whole, top)):
        raise NpvlmError(
            f"{where}config.json has a quantization_config: the weights are packed for another "
            "program; take the model's float32, float16 or bfloat16 files"
        )

    tied = top.flag("tie_word_embeddings", True)
    text = _text_config(top.part("text_config", _WHOLE_TEXT), f"{at}text_config.", tied)
    vision = _vision_config(top.part("vision_config", _WHOLE_VISION), f"{at}vision_config.")

    projection_dim = top.whole("projection_dim")
    if projection_dim != text.hidden_size:
        raise NpvlmError(
            f"{at}projection_dim is {projection_dim}, "
            f"expected {text.hidden_size}, the hidden_size of text_config"
        )

    return Config(
        text_config=text,
        vision_config=vision,
        projection_dim=projection_dim,
        image_token_index=_image_token_index(top),
        eos_token_ids=_eos_token_ids(values, generation, where),
        quantization=_quantization(whole),
        embedding_dim=embedding_dim,
    )


def _other_model(file: str, values: Values) -> NpvlmError:
    """Say which model a config is for, and which npvlm runs."""
    model_type, named = values.get("model_type"), values.get("architectures")
    short = isinstance(model_type, str) and f"a {model_type[:_SHOWN]} model"
    kind = short or "of no named model_type"
    names = [model_type, *(named if isinstance(named, list) else [])]
    if any(isinstance(name, str) and name.lower().startswith("col") for name in names):
        runs = "of the models that find pages, npvlm runs ColPali alone, which is a PaliGemma"
    else:
        runs = (
            "npvlm runs PaliGemma and PaliGemma 2 only (`npvlm convert` takes one out of another "
            "model)"
        )
    return NpvlmError(f"{file} is {kind}, expected paligemma; {runs}")


def _text_config(values: Values, where: str, tied: bool) -> TextConfig:
    kind = values.get("model_type", "gemma")
    if kind not in ("gemma", "gemma2"):
        found = _shown(kind)
        raise NpvlmError(f'{where}model_type is {found}, expected "gemma" or "gemma2"')
    newer = kind == "gemma2"
    text = Fields(values, where, _GEMMA2 if newer else _GEMMA)

    # Gemma 1 was published as "gelu" and always meant the tanh form; in Gemma 2 "gelu" is erf.
    tanh = ("gelu_pytorch_tanh",) if newer else ("gelu_pytorch_tanh", "gelu")
    text.one_of("hidden_activation", tanh)
    if not newer:
        text.one_of("hidden_act", tanh)
    text.one_of("attention_bias", (False,))
    text.one_of("use_bidirectional_attention", (True,), "a PaliGemma sees its whole prompt at once")
    if values.get("per_layer_config"):
        raise text.wrong("per_layer_config", "none", "every layer must have the same sizes")

    layers = text.whole("num_hidden_layers", most=_MOST_LAYERS)
    heads = text.whole("num_attention_heads")
    groups = text.whole("num_key_value_heads")
    if heads % groups:
        raise text.wrong(
            "num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}"
        )
    head_dim = text.whole("head_dim")
    if head_dim % 2:
        raise text.wrong("head_dim", "an even number", "rotary positions turn pairs")

    layer_types = _layer_types(text, layers) if newer else ("full_attention",) * layers
    window = None
    if "sliding_attention" in layer_types:
        # An explicit null leaves nothing to slide by; transformers refuses it as well.
        if "sliding_window" in values and values["sliding_window"] is None:
            raise NpvlmError(
                f"{where}sliding_window is null, expected a whole number: layers slide"
            )
        window = text.whole("sliding_window")

    return TextConfig(
        model_type=kind,
        hidden_size=text.whole("hidden_size"),
        intermediate_size=text.whole("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.positive("rms_norm_eps"),
        rope_theta=_rope_theta(text),
        max_position_embeddings=text.whole("max_position_embeddings"),
        query_pre_attn_scalar=text.positive("query_pre_attn_scalar") if newer else None,
        attn_logit_softcapping=text.positive_or_none("attn_logit_softcapping") if newer else None,
        final_logit_softcapping=text.positive_or_none("final_logit_softcapping") if newer else None,
        sliding_window=window,
        layer_types=layer_types,
        tie_word_embeddings=tied,
    )


def _vision_config(values: Values, where: str) -> VisionConfig:
    vision = Fields(values, where, _SIGLIP)
    vision.one_of("model_type", ("siglip_vision_model",))
    vision.one_of("hidden_act", ("gelu_pytorch_tanh",))
    vision.one_of(
        "vision_use_head", (False,), "a PaliGemma uses the patches, never a pooled picture"
    )
    vision.one_of("num_channels", (3,), "pictures are red, green and blue")

    width = vision.whole("hidden_size")
    heads = vision.whole("num_attention_heads")
    if width % heads:
        raise vision.wrong("num_attention_heads", f"a divisor of hidden_size, which is {width}")
    image_size = vision.whole("image_size")
    patch_size = vision.whole("patch_size", most=image_size)

    return VisionConfig(
        hidden_size=width,
        intermediate_size=vision.whole("intermediate_size"),
        num_hidden_layers=vision.whole("num_hidden_layers", most=_MOST_LAYERS),
        num_attention_heads=heads,
        num_channels=vision.whole("num_channels"),
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=vision.positive("layer_norm_eps"),
    )


def _rope_theta(text: Fields) -> float:
    """Find the rotary base, in rope_parameters (newer files) or beside the other fields."""
    for key in ("rope_scaling", "rope_parameters"):
        given = text.part(key, {})
        if not given:
            continue
        rope = Fields(given, f"{text.where}{key}.", {"rope_theta": text.get("rope_theta")})
        if any(isinstance(value, dict) for value in given.values()):
            raise text.wrong(key, "one set of values for all layers")
        rope.one_of("rope_type", ("default",))
        if "rope_type" not in given:
            rope.one_of("type", ("default",))
        rope.one_of("partial_rotary_factor", (1.0, 1))
        return rope.positive("rope_theta")
    text.one_of("partial_rotary_factor", (1.0, 1))
    return text.positive("rope_theta")


def _layer_types(text: Fields, layers: int) -> tuple[str, ...]:
    """Say which layers slide: by default every other one, the first among them."""
    given = text.values.get("layer_types")
    if given is None:
        return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(layers))
    kinds = ("sliding_attention", "full_attention")
    if not isinstance(given, list) or len(given) != layers or any(k not in kinds for k in given):
        raise text.wrong("layer_types", f"a list of {layers} times {kinds[0]} or {kinds[1]}")
    return tuple(given)


def _image_token_index(top: Fields) -> int:
    """Find the id of <image>, which newer files may call image_token_id."""
    keys = [k for k in ("image_token_index", "image_token_id") if top.values.get(k) is not None]
    found = {key: top.whole(key, least=0) for key in keys}
    if len(set(found.values())) > 1:
        raise top.wrong(
            "image_token_id", f"image_token_index, which is {found['image_token_index']}"
        )
    return next(iter(found.values()), _IMAGE_TOKEN_INDEX)


def _eos_token_ids(values: Values, generation: Values | None, where: str) -> tuple[int, ...]:
    """Find the ids that end an answer: the first place that names any decides."""
    text = values.get("text_config") or {}
    places = (
        (generation or {}, f"{where}generation_config.json: "),
        (values, f"{where}config.json: "),
        (text, f"{where}config.json: text_config."),
    )
    for place, says in places:
        given = place.get("eos_token_id")
        if given is None or given == []:
            continue
        ids = given if isinstance(given, list) else [given]
        if any(type(i) is not int or not 0 <= i <= _MOST for i in ids):
            raise Fields(place, says).wrong("eos_token_id", "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))
    return ()


def _quantization(top: Fields) -> str | None:
    """Find the precision that `npvlm convert` packed the weights for."""
    if top.values.get("quantization") is None:
        return None
    given = top.part("quantization", {})
    entry = Fields(given, f"{top.where}quantization.")
    hint = "take the model's float32, float16 or bfloat16 files"
    if given.get("format") != "npvlm":
        raise entry.wrong("format", '"npvlm"', hint)
    if type(given.get("version")) is not int or given["version"] != FORMAT_VERSION:
        hint = "convert the original checkpoint again with this npvlm"
        raise entry.wrong("version", str(FORMAT_VERSION), hint)
    if given.get("precision") not in PACKED:
        raise entry.wrong("precision", " or ".join(map(json.dumps, PACKED)), hint)
    precision: str = given["precision"]
    return precision


def _shown(value: Any) -> str:
    """Print a value of a file so that it fits into a sentence."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):  # a number with thousands of digits cannot be printed
        text = "a value too large to print"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
