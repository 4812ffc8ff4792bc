"""Which models there are, what each needs, and whether this machine has it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from npvlm.config import PACKED, PRECISIONS, Config, parse_config, read_config
from npvlm.errors import NpvlmError
from npvlm.files import hub
from npvlm.files.memory import available_memory
from npvlm.files.needs import weight_bytes, working_bytes
from npvlm.files.output import disk_free
from npvlm.files.published import LICENCE, OWNER, PUBLISHED, STORED, Published, config_values
from npvlm.opening import BUNDLED

OWN_LICENCE = "Apache-2.0"
_OWN_PURPOSES = {"shapes": "a toy in the box: drawn circles, squares, triangles, stars, numbers"}


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes at a precision, and whether this machine has them.

    memory : the weights, and about what a run takes beside them
    disk : what is still to be fetched, and what `npvlm convert` writes of it
    memory_suffices : None where the system does not say what is free
    """

    memory: int
    disk: int
    memory_suffices: bool | None
    disk_suffices: bool


@dataclass(frozen=True)
class Listed:
    """One model. `fetch` is its bytes on the hub, 0 in the box; `here` is "yes", "part" or ""."""

    name: str
    repo: str | None
    revision: str | None
    kind: str
    purpose: str
    licence: str
    parameters: int
    fetch: int
    here: str
    needs: dict[str, Need]


@dataclass(frozen=True)
class Listing:
    """The models that were asked for, and what is free for them: bytes, None where unknown."""

    memory_free: int | None
    disk_free: int
    cache: str
    models: list[Listed]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def list_models(words: tuple[str, ...] = ()) -> Listing:
    """List the bundled models and those that Google published, each group the smallest first.

    Parameters
    ----------
    words : each must be part of the name, or a word of what the model is for
    """
    place = hub.cache_folder()
    free, disk = available_memory(), disk_free(place)
    found = [
        _bundled(path, free, disk)
        for path in sorted(BUNDLED.iterdir())
        if (path / hub.CONFIG).is_file()
    ]
    by_kind = sorted(PUBLISHED.values(), key=lambda model: ("mix", "pt", "ft").index(model.kind))
    found += [_published(model, free, disk) for model in by_kind]
    return Listing(free, disk, str(place), [model for model in found if _matches(model, words)])


def _matches(model: Listed, words: tuple[str, ...]) -> bool:
    said = re.findall(r"\w+", model.purpose.lower())
    return all(word.lower() in model.name or word.lower() in said for word in words)


def _bundled(folder: Path, free: int | None, disk: int) -> Listed:
    config = read_config(folder)
    parameters = weight_bytes(config, "float32", 1)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // parameters
    return Listed(
        name=folder.name,
        repo=None,
        revision=None,
        kind="bundled",
        purpose=_OWN_PURPOSES.get(folder.name, "in the box"),
        licence=OWN_LICENCE,
        parameters=parameters,
        fetch=0,
        here="yes",
        needs=_needs(config, stored, 0, free, disk),
    )


def _published(model: Published, free: int | None, disk: int) -> Listed:
    here = _state(model)
    return Listed(
        name=model.name,
        repo=model.repo,
        revision=model.revision,
        kind=model.kind,
        purpose=model.purpose,
        licence=LICENCE,
        parameters=model.parameters,
        fetch=model.bytes,
        here=here,
        needs=_needs(
            _config(model.size, model.resolution),
            STORED,
            0 if here == "yes" else model.bytes,
            free,
            disk,
        ),
    )


@cache
def _config(size: str, resolution: int) -> Config:
    return parse_config(config_values(size, resolution))


def _needs(config: Config, stored: int, fetch: int, free: int | None, disk: int) -> dict[str, Need]:
    found = {}
    for precision in PRECISIONS:
        weights, beside = _takes(config, precision, stored)
        memory = weights + beside
        on_disk = fetch + (weights if precision in PACKED else 0)
        suffices = None if free is None else memory <= free
        found[precision] = Need(memory, on_disk, suffices, on_disk <= disk)
    return found


@cache  # many models have the same sizes
def _takes(config: Config, precision: str, stored: int) -> tuple[int, int]:
    return weight_bytes(config, precision, stored), working_bytes(config)


def _state(model: Published) -> str:
    """Whether a model is in the hub's cache: "yes", "part" or "" for no."""
    try:
        return "yes" if hub.find_cached(hub.Wanted(f"{OWNER}/{model.name}", None)) else ""
    except NpvlmError:
        return "part"
