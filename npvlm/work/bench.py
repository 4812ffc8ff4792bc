"""Measure a model on this machine, alone or in turns with another program."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from npvlm.config import PACKED, Values, parse_config, read_json
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.memory import available_memory
from npvlm.kernels.bandwidth import threads
from npvlm.work.limits import Limits, measure_limits
from npvlm.work.memory import Memory, PeakMemory, larger, memory_now
from npvlm.work.peers.process import Round
from npvlm.work.peers.start import Peer
from npvlm.work.rounds import open_model, random_inputs, run_round
from npvlm.work.synthetic import check_place, save_checkpoint, synthetic_checkpoint, weight_bytes

REST = 0.5  # seconds before a round: by then the threads of the other side sleep
WORKING = 1_500_000_000  # bytes that a run takes beside the weights, 1 GB of it for the bandwidth

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is run: `batch` pictures together, `repeat` times."""

    batch: int = 1
    prompt_tokens: int = 8
    new_tokens: int = 32
    repeat: int = 3


@dataclass(frozen=True)
class Figures:
    """One side: medians of its rounds in seconds, `decode` in tokens per second of all answers.

    Bytes: `anonymous` is the most that it held in the rounds, `anonymous_before` what it held with
    the weights opened and nothing run yet. None is what it does not have, or the system not say.
    """

    name: str
    load: float
    image: float | None
    prefill: float
    first_token: float | None
    decode: float
    anonymous: int | None
    anonymous_before: int | None
    resident: int | None
    rounds: list[Round]


@dataclass(frozen=True)
class Report:
    """Everything that a bench found out; a ratio above 1 means that npvlm is faster."""

    model: str
    precision: str
    plan: Plan
    image_tokens: int
    machine: dict[str, Any]
    npvlm: Figures
    against: Figures | None
    ratios: dict[str, float]
    limits: Limits

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def bench_synthetic(
    name: str,
    values: Values,
    save: Path | None,
    precision: str | None,
    plan: Plan,
    against: str | None,
    say: Say,
) -> Report:
    """Measure a checkpoint of random weights that is written for it.

    Parameters
    ----------
    name : what the report calls it
    values : the contents of its config.json
    save : a new folder that keeps it; None removes it at the end
    precision, plan, against, say : as in `bench`

    Raises
    ------
    UsageError, NpvlmError
        As `bench` does; also for a `save` that is taken, and a disk that is too small.
    """
    _check_memory(values, precision, _checked(values, precision, plan, against))
    check_place(values, save)
    say(f"writing {weight_bytes(values) / 1e9:.1f} GB of random weights")
    if save is not None:
        save_checkpoint(values, save)
        return bench(name, save, precision, plan, against, say)
    with synthetic_checkpoint(values) as folder:
        return bench(name, folder, precision, plan, against, say)


