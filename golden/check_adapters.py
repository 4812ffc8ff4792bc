"""Hold adapters against PEFT and transformers, live: `python golden/check_adapters.py`.

Random checkpoints with random adapters of every kind that npvlm applies: beside the weights, and
merged into them. The stored ones (`adapters.py`) are made anew and compared.

Needs golden/requirements.txt. Exit code 0: no difference; 1: differences, each in a line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import npvlm
from golden import adapters, oracle, ours
from golden.adapters import STORED, VARIANTS, Adapted, Variant
from golden.oracle import RECIPES, Recipe
from npvlm.api import Model
from npvlm.decoding.generate import logits
from npvlm.files.checkpoint import open_checkpoint
from npvlm.model import paligemma
from npvlm.model.tap import closed
from npvlm.model.weights import BFloat16, unpack
from npvlm.work.convert import convert

NAMES = ("pg1", "pg2-f16-sharded")  # tied tables and two of their own
DIGITS = {"float32": 23, "bfloat16": 7, "float16": 10}  # behind the point, of a stored number
TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def main() -> int:
    """Compare every variant on every checkpoint; the exit code is the verdict."""
    began = time.perf_counter()
    oracle.quiet(threads=1)
    print(f"{'adapter':<30}{'torch':>10}{'definitions':>13}{'kernels':>10}{'float64':>10}", end="")
    print(f"{'merged, ulp':>13}{'int8':>8}{'int4':>8}")
    differences: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in (recipe for recipe in RECIPES if recipe.name in NAMES):
            base = oracle.build_checkpoint(Path(folder) / recipe.name, recipe)
            for variant in VARIANTS:
                differences += compare(base, recipe, variant)
        differences += compare_stored(Path(folder))
    for difference in differences:
        print(f"DIFFERENT  {difference}")
    print(
        f"{'DIFFERENT' if differences else 'EQUAL'}: {len(NAMES) * len(VARIANTS)} adapters, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 1 if differences else 0


def compare(base: Path, recipe: Recipe, variant: Variant) -> list[str]:
    """One adapter on one checkpoint; what differs."""
    name, place = f"{recipe.name}, {variant.name}", base.parent / f"{recipe.name}-{variant.name}"
    adapters.build_adapter(base, variant, recipe.seed, place)
    float32, float64 = adapters.open_adapted(base, place)
    case = adapters.ask(base, recipe, float32, float64)
    torchs = off(case.torchs, case)
    slow, fast = npvlm.load(base, ops="numpy", adapter=place), npvlm.load(base, adapter=place)
    errors = {
        "definitions": off(one_pass(slow, case, np.float32), case),
        "kernels": off(one_pass(fast, case, np.float32), case),
        "float64": off(one_pass(slow, case, np.float64), case),
    }
    found = [
        f"{name}: {run} off by {error:.1e}, limit {limit:.1e}"
        for run, error in errors.items()
        if not error
        <= (limit := (ours.limit_float64 if run == "float64" else ours.limit_float32)(torchs))
    ]
    for model in (slow, fast):
        [answer] = model.generate(case.picture, case.prompt, max_tokens=oracle.STEPS)
        if answer.token_ids != case.answer:
            found.append(f"{name}: npvlm answers {answer.token_ids}, PEFT {case.answer}")
    losses = {}
    for precision in ("float32", "int8", "int4"):
        model = npvlm.load(base, precision, adapter=place)
        whole = one_pass(model, case, np.float32)
        [steps] = ours.decode(model, [case.pixels], [case.ids], [case.answer])
        losses[precision] = off(whole, case)
        if not np.array_equal(steps, whole[len(case.ids) - 1 : -1]):
            found.append(f"{name}: through the cache in {precision} it has other bits")
    merged = base.parent / f"{recipe.name}-{variant.name}-merged"
    convert(base, merged, None, lambda *_: None, place)
    furthest = merged_ulps(merged, recipe, adapters.merged(float64))
    if not furthest <= 0.501:
        found.append(f"{name}: a merged number is {furthest:.3f} units in the last place away")
    theirs = oracle.logits(oracle.load_float32(merged), case.pixels, case.ids, case.answer)
    again = one_pass(npvlm.load(merged, ops="numpy"), case, np.float32)
    if not ours.rms(again - theirs) <= 2 * ours.limit_float32(torchs) * ours.rms(theirs):
        found.append(f"{name}: transformers reads the merged checkpoint otherwise")
    print(
        f"{name:<30}{torchs:>10.1e}{errors['definitions']:>13.1e}{errors['kernels']:>10.1e}"
        f"{errors['float64']:>10.1e}{furthest:>13.3f}{losses['int8']:>8.1%}{losses['int4']:>8.1%}"
    )
    return found


def one_pass(model: Model, case: Adapted, dtype: type) -> np.ndarray:
    """npvlm's logits [T, V] of prompt and answer, in one pass."""
    w, config, ops = model.weights, model.config, model.ops
    pixels = case.pixels.astype(dtype)
    features = paligemma.image_features(pixels, w, config, ops=ops, tap=closed)
    features = features.reshape(-1, features.shape[-1])
    ids, answer = np.array(case.ids, np.int64), np.array(case.answer, np.int64)
    return logits(ids, answer, features, w, config, ops=ops, tap=closed)


def off(found: np.ndarray, case: Adapted) -> float:
    """The error of logits, as a share of the truth."""
    return ours.rms(found - case.truth) / ours.rms(case.truth)


def merged_ulps(folder: Path, recipe: Recipe, truth: dict[str, np.ndarray]) -> float:
    """How far the merged weights are from PEFT's in float64, in units of the stored type.

    PEFT merges into one table what changes one of two tied ones; npvlm writes two. Those are left.
    """
    model, furthest = npvlm.load(folder, ops="numpy"), 0.0
    for name, weight in open_checkpoint(folder, model.config).items():
        if name in TABLES and recipe.tied:
            continue
        numbers = unpack(weight, np.float64)
        stored = "bfloat16" if isinstance(weight, BFloat16) else str(weight.dtype)
        true = truth[name].reshape(numbers.shape)
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(true), 2.0**-14))) - DIGITS[stored])
        furthest = max(furthest, float(np.max(np.abs(numbers - true) / ulp)))
    return furthest


def compare_stored(folder: Path) -> list[str]:
    """The stored adapters, made anew: the same tensors, settings, ids, answers and errors."""
    adapters.write(folder / "stored")
    found = []
    for name in STORED:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            old, new = adapters.FOLDER / name / file, folder / "stored" / name / file
            if old.read_bytes() != new.read_bytes():
                found.append(f"stored {name}: {file} is another")
    old = json.loads((adapters.FOLDER / "adapters.json").read_text())
    new = json.loads((folder / "stored" / "adapters.json").read_text())
    for name in STORED:
        keys = ("prompt", "ids", "answer")
        was, now = old["cases"][name], new["cases"][name]
        found += [f"stored {name}: another {key}" for key in keys if was[key] != now[key]]
    return found


if __name__ == "__main__":
    sys.exit(main())
