"""A toy ColPali: a projection trained on top of the bundled `shapes`, and what an int8 index costs.

python golden/toy_colpali.py train FOLDER
    trains it, in minutes, and writes a model's folder
python golden/toy_colpali.py measure FOLDER [--pages N]
    lets it search N held-out pages, kept in each way that an index has, and prints what is lost

The decoder is frozen and never saw a text without a picture, so it finds pages only so well: it is
there to measure with. A query names one or two things; the pages that have them all are relevant.
Needs golden/requirements.txt.

Axis letters: B pages of a batch · T tokens of a query · S vectors of a page · D width of the
decoder · E width of a vector.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from golden.shapes import Scene, draw_scene
from npvlm.files.index import STORES, Origin, Page, PageIndex, pack
from npvlm.model import colpali
from npvlm.retrieval import Retriever, load_retriever
from tests.retriever import build_retriever

WIDTH, STEPS, BATCH, RATE, SHARPNESS = 32, 1500, 48, 2e-3, 1.0
TRAINED = 1200  # pages


Labels = frozenset[str]


def labels(scene: Scene) -> Labels:
    """What is on a page: its things, or the digits of its number."""
    things = {thing.label for thing in scene.things}
    return frozenset(things or ({f"number {scene.number}"} if scene.number else ()))


def queries(found: Labels) -> list[str]:
    """What may be asked for that is on the page: one thing, or two."""
    pairs = [f"{one} and {other}" for one, other in combinations(sorted(found), 2)]
    return sorted(found) + pairs


def wanted(query: str) -> Labels:
    """The things that a query names."""
    return frozenset(query.split(" and "))


def states(retriever: Retriever, ids: np.ndarray, features: np.ndarray) -> Tensor:
    """The decoder's last states, which the projection takes. ids [T], features [M, D] -> [T, D]"""
    kept = {}

    def tap(name: str, value: np.ndarray) -> np.ndarray:
        kept[name] = value
        return value

    model = retriever.model
    given = ids, features, model.weights, model.config
    colpali.vectors(*given, ops=model.ops, tap=tap)
    return torch.from_numpy(kept["language_model.model.norm"].copy())


def train(folder: Path) -> None:
    """Train the projection so that a query is nearer to its page than to the others of a batch."""
    build_retriever(folder, width=WIDTH)
    retriever = load_retriever(folder)
    scenes = [draw_scene("train", 7, index) for index in range(TRAINED)]
    on = [labels(scene) for scene in scenes]
    pages = torch.stack(
        [
            states(retriever, retriever.page_ids, retriever.model.look(scene.picture).features)
            for scene in scenes
        ]
    )  # [N, S, D]
    none = np.empty((0, pages.shape[2]), np.float32)
    asked: dict[str, Tensor] = {}
    for query in {query for found in on for query in queries(found)}:
        asked[query] = states(retriever, retriever.query_ids(query), none)

    torch.manual_seed(0)
    projection = nn.Linear(pages.shape[2], WIDTH)
    optimizer = torch.optim.AdamW(projection.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE * 4, STEPS)
    rng = Random(0)
    for step in range(STEPS):
        batch = rng.sample([n for n in range(TRAINED) if on[n]], BATCH)
        named = [rng.choice(queries(on[n])) for n in batch]
        vectors = nn.functional.normalize(projection(pages[batch]), dim=-1)  # [B, S, E]
        rows = []
        for query in named:
            own = nn.functional.normalize(projection(asked[query]), dim=-1)  # [T, E]
            rows.append(torch.einsum("te,bse->bts", own, vectors).amax(2).sum(1))
        scores = torch.stack(rows) / SHARPNESS
        # Another page that has what is asked for is no mistake.
        also = torch.tensor([[wanted(query) <= on[n] for n in batch] for query in named])
        also.fill_diagonal_(False)
        loss = nn.functional.cross_entropy(
            scores.masked_fill(also, -torch.inf), torch.arange(BATCH)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    tensors = load_file(folder / "model.safetensors")
    for name, value in projection.state_dict().items():
        tensors[f"embedding_proj_layer.{name}"] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def measure(folder: Path, count: int) -> None:
    """Search held-out pages kept in each way, and print what is lost beside float32."""
    retriever = load_retriever(folder)
    scenes = [draw_scene("held out", 7, index) for index in range(count)]
    on = [labels(scene) for scene in scenes]
    vectors = [retriever.embed_page(scene.picture) for scene in scenes]
    asked = sorted({query for found in on for query in queries(found)})
    asked = [query for query in asked if not query.startswith("number")]
    found = {query: retriever.embed_query(query) for query in asked}
    truth = None
    print(f"{count} pages, {len(asked)} queries")
    for store in STORES:
        index = kept(retriever, vectors, store)
        scores = np.stack([retriever.scores(index, found[query]) for query in asked])
        truth = scores if truth is None else truth
        gains = [
            ndcg(row, [wanted(q) <= own for own in on])
            for row, q in zip(scores, asked, strict=True)
        ]
        first = np.mean(np.argmax(scores, 1) == np.argmax(truth, 1))
        tens = [len(set(top(a)) & set(top(b))) / 10 for a, b in zip(scores, truth, strict=True)]
        off = np.sqrt(np.mean((scores - truth) ** 2)) / np.std(truth)
        print(
            f"{store:<8} NDCG@10 {np.mean(gains):.4f}, the same first page {first:.2%}, of the "
            f"first ten the same {np.mean(tens):.2%}, scores off by {off:.1e} of their spread"
        )


def kept(retriever: Retriever, vectors: list[np.ndarray], store: str) -> PageIndex:
    """An index in memory."""
    packed = [pack(page, store) for page in vectors]
    parts = {name: np.stack([page[name] for page in packed]) for name in packed[0]}
    size, width = vectors[0].shape
    origin = Origin("toy", "", "float32", store, size, width)
    pages = [Page(f"{n}.png", 1, 1, 1) for n in range(len(vectors))]
    return PageIndex(Path("memory"), origin, pages, parts)


def top(scores: np.ndarray, most: int = 10) -> list[int]:
    return np.argsort(-scores, kind="stable")[:most].tolist()


def ndcg(scores: np.ndarray, relevant: list[bool]) -> float:
    """How well the first ten are ordered: 1 where no other order has more that fit, sooner."""
    gains = 1 / np.log2(np.arange(2, 12))
    best = gains[: sum(relevant)].sum()
    return float(
        sum(gain for n, gain in zip(top(scores), gains, strict=True) if relevant[n]) / best
    )


def main() -> None:
    """Train or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["train", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.do == "train":
        train(arguments.folder)
    else:
        measure(arguments.folder, arguments.pages)


if __name__ == "__main__":
    main()
