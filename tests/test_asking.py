"""The commands that ask about pictures: caption, ask, ocr, detect, segment, chat, tokens."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm.work.demo import draw_picture
from tests.test_cli import CLI, one_line, run

LABELS = "red circle ; blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of different sizes, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    picture = draw_picture()
    picture.save(folder / "a.png")
    picture.resize((900, 300)).save(folder / "b.jpg", quality=95)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def broken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that cannot be read."""
    path = tmp_path_factory.mktemp("broken") / "broken.png"
    path.write_bytes((folder / "a.png").read_bytes()[:300])
    return path


def test_one_picture_answers_on_stdout_and_a_tail_on_stderr(folder: Path) -> None:
    result = run("caption", folder / "a.png")
    assert result.returncode == 0
    assert result.stdout == "a red circle and a blue square and an orange star\n"
    tail = one_line(result)
    assert "68 prompt tokens" in tail and "tokens/s" in tail and "peak memory" in tail
    assert run("caption", folder / "a.png", "-q").stderr == ""


def test_a_folder_is_all_its_pictures(folder: Path) -> None:
    result = run("ask", folder, "how many shapes?", "-q")
    assert result.stdout == f"{folder}/a.png\t3\n{folder}/b.jpg\t3\n"
    assert result.stderr == "" and result.returncode == 0
    pattern = run("ask", f"{folder}/*.p*", "how many shapes?", "-q")
    assert pattern.stdout == f"{folder}/a.png\t3\n"  # one file, but by a pattern


def test_a_picture_comes_down_a_pipe(folder: Path) -> None:
    with (folder / "a.png").open("rb") as picture:
        result = subprocess.run(
            [*CLI, "detect", "-", LABELS, "-q", "--json"], stdin=picture, capture_output=True
        )
    found = json.loads(result.stdout)
    assert result.returncode == 0
    assert found["image"] == "-" and (found["width"], found["height"]) == (448, 448)


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(folder: Path, broken: Path) -> None:
    result = run("caption", broken, folder / "a.png", "-q")
    assert result.returncode == 3
    assert result.stdout.startswith(f"{folder}/a.png\ta red circle")
    assert result.stderr.splitlines()[0].startswith(f"npvlm: {broken} cannot be read")
    assert result.stderr.splitlines()[1] == "npvlm: 1 of 2 pictures were not answered."
    assert run("caption", broken, "-q").returncode == 3


