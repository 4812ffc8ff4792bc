"""Plant known mistakes in ports and see what npvlm says of each: `python golden/planted.py`.

Four models: PaliGemma 1 with one key/value head and with two, PaliGemma 2, and the bundled
`shapes`. Every port is PyTorch. The first stage that is wrong has to be named for all of them, the
cause for nine of ten, and a correct port is accused of nothing: then the exit code is 0, else 1.
Needs golden/requirements.txt. golden/planted.md holds what it prints.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import npvlm
from golden import oracle
from golden.oracle import RECIPES
from golden.planted_correct import CORRECT, Correct, save
from golden.planted_mistakes import MISTAKES, Mistake
from golden.planted_port import Dump, Family, narrow, run, staged
from npvlm.api import Model
from npvlm.opening import BUNDLED
from npvlm.porting.compare import LIMIT, Report, compare
from npvlm.porting.dumps import save_trace
from npvlm.porting.floors import Floors, floors
from npvlm.porting.trace import trace
from npvlm.work.demo import draw_picture

FAMILIES = ("pg1", "pg1-f16-k2", "pg2", "shapes")
PROMPT = "detect red circle ; blue square"
PRECISIONS = ("float32", "bfloat16", "float16")
SHARE = 0.9  # of the causes that have to be right


@dataclass(frozen=True)
class Bench:
    """A family with npvlm's model of it and the reference trace on disk."""

    family: Family
    model: Model
    reference: Path
    floors: Floors
    folder: Path  # for dumps
    clean: Dump  # stages of the port without a mistake
    precision: str  # of the ports with mistakes

    def judge(self, dump: Dump, name: str, form: str = "safetensors") -> Report:
        """What npvlm says of a dump."""
        path = save(dump, self.folder / re.sub(r"\W+", "-", name.strip()), form)
        return compare(self.reference, path, model=self.model, replayed=True)


@dataclass
class Count:
    """How many there were, and how many of them npvlm saw right."""

    mistakes: int = 0
    stages: int = 0
    causes: int = 0
    hidden: int = 0
    ports: int = 0
    accused: int = 0

    @property
    def fine(self) -> bool:
        """Whether npvlm was right often enough."""
        right = self.stages == self.mistakes and self.causes >= SHARE * self.mistakes
        return right and not self.accused

    def __str__(self) -> str:
        return (
            f"{self.mistakes} planted mistakes: first stage right "
            f"{share(self.stages, self.mistakes)} (limit all), cause right "
            f"{share(self.causes, self.mistakes)} (limit {SHARE:.0%}); "
            f"{self.hidden} more were below the noise.\n"
            f"{self.ports} correct ports: {self.accused} accused (limit none)."
        )


def main() -> int:
    """Plant everything and print what was found."""
    options = _parser().parse_args()
    oracle.quiet(threads=1)
    count = Count()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(options.save or folder)
        benches = [
            set_up(name, place / name, options.precision) for name in options.family or FAMILIES
        ]
        names = [bench.family.name for bench in benches]
        if not options.only:
            show("correct port", *names)
            show(*["---"] * (1 + len(names)))
            for correct in CORRECT:
                show(correct.name, *(try_correct(bench, correct, count) for bench in benches))
            print()
        show("cause", "how", "first wrong stage", *names)
        show(*["---"] * (3 + len(names)))
        for mistake in MISTAKES:
            if options.only in (None, mistake.cause):
                cells = [try_mistake(bench, mistake, count) for bench in benches]
                show(mistake.cause, mistake.note, first_stage(benches, mistake), *cells)
    print(f"\n{count}")
    return 0 if count.fine else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--only", metavar="ID", help="one cause, and no correct ports")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of the ports with mistakes"
    )
    parser.add_argument("--save", metavar="DIR", help="keep references and dumps in a new folder")
    return parser


def show(*cells: str) -> None:
    """One row of a table in Markdown."""
    print(f"| {' | '.join(cells)} |", flush=True)


def share(part: int, whole: int) -> str:
    return f"{part}, {part / whole:.1%}" if whole else "0"


def short(stage: str | None) -> str:
    """A stage's name without what all have in common."""
    name = (stage or "none").replace("vision_tower.vision_model.", "tower.").replace("encoder.", "")
    return name.removeprefix("language_model.").removeprefix("model.")


