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
from npvlm.porting.compare import LIMIT, STORED
from npvlm.porting.dumps import Dump, open_dump
from npvlm.porting.floors import LEAST, less_exact
from npvlm.porting.kinds import plain
from npvlm.porting.layouts import layouts
from npvlm.porting.names import Found, found_in
from npvlm.porting.replay import replay
from npvlm.porting.stages import PICTURE, TEXT, row_size, shape_of, stages
from npvlm.porting.statistics import rms

INPUTS = tuple(name for name, _, _ in PICTURE)


def replay_stage(
    stage: str,
    mine: Path,
    model: Model,
    names: Mapping[str, str] | None,
    save: Path | None,
    precision: str | None = None,
) -> tuple[str, bool]:
    """Compute a stage from what a port has before it, and say how the port's own compares.

    Parameters
    ----------
    precision : what the port computes in; by default what the stage is stored in

    Returns
    -------
    A sentence, and whether the two are the same (or there is nothing to compare).

    Raises
    ------
    UsageError
        For a stage that there is not or that nothing computes, a decoding step, or a dump without
        the stages that lead to it.
    """
    known = {one.name: one for one in stages(model.config)}
    if stage not in known:
        raise UsageError(f"{stage!r} is no stage of {model.name}; docs/stages.md lists them.")
    if stage in INPUTS:
        raise UsageError(f"{stage} is what a run begins with; name a stage that is computed.")
    dump = open_dump(mine)
    found = found_in(list(dump.dtypes), list(known), names, mine)
    given = port_values(dump, model.config, found)
    if any(name.startswith(TEXT) and len(value) == 1 for name, value in given.items()):
        raise UsageError(
            f"{mine} is of one token, a decoding step, whose layers read the cache, which no stage "
            "shows; replay takes a dump of the prefill."
        )
    before = {name: value for name, value in given.items() if name != stage}
    computed = replay(before, model.weights, model.config, stage, ops=model.ops)
    if stage not in computed:
        raise UsageError(
            f"{mine} has nothing that {stage} of {model.name} can be computed from; dump the input "
            "of its layer, and name the right model with --model."
        )
    value = computed[stage]
    if save is not None:
        with new_file(save) as draft, draft.open("wb") as file:
            np.save(file, value)
    place = found.get(stage)
    if place is None:
        return f"{stage} {list(value.shape)}: rms {rms(value):.6g}; {mine} has none.", True
    precision = precision or STORED.get(dump.dtypes[place.name], "float32")
    weights, namespace, to = less_exact(model, precision)
    rougher = replay(before, weights, model.config, stage, ops=namespace)[stage]
    floor = max(_missed(to(rougher), value), LEAST)
    own = dump.read(place.name)
    read = [plain(one.value) for one in layouts(own, stage, value.shape, model.config, place.part)]
    if not read:
        return f"{stage} is {list(own.shape)}, expected {list(value.shape)}.", False
    error = min(_missed(one, value) for one in read)
    same = error <= LIMIT * floor
    said = "the same as the reference's" if same else "not what the reference makes"
    return (
        f"{stage}: {said} from the same input (relative error {error:.3g}, {error / floor:.3g} "
        f"times the {precision} floor)."
    ), same


def _missed(value: Array, expected: Array) -> float:
    size = rms(expected)
    return rms(value.astype(np.float64) - expected) / size if size else float(value.any())


def port_values(dump: Dump, config: Config, found: Mapping[str, Found]) -> dict[str, Array]:
    """The stages of a port in the reference's layout, as plainly as their shapes allow."""
    wanted = {one.name: one for one in stages(config)}
    values = {}
    for name, place in found.items():
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
