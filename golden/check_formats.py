"""Hold what convert makes of other forms against transformers: `python golden/check_formats.py`.

Checkpoints of big_vision, models with a PaliGemma inside, short tables, other picture sizes: each
is made here of a random checkpoint, converted, and read by transformers. With --store the stored
goldens are written anew instead, in golden/formats. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golden import big_vision, oracle
from golden.make import decoded, error, sums, surroundings, write_json
from golden.oracle import Recipe, _gemma, _gemma2, _vision
from golden.ours import EVERY
from npvlm.api import load
from npvlm.work.convert import convert

Tensors = dict[str, torch.Tensor]

GOLDEN = Path(__file__).resolve().parent
STORED = GOLDEN / "formats"
# Soft-caps, window and the scale of scores as an .npz has to be taken to have them.
_CAPS = {"attn": 50.0, "final": 30.0}
RECIPES = (
    Recipe(
        "bv1", 71, "bfloat16", "published",
        _vision(15, 5, 21, 35, layers=2, heads=3),
        _gemma(23, 49, layers=3, heads=3, groups=1, head_dim=10),
        image_row=False, locations=8,
    ),
    Recipe(
        "bv2", 72, "float16", "published",
        _vision(12, 4, 27, 33, layers=2, heads=3),
        _gemma(30, 41, layers=4, heads=6, groups=2, head_dim=6) | _gemma2(4096, 6, **_CAPS),
        image_row=False, locations=8,
    ),
    Recipe(
        "bv2-f32", 73, "float32", "published",
        _vision(20, 5, 33, 29, layers=3, heads=3),
        _gemma(36, 43, layers=3, heads=4, groups=2, head_dim=14) | _gemma2(4096, 14, **_CAPS),
        image_row=False, locations=8,
    ),
)  # fmt: skip
# The names around the PaliGemma in the checkpoints of robots' policies, and what stands beside it.
PREFIXES = ("paligemma_with_expert.paligemma.", "model.paligemma_with_expert.paligemma.")
BESIDE = ("action_in_proj.weight", "paligemma_with_expert.gemma_expert.model.norm.weight")
SIDES = ((3, 3), (3, 4), (3, 7), (4, 3), (8, 12), (9, 4), (1, 3))


class Report:
    """How many cases were held, and which differ."""

    def __init__(self) -> None:
        self.cases = 0
        self.differing: list[str] = []

    def hold(self, same: bool, case: str) -> None:
        self.cases += 1
        if not same:
            self.differing.append(case)
            print(f"DIFFERENT  {case}")


def npz_of(folder: Path, recipe: Recipe, path: Path) -> big_vision.Arrays:
    """Write the .npz of which transformers' script makes this checkpoint."""
    text = recipe.text
    arrays = big_vision.to_big_vision(
        {n: w.float().numpy() for n, w in load_file(folder / "model.safetensors").items()},
        text["num_attention_heads"],
        text["num_key_value_heads"],
        recipe.vision["num_attention_heads"],
    )
    big_vision.save(path, arrays, recipe.dtype)
    return arrays


def check_einsums(folder: Path, arrays: big_vision.Arrays, report: Report) -> None:
    """What the arrays mean to big_vision is what transformers' layers compute."""
    model = oracle.load_float64(oracle.load_float32(folder))
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = torch.randn(5, model.config.text_config.hidden_size, dtype=torch.float64)
    for i, layer in enumerate(model.model.language_model.layers):
        with torch.no_grad():
            theirs = [
                m(x)
                for m in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            ]
            theirs += [layer.self_attn.o_proj(theirs[0]), layer.mlp(x)]
        ours = [*attended(x, wide, i), gated(x, wide, i)]
        for a, b in zip(ours, theirs, strict=True):
            report.hold(torch.allclose(a, b, rtol=1e-12, atol=1e-12), f"einsums of layer {i}")


def attended(x: torch.Tensor, arrays: big_vision.Arrays, layer: int) -> list[torch.Tensor]:
    """Queries, keys and values of a decoder's layer, and the queries mixed again, by its einsums.

    x [T, D] -> [T, H d], [T, K d], [T, K d], [T, D]
    """
    q, kv, o = (
        torch.from_numpy(arrays[f"{big_vision.LAYERS}attn/{name}_einsum/w"][layer])
        for name in ("q", "kv", "attn_vec")
    )
    queries = torch.einsum("TD,NDH->TNH", x, q)
    keys, values = torch.einsum("TD,CKDH->CTKH", x, kv)
    mixed = torch.einsum("TNH,NHD->TD", queries, o)
    return [queries.flatten(1), keys.flatten(1), values.flatten(1), mixed]


def gated(x: torch.Tensor, arrays: big_vision.Arrays, layer: int) -> torch.Tensor:
    """A decoder's MLP as big_vision has it: the first half is the gate.

    x [T, D] -> [T, D]
    """
    gate, up = torch.from_numpy(arrays[f"{big_vision.LAYERS}mlp/gating_einsum"][layer])
    inner = torch.nn.functional.gelu(x @ gate, approximate="tanh") * (x @ up)
    return inner @ torch.from_numpy(arrays[f"{big_vision.LAYERS}mlp/linear"][layer])


