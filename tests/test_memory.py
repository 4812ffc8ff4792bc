"""What memory there is by the machine and its limits, and what is refused for want of it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import npvlm
from npvlm.cli.options import open_model
from npvlm.errors import NpvlmError
from npvlm.files import memory
from npvlm.files.memory import available_memory, check_memory, said_bytes
from npvlm.files.needs import mapped_bytes
from npvlm.model.weights import BFloat16, Weight
from npvlm.work.demo import draw_picture
from tests.test_cli import ROOT, photo  # noqa: F401

LARGE = 10**15
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def bits(weight: Weight) -> np.ndarray:
    """The stored numbers of a weight that is not packed."""
    return weight.bits if isinstance(weight, BFloat16) else np.asarray(weight)


def group(place: Path, files: dict[str, str]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name).write_text(content + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GB free and 1 GB of swap, and no limit."""
    (tmp_path / "meminfo").write_text("MemAvailable:  8000000 kB\nSwapFree:  1000000 kB\n")
    (tmp_path / "groups").touch()
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path / "groups")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    return tmp_path


def test_swap_counts_for_what_is_refused_and_not_for_what_is_free(machine: Path) -> None:
    assert available_memory() == 8_000_000 * 1024
    check_memory(9_000_000 * 1024, "it", "stop")
    with pytest.raises(
        NpvlmError, match=r"it takes about 9\.2 GB of memory, expected at most 9\.2"
    ):
        check_memory(9_000_001 * 1024, "it", "stop")


@pytest.mark.parametrize("inside", ["/a/b", "/not-seen-from-inside-a-container"])
def test_control_groups_limit_each_those_inside_them(machine: Path, inside: str) -> None:
    (machine / "groups").write_text(f"0::{inside}\n")
    stat = "anon 5\ninactive_file 300\nactive_file 200"
    group(machine / "fs", {"memory.max": "3000", "memory.current": "1000", "memory.stat": stat})
    group(machine / "fs/a/b", {"memory.max": "max", "memory.current": "1000", "memory.stat": stat})
    assert available_memory() == 3000 - 1000 + 500  # pages of files are given back when needed
    group(machine / "fs/a", {"memory.max": "1200", "memory.current": "1100", "memory.stat": ""})
    assert available_memory() == (100 if inside == "/a/b" else 2500)


def test_control_groups_of_the_first_version_are_read(machine: Path) -> None:
    (machine / "groups").write_text("5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n")
    files = {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "4000"}
    group(machine / "fs/memory/x", files | {"memory.stat": "total_inactive_file 70"})
    assert available_memory() == 1070


def test_where_nothing_is_known_nothing_is_refused(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert available_memory() is None
    check_memory(LARGE, "it", "stop")


def test_bytes_are_said_as_people_say_them() -> None:
    assert [said_bytes(n) for n in (1_600, 5_400_000, 10**9, LARGE)] == [
        "2 kB",
        "5 MB",
        "1.0 GB",
        "1,000,000.0 GB",
    ]


@LINUX
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_limit_too_low_for_a_model_is_said_in_a_sentence(photo: Path, precision: str) -> None:  # noqa: F811
    # 150 MB: Python and its libraries fit in, what kernels take does not.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (150 << 20,) * 2)\n"
        "from npvlm.cli import main\n"
        f"sys.argv = ['npvlm', 'caption', {str(photo)!r}, '-q', '--model', 'shapes',"
        f" '--precision', {precision!r}]; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert "of memory, expected at most" in result.stderr and len(result.stderr.splitlines()) == 1


def test_mapped_weights_that_do_not_fit_run_and_are_said_to_be_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_model("shapes", None, "numpy")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory, "available_memory", lambda: 3_000_000)
    open_model("shapes", None, "numpy", quiet=True)
    assert capsys.readouterr().err == ""
    open_model("shapes", None, "numpy")
    assert "4 MB of weights and 3 MB of memory: they are read from" in capsys.readouterr().err


def test_what_is_packed_in_memory_is_not_mapped() -> None:
    stored, packed = (npvlm.load("shapes", p, ops="numpy").weights for p in (None, "int8"))
    assert mapped_bytes(stored) == sum(parts.nbytes for parts in map(bits, stored.values()))
    assert 0 < mapped_bytes(packed) < mapped_bytes(stored) / 2


def test_a_call_that_would_not_fit_is_refused_before_it_begins(machine: Path) -> None:
    model = npvlm.load("shapes", ops="numpy")
    (machine / "meminfo").write_text("MemAvailable:  8000 kB\n")
    assert model.caption(draw_picture()).text
    with pytest.raises(NpvlmError, match=r"rows of cache takes about .* of memory, expected"):
        model.generate(draw_picture(), "caption en", beams=100)


@LINUX
def test_sizes_that_only_a_file_of_holes_can_have_are_refused(tmp_path: Path) -> None:
    side = 2**17  # a picture of 2**17 x 2**17, which is one patch
    folder = Path(shutil.copytree(ROOT / "golden" / "pg1", tmp_path / "model"))
    for name, path in (("config", ("vision_config",)), ("preprocessor_config", ())):
        values = json.loads((folder / f"{name}.json").read_text())
        inner = values
        for key in path:
            inner = inner[key]
        inner |= {"image_size": side, "patch_size": side} if path else {}
        values |= {} if path else {"size": {"height": side, "width": side}}
        (folder / f"{name}.json").write_text(json.dumps(values))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if name.endswith("patch_embedding.weight"):
            entry |= {"shape": [*entry["shape"][:2], side, side], "dtype": "F16"}
        elif name.endswith("position_embedding.weight"):
            entry["shape"][0] = 1
        size = {"F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]]
        for n in entry["shape"]:
            size *= n
        entry["data_offsets"] = [end, end := end + size]
    text = json.dumps(header).encode()
    try:
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(file, 8 + len(text) + end)
    except OSError:
        pytest.skip("this disk has no files of holes")
    with pytest.raises(NpvlmError, match=r"with one picture takes about .* of memory"):
        npvlm.load(folder, ops="numpy")
