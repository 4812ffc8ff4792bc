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

from npvlm.api import Model, load
from npvlm.config import Config, parse_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.model.weights import Array
from npvlm.opening import find_place, read_values
from npvlm.porting.dumps import Dump, open_dump
from npvlm.porting.floors import LEAST
from npvlm.porting.kinds import Kind, best_scale, kind_of, plain
from npvlm.porting.layouts import FROM_ZERO, PAIRS, Layout, layouts
from npvlm.porting.names import Found, found_in, suggest, unmatched
from npvlm.porting.replay import replay
from npvlm.porting.stages import EXACT, SCHEMA, chosen, fits, stages
from npvlm.porting.statistics import rms, sketch
from npvlm.porting.suspects import Context, Finding, accuse

# Errors of correct ports are up to 1.6 times the floor, 3.4 where sines are rounded to float16 too;
# those of mistakes are beyond it by orders of magnitude. golden/planted.py measures both.
LIMIT = 5.0

LOGITS = "language_model.logits"
UNUSED = 64  # rows that a table may have behind its last token, or lack

BAD = ("DIFF", "SHAPE", "NAN")
MOST_NAMED = 3  # of several stages, in a sentence

STORED = {"BF16": "bfloat16", "F16": "float16"}  # what a port that stores so computes in


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
    """The whole comparison.

    run : of which model and prompt the reference is
    unread : names in the port's dump that are no stage's, each with the one it may be meant for
    """

    reference: str
    mine: str
    run: str
    precision: str
    rows: list[Row]
    unread: dict[str, str | None]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "reference": self.reference,
            "mine": self.mine,
            "as": self.precision,
            "limit": LIMIT,
            "stages": [_finite(asdict(row)) for row in self.rows],
            "unread": list(self.unread),
            "verdict": _finite(asdict(self.verdict)),
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same without numbers that JSON has not: an infinite error is null there."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
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
    precision : what the port computes in; by default what most of its arrays are stored in, and
        for a single array what that is stored in, if that holds less
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
            f"{model.called} is not the model of {reference}, expected one whose config.json is "
            f"that of {_called(truth.manifest)}; name it with --model, or none."
        )
    described = truth.described()
    _check_shapes(reference, described, config)
    asked = [name for name in described if chosen(name, only)]
    if not asked:
        raise UsageError(f"{only!r} names no stage of {reference}; docs/stages.md lists them.")
    held = list(port.dtypes) or list(port.described())
    found = found_in(held, list(described), names, mine)
    if not any(name in found for name in asked):
        raise UsageError(_nothing_in_common(mine, held, found, list(described)))
    told, precision = precision, precision or _claimed(port, found)

    def judging(stage: str) -> str:
        stored = STORED.get(port.dtypes.get(found[stage].name, "")) if stage in found else None
        return stored or precision if told is None else told

    # A replay reads what the port shows elsewhere, too.
    entries = {n: e for n, e in described.items() if n in asked or (replayed and n in found)}
    if replayed and truth.manifest["step"]:
        raise UsageError(
            f"{reference} shows decoding step {truth.manifest['step']}, whose layers read the "
            "cache, which no stage shows; --replay takes a trace of the prefill."
        )

    judged = {
        stage: _judge(stage, entry, found.get(stage), truth, port, config, judging(stage))
        for stage, entry in entries.items()
    }
    for stage, refused in _alone({stage: row for stage, (row, _) in judged.items()}):
        entry = entries[stage]
        judged[stage] = _judge(
            stage, entry, found.get(stage), truth, port, config, judging(stage), refused
        )
    rows = [row for row, _ in judged.values()]
    values = {stage: value for stage, (_, value) in judged.items() if value is not None}
    if replayed:
        if model is None:
            raise UsageError(
                f"the model of {reference} ({_called(truth.manifest)}) is not there, which a "
                "replay runs; name it with --model."
            )
        rows = _localised(rows, values, model)
    rows = [row for row in rows if row.stage in asked]
    verdict = _verdict(rows, values, truth, port, config, precision, complete, model)
    if (other := _other_run(truth.manifest, port.manifest)) and not verdict.same:
        verdict = replace(verdict, sentence=f"{other} {verdict.sentence}")
    unread = {name: _meant(name, found, described) for name in unmatched(held, found)}
    run = f"{_called(truth.manifest)}, {truth.manifest.get('prompt')!r}"
    return Report(str(reference), str(mine), run, precision, rows, unread, verdict)


def _check_shapes(
    reference: Path, described: Mapping[str, Mapping[str, Any]], config: Config
) -> None:
    """Refuse a manifest whose stages are not those of its own config."""
    known = {one.name: one for one in stages(config)}
    for name, entry in described.items():
        if name not in known or not fits(known[name], config, entry["shape"]):
            raise NpvlmError(
                f"{reference}: {name!r:.80} is {entry['shape']!r:.60}, which no stage is in a "
                "model of the config in its manifest; write the trace anew."
            )