def same_tensors(folder: Path, expected: Tensors, report: Report, case: str) -> None:
    """A folder has these tensors, bit for bit, and no others."""
    found = load_file(folder / "model.safetensors")
    report.hold(set(found) == set(expected), f"{case}: names")
    for name, tensor in expected.items():
        report.hold(torch.equal(found[name].float(), tensor.float()), f"{case}: {name}")


def in_torch(arrays: big_vision.Arrays) -> Tensors:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def same_bits(one: Path, other: Path, report: Report, case: str) -> None:
    """npvlm computes the same bits with both folders, over the columns that both have."""
    picture = oracle.random_picture(np.random.default_rng(5))
    for ops in ("numpy", "kernels"):
        scores = [load(f, ops=ops).logits(picture, "caption en", [4, 9]) for f in (one, other)]
        report.hold(equal_columns(scores), f"{case}: logits, {ops}")


def same_logits(one: Path, other: Path, report: Report, case: str) -> None:
    """npvlm computes the same bits with both folders, as does transformers.

    transformers loads both, and nothing is missing or unexpected.
    """
    same_bits(one, other, report, case)
    picture = oracle.random_picture(np.random.default_rng(5))
    pixels, ids = oracle.pixel_values(one, picture)[None], oracle.layout(one, "caption en", 1)
    stages = [oracle.run(oracle.load_float32(f), pixels, ids, [4, 9]) for f in (one, other)]
    theirs = [s["language_model.logits"] for s in stages]
    report.hold(equal_columns(theirs), f"{case}: transformers' logits")


def equal_columns(scores: list[np.ndarray]) -> bool:
    columns = min(s.shape[1] for s in scores)
    return np.array_equal(*(s[:, :columns] for s in scores))


def check_npz(recipe: Recipe, folder: Path, place: Path, report: Report) -> None:
    """From transformers to big_vision and back, and from random arrays."""
    path = place / f"{recipe.name}.npz"
    arrays = npz_of(folder, recipe, path)
    check_einsums(folder, arrays, report)
    there_and_back = in_torch(big_vision.to_transformers(arrays))
    original = load_file(folder / "model.safetensors")
    report.hold(
        all(torch.equal(there_and_back[n], original[n].float()) for n in original)
        and len(there_and_back) == len(original),
        f"{recipe.name}: the scripts' mapping undoes its inverse",
    )
    shutil.copy(folder / "tokenizer.model", place / "paligemma_tokenizer.model")
    convert(path, place / "converted", None, quiet)
    same_tensors(place / "converted", original, report, f"{recipe.name}.npz")
    same_logits(place / "converted", folder, report, f"{recipe.name}.npz")

    draw = np.random.default_rng(recipe.seed)
    random = {n: draw.standard_normal(a.shape, dtype=np.float32) for n, a in arrays.items()}
    big_vision.save(path, random, "float32", prefix="")
    convert(path, place / "random", None, quiet)
    same_tensors(
        place / "random",
        in_torch(big_vision.to_transformers(random)),
        report,
        f"{recipe.name}, random arrays",
    )


def check_inside(recipe: Recipe, folder: Path, place: Path, report: Report) -> None:
    """A PaliGemma inside another model, in every spelling, with either of its tables."""
    original = load_file(folder / "model.safetensors")
    for spelling, rename in oracle.SPELLINGS.items():
        for prefix in PREFIXES:
            for head_alone in (False, True):
                case = f"{recipe.name}, {spelling} under {prefix}, {head_alone=}"
                source = place / "inside"
                shutil.copytree(folder, source)
                names = {n: prefix + rename(n) for n in original}
                if head_alone:
                    table = "language_model.model.embed_tokens.weight"
                    names[table] = prefix + rename("language_model.lm_head.weight")
                tensors = {names[n]: w for n, w in original.items()}
                tensors |= {name: torch.ones(3) for name in BESIDE}
                save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
                said: list[str] = []
                convert(source, place / "out", None, quiet, say=said.append)
                report.hold(
                    any("is left out" in line for line in said), f"{case}: what is left out"
                )
                same_tensors(place / "out", original, report, case)
                if spelling == "saved":
                    same_bits(source, folder, report, case)
                    same_logits(place / "out", folder, report, case)
                shutil.rmtree(source)
                shutil.rmtree(place / "out")


