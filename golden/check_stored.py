"""Make the stored goldens anew, compare them, and table npvlm's errors beside their limits.

python golden/check_stored.py (`check.py` does the same among the rest). Needs
golden/requirements.txt. Exit code 0: no difference; 1: differences, each in a line.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from safetensors.numpy import load_file

import npvlm
from golden import beam_cases, make, op_cases, oracle, our_ops, ours
from golden.make import GOLDEN
from golden.oracle import RECIPES, Case
from npvlm import kernels
from npvlm.model import ops as definitions

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """What one operation's case, or one stage of a model, is off by, and what it may be."""

    torchs: float
    definitions: float
    kernels: float | None  # None where they do not show it
    limit: float
    float64: float  # the definitions
    limit_float64: float


def main() -> int:
    """Check, and say what differs; the exit code is the verdict."""
    oracle.quiet(threads=1)
    differences = check()
    for difference in differences:
        print(f"DIFFERENT  {difference}")
    print(f"{'DIFFERENT' if differences else 'EQUAL'}: the stored goldens")
    return 1 if differences else 0


def check() -> list[str]:
    """Regenerate everything, print the tables, and give every difference in words."""
    differences = compare_ops()
    beams = json.loads((GOLDEN / "beams.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        for recipe in (recipe for recipe in RECIPES if recipe.name in make.NAMES):
            fresh = oracle.build_checkpoint(Path(folder) / recipe.name, recipe)
            float32 = oracle.load_float32(fresh)
            float64 = oracle.load_float64(float32)
            cases = oracle.cases(fresh, recipe, float32, float64)
            differences += compare_model(recipe.name, fresh, cases)
            searches = make.describe_beams(beam_cases.searches(cases, float32, float64))
            stored = beams["searches"][recipe.name], beams["logits_off"][recipe.name]
            differences += compare_beams(recipe.name, *stored, searches)
    for toy in make.TOYS:
        differences += compare_model(f"{toy}-run", make.BUNDLED / toy, make.toy_cases(toy))

    by_op: dict[str, list[Row]] = {}
    for golden in our_ops.read_ops():
        by_op.setdefault(golden.op, []).append(measure_op(golden))
    differences += show("operation", "cases", by_op)
    names = (*make.NAMES, *(f"{toy}-run" for toy in make.TOYS))
    by_model = {name: measure_model(name) for name in names}
    return differences + show("model", "stages", by_model)


# --- made anew -----------------------------------------------------------------------------------


def compare_ops() -> list[str]:
    """The cases of operations: names, numbers and inputs equal, results as near as rounding is."""
    record, stored = read("ops")
    cases = {f"{case.op}.{case.name}": case for case in op_cases.op_cases()}
    fresh = {f"{name}.{key}": v for name, c in cases.items() for key, v in make.parts(c).items()}
    described = {
        f"{op}.{name}": case for op, own in record["cases"].items() for name, case in own.items()
    }
    differences = unequal("ops", described.keys(), cases.keys())
    for name in described.keys() & cases.keys():
        numbers = json.loads(json.dumps(cases[name].numbers))
        differences += unequal(f"ops, {name}: numbers", described[name]["numbers"], numbers)
    torchs = {name: case.get("torch_float32_error", 0.0) for name, case in described.items()}
    return differences + compare_tensors(
        "ops", stored, fresh, {name: torchs.get(name.rpartition(".")[0], 0.0) for name in stored}
    )


def compare_model(name: str, folder: Path, cases: list[Case]) -> list[str]:
    """A checkpoint's files, ids, answers, pictures and pixels equal, stages as near as rounding."""
    record, stored = read(name)
    expected = {Path(path).name: digest for path, digest in record["sha256"].items()}
    del expected[f"{name}.safetensors"]
    made = make.sums(make.checkpoint_files(folder))
    found = {Path(path).name: digest for path, digest in made.items()}
    differences = unequal(f"{name}, files", expected, found)
    torchs: dict[str, float] = {}
    for number, (case, prompt) in enumerate(zip(cases, record["prompts"], strict=True)):
        fresh = make.describe(case)
        for key in ("prompt", "pictures", "ids", "answer", "text"):
            differences += unequal(f"{name}, prompt {number}, {key}", prompt[key], fresh[key])
        errors = prompt["torch_float32_error"]
        torchs |= {f"{number}.{stage}": error for stage, error in errors.items()}
    return differences + compare_tensors(name, stored, make.tensors_of(cases), torchs)


def compare_beams(
    name: str, stored: list[dict[str, Any]], off: list[float], fresh: list[dict[str, Any]]
) -> list[str]:
    """What beams find is equal, their scores are as near as two programs in float64 are."""
    differences = unequal(f"{name}, beams", len(stored), len(fresh))
    for then, now in zip(stored, fresh, strict=False):
        asked = f"{name}, prompt {now['prompt']}, {now['beams']} beams"
        limit = ours.APART * ours.FINER * 2 * off[now["prompt"]]
        if not abs(then["score"] - now["score"]) <= limit:
            differences.append(f"{asked}: the score is not what transformers gives now")
        differences += unequal(asked, then | {"score": 0}, now | {"score": 0})
    return differences


def compare_tensors(
    name: str, stored: Tensors, fresh: Tensors, torchs: dict[str, float]
) -> list[str]:
    """Those in float64 are as near as two programs are, torch's float32 too, the others equal."""
    differences = unequal(f"{name}, names", stored.keys(), fresh.keys())
    for key in sorted(stored.keys() & fresh.keys()):
        then, now, limit = stored[key], fresh[key], 0.0
        if then.dtype == np.float64:
            limit = ours.limit_float64(torchs[key])
        elif key.endswith(".torch"):
            limit = ours.limit_float32(torchs[key])
        same = (then.dtype, then.shape) == (now.dtype, now.shape)
        if not same or not (np.array_equal(then, now) or our_ops.error(now, then) <= limit):
            differences.append(f"{name}, {key}: it is not what transformers gives now")
    return differences


def unequal(what: str, then: Any, now: Any) -> list[str]:
    return [] if then == now else [f"{what}: stored is {then}, made now is {now}"]


def read(name: str) -> tuple[dict[str, Any], Tensors]:
    record = json.loads((GOLDEN / f"{name}.json").read_text())
    return record, load_file(GOLDEN / f"{name}.safetensors")


# --- npvlm's errors ------------------------------------------------------------------------------


def measure_op(golden: our_ops.OpGolden) -> Row:
    """Run npvlm on a case of an operation."""

    def error(ops: ModuleType, dtype: type) -> float:
        return our_ops.error(our_ops.run(golden, ops, dtype), golden.truth)

    narrow = our_ops.run(golden, definitions, np.float32).dtype  # that of log_softmax is float64
    return Row(
        torchs=golden.torchs or 0.0,
        definitions=error(definitions, np.float32),
        kernels=error(kernels, np.float32) if our_ops.serves(golden, kernels) else None,
        limit=our_ops.limit(golden, narrow),
        float64=error(definitions, np.float64),
        limit_float64=our_ops.limit(golden, np.float64),
    )


def measure_model(name: str) -> list[Row]:
    """Run npvlm on a checkpoint: every stored stage, and the logits of each prompt."""
    record, tensors = read(name)
    slow, fast = (
        npvlm.load(GOLDEN / record["checkpoint"], ops=ops) for ops in ("numpy", "kernels")
    )
    torchs = {
        f"{number}.{stage}": error
        for number, prompt in enumerate(record["prompts"])
        for stage, error in prompt["torch_float32_error"].items()
        if f"{number}.{stage}" in tensors
    }
    runs = [
        errors(model, record, tensors, dtype)
        for model, dtype in ((slow, np.float32), (fast, np.float32), (slow, np.float64))
    ]
    return [
        Row(
            torchs=error,
            definitions=runs[0][stage],
            kernels=runs[1][stage],
            limit=ours.limit_float32(error),
            float64=runs[2][stage],
            limit_float64=ours.limit_float64(error),
        )
        for stage, error in torchs.items()
    ]


def errors(
    model: npvlm.Model, record: dict[str, Any], tensors: Tensors, dtype: type
) -> dict[str, float]:
    """By how much npvlm misses each stored stage of the first prompt, and the logits of each."""
    prompts = record["prompts"]
    pixels = [tensors[f"{number}.pixel_values"].astype(dtype) for number in range(len(prompts))]
    ids, answers = ([prompt[key] for prompt in prompts] for key in ("ids", "answer"))
    stages = ours.run(model, pixels[0], ids[0], answers[0])
    found = {f"0.{stage}": value for stage, value in stages.items() if f"0.{stage}" in tensors}
    for number, scores in enumerate(ours.decode(model, pixels, ids, answers)):
        found[f"{number}.decode"] = scores[:: ours.EVERY]
    return {
        stage: our_ops.error(value.reshape(tensors[stage].shape), tensors[stage])
        for stage, value in found.items()
    }


# --- showing -------------------------------------------------------------------------------------


def show(kind: str, unit: str, parts: dict[str, list[Row]]) -> list[str]:
    """Print a table in Markdown, pooled over cases or stages; each of these is held on its own."""
    heads = (
        *(kind, unit, "torch float32", "definitions", "kernels", "limit", "nearest"),
        *("definitions in float64", "limit in float64"),
    )
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    differences = []
    for name, rows in parts.items():
        shares = [0.0]
        for row in rows:
            for found, limit in (
                *((found, row.limit) for found in (row.definitions, row.kernels) if found),
                (row.float64, row.limit_float64),
            ):
                shares.append(found / limit if limit else math.inf if found else 0.0)
        if not all(share <= 1 for share in shares):  # a nan is a difference, too
            differences.append(f"{name}: an error is {max(shares):.2f} of its limit")
        shown = [row.kernels for row in rows if row.kernels is not None]
        if not any(row.limit for row in rows):
            verdict = "equal" if max(shares) == 0 else "DIFFERENT"
            cells = ["equal", verdict, verdict if shown else "none", *[verdict] * 4]
            print(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
            continue
        narrow = (
            *(pooled(row.torchs for row in rows), pooled(row.definitions for row in rows)),
            *(pooled(shown), pooled(row.limit for row in rows)),
        )
        wide = pooled(row.float64 for row in rows), pooled(row.limit_float64 for row in rows)
        print(
            f"| {name} | {len(rows)} | {' | '.join(map(short, narrow))} | {max(shares):.2f} | "
            f"{' | '.join(map(short, wide))} |"
        )
    return differences


def pooled(errors: Iterable[float]) -> float:
    """The root mean square of several relative errors."""
    every = list(errors)
    return math.sqrt(sum(error * error for error in every) / len(every))


def short(error: float) -> str:
    return f"{error:.1e}" if error else "0"


if __name__ == "__main__":
    sys.exit(main())
