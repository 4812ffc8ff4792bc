"""Faults by the hundred: signals, closed pipes, full disks, limits, a damaged cache of kernels.

    python tests/faults.py --count 100 --seed 1 --only signal

Each try starts a command in a place of its own and lets something go wrong at a random moment. What
is promised then: one of a few exit codes, no traceback, nothing half-written, nothing left behind.
The table says for each fault how often it was tried and how often that was so.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run by hand

from tests.hub_double import REPO, Hub, serve  # noqa: E402
from tests.retriever import build_retriever  # noqa: E402

COMMAND = [sys.executable, str(ROOT / "cli.py")]
PICTURES = 6
# What a command must never say.
NEVER = ("Traceback", "Exception ignored", "Fatal", "libgomp", "Terminating", "core dumped")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
# Every command: what it prints or writes into out/, from the pictures and files beside that.
JOBS = {
    "caption": "caption pictures",
    "stream": "caption a.png",
    "ask": "ask a.png pictures how",
    "detect": "detect pictures red\\ circle -o out/drawn --format json",
    "segment": "segment a.png red\\ circle --cutouts out/cut -o out/a.png",
    "score": "score a.png caption\\ en a\\ red\\ circle a\\ blue\\ star",
    "explain": "explain a.png caption\\ en -o out/e.png --html out/e.html",
    "chat": "chat a.png",
    "batch": "batch pictures --task caption -o out/r.jsonl --html out/sheet",
    "generate": "generate a.png --prompt caption\\ en --beams 3 --json",
    "trace": "trace a.png --prompt caption\\ en --save out/t.safetensors",
    "dump": "trace a.png --prompt caption\\ en --save out/t",
    "convert": "convert shapes out/small --precision int8",
    "int8": "caption pictures --precision int8",
    "merge": "convert tiny out/merged --adapter adapter",
    "features": "features pictures --hidden 2 --attention 0 --prompt x -o out/f.safetensors",
    "embed": "embed pictures -o out/index.safetensors --model retriever",
    "search": "search index.safetensors red\\ circle --heat out/heat --model retriever",
    "compare": "compare dump.safetensors dump.safetensors",
    "replay": "replay language_model.model.layers.0.mlp --input dump.safetensors --save out/x.npy",
    "kit": "kit -o out/kit",
    "bench": "bench --repeat 1 --new-tokens 4 --json",
    "fetch": f"fetch {REPO}",
    "demo": "demo -o out/demo.png",
    "models": "models",
    "inspect": "inspect shapes",
    "doctor": "doctor",
    "tokens": "tokens caption\\ en",
    "help": "batch --help",
}
LINES = b"caption en\ndetect red circle\nhow many shapes?\n"


def arguments(job: str) -> list[str]:
    """The words of a job; a space that is quoted belongs to its word."""
    return [word.replace("\0", " ") for word in JOBS[job].replace("\\ ", "\0").split()]


@dataclass
class Clean:
    """What a job does where nothing goes wrong."""

    seconds: float
    stdout: bytes
    files: dict[str, bytes]


@dataclass
class Bench:
    """Where jobs are tried: a folder with what they need, and what each does undisturbed."""

    folder: Path
    chance: random.Random
    hub: Hub
    clean: dict[str, Clean] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def place(self) -> Iterator[Path]:
        """A working folder for one try."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="try-") as name:
            place = Path(name)
            for made in ("out", "tmp", "hub"):
                (place / made).mkdir()
            for given in (self.folder / "given").iterdir():
                (place / given.name).symlink_to(given)
            yield place

    def start(self, job: str, place: Path, **options: object) -> subprocess.Popen[bytes]:
        """Start a job; stdin is a file, so that nothing waits for it."""
        environment = {
            **os.environ,
            "NPVLM_MODEL": "shapes",
            "TMPDIR": str(place / "tmp"),
            "HF_HOME": str(place / "hub"),
            "HF_ENDPOINT": self.hub.address,
            **options.pop("env", {}),  # type: ignore[dict-item]
        }
        with (place / "lines").open("rb") as lines:
            return subprocess.Popen(
                [*COMMAND, *arguments(job)],
                **{"stdin": lines, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
                cwd=place,
                env=environment,
                start_new_session=True,
            )

    def of(self, job: str) -> Clean:
        """What a job does undisturbed, found out once, with the kernels it needs compiled."""
        if job not in self.clean:
            given = self.folder / "given"
            if "dump.safetensors" in JOBS[job] and not (given / "dump.safetensors").exists():
                traced = self.of("trace").files
                (given / "dump.safetensors").write_bytes(traced["t.safetensors"])
                (given / "dump.json").write_bytes(traced["t.json"])
            if job == "search" and not (given / "index.safetensors").exists():
                index = self.of("embed").files["index.safetensors"]
                (given / "index.safetensors").write_bytes(index)
            with self.place() as place:
                began = time.perf_counter()
                process = self.start(job, place)
                out, said = process.communicate()
                seconds = time.perf_counter() - began
                assert process.returncode == 0, said.decode()
                self.clean[job] = Clean(seconds, out, files_of(place / "out"))
        return self.clean[job]

    def judge(self, job: str, place: Path, code: int, said: bytes, codes: set[int]) -> str | None:
        """What is not as promised, if anything."""
        text = said.decode(errors="replace")
        if code not in codes:
            return f"exit code {code}, expected {sorted(codes)}: {text[-300:]}"
        if wrong := next((word for word in NEVER if word in text), None):
            return f"says {wrong}: {text[-1500:]}"
        if left := sorted(p.name for p in (place / "tmp").iterdir()):
            return f"left in $TMPDIR: {left}"
        whole = self.of(job).files
        for name, content in files_of(place / "out").items():
            if name == "index.safetensors.part" and code:
                continue  # which --resume goes on from
            if name not in whole:
                return f"left {name}"
            lines = name.endswith(".jsonl") and content.endswith((b"", b"\n"))
            if not (content == whole[name] or (lines and whole[name].startswith(content))):
                if Path(name).name in VARYING and len(content) > 0.9 * len(whole[name]):
                    continue
                return f"{name} is not whole: {len(content)} of {len(whole[name])} bytes"
        return None


# Files that tell the time or the place.
VARYING = ("index.html", "e.html")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


Fault = Callable[[Bench, str], str | None]


def last_line(said: bytes) -> str:
    """What the command says at the end."""
    return said.decode(errors="replace").rstrip("\n").rpartition("\n")[2]


def signalled(bench: Bench, job: str, times: int = 1, **options: object) -> str | None:
    """A signal at any moment, or several close together."""
    clean, number = bench.of(job), bench.chance.choice(list(SIGNALS))
    with bench.place() as place:
        process = bench.start(job, place, **options)
        with suppress(subprocess.TimeoutExpired):
            process.wait(bench.chance.uniform(0, clean.seconds))
        sent = time.perf_counter()
        for _ in range(times):
            process.send_signal(number)
            time.sleep(bench.chance.uniform(0, 0.05) if times > 1 else 0)
        out, said = process.communicate()
        code, took = process.returncode, time.perf_counter() - sent
        if code not in (0, -number):
            bench.seconds[job].append(took)
        if b"Failed to import the site module" in said:
            return None  # Python itself was not yet up, and says so
        if code == -number:  # nor here
            return None if not (out or said) else f"{number.name}: {said.decode()}"
        if code and not last_line(said).startswith("npvlm: "):
            return f"says no line of its own: {said.decode()[-2000:]}"
        return bench.judge(job, place, code, said, {0, SIGNALS[number]})


def twice(bench: Bench, job: str) -> str | None:
    """The same signal two or three times within a tenth of a second."""
    return signalled(bench, job, bench.chance.choice((2, 3)))


def pipe(bench: Bench, job: str) -> str | None:
    """A reader that has had enough after some bytes."""
    clean = bench.of(job)
    with bench.place() as place:
        with bench.start(job, place) as process:
            assert process.stdout is not None and process.stderr is not None
            wanted = bench.chance.choice((0, 1, bench.chance.randrange(len(clean.stdout) + 1)))
            process.stdout.read(wanted)
            process.stdout.close()
            said = process.stderr.read()
        return bench.judge(job, place, process.returncode, said, {0})


def closed(bench: Bench, job: str) -> str | None:
    """Some of stdin, stdout and stderr closed by the shell."""
    bench.of(job)
    which = bench.chance.sample((0, 1, 2), bench.chance.choice((1, 2, 3)))
    with bench.place() as place:

        def close() -> None:
            for number in which:
                os.close(number)

        process = bench.start(job, place, preexec_fn=close)
        out, said = process.communicate()
        wrong = bench.judge(job, place, process.returncode, said, {0})
        if not wrong and not out and bench.of(job).stdout and not {0, 1} & {*which}:
            wrong = "prints nothing"
        return wrong and f"without {which}: {wrong}"


def full(bench: Bench, job: str) -> str | None:
    """A full disk below stdout."""
    clean = bench.of(job)
    with bench.place() as place, Path("/dev/full").open("wb") as disk:
        process = bench.start(job, place, stdout=disk)
        said = process.communicate()[1]
        wrong = bench.judge(job, place, process.returncode, said, {3} if clean.stdout else {0})
        if wrong is None and clean.stdout and b"No space left" not in said:
            return f"does not say why: {said.decode()}"
        return wrong


def size(bench: Bench, job: str) -> str | None:
    """No file may be larger than something below the largest that the job writes."""
    clean = bench.of(job)
    largest = max([len(content) for content in clean.files.values()] or [100_000])
    most = bench.chance.randrange(int(bench.chance.choice((10, 1000, largest))))
    with bench.place() as place:

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        process = bench.start(job, place, preexec_fn=limit)
        said = process.communicate()[1]
        wrong = bench.judge(job, place, process.returncode, said, {0, 3})
        return wrong and f"at most {most} bytes: {wrong}"


def memory(bench: Bench, job: str) -> str | None:
    """Too little memory."""
    bench.of(job)
    kind = bench.chance.choice((resource.RLIMIT_AS, resource.RLIMIT_DATA))
    most = int(bench.chance.uniform(50e6, 900e6))
    with bench.place() as place:

        def limit() -> None:
            resource.setrlimit(kind, (most, most))

        process = bench.start(job, place, preexec_fn=limit)
        said = process.communicate()[1]
        if process.returncode == 1 and said.startswith(b"OpenBLAS error"):
            return None  # which ends the process itself, in words of its own
        wrong = bench.judge(job, place, process.returncode, said, {0, 3})
        return wrong and f"{most / 1e6:.0f} MB ({kind}): {wrong}"


def cache(bench: Bench, job: str) -> str | None:
    """Files of the cache of kernels that are cut, zeroed, scrambled, swapped or gone."""
    from npvlm.kernels.compiling import FOLDER

    clean, chance = bench.of(job), bench.chance
    with bench.place() as place:
        kept = place / "kernels"
        shutil.copytree(FOLDER, kept / "npvlm" / FOLDER.name)
        files = sorted(path for path in kept.rglob("*.nb?"))
        for path in chance.sample(files, min(len(files), chance.choice((1, 3, 10)))):
            damage(path, chance)
        process = bench.start(job, place, env={"NUMBA_CACHE_DIR": str(kept)})
        out, said = process.communicate()
        if clean.stdout != out and job in ("caption", "int8"):
            return f"answers {out!r}"
        return bench.judge(job, place, process.returncode, said, {0})


def damage(path: Path, chance: random.Random) -> None:
    """Make a file of the cache what a crash, a full disk or a bad copy may leave."""
    content = bytearray(path.read_bytes())
    how = chance.randrange(6)
    if how == 0:
        content = content[: chance.randrange(len(content))]
    elif how == 1:
        content = bytearray(len(content))
    elif how == 2:
        for _ in range(chance.choice((1, 100))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif how == 3:
        content.clear()
    path.unlink()
    if how == 4:
        return
    if how == 5:
        path.mkdir()
        return
    path.write_bytes(content)


FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "signal": (signalled, list(JOBS)),
    "twice": (twice, [job for job in JOBS if job not in ("help", "models")]),
    "pipe": (pipe, list(JOBS)),
    "closed": (closed, list(JOBS)),
    "full": (full, list(JOBS)),
    "size": (size, [job for job in JOBS if "out/" in JOBS[job]] + ["fetch"]),
    "memory": (memory, ["caption", "detect", "batch", "generate", "trace", "convert", "int8"]),
    "cache": (cache, ["caption"]),
}


def prepare(folder: Path) -> None:
    """Make what the jobs are about."""
    from npvlm.work.demo import draw_picture

    given = folder / "given"
    (given / "pictures").mkdir(parents=True)
    for number in range(PICTURES):
        draw_picture().crop((0, 0, 448 - number, 448)).save(given / f"pictures/{number}.png")
    shutil.copy(given / "pictures/0.png", given / "a.png")
    (given / "lines").write_bytes(LINES)
    (given / "tiny").symlink_to(ROOT / "golden/pg1")
    (given / "adapter").symlink_to(ROOT / "golden/adapters/pg1-trained")
    build_retriever(given / "retriever")


def hub_files() -> dict[str, bytes]:
    """A model to fetch."""
    shapes = ROOT / "npvlm" / "bundled" / "shapes"
    return {path.name: path.read_bytes() for path in shapes.iterdir() if path.is_file()}


@contextmanager
def bench_in(seed: int) -> Iterator[Bench]:
    """A bench in a temporary folder, with a hub beside it."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name, serve(Hub(hub_files())) as hub:
        prepare(Path(name))
        yield Bench(Path(name), random.Random(seed), hub)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="tries of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(FAULTS), help="faults, with commas")
    parser.add_argument("--jobs", default="", help="jobs, with commas")
    given = parser.parse_args()
    # Where this was started in the background, it would be ignored, and so by all it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failures = 0
    print(f"{'fault':<10} {'tried':>6} {'as promised':>12} {'failed':>7}", flush=True)
    with bench_in(given.seed) as bench:
        for fault in given.only.split(","):
            do, jobs = FAULTS[fault]
            jobs = [job for job in jobs if not given.jobs or job in given.jobs.split(",")]
            wrong = []
            for number in range(given.count):
                job = jobs[number % len(jobs)]
                if (why := do(bench, job)) is not None:
                    wrong.append(f"  {fault} {job}: {why}")
                    print(wrong[-1], flush=True)
            failures += len(wrong)
            good = given.count - len(wrong)
            print(f"{fault:<10} {given.count:>6} {good:>12} {len(wrong):>7}", flush=True)
        for job, seconds in sorted(bench.seconds.items()):
            middle, most = statistics.median(seconds), max(seconds)
            ended = f"{len(seconds)} ended by a signal"
            print(f"{job}: {ended}, after {middle:.2f} s, at most {most:.2f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