def model_of(reference: Path) -> Model | None:
    """The model that a reference names, if it is there and has that config.

    A relative folder may be one from where we are, or from a folder that the reference lies in: a
    kit holds its models and its goldens side by side.
    """
    notes = open_dump(reference).manifest
    if notes is None:
        return None
    around = reference.expanduser().resolve().parents
    named = notes.get("adapter")
    for up in (Path(), *around):
        place = notes["model"] if up == Path() else str(up / notes["model"])
        try:
            model = load(place, ops="numpy", adapter=up / named if named else None)
        except NpvlmError:
            continue
        if _is_of(notes, model):
            return model
    return None


def _other_run(notes: Mapping[str, Any], mine: Mapping[str, Any] | None) -> str | None:
    """In what two traces are of different runs, as far as their manifests tell."""
    if mine is None:
        return None
    for what in ("prompt", "step", "answer"):
        if notes.get(what) != mine.get(what):
            return f"These are two runs: {what} {notes.get(what)!r:.80} and {mine.get(what)!r:.80}."
    pictures = [(run.get("image") or {}).get("sha256") for run in (notes, mine)]
    return "These are runs on two pictures." if pictures[0] != pictures[1] else None


def _called(notes: Mapping[str, Any]) -> str:
    """The model of a trace, with its adapter."""
    adapter = notes.get("adapter")
    return f"{notes['model']} with --adapter {adapter}" if adapter else str(notes["model"])


def _is_of(notes: Mapping[str, Any], model: Model) -> bool:
    """Whether a trace is of a model, as far as its config tells, and with an adapter as it is."""
    same: bool = read_values(find_place(model.name)) == notes["config"]
    return same and (notes.get("adapter") is None) == (model.adapter is None)


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
    """The precision that most of a port's arrays are stored in."""
    stored = [port.dtypes.get(place.name) for place in found.values()]
    for kind, name in STORED.items():
        if stored.count(kind) > sum(one in ("F32", "F64") for one in stored):
            return name
    return "float32"


def _meant(name: str, found: Mapping[str, Found], described: Mapping[str, Any]) -> str | None:
    """The stage that is not in a dump and that one of its unknown names may be meant for."""
    near = suggest(name, (stage for stage in described if stage not in found))
    return near[0] if near else None


def _nothing_in_common(
    mine: Path, held: list[str], found: Mapping[str, Found], described: list[str]
) -> str:
    if found:
        return (
            f"{mine} holds {len(found)} stages, such as {next(iter(found))}, but none of those "
            "that are asked for; name others with --only."
        )
    hint = f"such as {held[0]!r}" if held else "none at all"
    near = suggest(held[0], described) if held else []
    like = f" (is that {near[0]}?)" if near else ""
    return (
        f"{mine} holds {len(held)} arrays, {hint}, and none has a name that is known as a stage's"
        f"{like}; rename them as docs/stages.md does, or name them with --map."
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
    left_out = ""
    if stage == LOGITS and expected is not None:
        filled = _with_all_columns(value, expected)
        if filled is not value:
            left_out = f"{filled.shape[-1] - value.shape[-1]} unused columns left out"
            value = filled
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
    how = ", ".join(filter(None, (best[1].how, left_out)))
    row = replace(row, status=status, layout=how, error=error, over=over, scale=scale)
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
        sentence = f"Missing in the dump: {_list(missing)}."
        return Verdict(False, missing[0], "missing", None, None, None, sentence)
    if first is None:
        return _agreement(rows, precision)
    kind, cause = _explain(first, values.get(first.stage), truth, port, config, values, model)
    sentence = _sentence(first, kind, cause, precision)
    others = [row.stage for row in rows if row.local_over is not None and _is_wrong(row)]
    if first.stage in others and len(others) > 1:
        sentence += f" Wrong by themselves, too: {_list(others[1:])}."
    if model is None and cause is None and kind.name == "numeric" and first.stage not in EXACT:
        sentence += (
            " Causes that only weights can show were not tried: name the reference's model with "
            "--model."
        )
    if missing:
        sentence += f" Not in the dump: {_list(missing)}."
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
        return Kind("nan", _broken(broken)), None
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


def _list(names: list[str]) -> str:
    """Some of several names, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _broken(value: Array) -> str:
    """How many numbers are nan, how many infinite, and where the first is."""
    nan, infinite = np.isnan(value), np.isinf(value)
    counts = [(int(nan.sum()), "nan"), (int(infinite.sum()), "infinite")]
    said = " and ".join(f"{count:,} {what}" for count, what in counts if count)
    first = np.unravel_index(int(np.argmax(nan | infinite)), value.shape)
    place = ", ".join(str(int(i)) for i in first)
    return f"{said} among {value.size:,} numbers, the first at [{place}]"


def _sentence(row: Row, kind: Kind, cause: Finding | None, precision: str) -> str:
    """The verdict in words."""
    parts = [f"The first stage that differs is {row.stage} ({kind.name})"]
    if row.over is not None:
        parts.append(f"{row.over:,.3g} times the {precision} floor there")
    if kind.detail:
        parts.append(kind.detail)
    text = "; ".join(parts) + "."
    if cause is not None:
        text += f" Likely cause: {cause.sentence}"
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
    if len(compared) < len(rows):
        missing = [row.stage for row in rows if row.status == "MISSING"]
        sentence += f" Not in the dump: {_list(missing)}."
    return Verdict(True, None, None, worst, None, None, sentence)
