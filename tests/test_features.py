"""`npvlm features`: one file for many pictures, whole or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import npvlm
from npvlm.errors import NpvlmError
from npvlm.files.writer import Stack
from npvlm.model.weights import Array
from npvlm.opening import BUNDLED
from npvlm.work.demo import draw_picture
from npvlm.work.features import save_features
from tests.lora import lora_tensors, save_lora
from tests.test_cli import CLI, one_line, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures, of which the first, the fifth and the last cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        draw_picture().rotate(30 * i).save(folder / f"{i:02}.png")
    for i in (0, 4, 10):
        (folder / f"{i:02}.png").write_text("no picture")
    return folder


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_readable_pictures_have_a_row_each_and_the_others_are_said(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    options = ["--hidden", "2", "--hidden", "-1", "--attention", "-1", "--attention", "0"]
    options += ["--prompt", "caption en", "--model", "shapes"]
    result = run("features", folder, "-o", output, *options, "-q")
    assert result.returncode == 3 and result.stdout == ""
    said = result.stderr.splitlines()
    assert [name in line for name, line in zip(("00", "04", "10"), said, strict=False)] == [
        True
    ] * 3
    assert said[3:] == ["npvlm: 3 of 11 pictures could not be read and have no row."]
    tensors, about = read(output)
    names = [str(folder / f"{i:02}.png") for i in range(11) if i not in (0, 4, 10)]
    assert json.loads(about.pop("images")) == names
    assert about == {
        "format": "npvlm-features",
        "model": "shapes",
        "precision": "float32",
        "prompt": '"caption en"',
    }
    model = npvlm.load("shapes")
    last = model.config.text_config.num_hidden_layers
    looks = ["attention.0", f"attention.{last - 1}"]
    assert tensors.keys() == {"features", "hidden.2", f"hidden.{last}", *looks}
    for row, name in enumerate(names):
        np.testing.assert_array_equal(tensors["features"][row], model.features(name))
        states = model.hidden_states(name, "caption en", [2, last])
        np.testing.assert_array_equal(tensors["hidden.2"][row], states[0])
        np.testing.assert_array_equal(tensors[f"hidden.{last}"][row], states[1])
        for look, expected in zip(looks, model.attention(name, "caption en", [0, -1]), strict=True):
            np.testing.assert_array_equal(tensors[look][row], expected)


def test_what_is_left_of_the_room_is_closed_up(folder: Path, tmp_path: Path) -> None:
    """The file of eight readable pictures among eleven is that of the eight alone."""
    model, kept = npvlm.load("shapes"), []
    readable = [path for path in sorted(folder.iterdir()) if path.stem not in ("00", "04", "10")]
    for number, pictures in enumerate((sorted(folder.iterdir()), readable)):
        output = tmp_path / f"{number}.safetensors"
        save_features(model, pictures, output, [1], [0], "", lambda _: None, lambda _: None)
        kept.append(read(output))
    (some, about), (alone, expected) = kept
    assert about == expected
    for name, tensor in alone.items():
        np.testing.assert_array_equal(some[name], tensor)


def test_one_picture_of_a_pipe_is_named_so(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    with (folder / "01.png").open("rb") as picture:
        result = subprocess.run(
            [*CLI, "features", "-", "-q", "-o", output], stdin=picture, capture_output=True
        )
    assert (result.returncode, result.stderr) == (0, b"")
    tensors, about = read(output)
    assert json.loads(about["images"]) == ["-"] and len(tensors["features"]) == 1
    assert "prompt" not in about


def test_an_adapter_is_named_in_the_file(folder: Path, tmp_path: Path) -> None:
    base = npvlm.load("shapes").folder
    lora = save_lora(tmp_path / "lora", lora_tensors(base), base_model_name_or_path="shapes")
    output = tmp_path / "x.safetensors"
    result = run(
        "features", folder / "01.png", "-o", output, "--adapter", lora, "--model", "shapes"
    )
    assert result.returncode == 0 and one_line(result).endswith("has 1 picture.")
    tensors, about = read(output)
    assert about["model"] == f"shapes+{lora}"
    expected = npvlm.load("shapes", adapter=lora).features(folder / "01.png")
    np.testing.assert_array_equal(tensors["features"][0], expected)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["01.png", "-o", "x.txt"], 2, "expected one that ends in .safetensors"),
        (["01.png"], 2, "Missing option '-o'"),
        (["-o", "x.safetensors"], 2, "Missing IMAGE"),
        (["01.png", "-o", "no/x.safetensors"], 2, "is no folder"),
        (["01.png", "-o", "x.safetensors", "--prompt", "hi"], 2, "--prompt goes with --hidden or"),
        (["01.png", "-o", "x.safetensors", "--hidden", "1"], 2, "--prompt goes with --hidden or"),
        (
            ["01.png", "-o", "x.safetensors", "--hidden", "9", "--prompt", ""],
            2,
            "layer 9 is asked for, expected numbers from",
        ),
        (["01.png", "-o", "x.safetensors", "--attention", "1"], 2, "--prompt goes with"),
        (
            ["01.png", "-o", "x.safetensors", "--attention", "4", "--prompt", ""],
            2,
            "layer 4 is asked for, expected numbers from -4 to 3",
        ),
        (["01.png", "-o", "x.safetensors", "--hidden", "a", "--prompt", ""], 2, "valid integer"),
        (["00.png", "04.png", "-o", "x.safetensors"], 3, "no picture could be read"),
        (["absent.png", "-o", "x.safetensors"], 3, "is no file or folder"),
        (["01.png", "-o", "x.safetensors", "--adapter", "."], 3, "is no adapter"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    folder: Path, arguments: list[str], code: int, says: str
) -> None:
    before = sorted(folder.iterdir())
    result = run("features", *arguments, "-q", "--model", "shapes", cwd=folder)
    assert result.returncode == code and says in result.stderr.splitlines()[-1]
    assert sorted(folder.iterdir()) == before


def test_an_earlier_file_stays_until_the_new_one_is_whole(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    assert run("features", folder / "01.png", "-o", output).returncode == 0
    earlier = output.read_bytes()
    command = [*CLI, "features", *[str(folder / "01.png")] * 1, str(folder), "-o", str(output)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".x.*")):
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert output.read_bytes() == earlier and list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("what", ["weights", "text"])
def test_what_is_no_file_of_features_is_not_replaced(folder: Path, tmp_path: Path, what) -> None:
    output = tmp_path / "model.safetensors"
    if what == "weights":
        shutil.copyfile(BUNDLED / "shapes" / output.name, output)
    else:
        output.write_text("notes")
    before = output.read_bytes()
    result = run("features", folder / "01.png", "-o", output)
    assert result.returncode == 2 and "is there already and something else" in one_line(result)
    assert output.read_bytes() == before


def test_a_disk_that_is_too_small_is_said_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NpvlmError, match="name fewer pictures or layers"):
        save_features(
            npvlm.load("shapes"), [folder / "01.png"], tmp_path / "x.safetensors", [], [], None,
            lambda _: None, lambda _: None,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_a_stack_of_any_height_is_a_whole_safetensors_file(
    tmp_path: Path, count: int, rng, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npvlm.files.writer._MOVED", 10)  # bytes: every tensor moves in parts
    rows = {"a": (3, 2), "b": (5,), "c": ()}
    given = [
        {name: np.asarray(rng.random(shape), np.float32) for name, shape in rows.items()}
        for _ in range(count)
    ]
    with (tmp_path / "x.safetensors").open("w+b") as file:
        stack = Stack(file, rows, 7, {"names": "x" * 99})
        for arrays in given:
            stack.add(arrays)
        stack.close({"names": "x" * count})
    tensors, about = read(tmp_path / "x.safetensors")
    assert about == {"names": "x" * count}
    for name, shape in rows.items():
        expected = np.array([arrays[name] for arrays in given], np.float32)
        np.testing.assert_array_equal(tensors[name], expected.reshape(count, *shape))