def test_words_come_as_json(folder: Path) -> None:
    result = run("ocr", folder, "--json", "-q")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(a["image"]).name for a in answers] == ["a.png", "b.jpg"]
    for answer in answers:
        assert answer["prompt"] == "ocr"
        assert answer["logprob"] == pytest.approx(sum(answer["logprobs"]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["caption"], "Missing IMAGE"),
        (["ask"], "nothing is given, expected IMAGE... and a QUESTION"),
        (["ask", "{a}"], "expected IMAGE... and a QUESTION as the last argument"),
        (["ask", "{a}", "{b}"], "is a file, expected IMAGE... and a QUESTION"),
        (["ask", "{a}", " "], "the question is empty"),
        (["detect", "{a}", " ; "], "no label is given"),
        (["detect", "{a}", "cat", "--format", "coco", "--json"], "exclude each other"),
        (["detect", "{a}", "cat", "-o", "{a}"], "is a picture that is asked about"),
        (["detect", "{folder}", "cat", "-o", "{folder}"], "whose pictures are asked about"),
        (["segment", "{a}", "cat", "--cutouts", "{folder}/b.jpg"], "b.jpg' is a file"),
        (["detect", "{a}", "cat", "-o", "boxes.jpg"], "drawn pictures are PNG"),
        (["detect", "{a}", "cat", "-o", "no/such/folder/boxes.png"], "is no folder; make it"),
        (["detect", "{a}", "{b}", "cat", "-o", "x.png"], "expected a folder for 2 pictures"),
        (["detect", "{a}", "cat", "--bins", "1000"], "1000"),
        (["caption", "{a}", "--lang", "english please"], "no language code"),
        (["caption", "-", "-"], "named twice"),
        (["chat", "{folder}"], "is 2 pictures, expected one"),
        (["chat", "-"], "the lines come from stdin"),
        (["tokens", "\udcff"], "no UTF-8"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(folder: Path, arguments: list[str], says: str) -> None:
    places = {"a": folder / "a.png", "b": folder / "b.jpg", "folder": folder}
    result = run(*(argument.format(**places) for argument in arguments), "-q")
    assert result.returncode == 2, result.stderr
    assert says in one_line(result)
    assert result.stdout == ""


def test_things_are_lines_in_pixels_of_the_picture(folder: Path) -> None:
    result = run("detect", folder / "b.jpg", LABELS, "-q")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == ["red circle", "blue square"]
    for row, expected in zip(rows, [(80, 40, 338, 126), (474, 158, 715, 238)], strict=True):
        assert all(abs(int(c) - e) < 12 for c, e in zip(row[1:5], expected, strict=True)), row
        assert 0 < float(row[5]) <= 1
    several = run("detect", folder, LABELS, "-q").stdout.splitlines()
    assert several[2:] == [f"{folder}/b.jpg\t{line}" for line in result.stdout.splitlines()]


def test_big_vision_s_bins_move_boxes_by_less_than_a_thousandth(folder: Path) -> None:
    path = folder / "b.jpg"
    one, other = (
        json.loads(run("detect", path, "red circle", "--json", "-q", "--bins", bins).stdout)
        for bins in ("1024", "1023")
    )
    [a], [b] = one["boxes"], other["boxes"]
    assert one["text"] == other["text"]
    assert b["box"][2] == pytest.approx(a["box"][2] * 1024 / 1023, abs=0.02)


def test_coco_yolo_and_csv_say_the_same_boxes(folder: Path) -> None:
    coco = json.loads(run("detect", folder, LABELS, "--format", "coco", "-q").stdout)
    assert [image["file_name"] for image in coco["images"]] == [
        f"{folder}/a.png",
        f"{folder}/b.jpg",
    ]
    assert [c["name"] for c in coco["categories"]] == ["red circle", "blue square"]
    table = run("detect", folder, LABELS, "--format", "csv", "-q").stdout
    rows = list(csv.DictReader(io.StringIO(table)))
    assert len(rows) == len(coco["annotations"]) == 4
    yolo = run("detect", folder, LABELS, "--format", "yolo")
    assert "classes: 0 red circle, 1 blue square" in yolo.stderr
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for row, annotation, line in zip(
        rows, coco["annotations"], yolo.stdout.splitlines(), strict=True
    ):
        x, y, wide, high = annotation["bbox"]
        edges = [float(row[name]) for name in ("x0", "y0", "x1", "y1")]
        assert edges == pytest.approx([x, y, x + wide, y + high], abs=0.02)
        path, _, rest = line.partition("\t")
        number, *parts = rest.split()
        assert path == row["image"] and int(number) + 1 == annotation["category_id"]
        width, height = sizes[annotation["image_id"]]
        centre = ((x + wide / 2) / width, (y + high / 2) / height, wide / width, high / height)
        assert [float(p) for p in parts] == pytest.approx(centre, abs=1e-4)


def test_the_drawn_picture_goes_to_a_file_or_a_folder(folder: Path, tmp_path: Path) -> None:
    result = run("detect", folder / "a.png", LABELS, "-o", tmp_path / "boxes.png")
    assert f"1 picture drawn: {tmp_path}/boxes.png" in result.stderr
    with Image.open(tmp_path / "boxes.png") as drawn:
        plain = Image.open(folder / "a.png")
        assert drawn.size == plain.size and drawn.tobytes() != plain.tobytes()
    result = run("detect", folder, LABELS, "-o", tmp_path / "drawn")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.png", "b.png"]


def test_no_picture_that_is_asked_about_is_written_over(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes((folder / "a.png").read_bytes())
    before = picture.read_bytes()
    run("detect", picture, LABELS, "-o", tmp_path, "-q")
    for options in (["-o", picture], ["--html", picture], ["--html", "x.txt"]):
        assert run("explain", picture, "caption en", *options, "-q").returncode == 2
    assert picture.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a.png"]


def test_drawn_pictures_and_cut_outs_may_share_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a-1.png").write_bytes((folder / "a.png").read_bytes())
    out = tmp_path / "out"
    pictures = [folder / "a.png", tmp_path / "a-1.png"]
    run("segment", *pictures, "red circle", "-o", out, "--cutouts", out, "-q")
    assert len(list(out.iterdir())) == 4


def test_a_question_may_be_long_and_wants_quotes(folder: Path) -> None:
    assert run("ask", folder / "a.png", "how many? " * 40, "-q").returncode == 0
    loose = run("ask", folder / "a.png", "how", "many", "circles?", "-q")
    assert loose.returncode == 3 and "'how' is no file" in one_line(loose)
    assert "several words go in quotes" in one_line(loose)


def test_stdin_without_a_picture_is_said() -> None:
    empty = run("caption", "-", "-q", input="")
    assert empty.returncode == 3 and "stdin is empty" in one_line(empty)


def test_pictures_of_one_name_do_not_overwrite_each_other(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.png").write_bytes((folder / "a.png").read_bytes())
    run("detect", folder / "a.png", tmp_path / "x/a.png", LABELS, "-o", tmp_path / "drawn", "-q")
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["a-2.png", "a.png"]


def test_nothing_found_and_text_that_is_no_box_are_said(folder: Path) -> None:
    result = run("detect", folder / "a.png", "green star")
    assert result.returncode == 0 and result.stdout == ""
    assert "nothing found" in result.stderr
    cut = run("detect", folder / "a.png", "red circle", "--max-tokens", "3")
    assert cut.stdout == "" and "no box: '<loc" in cut.stderr
    assert "cut off after 3 tokens; --max-tokens allows more" in cut.stderr


def test_masks_are_drawn_cut_out_and_said(folder: Path, tmp_path: Path) -> None:
    result = run(
        "segment", folder / "a.png", LABELS, "--json", "-q",
        "-o", tmp_path / "m.png", "--cutouts", tmp_path / "things",
    )  # fmt: skip
    assert result.stderr == ""
    found = json.loads(result.stdout)
    truth = np.asarray(draw_picture()).astype(int)
    colours = {"red circle": (215, 40, 40), "blue square": (45, 85, 215)}
    assert [box["label"] for box in found["boxes"]] == list(colours)
    for number, box in enumerate(found["boxes"], 1):
        counts = box["mask"]["counts"]
        inside = np.arange(len(counts)) % 2 == 1
        mask = np.repeat(inside, counts).reshape(box["mask"]["size"][::-1]).T
        thing = np.abs(truth - colours[box["label"]]).sum(-1) < 60
        assert (mask & thing).sum() / (mask | thing).sum() > 0.8
        assert box["polygons"]
        with Image.open(tmp_path / "things" / f"a-{number}.png") as cut:
            assert cut.mode == "RGBA"
            assert np.asarray(cut)[..., 3].astype(bool).sum() == mask.sum()
    assert (tmp_path / "m.png").is_file()


def test_chat_answers_line_by_line_about_one_look(folder: Path) -> None:
    typed = "caption en\n\nhow many shapes?\ndetect red circle\n" + "word " * 9000
    result = run("chat", folder / "a.png", input=typed)
    lines = result.stdout.splitlines()
    assert result.returncode == 0
    assert lines[0] == "a red circle and a blue square and an orange star"
    assert lines[1] == "3"
    assert lines[2].startswith("red circle\t") and len(lines) == 3
    assert result.stderr.startswith("Each line stands alone")  # and nobody types
    assert "at most 8192" in result.stderr and "Traceback" not in result.stderr


def test_chat_goes_on_after_a_line_that_is_no_utf8_and_ends_when_told(folder: Path) -> None:
    typed = b"caption en\n\xff hello\nhow many shapes?\n Quit \nocr\n"
    result = subprocess.run(
        [*CLI, "chat", folder / "a.png", "--model", "shapes", "-q"],
        input=typed,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert result.returncode == 0
    assert result.stdout == b"a red circle and a blue square and an orange star\n3\n"
    [said] = result.stderr.splitlines()
    assert b"no UTF-8" in said
    assert run("chat", folder / "a.png", "-q", input="exit\nocr\n").stdout == ""


@pytest.mark.skipif(os.name == "nt", reason="no such terminals there")
def test_chat_says_what_to_type_where_somebody_types(folder: Path) -> None:
    import pty  # not everywhere

    ours, theirs = pty.openpty()
    os.write(ours, b"quit\n")
    result = run("chat", folder / "a.png", stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert (result.returncode, result.stdout) == (0, "")
    hint, alone = result.stderr.splitlines()
    assert "quit or Ctrl-D ends" in hint and alone.startswith("Each line stands alone")


def test_tokens_show_the_whole_layout(folder: Path) -> None:
    result = run("tokens", "detect red circle")
    lines = [line.split() for line in result.stdout.splitlines()]
    model = npvlm.load("shapes")
    answer = model.generate(folder / "a.png", "detect red circle", max_tokens=1)[0]
    assert lines[0][:3] == ["0-63", str(model.tokenizer.image_id), "<image>"]
    assert [int(line[1]) for line in lines[1:]] == answer.prompt_token_ids[64:]
    assert [line[2] for line in lines[1:]] == ["<bos>", "detect", "▁red", "▁circle", r"\n"]
    as_json = json.loads(run("tokens", "detect red circle", "--json").stdout)
    assert as_json["ids"] == answer.prompt_token_ids
    assert len(as_json["pieces"]) == len(as_json["ids"])
