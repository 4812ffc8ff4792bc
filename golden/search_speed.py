"""How fast pages are scored, by npvlm and by torch, taking turns: `python golden/search_speed.py`.

Random pages as large as ColPali's, 1,030 vectors of 128 numbers, and a query of 25 tokens. torch
does what transformers' `score_retrieval` does. Seconds are those that one core spent, so that a
busy machine matters less. Needs golden/requirements.txt.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numba
import numpy as np
import torch

from npvlm import kernels
from npvlm.model.ops import unit
from npvlm.model.weights import pack_int8

TOKENS, SIZE, WIDTH = 25, 1030, 128


def main() -> None:
    """Print the median of some rounds for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    numba.set_num_threads(1)
    torch.set_num_threads(1)

    rng = np.random.default_rng(0)
    pages = unit(rng.standard_normal((arguments.pages * SIZE, WIDTH), dtype=np.float32))
    query = unit(rng.standard_normal((TOKENS, WIDTH), dtype=np.float32))
    wide = torch.from_numpy(pages).reshape(-1, SIZE, WIDTH)
    kept = {"float32": pages, "float16": pages.astype(np.float16), "int8": pack_int8(pages)}
    runs: dict[str, Callable[[], object]] = {
        f"npvlm {name}": lambda w=w: kernels.max_sim(query, w, SIZE) for name, w in kept.items()
    }
    runs["torch float32"] = lambda: scored(torch.from_numpy(query), wide)
    half = wide.bfloat16()
    runs["torch bfloat16"] = lambda: scored(torch.from_numpy(query).bfloat16(), half)
    for run in runs.values():  # what is compiled or fetched the first time
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            taken[name].append(time.process_time() - began)
    for name, seconds in taken.items():
        rates = sorted(arguments.pages / second for second in seconds)
        print(f"{name:<16}{median(rates):>8.0f} pages/s, {rates[0]:.0f} to {rates[-1]:.0f}")


def scored(query: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The einsum of `score_retrieval`, 128 pages at a time. query [T, E], pages [N, S, E] -> [N]"""
    found = [
        torch.einsum("bnd,csd->bcns", query[None], part).max(dim=3)[0].sum(dim=2)
        for part in pages.split(128)
    ]
    return torch.cat(found, dim=1)[0]


if __name__ == "__main__":
    main()
