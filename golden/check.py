"""Hold npvlm against transformers on random PaliGemma checkpoints: `python golden/check.py`.

The stored goldens are made anew, too, and compared (`check_stored.py`).

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
from dataclasses import dataclass, field, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numba
import numpy as np

import npvlm
from golden import check_beams, check_states, check_stored, oracle, ours
from golden.check_masks import check_masks
from golden.oracle import RECIPES, STEPS, WIDE, Case, Recipe
from golden.ours import rms
from npvlm.api import Model
from npvlm.files.pictures import open_picture, pixel_values

LOGITS = "language_model.logits"
DECODE = "decoding through the cache"  # a stage without a module: the logits of every step


@dataclass(frozen=True)
class Errors:
    """What one stage of one case is off by, as shares of the truth's root mean square."""

    float64: float  # our definitions in float64 against the truth
    ours: float  # our definitions in float32 against the truth
    kernels: float | None  # our kernels against the truth, where they show the stage
    torchs: float  # torch's float32 against the truth
    apart: float  # ours in float32 against torch's float32, definitions or kernels: the larger
    ulps: float  # ours in float32 against the truth, the largest, in units of the last place


@dataclass(frozen=True)
class Losses:
    """What the logits of one prompt are off by at the precisions, as shares of the truth's rms."""

    torchs: float  # torch's bfloat16, as are the next two, against float64 on the same weights
    bfloat16: float
    definitions: float
    int8: float  # against float64 on the weights as stored, as is the next
    int4: float


@dataclass
class Report:
    """Everything that was measured, and every difference in words."""

    stages: dict[str, dict[str, list[Errors]]] = field(default_factory=dict)  # by checkpoint
    losses: dict[str, list[Losses]] = field(default_factory=dict)  # by checkpoint
    differences: list[str] = field(default_factory=list)
    operations: int = 0  # of torch, seen to be in float64
    prompts: int = 0
    tokens: list[int] = field(default_factory=list)  # greedy, and equal if nothing is said
    margin: float = math.inf
    beams: check_beams.Found = field(default_factory=check_beams.Found)

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
    parser.add_argument("--threads", type=int, default=1, help="of torch and kernels (default 1)")
    arguments = parser.parse_args()

    began = time.perf_counter()
    oracle.quiet(arguments.threads)
    numba.set_num_threads(arguments.threads)
    report = Report()
    slow = ("1024",) if arguments.quick else ()
    recipes = [recipe for recipe in RECIPES if not recipe.name.endswith(slow)]
    if arguments.wide:
        recipes = [WIDE]
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            compare(Path(folder) / recipe.name, recipe, report)
    show_checkpoints(report)
    show_stages(report)
    show_losses(report)
    if not arguments.wide:
        report.differences += check_beams.show(report.beams)
        report.differences += check_stored.check()
        report.differences += check_masks()

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


def compare(folder: Path, recipe: Recipe, report: Report) -> None:
    """Build one checkpoint, run everything on it and note the errors."""
    oracle.build_checkpoint(folder, recipe)
    float32 = oracle.load_float32(folder)
    float64 = oracle.load_float64(float32)
    definitions, kernels = npvlm.load(folder, ops="numpy"), npvlm.load(folder)

    cases = oracle.cases(folder, recipe, float32, float64)
    report.operations += sum(case.operations for case in cases)
    for model in (definitions, kernels):
        compare_answers(model, cases, recipe, report)
    report.prompts += len(cases)
    report.stages[recipe.name] = {
        "pixel_values": [compare_inputs(kernels, case) for case in cases],
        **compare_stages(definitions, kernels, cases, recipe, report),
        DECODE: compare_decoding(definitions, kernels, cases, recipe, report),
    }
    report.losses[recipe.name] = compare_precisions(folder, cases, recipe, report)
    if not recipe.name.endswith(("1024", "wide")):  # in which beams take minutes, and show no more
        check_beams.compare(
            recipe.name, definitions, kernels, float32, float64, cases, report.beams
        )
        both = definitions, kernels
        report.differences += check_states.compare(recipe.name, both, float32, float64, cases)


def compare_inputs(model: Model, case: Case) -> Errors:
    """Our pixel_values against transformers', which are the truth here: torch's error is 0."""
    found = np.stack([pixel_values(open_picture(p), model.preprocessor) for p in case.pictures])
    assert found.dtype == np.float32
    error = rms(found - case.pixels) / rms(case.pixels)
    return Errors(error, error, error, 0.0, error, ulps(found, case.pixels))


