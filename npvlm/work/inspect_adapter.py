"""What an adapter's folder holds, for reading and as plain values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from npvlm.errors import NpvlmError
from npvlm.files.adapters import TENSORS, open_adapter
from npvlm.files.checkpoint import grouped

_LABEL, _WIDTH = 12, 100


@dataclass(frozen=True)
class AdapterInspection:
    """Everything found out about an adapter; where it is refused, that alone.

    corrected : the weights with a correction beside them, and its rank
    brought : the weights that it brings as a whole
    numbers : how many it has of its own; bytes : of its file
    """

    adapter: str
    refusal: str | None
    base: str
    dora: bool
    corrected: dict[str, int]
    brought: list[str]
    numbers: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def inspect_adapter(folder: Path) -> AdapterInspection:
    """Find out what an adapter's folder holds; nothing is refused."""
    try:
        adapter = open_adapter(folder)
    except NpvlmError as error:
        return AdapterInspection(str(folder), str(error), "", False, {}, [], 0, 0)
    whole = [*adapter.trained.values(), *adapter.base_layers.values()]
    return AdapterInspection(
        adapter=str(folder),
        refusal=None,
        base=adapter.base,
        dora=any(c.magnitude is not None for c in adapter.corrections.values()),
        corrected={name: c.rank for name, c in adapter.corrections.items()},
        brought=[*adapter.trained, *adapter.base_layers],
        numbers=sum(c.numbers for c in adapter.corrections.values())
        + sum(tensor.array().size for tensor in whole),
        bytes=(folder / TENSORS).stat().st_size,
    )


def adapter_page(found: AdapterInspection) -> str:
    """An inspection as text: one fact a line."""
    lines: list[str] = []
    for label, text in _facts(found):
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=label.ljust(_LABEL),
            subsequent_indent=" " * _LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _facts(found: AdapterInspection) -> Iterator[tuple[str, str]]:
    yield "adapter", found.adapter
    if found.refusal is not None:
        yield "load", f"would refuse it: {found.refusal}"
        return
    ranks = sorted(set(found.corrected.values()))
    kind = "a DoRA" if found.dora else "a LoRA"
    count = len(found.corrected)
    if ranks:
        said = ", ".join(map(str, ranks))
        yield "kind", f"{kind} of rank {said}, beside {count} weight{'s' * (count != 1)}"
    yield from (("", name) for name in grouped(dict.fromkeys(found.corrected, "")))
    if found.brought:
        yield "brings", f"{len(found.brought)} in place of the model's"
        yield from (("", name) for name in grouped(dict.fromkeys(found.brought, "")))
    yield "base", found.base or "not named"
    yield "size", f"{found.numbers:,} numbers, {found.bytes:,} bytes"
    yield "load", "would open it, with --model for its base and --adapter for this folder"
