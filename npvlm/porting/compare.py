"""Another program's run held against the reference, stage by stage, and one verdict.

Errors are relative: the root mean square of the difference over that of the reference. They are
judged by the noise floor of the stage, in the precision that the port claims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.api import Model, find_folder, load
from npvlm.config import Config, parse_config, read_json
from npvlm.errors import NpvlmError, UsageError
from npvlm.model.weights import Array
from npvlm.porting.dumps import Dump, open_dump
from npvlm.porting.floors import LEAST
from npvlm.porting.kinds import Kind, best_scale, kind_of, plain
from npvlm.porting.layouts import FROM_ZERO, PAIRS, Layout, layouts
from npvlm.porting.names import Found, match, suggest
from npvlm.porting.replay import replay
from npvlm.porting.stages import EXACT, SCHEMA, chosen
from npvlm.porting.statistics import rms, sketch
from npvlm.porting.suspects import Context, Finding, accuse

# Errors of correct ports are up to 1.6 times the floor, 3.4 where sines are rounded to float16 too;
# those of mistakes are beyond it by orders of magnitude. golden/planted.py measures both.
LIMIT = 5.0

LOGITS = "language_model.logits"
UNUSED = 64  # rows that a table may have behind its last token, or lack

BAD = ("DIFF", "SHAPE", "NAN")


@dataclass(frozen=True)
class Row:
    """What was found of one stage.

    status : "OK", "DIFF", "SHAPE", "MISSING" or "NAN"
    name : of the array in the port's dump
    layout : in which way it was read, "" for as it is
    error : relative; over: how many times the floor that is; scale: the best fit of the port's
        values as a multiple of the reference's
    local_over : the same with the port's own input, where that was there
    """

    stage: str
    status: str
    name: str | None = None
    layout: str = ""
    shape: tuple[int, ...] = ()
    mine_shape: tuple[int, ...] | None = None
    error: float | None = None
    floor: float | None = None
    over: float | None = None
    scale: float | None = None
    local_over: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The first stage that is wrong, in which way, and the likely cause."""

    same: bool
    stage: str | None
    kind: str | None
    over: float | None
    scale: float | None
    cause: str | None
    sentence: str


@dataclass(frozen=True)
class Report:
    """The whole comparison."""

    reference: str
    mine: str
    precision: str
    rows: list[Row]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "reference": self.reference,
            "mine": self.mine,
            "as": self.precision,
            "limit": LIMIT,
            "stages": [asdict(row) for row in self.rows],
            "verdict": asdict(self.verdict),
        }


def compare(
    reference: Path,
    mine: Path,
    *,
    precision: str | None = None,
    names: Mapping[str, str] | None = None,
    only: str | None = None,
    complete: bool = False,
    model: Model | None = None,
    replayed: bool = False,
) -> Report:
    """Hold a port's dump against a reference trace.

    Parameters
    ----------
    reference : a trace that npvlm saved, compact or not
    mine : the port's dump in any form that `dumps.open_dump` reads
    precision : what the port computes in; by default what its arrays are stored in
    names : for a stage the name of the port's array, before any name is guessed
    only : comma-separated globs of stages
    complete : whether a missing stage is a difference
    model : the reference's model, for replays and for causes that only weights can show
    replayed : whether to tell local from inherited error; takes the model

    Raises
    ------
    UsageError
        Where the two have nothing in common, or the reference is no trace.
    NpvlmError
        For a file that cannot be read.
    """
    truth, port = open_dump(reference), open_dump(mine)
    if truth.manifest is None:
        raise UsageError(
            f"{reference} is no reference, expected a trace with its manifest, as `npvlm trace "
            "--save` writes them."
        )
    config = parse_config(truth.manifest["config"])
    if model is not None and not _is_of(truth.manifest, model):
        raise UsageError(
            f"{model.name} is not the model of {reference}, expected one whose config.json is "
            f"that of {truth.manifest['model']}; name it with --model, or none."
        )
    entries = {n: e for n, e in truth.described().items() if chosen(n, only)}
    if not entries:
        raise UsageError(f"{only!r} names no stage of {reference}; docs/stages.md lists them.")
    held = list(port.dtypes) or list(port.described())
    found = match(held, list(entries))
    for stage, name in (names or {}).items():
        if stage in entries:
            if name not in held:
                raise UsageError(f"{mine} has no {name!r}, which the map names for {stage}.")
            found[stage] = Found(name)
    if not found:
        raise UsageError(_nothing_in_common(mine, held, list(entries)))
    precision = precision or _claimed(port, found)

    judged = {
        stage: _judge(stage, entry, found.get(stage), truth, port, config, precision)
        for stage, entry in entries.items()
    }
    for stage, refused in _alone({stage: row for stage, (row, _) in judged.items()}):
        entry = entries[stage]
        judged[stage] = _judge(
            stage, entry, found.get(stage), truth, port, config, precision, refused
        )
    rows = [row for row, _ in judged.values()]
    values = {stage: value for stage, (_, value) in judged.items() if value is not None}
    if replayed:
        if model is None:
            raise UsageError(
                f"the model of {reference} ({truth.manifest['model']}) is not there, which a "
                "replay runs; name it with --model."
            )
        rows = _localised(rows, values, model)
    verdict = _verdict(rows, values, truth, port, config, precision, complete, model)
    return Report(str(reference), str(mine), precision, rows, verdict)