def compare_answers(model: Model, cases: list[Case], recipe: Recipe, report: Report) -> None:
    """Prompt ids and greedy answers are equal: each prompt alone, and all packed together."""
    pictures = [case.pictures for case in cases]
    prompts = [case.prompt for case in cases]
    alone = [model.generate([c.pictures], c.prompt, max_tokens=STEPS)[0] for c in cases]
    packed = model.generate(pictures, prompts, max_tokens=STEPS)
    for way, answers in (("alone", alone), ("packed", packed)):
        for number, (found, case) in enumerate(zip(answers, cases, strict=True)):
            where = f"{recipe.name}, prompt {number}, {way}, {model.ops.__name__}"
            report.hold(found.prompt_token_ids == case.ids, f"{where}: prompt_token_ids")
            report.hold(
                found.token_ids == case.answer,
                f"{where}: the answer is {found.token_ids}, torch's is {case.answer}",
            )
            if found.token_ids == case.answer:
                compare_logprobs(found.logprobs, case, where, report)
        report.tokens.extend(token for case in cases for token in case.answer)
    for case in cases:
        best = np.sort(case.scores, axis=-1)
        report.margin = min(report.margin, float(np.min(best[:, -1] - best[:, -2])))


def compare_logprobs(found: list[float], case: Case, where: str, report: Report) -> None:
    """A log-probability is a logit less a mean of all: its error is at most twice a logit's."""
    truth = case.truth["language_model.logits"][len(case.ids) - 1 : -1]
    total = np.log(np.sum(np.exp(truth), axis=-1))
    expected = truth[range(len(found)), case.answer] - total
    error = float(np.max(np.abs(expected - found)))
    limit = 2 * float(np.max(np.abs(truth - case.scores)))
    report.hold(error <= limit, f"{where}: logprobs are off by {error:.1e}, limit {limit:.1e}")


def compare_stages(
    definitions: Model, kernels: Model, cases: list[Case], recipe: Recipe, report: Report
) -> dict[str, list[Errors]]:
    """Every tapped stage of an uncached pass, in float32 and in float64, against the truth."""
    stages = defaultdict(list)
    for number, case in enumerate(cases):
        narrow = ours.run(definitions, case.pixels, case.ids, case.answer)
        fast = ours.run(kernels, case.pixels, case.ids, case.answer)
        wide = ours.run(definitions, case.pixels.astype(np.float64), case.ids, case.answer)
        where = f"{recipe.name}, prompt {number}"
        missing = sorted(ours.required(definitions.config) - set(narrow))
        report.hold(not missing, f"{where}: npvlm does not show {missing}")
        hidden = sorted(stage for stage in set(narrow) ^ set(fast) if not ours.fused(stage))
        report.hold(not hidden, f"{where}: only definitions or only kernels show {hidden}")
        unknown = sorted(set(narrow) - set(case.truth))
        report.hold(not unknown, f"{where}: transformers has no {unknown}")
        for stage in narrow:
            if stage in case.truth:
                torchs, truth = case.torchs[stage], case.truth[stage]
                found = measure(narrow[stage], fast.get(stage), wide[stage], torchs, truth)
                stages[stage].append(found)
    return stages


def compare_decoding(
    definitions: Model, kernels: Model, cases: list[Case], recipe: Recipe, report: Report
) -> list[Errors]:
    """The logits of every greedy step through the cache, packed, against the uncached truth."""
    ids, answers = [case.ids for case in cases], [case.answer for case in cases]
    pixels = [case.pixels for case in cases]
    narrow = ours.decode(definitions, pixels, ids, answers)
    wide = ours.decode(definitions, [p.astype(np.float64) for p in pixels], ids, answers)
    fast = compare_exactly(kernels, cases, recipe, report)
    return [
        measure(
            narrow[i], fast[i][steps(case)], wide[i], case.scores, case.truth[LOGITS][steps(case)]
        )
        for i, case in enumerate(cases)
    ]


def compare_exactly(
    kernels: Model, cases: list[Case], recipe: Recipe, report: Report
) -> list[np.ndarray]:
    """Decoding through the cache, packed, gives the very bits of a pass without; returns these."""
    ids, answers = [case.ids for case in cases], [case.answer for case in cases]
    decoded = ours.decode(kernels, [case.pixels for case in cases], ids, answers)
    uncached = [ours.run(kernels, c.pixels, c.ids, c.answer)[LOGITS] for c in cases]
    for number, case in enumerate(cases):
        report.hold(
            np.array_equal(decoded[number], uncached[number][steps(case)]),
            f"{recipe.name}, prompt {number}, {kernels.precision}: with kernels, decoding through "
            "the cache gives other bits than a pass without",
        )
    return uncached


