"""Boxes from answers, and boxes on pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from npvlm.answers.boxes import Box, parse_boxes
from npvlm.answers.drawing import PAPER, draw_boxes
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.output import save_picture


def test_places_come_as_y0_x0_y1_x1_and_count_1024ths() -> None:
    text = "<loc0256><loc0128><loc0512><loc1023> red circle"
    assert parse_boxes(text, 1000, 100) == [Box("red circle", 125, 25, 1000 * 1023 / 1024, 50)]


def test_several_boxes_keep_their_order_and_labels_of_any_letters() -> None:
    box = "<loc0000><loc0000><loc0512><loc0512>"
    text = f"{box} it's a №5 (big) ; {box} кот;{box}"
    assert [found.label for found in parse_boxes(text, 8, 8)] == ["it's a №5 (big)", "кот", ""]


@pytest.mark.parametrize(
    "text", ["", "nothing", "<loc0001><loc0002><loc0003> three", "<loc1024>" * 4, "<loc001>" * 4]
)
def test_text_that_is_no_box_gives_none(text: str) -> None:
    assert parse_boxes(text, 10, 10) == []


@pytest.mark.parametrize("size", [(40, 30), (400, 300), (4000, 3000)])
def test_a_box_is_outlined_where_it_is_and_the_picture_stays(size: tuple[int, int]) -> None:
    width, height = size
    plain = Image.new("RGB", size)
    box = Box("", width * 0.25, height * 0.25, width * 0.75, height * 0.75)
    drawn = draw_boxes(plain, [box])
    assert plain.getbbox() is None
    edges = drawn.getbbox()
    assert edges is not None
    expected = (box.x0, box.y0, box.x1 + 1, box.y1 + 1)
    assert all(abs(a - b) <= 1 for a, b in zip(edges, expected, strict=True))
    assert drawn.getpixel((int(box.x0) + 1, height // 2)) == PAPER
    assert drawn.getpixel((width // 2, height // 2)) == (0, 0, 0)


@pytest.mark.parametrize("corner", [(0, 0), (95, 95), (-20, -20), (99, 0)])
def test_labels_stay_on_the_picture(corner: tuple[int, int]) -> None:
    x, y = corner
    drawn = draw_boxes(Image.new("RGB", (100, 100)), [Box("cat", x, y, x + 30, y + 30)])
    assert drawn.size == (100, 100) and drawn.getbbox() is not None


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