def model_of(reference: Path) -> Model | None:
    """The model that a reference names, if it is there and has that config."""
    notes = open_dump(reference).manifest
    if notes is None:
        return None
    try:
        model = load(notes["model"], ops="numpy")
    except NpvlmError:
        return None
    return model if _is_of(notes, model) else None


def _is_of(notes: Mapping[str, Any], model: Model) -> bool:
    """Whether a trace is of a model, as far as its config tells."""
    same: bool = read_json(find_folder(model.name) / "config.json") == notes["config"]
    return same


def _alone(rows: Mapping[str, Row]) -> Iterator[tuple[str, str]]:
    """Queries or keys that were read by a convention of RoPE which the others do not follow.

    Scores do not depend on such a convention if both follow it, and are wrong if one does.
    """
    for stage, row in rows.items():
        keys = stage.replace("q_rope", "k_rope")
        if keys != stage and keys in rows and "MISSING" not in (row.status, rows[keys].status):
            for convention in (PAIRS, FROM_ZERO):
                queried, keyed = convention in row.layout, convention in rows[keys].layout
                if queried != keyed:
                    yield (stage if queried else keys), convention


def _claimed(port: Dump, found: Mapping[str, Found]) -> str:
    """The precision that a port's arrays are stored in."""
    stored = [port.dtypes.get(place.name) for place in found.values()]
    for kind, name in (("BF16", "bfloat16"), ("F16", "float16")):
        if kind in stored:
            return name
    return "float32"


def _nothing_in_common(mine: Path, held: list[str], wanted: list[str]) -> str:
    hint = f"such as {held[0]!r}" if held else "none at all"
    near = suggest(held[0], wanted) if held else []
    like = f"; is that {near[0]}?" if near else ""
    return (
        f"{mine} holds {len(held)} arrays, {hint}, and none has a name that is known as a stage's"
        f"{like} Rename them as docs/stages.md does, or name them with --map."
    )


