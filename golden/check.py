"""Hold npvlm against transformers on random PaliGemma checkpoints: `python golden/check.py`.

Needs golden/requirements.txt. Exit code 0: no difference; 1: differences, each in a line.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import npvlm
from golden import oracle, ours
from golden.oracle import RECIPES, STEPS, WIDE, Case, Recipe
from golden.ours import rms
from npvlm.api import Model
from npvlm.files.pictures import open_picture, pixel_values

DECODE = "decoding through the cache"  # a stage without a module: the logits of every step


@dataclass(frozen=True)
class Errors:
    """What one stage of one case is off by, as shares of the truth's root mean square."""

    float64: float  # our definitions in float64 against the truth
    ours: float  # ours in float32 against the truth
    torchs: float  # torch's float32 against the truth
    apart: float  # ours in float32 against torch's float32
    ulps: float  # ours in float32 against the truth, the largest, in units of the last place


@dataclass
class Report:
    """Everything that was measured, and every difference in words."""

    stages: dict[str, dict[str, list[Errors]]] = field(default_factory=dict)  # by checkpoint
    differences: list[str] = field(default_factory=list)
    operations: int = 0  # of torch, seen to be in float64
    prompts: int = 0
    tokens: list[int] = field(default_factory=list)  # greedy, and equal if nothing is said
    margin: float = math.inf

    def hold(self, fine: bool, difference: str) -> None:
        """Note a difference unless all is fine; written so that a nan is a difference too."""
        if not fine:
            self.differences.append(difference)


def main() -> int:
    """Run the comparison and print it; the exit code is the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out the two with 1024 patches")
    parser.add_argument(
        "--wide", action="store_true", help="take one as wide as a real model instead, slowly"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    arguments = parser.parse_args()

    began = time.perf_counter()
    oracle.quiet(arguments.threads)
    report = Report()
    slow = ("1024",) if arguments.quick else ()
    recipes = [recipe for recipe in RECIPES if not recipe.name.endswith(slow)]
    if arguments.wide:
        recipes = [WIDE]
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            report.stages[recipe.name] = compare(Path(folder) / recipe.name, recipe, report)
    show_checkpoints(report)
    show_stages(report)

    for difference in report.differences:
        print(f"DIFFERENT  {difference}")
    print(
        f"{'DIFFERENT' if report.differences else 'EQUAL'}: {len(recipes)} checkpoints, "
        f"{report.prompts} prompts, {len(report.tokens)} greedy tokens "
        f"({len(set(report.tokens))} different), "
        f"{report.operations} torch operations in float64, "
        f"{len(report.differences)} differences, {time.perf_counter() - began:.0f} s"
    )
    return 1 if report.differences else 0


# --- comparing -----------------------------------------------------------------------------------


def compare(folder: Path, recipe: Recipe, report: Report) -> dict[str, list[Errors]]:
    """Build one checkpoint, run everything on it; return the errors of every stage."""
    oracle.build_checkpoint(folder, recipe)
    float32 = oracle.load_float32(folder)
    float64 = oracle.load_float64(float32)
    model = npvlm.load(folder)

    cases = oracle.cases(folder, recipe, float32, float64)
    report.operations += sum(case.operations for case in cases)
    compare_answers(model, cases, recipe, report)
    return {
        "pixel_values": [compare_inputs(model, case) for case in cases],
        **compare_stages(model, cases, recipe, report),
        DECODE: compare_decoding(model, cases),
    }


def compare_inputs(model: Model, case: Case) -> Errors:
    """Our pixel_values against transformers', which are the truth here: torch's error is 0."""
    found = np.stack([pixel_values(open_picture(p), model.preprocessor) for p in case.pictures])
    assert found.dtype == np.float32
    error = rms(found - case.pixels) / rms(case.pixels)
    return Errors(error, error, 0.0, error, ulps(found, case.pixels))


def compare_answers(model: Model, cases: list[Case], recipe: Recipe, report: Report) -> None:
    """Prompt ids and greedy answers are equal: each prompt alone, and all packed together."""
    pictures = [case.pictures for case in cases]
    prompts = [case.prompt for case in cases]
    alone = [model.generate([c.pictures], c.prompt, max_tokens=STEPS)[0] for c in cases]
    packed = model.generate(pictures, prompts, max_tokens=STEPS)
    for way, answers in (("alone", alone), ("packed", packed)):
        for number, (found, case) in enumerate(zip(answers, cases, strict=True)):
            where = f"{recipe.name}, prompt {number}, {way}"
            report.hold(found.prompt_token_ids == case.ids, f"{where}: prompt_token_ids")
            report.hold(
                found.token_ids == case.answer,
                f"{where}: the answer is {found.token_ids}, torch's is {case.answer}",
            )
            report.tokens.extend(case.answer)
            if found.token_ids == case.answer:
                compare_logprobs(found.logprobs, case, where, report)
    for case in cases:
        best = np.sort(case.scores, axis=-1)
        report.margin = min(report.margin, float(np.min(best[:, -1] - best[:, -2])))
    report.prompts += len(cases)


def compare_logprobs(found: list[float], case: Case, where: str, report: Report) -> None:
    """A log-probability is a logit less a mean of all: its error is at most twice a logit's."""
    truth = case.truth["language_model.logits"][len(case.ids) - 1 : -1]
    total = np.log(np.sum(np.exp(truth), axis=-1))
    expected = truth[range(len(found)), case.answer] - total
    error = float(np.max(np.abs(expected - found)))
    limit = 2 * float(np.max(np.abs(truth - case.scores)))
    report.hold(error <= limit, f"{where}: logprobs are off by {error:.1e}, limit {limit:.1e}")


