"""A long batch, watched from outside: memory, descriptors, seconds of CPU, the same bytes twice.

    python tests/soak.py                      # 20,000 pictures, four runs; half an hour
    python tests/soak.py --count 500          # a minute
    python tests/soak.py -o tests/soak.json   # keep the figures

It draws pictures, answers them with the bundled model in several runs, and looks at each process
through /proc every quarter of a second. Runs differ in threads and in how many pictures are
answered together, and their records must not. Exit code 0 if all is as promised, 1 otherwise.

A machine may be slower at the end of a run than at its start, for other guests or for heat. So at
each look the watcher does a piece of work of its own, always the same, and the seconds of a picture
are told in those of that work as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the watcher's own work

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from golden.shapes import draw_scene  # noqa: E402

LABELS = "red circle ; blue square ; star ; green triangle"
# Threads, and pictures answered together; the first is run three times.
SETTINGS = [(1, 8), (1, 8), (1, 8), (2, 3)]
INTERVAL = 0.25
TICK = os.sysconf("SC_CLK_TCK")
_WEIGHTS, _ROWS = np.ones((1500, 1500), np.float32), np.ones((1500, 8), np.float32)

# What is promised.
SLOPE = 50  # bytes of memory for each picture, fitted over all but the first tenth of a run
AGING = 1.1  # CPU seconds of a picture in the last tenth over those in the first


@dataclass(frozen=True)
class Look:
    """What a process is at one moment.

    records : lines it has written
    memory : bytes of its own, mapped files left out
    cpu : seconds, of all its threads
    files : descriptors that are open
    yard : seconds of CPU that the watcher's own work took
    """

    records: int
    memory: int
    cpu: float
    files: int
    yard: float


@dataclass(frozen=True)
class Run:
    """What one run came to.

    slope : bytes of memory for each picture, by least squares over all but the first tenth
    memory : bytes, median of the second tenth and of the last one; most_memory at any look
    files : descriptors, fewest of the second tenth and of the last one
    cpu : milliseconds for each picture in the first tenth, from the first record on, and the last
    yard : milliseconds of the watcher's own work in these, the mean
    """

    threads: int
    together: int
    seconds: float
    slope: float
    memory: tuple[float, float]
    most_memory: int
    files: tuple[int, int]
    cpu: tuple[float, float]
    yard: tuple[float, float]
    sha256: str

    @property
    def aging(self) -> float:
        """How much more a picture of the last tenth takes than one of the first, in such work."""
        return self.cpu[1] / self.cpu[0] * self.yard[0] / self.yard[1]


def draw(folder: Path, count: int, seed: int) -> None:
    """Write so many pictures of the bundled model's world."""
    for index in range(count):
        draw_scene("soak", seed, index).picture.save(folder / f"{index:05d}.png")


def run(pictures: Path, count: int, threads: int, together: int) -> Run:
    """Answer all pictures in a process of its own, and watch it."""
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / "records.jsonl"
        program = f"import npvlm.packs as p; p.PACKED_SEQUENCES = {together}; import npvlm.cli as c"
        options = ["--task", "detect", "--labels", LABELS, "-o", str(records), "-q"]
        options += ["--threads", str(threads)]
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", f"{program}; c.main()", "batch", str(pictures), *options],
            cwd=ROOT,
        )
        looks = _watch(process, records)
        seconds = time.perf_counter() - began
        content = records.read_bytes()
        if process.returncode or content.count(b"\n") != count:
            written = content.count(b"\n")
            raise SystemExit(f"the batch ended with {process.returncode} and {written} records.")
        sha256 = hashlib.sha256(content).hexdigest()
    done = np.array([look.records for look in looks]) / count
    late = [look for look, part in zip(looks, done, strict=True) if part >= 0.1]
    slope, _ = np.polyfit([look.records for look in late], [look.memory for look in late], 1)
    first = [look for look, part in zip(looks, done, strict=True) if part < 0.1]
    second = [look for look, part in zip(looks, done, strict=True) if 0.1 <= part < 0.2]
    last = [look for look, part in zip(looks, done, strict=True) if part >= 0.9]
    return Run(
        threads=threads,
        together=together,
        seconds=seconds,
        slope=float(slope),
        memory=tuple(statistics.median(look.memory for look in part) for part in (second, last)),
        most_memory=max(look.memory for look in looks),
        files=tuple(min(look.files for look in part) for part in (second, last)),
        cpu=(_cpu(looks, 0, count // 10), _cpu(looks, count - count // 10, count)),
        yard=tuple(1000 * statistics.mean(x.yard for x in part or looks) for part in (first, last)),
        sha256=sha256,
    )


def _watch(process: subprocess.Popen[bytes], records: Path) -> list[Look]:
    """Look at a process until it ends."""
    looks, size, lines = [], 0, 0
    while process.poll() is None:
        if records.exists():
            with records.open("rb") as file:
                file.seek(size)
                new = file.read()
            size, lines = size + len(new), lines + new.count(b"\n")
        if lines and (look := _look(process.pid, lines)):
            looks.append(look)
        time.sleep(INTERVAL)
    return looks


def _look(pid: int, records: int) -> Look | None:
    """Read what the system says of a process; None where it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None
    if "RssAnon" not in status:
        return None
    memory = int(status.partition("RssAnon:")[2].split()[0]) * 1024
    return Look(records, memory, (int(times[11]) + int(times[12])) / TICK, files, _yard())


def _yard() -> float:
    """Seconds of CPU for a piece of work that is as large as the bundled model's weights."""
    began = time.thread_time()
    for _ in range(3):
        _WEIGHTS @ _ROWS
    return time.thread_time() - began


def _cpu(looks: list[Look], first: int, last: int) -> float:
    """Milliseconds of CPU for each record between two counts, read between the looks."""
    records = [look.records for look in looks]
    first, last = max(first, records[0]), min(last, records[-1])
    cpu = np.interp([first, last], records, [look.cpu for look in looks])
    return float(1000 * (cpu[1] - cpu[0]) / (last - first))


def main() -> int:
    """Draw, run, compare, and say whether all is as promised."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20000, help="how many pictures")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("-o", "--output", type=Path, help="where the figures are kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), given.count, given.seed)
        runs = []
        for threads, together in SETTINGS:
            runs.append(run(Path(folder), given.count, threads, together))
            print(json.dumps(asdict(runs[-1])), flush=True)

    slope = statistics.median(run.slope for run in runs)
    aging = statistics.median(run.aging for run in runs[:3])
    promises = {
        f"memory grows by {slope:.1f} bytes a picture, at most {SLOPE}": abs(slope) <= SLOPE,
        f"a late picture takes {aging:.3f} of an early one, at most {AGING}": aging <= AGING,
        "no run has more files open at its end": all(r.files[1] <= r.files[0] for r in runs),
        "all records are the same bytes": len({run.sha256 for run in runs}) == 1,
    }
    for promise, kept in promises.items():
        print(f"{'as promised' if kept else 'NOT SO'}: {promise}")
    if given.output:
        figures = {"pictures": given.count, "seed": given.seed, "labels": LABELS}
        figures |= {"slope": slope, "aging": aging, "runs": [asdict(run) for run in runs]}
        given.output.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(promises.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
