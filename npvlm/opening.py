"""Where a model lies, and its weights opened at a precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from npvlm.computing import TURNS
from npvlm.config import PRECISIONS, Config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files import hub
from npvlm.files.adapters import Adapter
from npvlm.files.big_vision import convert_command, find_npz
from npvlm.files.checkpoint import open_checkpoint
from npvlm.files.links import refuse_links_out
from npvlm.files.memory import check_memory
from npvlm.files.needs import packed_bytes, working_bytes
from npvlm.files.packed import at_precision
from npvlm.model import ops as definitions
from npvlm.model.weights import PACKERS, Packer, Weights

BUNDLED = Path(__file__).parent / "bundled"


def find_folder(model: str | Path) -> Path:
    """The folder of a model: a bundled one, a checkpoint folder, or one in the hub's cache.

    A bundled one is as it was installed; any other may be a stranger's.
    """
    bundled = sorted(path.name for path in BUNDLED.iterdir() if (path / "config.json").is_file())
    folder = BUNDLED / model if str(model) in bundled else Path(model).expanduser()
    if str(model) and (file := find_npz(folder)):
        raise NpvlmError(
            f"{file} is an .npz file, expected a folder of safetensors; a checkpoint of big_vision "
            f"becomes one by {convert_command(file)}"
        )
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
    raise NpvlmError(
        f"{str(model)!r} is no model; expected a bundled one ({', '.join(bundled)}), a checkpoint "
        "folder, or one that `npvlm fetch` has brought (`npvlm models` lists those there are)."
    )


def open_weights(
    folder: Path,
    config: Config,
    precision: str | None,
    ops: str,
    adapter: Adapter | None = None,
) -> tuple[Weights, str, ModuleType]:
    """The weights of a folder as a precision computes with them, its name, and what computes.

    Parameters and errors are those of `load`.
    """
    precision = _precision(folder, config, precision)
    namespace, packers = _namespace(ops)
    weights = open_checkpoint(folder, config)
    if adapter:
        weights = adapter.replace(weights)
    packed = 0 if config.quantization else packed_bytes(weights, precision)
    what = f"{folder} in {precision}, with one picture," if packed else f"{folder} with one picture"
    smaller = "convert it on a larger machine" if packed else "take a smaller model"
    check_memory(packed + working_bytes(config), what, f"stop other programs, or {smaller}")
    if not config.quantization:
        with TURNS.take(namespace):
            weights = at_precision(weights, precision, packers)
    if adapter:
        weights = adapter.correct(weights)
    return Weights(weights), precision, namespace


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