def compare_stages(
    model: Model, cases: list[Case], recipe: Recipe, report: Report
) -> dict[str, list[Errors]]:
    """Every tapped stage of an uncached pass, in float32 and in float64, against the truth."""
    stages = defaultdict(list)
    for number, case in enumerate(cases):
        narrow = ours.run(model, case.pixels, case.ids, case.answer)
        wide = ours.run(model, case.pixels.astype(np.float64), case.ids, case.answer)
        where = f"{recipe.name}, prompt {number}"
        missing = sorted(ours.required(model.config) - set(narrow))
        report.hold(not missing, f"{where}: npvlm does not show {missing}")
        unknown = sorted(set(narrow) - set(case.truth))
        report.hold(not unknown, f"{where}: transformers has no {unknown}")
        for stage in narrow:
            if stage in case.truth:
                values = narrow[stage], wide[stage], case.torchs[stage], case.truth[stage]
                stages[stage].append(measure(*values))
    return stages


def compare_decoding(model: Model, cases: list[Case]) -> list[Errors]:
    """The logits of every greedy step through the cache, packed, against the uncached truth."""
    ids, answers = [case.ids for case in cases], [case.answer for case in cases]
    narrow = ours.decode(model, [case.pixels for case in cases], ids, answers)
    wide = ours.decode(model, [case.pixels.astype(np.float64) for case in cases], ids, answers)
    truth = [case.truth["language_model.logits"][len(case.ids) - 1 : -1] for case in cases]
    return [measure(narrow[i], wide[i], case.scores, truth[i]) for i, case in enumerate(cases)]


def measure(narrow: np.ndarray, wide: np.ndarray, torchs: np.ndarray, truth: np.ndarray) -> Errors:
    """Put our two runs and torch's float32 run of one stage beside the truth."""
    narrow, wide = narrow.reshape(truth.shape), wide.reshape(truth.shape)
    dtypes = narrow.dtype, wide.dtype, torchs.dtype, truth.dtype
    assert dtypes == (np.float32, np.float64, np.float32, np.float64), dtypes
    size = rms(truth)
    return Errors(
        float64=rms(wide - truth) / size,
        ours=rms(narrow - truth) / size,
        torchs=rms(torchs - truth) / size,
        apart=rms(narrow.astype(np.float64) - torchs) / size,
        ulps=ulps(narrow, truth),
    )


def ulps(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, in units of the last place of a float32."""
    spacing = np.spacing(np.abs(truth).astype(np.float32))
    return float(np.max(np.abs(found.astype(np.float64) - truth) / spacing))


# --- showing -------------------------------------------------------------------------------------


def show_checkpoints(report: Report) -> None:
    """For each checkpoint the stage that comes nearest to its limit, in float64 and in float32."""
    print(f"{'':<17}{'float64 against the truth':<65}float32 against torch's float32")
    print(f"{'checkpoint':<17}" + f"{'measured':>9} {'limit':>9}  {'nearest its limit':<44}" * 2)
    for name, stages in report.stages.items():
        wide, narrow = [], []
        for stage, errors in stages.items():
            torchs = pooled(e.torchs for e in errors)
            wide.append((pooled(e.float64 for e in errors), ours.limit_float64(torchs), stage))
            narrow.append((pooled(e.apart for e in errors), ours.limit_float32(torchs), stage))
        for kind, rows in (("float64", wide), ("float32", narrow)):
            for found, limit, stage in rows:
                report.hold(
                    found <= limit,
                    f"{name}, {short(stage)}: {kind} is off by {found:.2e}, limit {limit:.2e}",
                )
        cells = []
        for rows in (wide, narrow):
            found, limit, stage = max(rows, key=lambda row: row[0] / row[1] if row[1] else 0.0)
            report.hold(
                found >= limit / 100, f"{name}: the limit {limit:.1e} is loose, {found:.1e}"
            )
            cells.append(f"{found:>9.1e} {limit:>9.1e}  {short(stage):<44}")
        print(f"{name:<17}" + "".join(cells).rstrip())
    print(f"The closest greedy choice: first and second {report.margin:.1e} apart.")


def show_stages(report: Report) -> None:
    """The float32 errors against the truth, pooled over all prompts: ours, and torch's."""
    pools: dict[str, list[Errors]] = defaultdict(list)
    for stages in report.stages.values():
        for stage, errors in stages.items():
            pools[re.sub(r"layers\.\d+\.", "layers.*.", stage)].extend(errors)

    print(f"\n{'stage':<58} {'runs':>4} {'ours':>9} {'torchs':>9} {'ratio':>6} {'limit':>6}")
    for stage, errors in pools.items():
        mine, torchs = pooled(e.ours for e in errors), pooled(e.torchs for e in errors)
        if torchs > 0:
            fine, ratio, limit = mine <= torchs, f"{mine / torchs:.2f}", "1.00"
        else:
            most = max(e.ulps for e in errors)
            fine, ratio, limit = most <= 1, f"{most:.0f} ulp", "1 ulp"
        report.hold(fine, f"{short(stage)}: float32 is off by {mine:.2e}, torch's {torchs:.2e}")
        print(
            f"{short(stage):<58} {len(errors):>4} {mine:>9.2e} {torchs:>9.2e} {ratio:>6} {limit:>6}"
        )


def pooled(errors: Iterable[float]) -> float:
    """The root mean square of several relative errors."""
    errors = list(errors)
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def short(stage: str) -> str:
    return stage.removeprefix("vision_tower.").removeprefix("language_model.")


if __name__ == "__main__":
    sys.exit(main())
