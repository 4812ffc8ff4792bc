"""Which programs npvlm can be measured against, what each needs, and how it is started."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from npvlm.config import TextConfig, Values, parse_config
from npvlm.errors import UsageError
from npvlm.files.output import check_room, scratch_folder
from npvlm.work.peers.gguf import KINDS, gguf_bytes, write_gguf
from npvlm.work.peers.process import Worker, worker
from npvlm.work.rounds import Inputs
from npvlm.work.synthetic import ELSEWHERE, weight_bytes


@dataclass(frozen=True)
class Peer:
    """A program, and the precision of ours that it is measured against.

    program : transformers, transformers:bfloat16, transformers:float32 or llama.cpp
    """

    program: str
    precision: str

    @property
    def dtype(self) -> str:
        """What transformers computes in: what was asked for, or the nearest to our precision."""
        _, _, dtype = self.program.partition(":")
        return dtype or ("float32" if self.precision == "float32" else "bfloat16")

    @property
    def is_llama(self) -> bool:
        return self.program == "llama.cpp"

    def check(self, values: Values, batch: int) -> None:
        """Refuse what cannot be run, before any work is done.

        Raises
        ------
        UsageError
            For a program that is not installed, or a model that it cannot run.
        """
        wanted = (
            {"llama_cpp": "llama-cpp-python"}
            if self.is_llama
            else {"torch": "torch", "transformers": "transformers"}
        )
        missing = [package for module, package in wanted.items() if find_spec(module) is None]
        if missing:
            raise UsageError(
                f"--against {self.program} found no {' and no '.join(missing)}, expected in the "
                f"same Python as npvlm; pip install {' '.join(missing)} puts it there."
            )
        if self.is_llama and batch > 1:
            raise UsageError("--against llama.cpp runs one sequence, expected --batch 1.")
        if not self.is_llama and values.get("quantization") is not None:
            raise UsageError(
                "transformers cannot read a converted model; name the model it was made from, "
                f"with --precision {self.precision}."
            )

    def memory(self, values: Values) -> int:
        """Bytes that its weights will take."""
        if self.is_llama:
            return gguf_bytes(parse_config(values).text_config, KINDS[self.precision])
        return weight_bytes(values) * (2 if self.dtype == "float32" else 1)

    @contextmanager
    def start(
        self, folder: Path, text: TextConfig, inputs: Inputs, new_tokens: int, threads: int
    ) -> Iterator[Worker]:
        """Run it in a process of its own, on the same folder and inputs as far as it can.

        llama.cpp gets a file of random weights instead, of the decoder's sizes.
        """
        with scratch_folder(Path(tempfile.gettempdir())) as scratch:
            settings: dict[str, Any] = {"new_tokens": new_tokens, "threads": threads}
            if self.is_llama:
                kind = KINDS[self.precision]
                check_room(scratch, gguf_bytes(text, kind), ELSEWHERE)
                write_gguf(scratch / "decoder.gguf", text, kind)
                settings |= {
                    "file": str(scratch / "decoder.gguf"),
                    "kind": kind.name,
                    "prompt_tokens": inputs.ids.shape[1],
                }
                module = "npvlm.work.peers.run_llama"
            else:
                np.savez(scratch / "inputs.npz", ids=inputs.ids, pixels=inputs.pixels)
                settings |= {
                    "folder": str(folder.resolve()),
                    "inputs": str(scratch / "inputs.npz"),
                    "dtype": self.dtype,
                }
                module = "npvlm.work.peers.run_transformers"
            with worker(module, self.program, settings, threads, scratch) as running:
                yield running
