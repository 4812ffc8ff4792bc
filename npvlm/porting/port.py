"""One stage of the reference on a port's own input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from npvlm.api import Model
from npvlm.config import Config
from npvlm.errors import UsageError
from npvlm.files.output import new_file
from npvlm.model.weights import Array
from npvlm.porting.dumps import Dump, open_dump
from npvlm.porting.kinds import plain
from npvlm.porting.layouts import layouts
from npvlm.porting.names import Found, match
from npvlm.porting.replay import replay
from npvlm.porting.stages import row_size, shape_of, stages
from npvlm.porting.statistics import rms

SAME = 1e-5  # relative: what float32 can lose within a layer, and no mistake that is known


def replay_stage(
    stage: str, mine: Path, model: Model, names: Mapping[str, str] | None, save: Path | None
) -> tuple[str, bool]:
    """Compute a stage from what a port has before it, and say how the port's own compares.

    Returns
    -------
    A sentence, and whether the two are the same (or there is nothing to compare).

    Raises
    ------
    UsageError
        For a stage that there is not, or a dump without the stages that lead to it.
    """
    known = [one.name for one in stages(model.config)]
    if stage not in known:
        raise UsageError(f"{stage!r} is no stage of {model.name}; docs/stages.md lists them.")
    given = port_values(open_dump(mine), model.config, names)
    before = {name: value for name, value in given.items() if name != stage}
    computed = replay(before, model.weights, model.config, stage, ops=model.ops)
    if stage not in computed:
        raise UsageError(
            f"{mine} has nothing that {stage} can be computed from; dump the input of its layer."
        )
    value = computed[stage]
    if save is not None:
        with new_file(save) as draft, draft.open("wb") as file:
            np.save(file, value)
    if stage not in given:
        return f"{stage} {list(value.shape)}: rms {rms(value):.6g}; {mine} has none.", True
    error = rms(given[stage].reshape(value.shape) - value) / (rms(value) or 1.0)
    same = error <= SAME
    said = "the same as the reference's" if same else "not what the reference makes"
    return f"{stage}: {said} from the same input (relative error {error:.3g}).", same


def port_values(dump: Dump, config: Config, names: Mapping[str, str] | None) -> dict[str, Array]:
    """The stages of a port in the reference's layout, as plainly as their shapes allow."""
    wanted = {stage.name: stage for stage in stages(config)}
    found = match(list(dump.dtypes), list(wanted))
    found |= {stage: Found(name) for stage, name in (names or {}).items() if stage in wanted}
    values = {}
    for name, place in found.items():
        if place.name not in dump.dtypes:
            raise UsageError(f"{dump.path} has no {place.name!r}, which the map names for {name}.")
        value = dump.read(place.name)
        size = value.size
        if place.part:  # side by side with others
            module = name.rpartition(".")[0]
            rows = [row_size(wanted[f"{module}.{part}"], config) for part in place.part]
            size = size * row_size(wanted[name], config) // sum(rows)
        shape = shape_of(wanted[name], config, size)
        if shape is not None:
            arranged = next(layouts(value, name, shape, config, place.part), None)
            if arranged is not None:
                values[name] = plain(arranged.value)
    return values