def _judge(
    stage: str,
    entry: Mapping[str, Any],
    found: Found | None,
    truth: Dump,
    port: Dump,
    config: Config,
    precision: str,
    refused: str | None = None,
) -> tuple[Row, Array | None]:
    """Compare one stage; also the port's value in the reference's layout, if it has one.

    refused : a convention by which it is not to be read
    """
    shape = tuple(entry["shape"])
    row = Row(stage, "MISSING", shape=shape)
    if found is None:
        return row, None
    floor = 0.0 if stage in EXACT else entry.get("floors", {}).get(precision, LEAST)
    row = replace(row, name=found.name, floor=floor)
    if found.name not in port.dtypes:  # a compact dump
        return _judge_sketch(row, entry, port.described()[found.name]), None
    value = port.read(found.name)
    row = replace(row, mine_shape=value.shape)
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        return replace(row, status="NAN"), None
    expected = truth.read(stage) if stage in truth.dtypes else None
    if stage == LOGITS and expected is not None:
        value = _with_all_columns(value, expected)
    best: tuple[float, Layout] | None = None
    for layout in layouts(value, stage, shape, config, found.part):
        if refused is not None and refused in layout.how:
            continue
        if _error(layout.value, expected, entry) <= LIMIT * floor:
            best = 0.0, layout
            break
        # Where none is right, another has to fit much better than the plainest, or chance chooses.
        unlike = _unlikeness(layout.value, expected, entry)
        if best is None or unlike < best[0] / 2:
            best = unlike, layout
    if best is None:
        return replace(row, status="SHAPE"), None
    arranged = best[1].value
    error = _error(arranged, expected, entry)
    scale = None if expected is None else best_scale(arranged, expected)
    status = "OK" if error <= LIMIT * floor else "DIFF"
    over = error / floor if floor else None
    row = replace(row, status=status, layout=best[1].how, error=error, over=over, scale=scale)
    return row, arranged


def _with_all_columns(value: Array, expected: Array) -> Array:
    """Scores of a smaller vocabulary, filled up: published tables have 64 unused rows more."""
    short = expected.shape[-1] - value.shape[-1] if value.ndim else 0
    if not 0 < short <= UNUSED:
        return value
    rest = np.broadcast_to(expected[0, -short:], (*value.shape[:-1], short))
    return np.concatenate([value, rest.astype(value.dtype)], axis=-1)


def _judge_sketch(row: Row, entry: Mapping[str, Any], other: Mapping[str, Any]) -> Row:
    """Compare two stages of which the port's is known by its statistics alone."""
    row = replace(row, mine_shape=tuple(other["shape"]))
    if math.prod(other["shape"]) != math.prod(row.shape):
        return replace(row, status="SHAPE")
    error = _sketched(np.array(other["sketch"]), entry)
    floor = row.floor or 0.0
    status = "OK" if error <= LIMIT * max(floor, LEAST) else "DIFF"
    return replace(row, status=status, error=error, over=error / floor if floor else None)


def _unlikeness(value: Array, expected: Array | None, entry: Mapping[str, Any]) -> float:
    """The relative error that is left when a factor is allowed for: of a layout, not of a value."""
    own = sketch(value) if expected is None else value.reshape(-1).astype(np.float64)
    other = np.array(entry["sketch"]) if expected is None else expected.reshape(-1)
    scale = best_scale(own, other)
    size = float(np.linalg.norm(own))
    if scale is None or not size:
        return 1.0
    return float(np.linalg.norm(own - scale * other)) / size


def _error(value: Array, expected: Array | None, entry: Mapping[str, Any]) -> float:
    if expected is None:
        return _sketched(sketch(value), entry)
    size = rms(expected)
    missed = rms(value.astype(np.float64) - expected)
    return missed / size if size else (0.0 if missed == 0 else math.inf)


def _sketched(own: Array, entry: Mapping[str, Any]) -> float:
    """The error that the difference of two sketches tells of."""
    missed = float(np.linalg.norm(own - np.array(entry["sketch"])))
    size = entry["rms"] * math.sqrt(math.prod(entry["shape"]))
    return missed / size if size else (0.0 if missed == 0 else math.inf)


def _localised(rows: list[Row], values: Mapping[str, Array], model: Model) -> list[Row]:
    """The same rows with the error each stage adds to what went into it."""
    given = {name: plain(value) for name, value in values.items()}
    computed = replay(given, model.weights, model.config, ops=model.ops)
    local = []
    for row in rows:
        if row.stage in computed and row.stage in given and row.floor:
            expected = computed[row.stage].reshape(given[row.stage].shape)
            size = rms(expected)
            error = rms(given[row.stage] - expected) / size if size else math.inf
            row = replace(row, local_over=error / row.floor)
        local.append(row)
    return local