def compare_precisions(
    folder: Path, cases: list[Case], recipe: Recipe, report: Report
) -> list[Losses]:
    """The logits at bfloat16, int8 and int4, all tokens of an uncached pass.

    The truth for bfloat16, ours and torch's, is float64 on weights rounded to bfloat16; that for
    int8 and int4 is float64 on the weights as they are stored.
    """
    torchs = oracle.load_bfloat16(folder)
    found = {
        precision: compare_exactly(npvlm.load(folder, precision), cases, recipe, report)
        for precision in ("bfloat16", "int8", "int4")
    }
    definitions = npvlm.load(folder, "bfloat16", ops="numpy")
    truths = [case.truth[LOGITS] for case in cases]
    rounded = truths
    if recipe.dtype != "bfloat16":
        truth = oracle.load_float64(torchs)
        rounded = [oracle.run_float64(truth, c.pixels, c.ids, c.answer)[0][LOGITS] for c in cases]
    return [
        Losses(
            relative(oracle.run(torchs, case.pixels, case.ids, case.answer)[LOGITS], rounded[i]),
            relative(found["bfloat16"][i], rounded[i]),
            relative(ours.run(definitions, case.pixels, case.ids, case.answer)[LOGITS], rounded[i]),
            relative(found["int8"][i], truths[i]),
            relative(found["int4"][i], truths[i]),
        )
        for i, case in enumerate(cases)
    ]


def steps(case: Case) -> slice:
    """The rows of an uncached pass that score the tokens of the answer."""
    return slice(len(case.ids) - 1, -1)


def measure(
    narrow: np.ndarray,
    fast: np.ndarray | None,
    wide: np.ndarray,
    torchs: np.ndarray,
    truth: np.ndarray,
) -> Errors:
    """Put our runs (definitions, kernels, float64) and torch's of one stage beside the truth."""
    dtypes = narrow.dtype, wide.dtype, torchs.dtype, truth.dtype
    assert dtypes == (np.float32, np.float64, np.float32, np.float64), dtypes
    assert fast is None or fast.dtype == np.float32
    runs = [run.reshape(truth.shape) for run in (narrow, fast) if run is not None]
    return Errors(
        float64=relative(wide, truth),
        ours=relative(narrow, truth),
        kernels=None if fast is None else relative(fast, truth),
        torchs=relative(torchs, truth),
        apart=max(rms(run.astype(np.float64) - torchs) for run in runs) / rms(truth),
        ulps=max(ulps(run, truth) for run in runs),
    )


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    """The root mean square of an error over that of the truth."""
    return rms(found.reshape(truth.shape) - truth) / rms(truth)


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
    """The float32 errors against the truth, pooled over all prompts: ours twice, and torch's."""
    pools: dict[str, list[Errors]] = defaultdict(list)
    for stages in report.stages.values():
        for stage, errors in stages.items():
            pools[re.sub(r"layers\.\d+\.", "layers.*.", stage)].extend(errors)

    print(f"\n{'':<54} {'':>4} {'':>9} {'definitions':>16} {'kernels':>16}")
    print(f"{'stage':<54} {'runs':>4} {'torchs':>9}" + f" {'error':>9} {'ratio':>6}" * 2)
    for stage, errors in pools.items():
        torchs, cells = pooled(e.torchs for e in errors), ""
        shown = [e.kernels for e in errors if e.kernels is not None]
        for name, found in (("definitions", [e.ours for e in errors]), ("kernels", shown)):
            if not found:
                cells += f" {'inside one operation':>16}"
                continue
            error = pooled(found)
            most = max(e.ulps for e in errors)
            fine = error <= torchs if torchs > 0 else most <= 1
            ratio = f"{error / torchs:.2f}" if torchs > 0 else f"{most:.0f} ulp"
            report.hold(
                fine, f"{short(stage)}: {name} are off by {error:.2e}, torch's float32 {torchs:.2e}"
            )
            cells += f" {error:>9.2e} {ratio:>6}"
        print(f"{short(stage):<54} {len(errors):>4} {torchs:>9.2e}{cells}")
    print("The limit of every ratio is 1.00, of ulp 1.")


def show_losses(report: Report) -> None:
    """What bfloat16, int8 and int4 cost the logits, and what torch's bfloat16 does."""
    print(f"\n{'logits, off by percent':<30}{'bfloat16':>12}{'':>24}{'int8':>10}{'int4':>8}")
    print(f"{'':<24}{'torch':>8}{'kernels':>10}{'ratio':>7}{'definitions':>14}{'ratio':>7}")
    for name, losses in report.losses.items():
        torchs, kernels, definitions, int8, int4 = (
            pooled(getattr(loss, part.name) for loss in losses) for part in fields(Losses)
        )
        for run, error in (("kernels", kernels), ("definitions", definitions)):
            report.hold(
                error <= torchs,
                f"{name}: bfloat16 with {run} is off by {error:.2e}, torch's {torchs:.2e}",
            )
        print(
            f"{name:<24}{100 * torchs:>8.2f}{100 * kernels:>10.2f}{kernels / torchs:>7.2f}"
            f"{100 * definitions:>14.2f}{definitions / torchs:>7.2f}{100 * int8:>9.2f}"
            f"{100 * int4:>8.2f}"
        )
    print("The limit of both ratios is 1.00; int8 and int4 have none.")


def pooled(errors: Iterable[float]) -> float:
    """The root mean square of several relative errors."""
    errors = list(errors)
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def short(stage: str) -> str:
    return stage.removeprefix("vision_tower.").removeprefix("language_model.")


if __name__ == "__main__":
    sys.exit(main())
