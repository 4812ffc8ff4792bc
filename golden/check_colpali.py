"""Hold npvlm's ColPali against transformers' on random checkpoints.

`python golden/check_colpali.py`; with --write, the first one is stored in golden/, for tests that
have no torch. Needs golden/requirements.txt. Exit code 0: no difference; 1: differences, each in a
line.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numba
import numpy as np
from safetensors.numpy import save_file

from golden import colpali_oracle, make, oracle, our_colpali, ours
from golden.colpali_oracle import QUERIES, RECIPES, Case, Run
from golden.our_ops import error
from npvlm import load_retriever
from npvlm.files.pictures import open_picture, pixel_values

GOLDEN = Path(__file__).resolve().parent
NAME = RECIPES[0].base.name  # the one that is stored


def main() -> int:
    """Compare, and say what differs; the exit code is the verdict."""
    oracle.quiet(threads=1)
    numba.set_num_threads(1)
    if sys.argv[1:] == ["--write"]:
        write()
        return 0
    differences = check()
    for difference in differences:
        print(f"DIFFERENT  {difference}")
    print(f"{'DIFFERENT' if differences else 'EQUAL'}: ColPali")
    return 1 if differences else 0


def check() -> list[str]:
    """Every difference, in words."""
    print(
        f"{'':<16}{'what':<9}{'torch':>9}{'definitions':>12}{'kernels':>9}{'float64':>9}{'limit':>9}"
    )
    differences: list[str] = []
    vectors: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory() as place:
        for recipe in RECIPES:
            folder = Path(place) / recipe.base.name
            model = colpali_oracle.build(folder, recipe)
            case = colpali_oracle.case(folder, recipe, model)
            different, off = compare(recipe.base.name, folder, case)
            differences += different
            vectors += off
            if recipe.base.name == NAME:
                differences += compare_stored(folder, case)
    torchs, definitions, kernels = np.sqrt(np.mean(np.square(vectors), axis=0))
    print(f"{'all':<16}{'vectors':<9}{torchs:>9.1e}{definitions:>12.1e}{kernels:>9.1e}")
    for what, found in (("definitions", definitions), ("kernels", kernels)):
        if not found <= torchs:
            differences.append(f"vectors: {what} are {found:.1e} off, torch's float32 {torchs:.1e}")
    return differences


def compare(name: str, folder: Path, case: Case) -> tuple[list[str], list[tuple[float, ...]]]:
    """One checkpoint: pixels and ids equal, vectors and scores about as near to the truth as torch.

    Also returns what torch, the definitions and the kernels are off by, for pages and for queries:
    torch and the definitions are so close that the few tokens of one checkpoint cannot say which is
    nearer. The kernels are nearer in each.
    """
    slow, fast = (load_retriever(folder, ops=ops) for ops in ("numpy", "kernels"))
    differences = []
    pixels = [pixel_values(open_picture(p), slow.model.preprocessor) for p in case.pictures]
    if not np.array_equal(np.stack(pixels), case.pixels):
        differences.append(f"{name}: pixel values")
    if slow.page_ids.tolist() != case.page_ids:
        differences.append(f"{name}: ids of a page")
    for query, ids in zip(QUERIES, case.query_ids, strict=True):
        if slow.query_ids(query).tolist() != ids:
            differences.append(f"{name}: ids of {query!r}")
    given = case.pixels, case.page_ids, case.query_ids
    runs = [
        our_colpali.run(retriever, *given, dtype)
        for retriever, dtype in ((slow, np.float32), (fast, np.float32), (slow, np.float64))
    ]
    truth, torchs = parts(case.truth), parts(case.torchs)
    off = []
    for kind in ("page", "query", "scores"):
        keys = [key for key in truth if key.startswith(kind)]
        narrow, kernels, wide = (pooled(run, truth, keys) for run in runs)
        theirs = pooled(torchs, truth, keys)
        apart = max(
            pooled(run, {key: torchs[key].astype(np.float64) for key in keys}, keys)
            for run in runs[:2]
        )
        allowed = theirs
        if kind == "scores":
            # A dozen numbers say little of torch's error; that of the vectors that they are made
            # of, page and query, says more. A score is a sum over tokens, where errors cancel.
            allowed = math.hypot(*(vectors for vectors, *_ in off)) / 2
        else:
            off.append((theirs, narrow, kernels))
        limit = ours.limit_float32(allowed)
        print(
            f"{name:<16}{kind:<9}{theirs:>9.1e}{narrow:>12.1e}{kernels:>9.1e}{wide:>9.1e}"
            f"{limit:>9.1e}"
        )
        for what, found, most in (
            ("definitions against the truth", narrow, limit),
            ("kernels against the truth", kernels, allowed),
            ("float32 against torch's", apart, limit),
            ("float64 against the truth", wide, ours.limit_float64(allowed)),
        ):
            if not found <= most:
                differences.append(f"{name}, {kind}: {what} is {found:.1e} off, limit {most:.1e}")
            if found * 100 < most:
                differences.append(f"{name}, {kind}: {what}: the limit {most:.1e} is too wide")
    return differences, off


def pooled(found: dict[str, np.ndarray], truth: dict[str, np.ndarray], keys: list[str]) -> float:
    """The relative error of several arrays together."""
    return error(
        np.concatenate([found[key].ravel() for key in keys]),
        np.concatenate([truth[key].ravel() for key in keys]),
    )


def parts(run: Run) -> dict[str, np.ndarray]:
    """What a run gave, by the names that `our_colpali.run` has for it."""
    found = {f"page.{n}": page for n, page in enumerate(run.pages)}
    found |= {f"query.{n}": query for n, query in enumerate(run.queries)}
    return found | {"scores": run.scores}


def tensors_of(case: Case) -> dict[str, np.ndarray]:
    """What is stored of a case: pictures, pixels, and the truth."""
    pictures = {f"picture.{n}": np.asarray(p) for n, p in enumerate(case.pictures)}
    return {**pictures, "pixel_values": case.pixels, **parts(case.truth)}


def write() -> None:
    """Store the first checkpoint and what transformers makes of it."""
    folder = GOLDEN / NAME
    shutil.rmtree(folder, ignore_errors=True)
    case = colpali_oracle.case(folder, RECIPES[0], colpali_oracle.build(folder, RECIPES[0]))
    file = GOLDEN / f"{NAME}-run.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in tensors_of(case).items()}, file)
    truth, torchs = parts(case.truth), parts(case.torchs)
    record = {
        "made_by": "python golden/check_colpali.py --write",
        **make.surroundings(),
        "queries": list(QUERIES),
        "page_ids": case.page_ids,
        "query_ids": case.query_ids,
        "torch_float32_error": {key: error(torchs[key], truth[key]) for key in truth},
        "sha256": make.sums([*make.checkpoint_files(folder), file]),
    }
    make.write_json(GOLDEN / f"{NAME}-run.json", record)


def compare_stored(folder: Path, case: Case) -> list[str]:
    """What is stored is what transformers gives now."""
    from golden.check_stored import compare_tensors, read, unequal

    record, stored = read(f"{NAME}-run")
    expected = {Path(path).name: digest for path, digest in record["sha256"].items()}
    del expected[f"{NAME}-run.safetensors"]
    made = make.sums(make.checkpoint_files(folder))
    differences = unequal(f"{NAME}, files", expected, {Path(p).name: d for p, d in made.items()})
    differences += unequal(f"{NAME}, page ids", record["page_ids"], case.page_ids)
    differences += unequal(f"{NAME}, query ids", record["query_ids"], case.query_ids)
    return differences + compare_tensors(
        f"{NAME}-run", stored, tensors_of(case), record["torch_float32_error"]
    )


if __name__ == "__main__":
    sys.exit(main())