def _verdict(
    rows: list[Row],
    values: Mapping[str, Array],
    truth: Dump,
    port: Dump,
    config: Config,
    precision: str,
    complete: bool,
    model: Model | None,
) -> Verdict:
    """Name the first stage that is wrong."""
    first = next((row for row in rows if _is_wrong(row)), None)
    missing = [row.stage for row in rows if row.status == "MISSING"]
    if first is None and complete and missing:
        sentence = f"{missing[0]} is missing, with {len(missing) - 1} more stages."
        return Verdict(False, missing[0], "missing", None, None, None, sentence)
    if first is None:
        return _agreement(rows, precision)
    kind, cause = _explain(first, values.get(first.stage), truth, port, config, values, model)
    sentence = _sentence(first, kind, cause, precision, missing)
    named = kind.name if kind.name in ("nan", "constant") else None
    return Verdict(
        False,
        first.stage,
        kind.name,
        first.over,
        first.scale,
        cause.id if cause else named,
        sentence,
    )


def _explain(
    row: Row,
    value: Array | None,
    truth: Dump,
    port: Dump,
    config: Config,
    values: Mapping[str, Array],
    model: Model | None,
) -> tuple[Kind, Finding | None]:
    """In which way a stage is wrong, and what would make it so."""
    if row.status == "NAN":
        broken = port.read(row.name or "")
        count = int(broken.size - np.isfinite(broken).sum())
        return Kind("nan", f"{count:,} of {broken.size:,} numbers are not finite"), None
    if row.status == "SHAPE":
        shapes = f"it is {list(row.mine_shape or ())}, expected {list(row.shape)} or a known layout"
        kind = Kind("shape", f"{shapes} of it")
        if row.stage != "input_ids":
            return kind, None
        ids = plain(port.read(row.name or "").reshape(-1))  # one too many or too few tells a cause
        return kind, accuse(row.stage, ids, Context(truth, config, model, values, 0.0))
    if value is None:  # compact dumps
        return Kind("numeric", ""), None
    floor = max(row.floor or 0.0, LEAST)
    original = port.dtypes.get(row.name or "", "F32")
    kind = kind_of(row.stage, plain(value), original, truth, floor, config)
    if kind.name in ("constant", "dtype"):
        return kind, None
    return kind, accuse(row.stage, plain(value), Context(truth, config, model, values, floor))


def _sentence(
    row: Row, kind: Kind, cause: Finding | None, precision: str, missing: list[str]
) -> str:
    """The verdict in words."""
    parts = [f"The first stage that differs is {row.stage} ({kind.name})"]
    if row.over is not None:
        parts.append(f"{row.over:,.3g} times the {precision} floor there")
    if kind.detail:
        parts.append(kind.detail)
    text = "; ".join(parts) + "."
    if cause is not None:
        text += f" Likely cause: {cause.sentence}"
    if missing:
        text += f" ({len(missing)} stages were not in the dump.)"
    return text


def _is_wrong(row: Row) -> bool:
    """Whether a stage is wrong by itself, as far as is known."""
    if row.status == "DIFF" and row.local_over is not None:
        return row.local_over > LIMIT
    return row.status in BAD


def _agreement(rows: list[Row], precision: str) -> Verdict:
    compared = [row for row in rows if row.status != "MISSING"]
    drifting = [row for row in compared if row.status == "DIFF"]
    worst = max((row.over or 0.0 for row in compared), default=0.0)
    if drifting:
        sentence = (
            f"No stage is wrong by itself, but the error adds up: from {drifting[0].stage} on it "
            f"is over {LIMIT:g} times the {precision} floor, at most {worst:.3g} times."
        )
        return Verdict(False, drifting[0].stage, "numeric", worst, None, None, sentence)
    sentence = (
        f"The same: {len(compared)} of {len(rows)} stages compared, the worst at {worst:.2g} times "
        f"the {precision} floor."
    )
    return Verdict(True, None, None, worst, None, None, sentence)
