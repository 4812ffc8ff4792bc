"""Where a model lies, and its weights opened at a precision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from npvlm.computing import TURNS
from npvlm.config import PRECISIONS, Config, parse_config, read_config, read_json
from npvlm.errors import NpvlmError, UsageError
from npvlm.files import hub
from npvlm.files.adapters import Adapter
from npvlm.files.big_vision import (
    TOKENIZERS,
    Turned,
    convert_command,
    find_npz,
    find_tokenizer,
    open_big_vision,
)
from npvlm.files.checkpoint import open_checkpoint
from npvlm.files.links import refuse_links_out
from npvlm.files.memory import check_memory
from npvlm.files.needs import made_bytes, working_bytes
from npvlm.files.packed import at_precision
from npvlm.files.pictures import Preprocessor, parse_preprocessor, read_preprocessor
from npvlm.files.published import preprocessor_values
from npvlm.files.tokenizer import Tokenizer, complete_tokenizer, load_tokenizer
from npvlm.model import ops as definitions
from npvlm.model.weights import PACKERS, Packer, Weight, Weights

BUNDLED = Path(__file__).parent / "bundled"


def find_place(model: str | Path) -> Path:
    """The folder of a model, or the .npz file of big_vision that it is or holds.

    The folder is a bundled one, a checkpoint folder, or one in the hub's cache. A bundled one is
    as it was installed; any other may be a stranger's.

    Raises
    ------
    NpvlmError
        Where there is none, or a link in it leads out of it.
    """
    bundled = sorted(path.name for path in BUNDLED.iterdir() if (path / "config.json").is_file())
    folder = BUNDLED / model if str(model) in bundled else Path(model).expanduser()
    if str(model) and (file := find_npz(folder)):
        return file
    try:
        found = folder.is_dir() and str(model) != ""
    except OSError:  # a name too long for a file
        found = False
    if found:
        if folder.parent != BUNDLED:
            refuse_links_out(folder)
        return folder
    wanted = hub.parse_name(str(model))
    if wanted and (cached := hub.find_cached(wanted)):
        refuse_links_out(cached)
        return cached
    if wanted and wanted.published:
        size = f"{wanted.published.bytes / 1e9:.1f} GB"
        raise NpvlmError(
            f"{model} is not on this machine; `npvlm fetch {model}` brings it ({size})."
        )
    is_file = os.path.isfile(folder)  # noqa: PTH113 (Path.is_file raises where a name is too long)
    what = "is no model, but another file" if is_file else "is no model"
    raise NpvlmError(
        f"{str(model)!r} {what}; expected a bundled one ({', '.join(bundled)}), a folder or .npz "
        "of weights, or one that `npvlm fetch` has brought (`npvlm models` lists those there are)."
    )


def find_folder(model: str | Path) -> Path:
    """The folder of a model, for what needs one.

    Raises
    ------
    NpvlmError
        As `find_place` does, or for an .npz file.
    """
    place = find_place(model)
    if place.is_file():
        raise NpvlmError(
            f"{place} is an .npz file, expected a folder of safetensors; a checkpoint of "
            f"big_vision becomes one by {convert_command(place)}"
        )
    return place


def read_values(place: Path) -> dict[str, Any]:
    """The contents of a model's config.json, or what the arrays of an .npz say it to be."""
    return open_big_vision(place).config if place.is_file() else read_json(place / "config.json")


def read_vocabulary(place: Path) -> tuple[Config, Tokenizer]:
    """Read what a model is and how it spells: from its folder, or an .npz and what lies beside.

    Raises
    ------
    NpvlmError
        In one sentence: what is missing or wrong.
    """
    if place.is_dir():
        config = read_config(place)
        return config, load_tokenizer(place, config)
    config, vocabulary = parse_config(read_values(place), None, f"{place}: "), find_tokenizer(place)
    if vocabulary is None:
        raise NpvlmError(
            f"{place.parent} has no {' or '.join(TOKENIZERS)}, expected one beside {place.name}: "
            "that of any published PaliGemma."
        )
    return config, complete_tokenizer(vocabulary, config)


def read_picture_settings(place: Path, config: Config) -> Preprocessor:
    """Read how a model wants its pictures; one in an .npz, as all published ones do.

    Raises
    ------
    NpvlmError
        In one sentence: what is missing or wrong.
    """
    if place.is_dir():
        return read_preprocessor(place, config)
    vision = config.vision_config
    values = preprocessor_values(vision.image_size, vision.patch_size)
    return parse_preprocessor(values, f"{place}: ", config)


def open_weights(
    place: Path,
    config: Config,
    precision: str | None,
    ops: str,
    adapter: Adapter | None = None,
) -> tuple[Weights, str, ModuleType]:
    """The weights of a model as a precision computes with them, its name, and what computes.

    Parameters and errors are those of `load`.
    """
    precision = _precision(place, config, precision)
    namespace, packers = _namespace(ops)
    file = open_big_vision(place) if place.is_file() else None
    # An .npz gives rows of its weights, as any weight does: nothing more is asked of them here.
    weights = cast("dict[str, Weight]", file.weights) if file else open_checkpoint(place, config)
    if adapter:
        weights = adapter.replace(weights)
    check_fits(place, config, weights, precision)
    if file:
        file.check()
    if not config.quantization:
        with TURNS.take(namespace):
            weights = at_precision(weights, precision, packers)
    weights = {n: w.whole() if isinstance(w, Turned) else w for n, w in weights.items()}
    if adapter:
        weights = adapter.correct(weights)
    return Weights(weights), precision, namespace


def check_fits(
    place: Path, config: Config, weights: Mapping[str, Weight | Turned], precision: str
) -> None:
    """Refuse a model that takes more memory than there is: what is made of its weights, and a run.

    Raises
    ------
    NpvlmError
        With both numbers.
    """
    made = 0 if config.quantization else made_bytes(weights, precision)
    what = f"{place} in {precision}, with one picture," if made else f"{place} with one picture"
    smaller = "convert it on a larger machine" if made else "take a smaller model"
    if place.is_file():
        smaller = f"make a folder of it, whose weights are mapped: {convert_command(place)}"
    check_memory(made + working_bytes(config), what, f"stop other programs, or {smaller}")


def _namespace(ops: str) -> tuple[ModuleType, Mapping[str, Packer]]:
    """What to compute with and what to pack with; numba is imported only by those who use it."""
    if ops == "numpy":
        return definitions, PACKERS
    if ops == "kernels":
        from npvlm import kernels
        from npvlm.kernels import packing

        return kernels, packing.PACKERS
    raise UsageError(f'ops is {ops!r}, expected "kernels" or "numpy".')


def _precision(folder: Path, config: Config, asked: str | None) -> str:
    """What a folder is computed with: what is asked for, if there is that and it fits."""
    if asked is not None and asked not in PRECISIONS:
        raise UsageError(f"precision is {asked!r}, expected one of {', '.join(PRECISIONS)}.")
    packed = config.quantization
    if packed and asked not in (packed, None):
        raise UsageError(
            f"{folder} is packed for {packed}, expected {asked}; name the original checkpoint."
        )
    return packed or asked or "float32"
