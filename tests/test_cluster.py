"""A batch on a cluster: the bytes of the local engine, whatever dies. Needs Ray, for the most."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import npvlm
from npvlm.errors import NpvlmError
from npvlm.work import cluster
from npvlm.work.batch_input import Item
from npvlm.work.scenes import Thing, draw_things
from tests.test_batch import count_lines
from tests.test_cli import CLI, ROOT, one_line, run

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
COUNT = 24
RAY = ["--engine", "ray", "--threads", "2"]
Nodes = tuple[str, Callable[[], None]]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 400 pictures, some of them absent or broken, by paths as seen from its folder."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("cluster")
    for i in range(COUNT):
        picture = Image.new("RGB", (96, 64 + i), (225, 222, 215))
        draw_things(picture, [Thing("red", "star", i, i, i + 30, i + 30)])
        picture.save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG, and no more")
    names = [f"{i % COUNT}.png" for i in range(396)]
    names[7:7] = ["absent.png", "broken.png"]
    rows = [
        f'{{"image": "{name}", "prompt": "detect red star", "id": {i}}}'
        for i, name in enumerate([*names, "absent.png"])
    ]
    path = folder / "list.jsonl"
    path.write_text("\n".join([*rows, '{"image": 5}']) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(listed: Path) -> bytes:
    """What the local engine writes."""
    output = listed.with_name("whole.jsonl")
    run("batch", listed, "-o", output, "-q")
    return output.read_bytes()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """The address of a cluster of two nodes, and what kills the second; more CPUs than workers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_nodes", "3", "3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None and process.stdout is not None

    def kill() -> None:
        process.stdin.write("kill\n")
        process.stdin.flush()
        assert process.stdout.readline() == "killed\n"

    try:
        yield process.stdout.readline().strip(), kill
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def start(listed: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [*CLI, "batch", str(listed), "-o", str(output), "--model", "shapes", *RAY, *options]
    return subprocess.Popen(
        command, cwd=listed.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], output: Path, lines: int) -> None:
    while process.poll() is None and count_lines(output) < lines:
        time.sleep(0.01)


@with_ray
def test_with_a_node_killed_in_the_middle_the_bytes_are_those_of_the_local_engine(
    nodes: Nodes, listed: Path, whole: bytes, tmp_path: Path
) -> None:
    address, kill = nodes
    output = tmp_path / "out.jsonl"
    process = start(listed, output, "--address", address)
    wait_for(process, output, 40)
    assert count_lines(output) < 400
    kill()
    stdout, stderr = process.communicate(timeout=200)
    assert (process.returncode, stdout) == (3, "")
    assert output.read_bytes() == whole
    *errors, summary = stderr.splitlines()
    assert len(errors) == 4  # the first three, and where the others are: nothing that Ray says
    assert "400 pictures, 4 errors" in summary


@with_ray
@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
def test_a_killed_driver_is_gone_on_from_and_one_that_is_terminated_leaves_nothing(
    listed: Path, whole: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    for number, code, lines in ((signal.SIGKILL, -9, 20), (signal.SIGTERM, 143, 60)):
        process = start(listed, output, "--resume")
        wait_for(process, output, lines)
        below = children_of(process.pid)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (code, ""), stderr
        assert whole.startswith(output.read_bytes())
    assert len(below) > 2 and not [p for p in below if is_there(p)]
    assert "of 400 records are in" in stderr and stderr.endswith("npvlm: terminated.\n")
    process = start(listed, output, "--resume", "-q")
    process.communicate(timeout=200)
    assert output.read_bytes() == whole


def children_of(number: int) -> list[int]:
    """What a process has started, and what that has."""
    found = [
        int(child)
        for path in Path(f"/proc/{number}/task").glob("*/children")
        for child in path.read_text().split()
    ]
    return found + [below for child in found for below in children_of(child)]


def is_there(number: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@with_ray
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--engine", "ray", "--address", "127.0.0.1:1"], 3, "no Ray cluster can be joined at 127"),
        (["--engine", "ray", "--address", "ray://head:10001"], 2, "expected host:port"),
        (["--address", "127.0.0.1:1"], 2, "--address goes with --engine ray only"),
        (["--engine", "ray", "--model", "absent"], 3, "'absent' is no model"),
    ],
)
def test_a_cluster_that_cannot_be_asked_is_said_in_a_sentence(
    listed: Path, tmp_path: Path, options: list[str], code: int, says: str
) -> None:
    output = tmp_path / "out.jsonl"
    result = run("batch", listed, "-o", output, "-q", *options, env={"RAY_ADDRESS": ""})
    assert result.returncode == code and says in one_line(result)
    assert not output.exists()