def first_stage(benches: list[Bench], mistake: Mistake) -> str:
    """The first stage that a mistake makes wrong, in the models where it shows."""
    ports = [bench.family.port() for bench in benches]
    stages = (mistake.first_stage(port) for port in ports if mistake.shows(port))
    return ", ".join(dict.fromkeys(short(stage) for stage in stages))


# --- one model -----------------------------------------------------------------------------------


def set_up(name: str, folder: Path, precision: str) -> Bench:
    """Build a family, trace it with npvlm, and run the port without a mistake."""
    folder.mkdir(parents=True)
    if name == "shapes":
        checkpoint = BUNDLED / name
        picture = draw_picture().crop((0, 0, 448, 360))  # no square, so that a crop shows
    else:
        recipe = next(recipe for recipe in RECIPES if recipe.name == name)
        checkpoint = oracle.build_checkpoint(folder / "checkpoint", recipe)
        picture = oracle.random_picture(np.random.default_rng(5))
    family = Family(name, checkpoint, oracle.load_float32(checkpoint), picture, PROMPT)
    assert_transformers(family, run(family.port()))
    port = family.port()
    narrow(port, precision)

    model = npvlm.load(checkpoint, ops="numpy")
    traced = trace(model, picture, PROMPT)
    reference = folder / "reference.safetensors"
    found = floors(traced, model)
    save_trace(traced, reference, found)
    return Bench(family, model, reference, found, folder, staged(run(port)), precision)


@torch.no_grad()
def assert_transformers(family: Family, dump: Dump) -> None:
    """The port without a mistake is transformers' own forward pass, to the bit."""
    ids = dump["input_ids"]
    whole = family.model(
        input_ids=ids,
        pixel_values=dump["pixel_values"],
        attention_mask=torch.ones_like(ids),
        token_type_ids=torch.zeros_like(ids),
    )
    assert torch.equal(whole.logits, dump["logits"]), f"the port of {family.name} is not right"


def try_correct(bench: Bench, correct: Correct, count: Count) -> str:
    """How one correct port compares: stages that were found, and the worst error over its floor."""
    if not correct.shows(bench.family.port()):
        return ""
    report = bench.judge(correct.make(bench.family), correct.name, correct.form)
    compared = [row for row in report.rows if row.status != "MISSING"]
    count.ports += 1
    if not report.verdict.same:
        count.accused += 1
        return f"ACCUSED: {report.verdict.sentence}"
    return f"{len(compared)} stages, {max(row.over or 0.0 for row in compared):.1f}"


def try_mistake(bench: Bench, mistake: Mistake, count: Count) -> str:
    """What npvlm says of a port with one mistake: "yes" where stage and cause are right."""
    port = bench.family.port()
    if not mistake.shows(port):
        return ""
    wrong = mistake.first_stage(port)
    mistake.plant(port)
    narrow(port, bench.precision)
    dump = run(port)
    error = first_error(bench.clean, staged(dump), wrong)
    if error <= LIMIT * bench.floors[wrong][bench.precision]:  # another rounding would do as much
        count.hidden += 1
        return f"hidden: {error:.1e}"
    verdict = bench.judge(dump, f"{mistake.cause} {mistake.note}").verdict
    stage, cause = verdict.stage == wrong, verdict.cause == mistake.cause
    count.mistakes += 1
    count.stages += stage
    count.causes += cause
    if stage and cause:
        return "yes"
    found = [] if stage else [f"FOUND {short(verdict.stage)}"]
    return ", ".join(found + ([] if cause else [f"said {verdict.cause}"]))


def first_error(clean: Dump, planted: Dump, stage: str) -> float:
    """The relative error at the stage that the table names; no stage before it differs."""
    for name, value in clean.items():
        if name == stage:
            break
        same = name not in planted or torch.equal(value, planted[name])
        assert same, f"the table says {stage}, but {name} differs before it"
    value, found = clean[stage].double(), planted[stage].double()
    if found.shape != value.shape or not found.isfinite().all():
        return float("inf")
    return float((found - value).norm() / value.norm())


if __name__ == "__main__":
    sys.exit(main())
