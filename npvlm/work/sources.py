"""What convert begins from: a folder as published, one that is not quite, or a big_vision file."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.config import Config, Values, parse_config, read_config, read_json, read_small
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.big_vision import TOKENIZERS, find_tokenizer, open_big_vision
from npvlm.files.checkpoint import (
    OTHER_FORMATS,
    Stored,
    by_name,
    checkpoint_files,
    fit_rows,
    left_out,
    open_checkpoint,
    read_header,
)
from npvlm.files.deduced import deduce_config, side_of
from npvlm.files.masks import find_mask_decoder
from npvlm.files.names import POSITIONS
from npvlm.files.packed import Rows
from npvlm.files.published import preprocessor_values
from npvlm.files.resample import resample_positions
from npvlm.files.tokenizer import complete_tokenizer, tokens_to_add
from npvlm.model.weights import unpack

LARGEST_COPIED = 2**25  # vocabularies and settings are smaller, weights in other formats larger
TOKENIZER = TOKENIZERS[0]
_PREPROCESSORS = {"preprocessor_config.json", "processor_config.json"}
_WITH_A_TOKENIZER = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LISTED = 6

Say = Callable[[str], None]
Small = Path | bytes  # a file as it is, or what becomes of one


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be written as a folder of the published form.

    values : the contents of its config.json, as that form has them
    config : what they say
    weights : under their published names, to be read a few rows at a time
    files : small files that go along, by name; no more than one at a time need be in memory
    """

    values: dict[str, Any]
    config: Config
    weights: Mapping[str, Rows]
    files: dict[str, Small]


def open_source(place: Path, tokenizer: Path | None, image_size: int | None, say: Say) -> Source:
    """Open what is to be converted. No weight is kept; those of an .npz are checked first.

    Parameters
    ----------
    place : a checkpoint folder as `load` takes it; one whose config.json is not a PaliGemma's,
        though its weights are, or have one inside; or an .npz file of big_vision
    tokenizer : a vocabulary to put in the place of the model's own
    image_size : pixels of a picture's side for which positions are resampled, if they are to be
    say : told, in sentences, what is left out and what is assumed

    Raises
    ------
    UsageError
        For a folder that is packed already, or an image size that cannot be.
    NpvlmError
        For a source that is damaged, or no PaliGemma.
    """
    if tokenizer is not None and not tokenizer.is_file():
        raise NpvlmError(f"{tokenizer} is no file, expected a SentencePiece model.")
    if place.is_dir():
        source = _folder(place, image_size is not None, say)
        if tokenizer is None and TOKENIZER not in source.files:
            say(_to_be_brought(f"no {TOKENIZER} in {place}"))
    else:
        source = _npz(place, say)
        tokenizer = tokenizer or find_tokenizer(place)
        if tokenizer is None:
            say(_to_be_brought(f"no {' or '.join(TOKENIZERS)} beside {place.name}"))
    _say_rows(source.config, say)
    if tokenizer is not None:
        source = replace(source, files=_with_tokenizer(source, tokenizer))
    return source if image_size is None else _resampled(source, image_size)


def _npz(file: Path, say: Say) -> Source:
    """A file of big_vision."""
    found = open_big_vision(file)
    for remark in found.remarks():
        say(remark)
    say(f"{file.name} is read once to see that it is whole.")
    found.check()
    config = parse_config(found.config, None, f"{file}: ")
    files = _made_files(config) | _mask_decoder(file.parent)
    return Source(found.config, config, found.weights, files)


def _to_be_brought(missing: str) -> str:
    return (
        f"there is {missing}: name one with --tokenizer, or copy it into the new folder as "
        f"{TOKENIZER}."
    )


def _folder(folder: Path, resampled: bool, say: Say) -> Source:
    """A folder of safetensors."""
    tensors = [t for file in checkpoint_files(folder) for t in read_header(file)]
    stored = by_name(tensors)
    if note := left_out(folder):
        say(note)
    values, own = _values(folder, stored, say)
    config = read_config(folder) if own else parse_config(values, None, f"{folder}/")
    if config.quantization:
        raise UsageError(
            f"{folder} is packed as {config.quantization} already; convert the original checkpoint."
        )
    if resampled and POSITIONS in stored:
        config = _sized(config, side_of(stored[POSITIONS].shape[0]))
    weights = open_checkpoint(folder, config)
    fitted, files = fit_rows(config, stored), _small_files(folder)
    if fitted != config:
        values, config = _with_rows(values, fitted.text_config.vocab_size), fitted
    if not own or not _PREPROCESSORS & files.keys():
        files = _made_files(config) | files
    return Source(values, config, weights, files)


def _values(folder: Path, stored: Mapping[str, Stored], say: Say) -> tuple[dict[str, Any], bool]:
    """What config.json has to say, and whether it is what the folder's own says."""
    path = folder / "config.json"
    own = read_json(path) if path.exists() else {}
    if own.get("model_type") in ("paligemma", "colpali"):
        return own, True
    inside = [v for v in own.values() if isinstance(v, dict) and v.get("model_type") == "paligemma"]
    if len(inside) == 1:
        say(f"{path} is that of a model with a PaliGemma inside, whose part is taken.")
        return inside[0], False
    types = Counter(_TYPES.get(tensor.dtype, tensor.dtype) for tensor in stored.values())
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    kind = own.get("model_type", own.get("type"))
    says = f"is no PaliGemma's ({kind!r:.40})" if own else "is missing"
    try:
        values, _ = deduce_config(shapes, None, types.most_common(1)[0][0] if types else "")
    except NpvlmError as error:
        raise NpvlmError(f"{path} {says}, and {error}") from None
    text = values["text_config"]
    say(
        f"{path} {says}; one is written for these weights, which have the sizes of a published "
        f"PaliGemma: {text['num_hidden_layers']} layers of {text['hidden_size']}, pictures of "
        f"{values['vision_config']['image_size']} px."
    )
    return values, False