@with_ray
def test_pictures_in_parquet_are_answered_there_as_here(listed: Path, tmp_path: Path) -> None:
    rows = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pictures = [(listed.parent / f"{i}.png").read_bytes() for i in range(COUNT)]
    pictures[5] = b"no picture"
    table = pa.table({"image": pictures, "path": [f"n{i}" for i in range(COUNT)]})
    rows.write_table(table, tmp_path / "in.parquet", row_group_size=19)
    options = ["--task", "caption", "-q", "--model", "shapes"]
    named = pa.table({"image": [str(listed.parent / f"{i}.png") for i in range(COUNT)]})
    rows.write_table(named, tmp_path / "paths.parquet")
    for engine, name in (([], "here.parquet"), (RAY, "there.parquet")):
        result = run(
            "batch", "in.parquet", "paths.parquet", *options, *engine, "-o", name, cwd=tmp_path
        )
        assert result.returncode == 3, result.stderr
        assert one_line(result).startswith("npvlm: in.parquet: n5 is no picture")
    here, there = (rows.read_table(tmp_path / f"{name}.parquet") for name in ("here", "there"))
    assert here.num_rows == 2 * COUNT and here.equals(there)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "here.parquet",
        "in.parquet",
        "paths.parquet",
        "there.parquet",
    ]


# What needs no cluster


class Death(Exception):
    """Stands for what Ray raises where a worker dies."""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for Ray where nothing runs."""
    fake = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=Death),
        util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.5"),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.util", fake.util)


def test_what_is_no_death_ends_the_batch_at_once_and_is_said(ray, monkeypatch) -> None:
    class Mistake(Death):
        cause = KeyError("x")

    def broken(*_: object) -> Iterator[dict[str, object]]:
        yield {"index": 0}
        raise Mistake("Traceback\n  many lines\nKeyError: 'x'")

    monkeypatch.setattr(cluster, "_pass", broken)
    asked = cluster.answer_on_cluster(SimpleNamespace(), items(3))
    with pytest.raises(
        NpvlmError, match=r"no worker can make the record of 1\.png \(KeyError: 'x'"
    ):
        list(asked)


def items(count: int) -> list[Item]:
    return [Item(i, f"{i}.png", "ocr", Path(f"{i}.png")) for i in range(count)]


def test_a_worker_that_dies_costs_no_record_and_gives_none_twice(ray, monkeypatch) -> None:
    passes: list[int] = []

    def dying(model, asked, max_tokens):
        passes.append(len(asked))
        yield from (item.head for item in asked[:7])
        if len(asked) > 7:
            raise Death("gone")

    monkeypatch.setattr(cluster, "_pass", dying)
    found = [*cluster.answer_on_cluster(None, items(30))]
    assert [record["index"] for record in found] == list(range(30))
    assert passes == [30, 23, 16, 9, 2]


def test_a_picture_that_kills_every_worker_ends_the_batch_in_a_sentence(ray, monkeypatch) -> None:
    def dying(model, asked, max_tokens):
        for item in asked:
            if item.index == 4:
                raise Death("out of\nmemory")
            yield item.head

    monkeypatch.setattr(cluster, "_pass", dying)
    given = cluster.answer_on_cluster(None, items(9))
    assert [next(given)["index"] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(NpvlmError, match=r"3 times in a row before .* 4\.png \(out of memory\)"):
        next(given)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "absent"}, "'absent' is no model"),
        ({"folder": "/absent"}, "/absent, where the driver runs, cannot be entered"),
        ({"version": "9"}, "expected 9 as on the driver"),
    ],
)
def test_a_node_that_cannot_answer_says_which_and_why(
    ray, monkeypatch, tmp_path: Path, change: dict[str, str], says: str
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cluster.THREADS, "1")
    asked = cluster._Asked("shapes", None, "float32", None, 1, str(tmp_path), npvlm.__version__)
    worker = cluster._Worker(replace(asked, **change))
    [row] = worker(cluster._table(items=[b""])).to_pylist()
    assert row["refusal"].startswith("on node 10.0.0.5: ") and says in row["refusal"]
    assert row["records"] is None
