"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from npvlm.errors import NpvlmError, UsageError
from npvlm.files import output
from npvlm.files.output import new_file, new_folder, save_picture, scratch_folder


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    save_picture(Image.new("RGB", (3, 2), "red"), target)
    with Image.open(target) as read:
        assert read.size == (3, 2) and read.getpixel((0, 0)) == (255, 0, 0)

    link = tmp_path / "link.png"
    link.symlink_to(target)
    save_picture(Image.new("RGB", (4, 2), "red"), link)
    with Image.open(target) as read:
        assert read.size == (4, 2)
    assert link.is_symlink()
    link.unlink()

    class Broken(Image.Image):
        def save(self, file, *args, **kwargs):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    before = target.read_bytes()
    with pytest.raises(NpvlmError, match=r"out\.png.*No space left"):
        save_picture(Broken(), target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_only_a_png_in_a_regular_file_is_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(NpvlmError, match="no regular file"):
        save_picture(Image.new("RGB", (3, 2)), tmp_path / "pipe.png")
    with pytest.raises(UsageError, match=r"ends in \.png"):
        save_picture(Image.new("RGB", (3, 2)), tmp_path / "out.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.png"]


@pytest.mark.parametrize("make", [new_file, new_folder])
@pytest.mark.parametrize("place", ["loop", "loop/x", "~nobody-of-this-name/x"])
def test_a_name_that_leads_nowhere_is_refused(tmp_path, monkeypatch, make, place) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(NpvlmError, match=r"loop|nobody"), make(Path(place)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


class Signal(BaseException):
    """What a signal raises, wherever it arrives."""


@pytest.mark.parametrize("make", [new_file, new_folder, scratch_folder])
def test_a_signal_in_the_middle_of_the_clean_up_leaves_nothing(tmp_path, monkeypatch, make) -> None:
    remove, arrived = output._remove_at_once, []

    def interrupted(path: Path) -> None:
        if not arrived:
            arrived.append(path)
            raise Signal
        remove(path)

    monkeypatch.setattr(output, "_remove_at_once", interrupted)
    place = tmp_path if make is scratch_folder else tmp_path / "place"
    with pytest.raises(Signal), make(place):
        raise Signal
    assert arrived and not list(tmp_path.iterdir())


def test_of_two_that_write_one_folder_the_later_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(NpvlmError, match="not empty"), new_folder(place) as late:
        (late / "late").touch()
        with new_folder(place) as early:
            (early / "early").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "place",
        "place/early",
    ]