def _say_rows(config: Config, say: Say) -> None:
    """Tell of a table that is shorter than the published one."""
    rows, image = config.text_config.vocab_size, config.image_token_index
    if rows <= image:
        say(
            f"the embedding table has {rows:,} rows: none for <image> ({image}), which is never "
            "looked up, nor those behind it in the published files, which nothing was trained for."
        )


def _with_rows(values: Values, rows: int) -> dict[str, Any]:
    """The contents of config.json for a vocabulary of so many rows."""
    changed = copy.deepcopy(dict(values))
    whole = _paligemma(changed)
    _part(whole, "text_config")["vocab_size"] = rows
    if "vocab_size" in whole:
        whole["vocab_size"] = rows
    return changed


def _resampled(source: Source, image_size: int) -> Source:
    """The same for pictures of another size."""
    patch = source.config.vision_config.patch_size
    side, rest = divmod(image_size, patch)
    most = source.config.text_config.max_position_embeddings
    if rest or not 0 < side * side < most:
        raise UsageError(
            f"--image-size is {image_size}, expected a multiple of {patch}, the side of a patch, "
            f"with less than {most} patches in a picture."
        )
    table = unpack(source.weights[POSITIONS][slice(None)], np.float32)
    weights = dict(source.weights)
    if len(table) != side * side:
        weights[POSITIONS] = resample_positions(table, side)
    values = copy.deepcopy(source.values)
    whole = _paligemma(values)
    vision, text = _part(whole, "vision_config"), whole.get("text_config") or {}
    vision["image_size"] = image_size
    for part in (vision, text):
        if "num_image_tokens" in part:
            part["num_image_tokens"] = side * side
    return Source(values, _sized(source.config, side), weights, _sized_files(source, image_size))


def _paligemma(values: dict[str, Any]) -> dict[str, Any]:
    """The PaliGemma's part of config.json: all of it, but for a ColPali."""
    return _part(values, "vlm_config") if values.get("model_type") == "colpali" else values


def _part(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of config.json that is to be changed; left out, it would mean another one."""
    part = values.get(name)
    if not isinstance(part, dict):
        raise NpvlmError(f"config.json has no {name}, expected one; write it out in full.")
    return part


def _sized(config: Config, side: int) -> Config:
    """A config for pictures of side x side patches."""
    vision = config.vision_config
    return replace(config, vision_config=replace(vision, image_size=side * vision.patch_size))


def _sized_files(source: Source, image_size: int) -> dict[str, Small]:
    """The small files, those that tell the size of pictures changed."""
    patch, files = source.config.vision_config.patch_size, dict(source.files)
    new = preprocessor_values(image_size, patch)
    found = False
    for name, part in (
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),
    ):
        if name not in files:
            continue
        values = _object(name, content_of(files[name]))
        settings = values if part is None else values.get(part)
        if not isinstance(settings, dict):
            continue
        found = True
        settings["size"] = new["size"]
        if "image_seq_length" in settings:
            settings["image_seq_length"] = new["image_seq_length"]
        files[name] = _json(values)
    return files if found else files | {"preprocessor_config.json": _json(new)}


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise NpvlmError(f"{name} is no JSON object; copy it again.")
    return values


def _made_files(config: Config) -> dict[str, Small]:
    """What stands in a published folder and follows from config.json."""
    vision = config.vision_config
    return {
        "preprocessor_config.json": _json(preprocessor_values(vision.image_size, vision.patch_size))
    }


def _with_tokenizer(source: Source, tokenizer: Path) -> dict[str, Small]:
    """The small files with another vocabulary, and the tokens that it lacks.

    Raises
    ------
    NpvlmError
        For what is no vocabulary, or that of another model.
    """
    if tokenizer.is_file() and tokenizer.stat().st_size > LARGEST_COPIED:
        raise NpvlmError(f"{tokenizer} is too large for a SentencePiece model.")
    complete_tokenizer(tokenizer, source.config)
    added = tokens_to_add(tokenizer, source.config)
    files = {TOKENIZER: content_of(tokenizer), "added_tokens.json": _json(added)}
    others = {n: content for n, content in source.files.items() if n not in _WITH_A_TOKENIZER}
    return others | files


def _small_files(folder: Path) -> dict[str, Small]:
    """Vocabulary, settings, licence, mask decoder: what goes with the weights as it is."""
    found = {}
    for file in sorted(folder.iterdir()):
        weights = any(file.match(kind) for kind in ("*.safetensors", *OTHER_FORMATS))
        written = file.name.endswith(".index.json") or file.name == "config.json"
        if weights or written or file.name.startswith(".") or not file.is_file():
            continue
        if file.stat().st_size <= LARGEST_COPIED:
            found[file.name] = file
    return found | _mask_decoder(folder)


def _mask_decoder(folder: Path) -> dict[str, Small]:
    """The file that the source paints masks with, from its folder or beside it, if any."""
    try:
        file = find_mask_decoder(folder)
    except NpvlmError:
        return {}
    return {file.name: file} if file.stat().st_size <= LARGEST_COPIED else {}


def content_of(file: Small) -> bytes:
    """What is to be written of a small file."""
    return file if isinstance(file, bytes) else read_small(file, LARGEST_COPIED)


def size_of(file: Small) -> int:
    """Its bytes."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