def check_sizes(recipe: Recipe, folder: Path, place: Path, report: Report) -> None:
    """Positions for pictures of another size are those that transformers makes of the table."""
    patch, model = recipe.vision["patch_size"], oracle.load_float32(folder)
    truth = oracle.load_float64(model)
    for side in (2, 5, 8):
        new = place / f"side-{side}"
        convert(folder, new, None, quiet, image_size=side * patch)
        pixels = np.random.default_rng(side).standard_normal((1, 3, side * patch, side * patch))
        with torch.no_grad():
            features = truth.model.get_image_features(
                torch.from_numpy(pixels), interpolate_pos_encoding=True
            ).pooler_output
            made = (
                oracle.load_float64(oracle.load_float32(new))
                .model.get_image_features(torch.from_numpy(pixels))
                .pooler_output
            )
        name = "vision_tower.vision_model.embeddings.position_embedding.weight"
        table = load_file(new / "model.safetensors")[name]
        theirs = positions(truth, side)
        report.hold(torch.equal(table, theirs.float()), f"{recipe.name}: positions of side {side}")
        off = (features - made).norm() / features.norm()
        report.hold(
            bool(off < 1e-6), f"{recipe.name}: features of side {side} are off by {off:.1e}"
        )
        load(new)


def positions(model: Any, side: int) -> torch.Tensor:
    """The table that transformers adds for pictures of side x side patches. [N * N, D]"""
    embeddings = model.model.vision_tower.embeddings
    size = side * embeddings.patch_size
    with torch.no_grad():
        found = embeddings.interpolate_pos_encoding(
            torch.empty(1, side * side, embeddings.embed_dim), size, size
        )
    return found[0]


def quiet(*_: int) -> None:
    """Progress that no one sees."""


def store() -> None:
    """Write the goldens: an .npz of each family with what transformers says, and positions."""
    shutil.rmtree(STORED, ignore_errors=True)
    STORED.mkdir()
    record: dict[str, Any] = {"made_by": "python golden/check_formats.py --store", **surroundings()}
    with tempfile.TemporaryDirectory() as place:
        for recipe in RECIPES[:2]:
            folder = oracle.build_checkpoint(Path(place) / recipe.name, recipe)
            npz_of(folder, recipe, STORED / f"{recipe.name}.npz")
            shutil.copy(folder / "tokenizer.model", STORED / f"{recipe.name}.tokenizer.model")
            float32 = oracle.load_float32(folder)
            picture = oracle.random_picture(np.random.default_rng(recipe.seed))
            case = oracle.ask(
                folder, [picture], oracle.PROMPTS[0][1], float32, oracle.load_float64(float32)
            )
            kept = {"picture": np.asarray(picture), "decode": decoded(case)}
            save_arrays(kept, STORED / f"{recipe.name}.safetensors")
            record[recipe.name] = {"recipe": asdict(recipe), **described(case)}
    tables = {}
    for old, new in SIDES:
        draw = torch.Generator().manual_seed(100 * old + new)
        table = torch.randn(old * old, 7, generator=draw)
        grid = table.double().reshape(1, old, old, -1).permute(0, 3, 1, 2)
        made = torch.nn.functional.interpolate(
            grid, size=(new, new), mode="bicubic", align_corners=False
        )
        tables[f"{old}.{new}.table"] = table.numpy()
        tables[f"{old}.{new}.made"] = made[0].flatten(1).T.float().contiguous().numpy()
    save_arrays(tables, STORED / "positions.safetensors")
    record["sha256"] = sums(sorted(STORED.glob("*.*")))
    write_json(GOLDEN / "formats.json", record)
    print(f"{sum(path.stat().st_size for path in STORED.iterdir()):,} bytes")


def described(case: oracle.Case) -> dict[str, Any]:
    """A prompt in plain numbers, and by how much torch's float32 misses the truth."""
    off = error(case.scores[::EVERY], decoded(case))
    return {"prompt": case.prompt, "ids": case.ids, "answer": case.answer, "torch_float32": off}


def check() -> list[str]:
    """Run all of it."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            place = Path(folder) / recipe.name
            checkpoint = oracle.build_checkpoint(place / "checkpoint", recipe)
            check_npz(recipe, checkpoint, place, report)
            check_inside(recipe, checkpoint, place, report)
            check_sizes(recipe, checkpoint, place, report)
        recipe = replace(RECIPES[0], image_row=True)
        place = Path(folder) / "rows"
        check_rows(oracle.build_checkpoint(place / "checkpoint", recipe), place, report)
    print(f"other forms: {report.cases} cases, {len(report.differing)} differ")
    return report.differing


def check_rows(folder: Path, place: Path, report: Report) -> None:
    """A table without the rows that nothing was trained for, under a config that says there are."""
    table = "language_model.model.embed_tokens.weight"
    tensors = load_file(folder / "model.safetensors")
    image = json.loads((folder / "config.json").read_text())["image_token_index"]
    short = place / "short"
    shutil.copytree(folder, short)
    cut = tensors | {table: tensors[table][:image].clone()}
    save_file(cut, short / "model.safetensors", metadata={"format": "pt"})
    convert(short, place / "fitted", None, quiet)
    same_tensors(place / "fitted", cut, report, "a short table")
    same_logits(place / "fitted", folder, report, "a short table, converted")


def main() -> int:
    """Check, or store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true", help="write the stored goldens anew")
    options = parser.parse_args()
    oracle.quiet(threads=1)
    if options.store:
        store()
        return 0
    return int(bool(check()))


if __name__ == "__main__":
    sys.exit(main())