def bench(
    name: str,
    folder: Path,
    precision: str | None,
    plan: Plan,
    against: str | None,
    say: Say,
    adapter: Path | None = None,
) -> Report:
    """Measure a checkpoint, alone or in turns with another program.

    Parameters
    ----------
    name : what the report calls it
    folder : a checkpoint folder; it needs no tokenizer
    precision : of the arithmetic; None is that of `load`
    plan : how much is run
    against : the other program: transformers, transformers:bfloat16, transformers:float32 or
        llama.cpp
    say : called with what is going on
    adapter : a LoRA to run the checkpoint with

    Raises
    ------
    UsageError
        For more tokens than the model has places for, or a program that is not there.
    NpvlmError
        For a folder that is no model, or a machine too small for two programs at once.
    """
    values = read_json(folder / "config.json")
    peer = _checked(values, precision, plan, against)
    if peer is not None:
        _check_memory(values, precision, peer)

    packs = precision in PACKED and parse_config(values).quantization is None
    say(f"packing the weights as {precision} in memory" if packs else "opening the model")
    model = open_model(folder, precision, adapter)
    inputs = random_inputs(model.config, plan.batch, plan.prompt_tokens)
    with ExitStack() as stack:
        ours = _Side("npvlm", model.load, memory_now())
        theirs = worker = None
        if peer is not None:
            say(f"starting {peer.program}")
            text = model.config.text_config
            worker = stack.enter_context(
                peer.start(folder, text, inputs, plan.new_tokens, threads())
            )
            theirs = _Side(worker.name, worker.load, worker.before)
        say("warming up")
        run_round(model, inputs, 2)
        if worker is not None:
            worker.round()

        for number in range(plan.repeat):
            say(f"round {number + 1} of {plan.repeat}")
            time.sleep(REST)
            with PeakMemory() as peak:
                done = run_round(model, inputs, plan.new_tokens)
            ours.add(done, peak.memory)
            if worker is not None and theirs is not None:
                time.sleep(REST)
                theirs.add(*worker.round())

    say("measuring the machine")
    limits = measure_limits(model, inputs, plan.new_tokens, plan.repeat)
    figures = ours.figures(plan)
    other = theirs.figures(plan) if theirs is not None else None
    return Report(
        model=name,
        precision=model.precision,
        plan=plan,
        image_tokens=model.config.vision_config.num_patches,
        machine=machine(),
        npvlm=figures,
        against=other,
        ratios=ratios(figures, other) if other is not None else {},
        limits=limits,
    )


class _Side:
    """One program's rounds as they come in."""

    def __init__(self, name: str, load: float, before: Memory | None) -> None:
        self.name, self.load, self.before = name, load, before
        self.rounds: list[Round] = []
        self.peak: Memory | None = None

    def add(self, done: Round, peak: Memory | None) -> None:
        self.rounds.append(done)
        self.peak = larger(self.peak, peak)

    def figures(self, plan: Plan) -> Figures:
        def median(part: str) -> float | None:
            seconds = [getattr(done, part) for done in self.rounds]
            return None if None in seconds else statistics.median(seconds)

        written = plan.batch * (plan.new_tokens - 1)  # the first token belongs to the prefill
        return Figures(
            name=self.name,
            load=self.load,
            image=median("image"),
            prefill=statistics.median(done.prefill for done in self.rounds),
            first_token=median("first_token"),
            decode=statistics.median(written / done.decode for done in self.rounds),
            anonymous=self.peak.anonymous if self.peak else None,
            anonymous_before=self.before.anonymous if self.before else None,
            resident=self.peak.resident if self.peak else None,
            rounds=self.rounds,
        )


def ratios(ours: Figures, theirs: Figures) -> dict[str, float]:
    """How many times as fast npvlm is, where both sides have a figure."""
    found = {}
    for part in ("image", "prefill", "first_token"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        if mine is not None and other is not None:
            found[part] = other / mine
    found["decode"] = ours.decode / theirs.decode
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "threads": threads(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "numba": version("numba"),
    }


def _cpu_name() -> str:
    """The name that the system has for its CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _checked(values: Values, precision: str | None, plan: Plan, against: str | None) -> Peer | None:
    """Refuse what cannot be run before anything is written or opened; give the other program."""
    config = parse_config(values)
    most = config.text_config.max_position_embeddings
    tokens = config.vision_config.num_patches + plan.prompt_tokens + plan.new_tokens
    if tokens > most:
        raise UsageError(
            f"{tokens} tokens of picture, prompt and answer are too many, expected at most {most} "
            "(max_position_embeddings of config.json)."
        )
    if against is None:
        return None
    peer = Peer(against, precision or config.quantization or "float32")
    peer.check(values, plan.batch)
    return peer


def _check_memory(values: Values, precision: str | None, peer: Peer | None) -> None:
    """Refuse a run whose weights would push each other out of memory."""
    size = weight_bytes(values)
    packed = size // 2 if precision in PACKED else 0
    needed = size + packed + (peer.memory(values) if peer else 0) + WORKING
    free = available_memory()
    if free is not None and free < needed:
        raise NpvlmError(
            f"{free / 1e9:.1f} GB of memory are free, expected {needed / 1e9:.1f} GB; take a "
            "smaller model, leave out --against, or stop other programs."
        )
