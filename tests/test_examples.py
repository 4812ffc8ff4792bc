"""Every example of the README and of --help that needs no real weights is run as it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import npvlm
from npvlm.cli.commands import npvlm as commands
from npvlm.work.demo import draw_picture

ROOT = Path(npvlm.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = f'npvlm() {{ "{sys.executable}" "{ROOT}/cli.py" "$@"; }}; scan() {{ cat photo.jpg; }}\n'
PICTURES = (
    "after.jpg",
    "before.jpg",
    "cat.jpg",
    "holiday/one.jpg",
    "npvlm-demo.png",
    "photo.jpg",
    "photo.png",
    "photos/one.jpg",
    "photos/two.jpg",
    "photos/three.jpg",
    "photos/four.jpg",
    "scans/old/one.png",
    "sign.jpg",
    "street.jpg",
)
# What cannot be had here: a published model's weights, and the folder of one. (test_embed.py runs
# what takes a ColPali.)
ABSENT = re.compile(r"npvlm (embed|search)|paligemma|FOLDER|\bsmall\b|--against")


def examples() -> list[str]:
    """The command lines shown, each once; of a model that is absent only the name is left out."""
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    for command in commands.commands.values():
        lines += [line.strip() for line in (command.help or "").splitlines()]
    lines = [re.sub(r"\s{3,}.*", "", line) for line in lines]  # what it is for stands behind it
    shown = dict.fromkeys(line for line in lines if re.match(r"(scan \| )?npvlm ", line))
    without = dict.fromkeys(re.sub(r" --model (\S+)", "", line) for line in shown)
    return [line for line in without if not ABSENT.search(line)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the examples name."""
    place = tmp_path_factory.mktemp("examples")
    for name in PICTURES:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        draw_picture().save(place / name)
    (place / "questions.csv").write_text("image,prompt\nphoto.jpg,caption en\ncat.jpg,ocr\n")
    (place / "questions.txt").write_text("caption en\nhow many circles?\n")
    trace = 'npvlm trace photo.jpg --prompt "caption en" --save reference.safetensors'
    assert run(place, trace).returncode == 0
    (place / "mine.safetensors").write_bytes((place / "reference.safetensors").read_bytes())
    stages = load_file(place / "reference.safetensors")
    np.savez(place / "mine.npz", **{name: np.asarray(value) for name, value in stages.items()})
    return place


@pytest.fixture
def place(prepared: Path, tmp_path: Path) -> Path:
    """That folder anew, for each example."""
    return Path(shutil.copytree(prepared, tmp_path / "place"))


def run(place: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell that knows npvlm."""
    return subprocess.run(
        ["bash", "-c", SHELL + line],
        cwd=place,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"NPVLM_MODEL": "shapes"},
        check=False,
    )


@pytest.mark.parametrize("line", examples())
def test_an_example_does_what_it_says(place: Path, line: str) -> None:
    if "--save" in line:
        for reference in place.glob("reference.*"):
            reference.unlink()
    result = run(place, line)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in re.findall(r"(?:-o|--html|--cutouts|--save|>) (\S+)", line):
        assert (place / name).exists(), f"{name} is not there"


def run_python(place: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python that imports npvlm."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_every_command_shows_an_example() -> None:
    for name, command in commands.commands.items():
        assert re.search(rf"^\s*(scan \| )?npvlm {name}\b", command.help or "", re.MULTILINE), name


def test_the_python_of_the_readme_runs(place: Path) -> None:
    [code] = [block for kind, block in BLOCKS if kind == "python"]
    result = run_python(place, code)
    assert result.returncode == 0, result.stderr
    assert "a red circle" in result.stdout and '"error"' in result.stdout


def test_the_python_of_the_page_of_answers_runs(prepared: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(prepared, tmp_path / "place"))
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    result = run_python(place, code)
    assert result.returncode == 0, result.stderr
    assert "absent.png absent.png cannot be opened" in result.stdout
    assert (place / "masks.png").exists() and (place / "circle.png").exists()


def test_the_python_and_the_commands_of_the_page_of_features_run(place: Path) -> None:
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "python"]
    for kind, code in blocks:
        for line in code.splitlines() if kind == "sh" else [code]:
            result = run(place, line) if kind == "sh" else run_python(place, line)
            assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "photos/four.jpg"
