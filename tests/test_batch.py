"""A batch: every kind of input, a record each, and the same bytes whatever happened on the way."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
from PIL import Image

import npvlm
from npvlm.cli.batch import prompt_of
from npvlm.cli.commands import npvlm as commands
from npvlm.work.batch import Progress, run_batch
from npvlm.work.batch_input import Item, part, read_input
from npvlm.work.batch_output import open_records
from npvlm.work.scenes import COLOURS, SHAPES, Thing, draw_things
from tests.test_cli import CLI, one_line, run

COUNT = 32
PROMPTS = ("caption en", "answer en how many shapes?", "detect red star ; blue square", "ocr")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn pictures."""
    folder, chance = tmp_path_factory.mktemp("batch") / "photos", random.Random(4)
    folder.mkdir()
    for i in range(COUNT):
        picture = Image.new("RGB", (96, 64 + i), (225, 222, 215))
        x, y, side = chance.randrange(40), chance.randrange(20), chance.randrange(20, 44)
        thing = Thing(chance.choice([*COLOURS]), chance.choice(SHAPES), x, y, x + side, y + side)
        draw_things(picture, [thing])
        picture.save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def model() -> npvlm.Model:
    return npvlm.load("shapes")


@pytest.fixture(scope="module")
def listed(photos: Path) -> Path:
    """A list with prompts of all kinds, and everything that can be wrong with a line."""
    lines: list[str] = [
        json.dumps({"image": f"photos/{i:02}.png", "prompt": PROMPTS[i % 4], "id": i})
        for i in range(18)
    ]
    (photos.parent / "broken.png").write_bytes(b"\x89PNG, and no more")
    wrong = {
        "absent.png": "caption en",
        "broken.png": "caption en",
        "photos": "caption en",
        "photos/01.png": "word " * 9000,
        "photos/02.png": "detect ;",
    }
    for place, (image, prompt) in enumerate(wrong.items()):
        lines.insert(3 * place, json.dumps({"image": image, "prompt": prompt}))
    lines[4:4] = ['{"image": "photos/03.png", "prompt"', "", "[1]", '{"image": 5}', '{"x": NaN}']
    path = photos.parent / "list.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(model: npvlm.Model, listed: Path) -> bytes:
    """The records of the list, without any break."""
    output = listed.with_name("whole.jsonl")
    answered(model, read_input([str(listed)], None), output)
    return output.read_bytes()


def answered(model: npvlm.Model, items: Sequence[Item], output: Path, **options) -> Progress:
    return run_batch(
        model, items, output, lambda progress: None, lambda path, error: None, **options
    )[0]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What is asked


def test_a_folder_gives_a_record_for_each_picture_in_order(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = run("batch", photos, "--task", "caption", "-o", output, "--max-tokens", 3)
    assert (result.returncode, result.stdout) == (0, "")
    found = records(output)
    assert [r["image"] for r in found] == [str(photos / f"{i:02}.png") for i in range(COUNT)]
    assert [r["index"] for r in found] == list(range(COUNT))
    assert {r["prompt"] for r in found} == {"caption en"}
    summary = one_line(result)
    parts = ("32 pictures", "0 errors", "pictures/s", "tokens/s", "MB", f"records in {output}")
    for part_of_it in parts:
        assert part_of_it in summary
    assert "\r" not in result.stderr  # no progress where nobody watches


@pytest.mark.skipif(os.name == "nt", reason="no such terminals there")
def test_on_a_terminal_the_progress_is_shown_and_cleared(photos: Path, tmp_path: Path) -> None:
    import pty  # not everywhere

    (photos.parent / "few.csv").write_text("image\n" + "photos/00.png\n" * 25 + "absent.png\n")
    options = ["--task", "caption", "--max-tokens", "1", "-o", str(tmp_path / "out.jsonl")]
    ours, theirs = pty.openpty()
    subprocess.run([*CLI, "batch", str(photos.parent / "few.csv"), *options], stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    looks = [line.rstrip() for line in shown.split("\r") if " of 26 pictures" in line]
    assert looks[-1].startswith("26 of 26 pictures · ")
    assert looks[-1].endswith("/s · 0:00 left · 1 error")
    assert "absent.png cannot be opened: No such file or directory\n" in shown.replace("\r", "")
    assert shown.split("\r")[-2].startswith("npvlm: 26 pictures, 1 error, ")


def test_records_hold_what_the_picture_alone_would_give(model, photos: Path, tmp_path) -> None:
    items = [
        Item(i, f"{i}", prompt, photos / f"{i:02}.png") for i, prompt in enumerate(PROMPTS * 3)
    ]
    answered(model, items, tmp_path / "out.jsonl")
    for item, record in zip(items, records(tmp_path / "out.jsonl"), strict=True):
        [alone] = model.batch([item.path], item.prompt)
        expected = json.loads(alone.to_json())
        for dropped in ("image", "seconds", "seed", "prompt_token_ids"):
            del expected[dropped]
        assert record.items() >= expected.items()
        assert not {"seconds", "prompt_token_ids"} & record.keys()


@pytest.mark.parametrize(
    ("task", "given", "prompt"),
    [
        ("caption", {}, "caption en"),
        ("caption", {"lang": "de"}, "caption de"),
        ("ask", {"question": "how many?"}, "answer en how many?"),
        ("ocr", {}, "ocr"),
        ("detect", {"labels": "cat;dog"}, "detect cat ; dog"),
        ("segment", {"labels": "cat"}, "segment cat"),
    ],
)
def test_every_task_has_its_prompt(task: str, given: dict, prompt: str) -> None:
    options = {"labels": None, "question": None, "lang": None} | given
    assert prompt_of(task, None, **options) == prompt


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "nothing is asked"),
        (["--task", "caption", "--prompt", "ocr"], "--task and --prompt"),
        (["--task", "detect"], "needs --labels"),
        (["--task", "ask"], "needs --question"),
        (["--task", "ocr", "--lang", "de"], "--lang goes with --task caption or ask"),
        (["--prompt", "ocr", "--labels", "cat"], "--labels goes with --task detect or segment"),
        (["--task", "detect", "--labels", " ; "], "no label"),
        (["--task", "caption", "--lang", "??"], "language code"),
        (["--task", "ocr", "--shard", "0/4"], "no part of several"),
        (["--task", "ocr", "--shard", "5/4"], "no part of several"),
        (["--task", "ocr", "--html", "absent/r.html"], "absent is no folder"),
        (["--task", "ocr", "--html", "photos/report"], "among the pictures"),
        (["--task", "ocr", "--html", "photos"], "is there already"),
        (["--task", "ocr", "-"], "batch reads no stdin"),
    ],
)
def test_bad_use_is_refused_before_any_work(photos, tmp_path, monkeypatch, options, says) -> None:
    output = tmp_path / "out.jsonl"
    monkeypatch.chdir(photos.parent)
    with pytest.raises((click.UsageError, npvlm.UsageError)) as caught:
        commands.main(["batch", "photos", "-o", str(output), *options], standalone_mode=False)
    assert says in str(caught.value)
    assert not output.exists()


@pytest.fixture
def work(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a picture, a link to it, a list, an empty folder and a note."""
    place = tmp_path / "work"
    (place / "album").mkdir(parents=True)
    (place / "empty").mkdir()
    (place / "album/a.png").write_bytes((photos / "00.png").read_bytes())
    (place / "link.html").symlink_to("album/a.png")
    (place / "list.csv").write_text(f"image,prompt\nalbum/a.png,ocr\n{'x' * 5000},ocr\n\0,ocr\n")
    (place / "note").write_text("mine")
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("album -o -", "-o - is no file"),
        ("album -o absent/out.jsonl", "absent is no folder; make it first"),
        ("album -o note/out.jsonl", "note is no folder; make it first"),
        ("album -o out.jsonl --html note/sheet.html", "note is no folder; make it first"),
        ("album -o X.html --html X.html", "place of the records, too"),
        ("album -o X.html --html album/../X.html", "place of the records, too"),
        ("album -o empty/out.jsonl --html empty", "place of the records, too"),
        ("album -o album/b.PNG", "would be taken for a picture of"),
        ("album -o album/a.png --resume", "is what is asked about"),
        ("album -o link.html --resume", "is what is asked about"),
        ("album -o out.jsonl --html link.html", "is what is asked about"),
        ("list.csv -o list.csv --resume", "is what is asked about"),
        ("list.csv -o album/a.png --resume", "is what is asked about"),
        ("list.csv -o out.csv", "records are JSON, a line each; name a .jsonl, or a .parquet"),
    ],
)
def test_nothing_is_written_over_what_is_asked_about(work: Path, arguments: str, says: str) -> None:
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    task = [] if arguments.startswith("list") else ["--task", "ocr"]
    with pytest.raises(npvlm.UsageError) as caught:
        commands.main(["batch", *arguments.split(), *task], standalone_mode=False)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


def test_records_and_sheet_may_lie_among_the_pictures(work: Path) -> None:
    options = ["--task", "ocr", "-o", "album/out.jsonl", "--html", "album/sheet.html"]
    result = run("batch", "album", *options, cwd=work)
    assert result.returncode == 0
    assert one_line(result).endswith(
        "records in album/out.jsonl, contact sheet in album/sheet.html"
    )
    assert run("batch", "album", *options, "--resume", cwd=work).returncode == 0
    assert len(records(work / "album/out.jsonl")) == 1


@pytest.mark.parametrize("options", [["-o", "out.jsonl"], ["-o", "note", "--resume"]])
def test_a_place_where_nobody_may_write_is_found_before_the_work(
    work, monkeypatch, options
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(npvlm.NpvlmError, match=r"cannot be written \(no permission\)"):
        commands.main(["batch", "album", "--task", "ocr", *options], standalone_mode=False)


def test_a_list_of_another_ending_is_told_apart_from_a_picture(work: Path) -> None:
    (work / "list.csv").rename(work / "list.txt")
    with pytest.raises(npvlm.UsageError, match=r"list.txt is text; a list ends in .jsonl or .csv"):
        read_input(["list.txt"], None)
    (work / "binary").write_bytes(b"\x89PNG\0")
    (work / "empty.dat").touch()
    (work / "text.ppm").write_text("P3 1 1 1 0 0 0")
    for name in ("binary", "empty.dat", "text.ppm"):
        assert [item.image for item in read_input([name], "ocr")] == [name]


def test_quiet_leaves_what_goes_wrong(work: Path) -> None:
    options = ["--task", "ocr", "-o", "out.jsonl", "-q"]
    result = run("batch", "album", *options, cwd=work, env={"NPVLM_MODEL": ""})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    for number in range(5):
        (work / f"album/{number}.png").touch()
    command = ["batch", "album", "--task", "ocr", "-o", "wrong.jsonl", "-q"]
    first = run(*command, cwd=work)
    said = [f"npvlm: album/{n}.png is empty, expected a picture" for n in range(3)]
    assert first.stderr.splitlines() == [*said, "npvlm: more errors are in wrong.jsonl"]
    again = run(*command, "--resume", cwd=work)
    assert again.returncode == 3 and one_line(again) == "npvlm: 5 errors from before in wrong.jsonl"


def lines_of(tmp_path: Path, name: str, data: str | bytes) -> list[tuple]:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    items = read_input([str(path)], None)
    return [
        (i.image, i.prompt, str(i.path.relative_to(tmp_path)), dict(i.extra))
        for i in items
        if not i.error
    ]


def test_lists_are_read_whatever_wrote_them(tmp_path: Path) -> None:
    rows = [
        ("a.png", 'say "hé"\u2028now', "a.png", {"id": "7"}),
        ("sub/b, c.png", "two\nlines", "sub/b, c.png", {"id": ""}),
    ]
    table = 'prompt,image,id\n"say ""hé""\u2028now",a.png,7\n\n"two\nlines","sub/b, c.png",\n'
    for data in (table, table.replace("\n", "\r\n"), "\ufeff" + table, table.rstrip("\n")):
        expected = [(a, b.replace("\n", "\r\n"), c, d) if "\r" in data else (a, b, c, d)
                    for a, b, c, d in rows]  # fmt: skip
        assert lines_of(tmp_path, "list.csv", data) == expected
    lines = "\n".join(
        json.dumps({"image": a, "prompt": b, **d}, ensure_ascii=False) for a, b, _, d in rows
    )
    for data in (lines, lines.replace("\n", "\r\n"), "\ufeff" + lines, f"\n{lines}\n\n"):
        assert lines_of(tmp_path, "list.JSONL", data) == rows


def test_paths_are_as_seen_from_the_list(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(
        '{"image": "sub/a.png", "prompt": "ocr"}\n{"image": "/b.png", "prompt": "ocr"}\n'
    )
    one, other = read_input([str(path)], None)
    assert (one.image, one.path) == ("sub/a.png", tmp_path / "sub/a.png")
    assert other.path == Path("/b.png")


def test_one_question_can_be_asked_about_a_list(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("image,id\na.png,1\n")
    [item] = read_input([str(path)], "caption en")
    assert (item.prompt, item.extra) == ("caption en", {"id": "1"})
    with pytest.raises(npvlm.UsageError, match="has no prompts: nothing is asked; give --task"):
        read_input([str(path)], None)
    path.write_text("image,prompt\na.png\nb.png,ocr\n")
    assert [item.error for item in read_input([str(path)], None)] == [
        "line 2 has 1 columns, expected 2 as in the header",
        None,
    ]
    path.write_text("image,prompt\na.png,ocr\n")
    with pytest.raises(npvlm.UsageError, match="line 2 has a prompt"):
        read_input([str(path)], "caption en")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.csv", b"", "expected names of columns"),
        ("a.csv", b"picture;prompt\n", "begins with .*picture;prompt"),
        ("a.csv", b"image,image\n", "each once"),
        ("a.csv", b"image,prompt\n", "is empty"),
        ("a.csv", b"image,prompt\ncaf\xe9.png,ocr\n", "no UTF-8 at byte 16"),
        ("a.csv", b'image,prompt\na.png,"ocr\n', "line 2 is no CSV"),
        ("a.csv", b"image,prompt,text\na.png,ocr,x\n", "a field 'text'"),
        ("a.jsonl", b'{"image": "a", "prompt": "b", "boxes": 1}', "line 1: .* a field 'boxes'"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(tmp_path: Path, name, data, says) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(npvlm.NpvlmError, match=says) as caught:
        read_input([str(path)], None)
    assert "\n" not in str(caught.value)


def test_a_list_stands_alone(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(npvlm.UsageError, match="expected it alone"):
        read_input([str(photos), "list.csv"], None)
    with pytest.raises(npvlm.NpvlmError, match="cannot be read: No such file"):
        read_input([str(tmp_path / "list.csv")], None)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff",
        b"7",
        b"[" * 100_000,
        b'{"image": "a.png", "prompt": "ocr", "n": 1e999}',
        b'{"image": "a.png", "prompt": "ocr", "n": ' + b"9" * 5000 + b"}",
        b'{"image": "", "prompt": "ocr"}',
        b'{"image": ["a.png"], "prompt": "ocr"}',
    ],
    ids=lambda line: line[:50],
)
def test_a_broken_line_becomes_an_error_with_its_number(model, tmp_path: Path, line) -> None:
    path, output = tmp_path / "list.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    ended = answered(model, read_input([str(path)], None), output)
    [record] = records(output)
    assert ended.errors == 1
    assert record["error"].startswith("line 2 ") and len(record["error"]) < 200


# What comes of it


def test_errors_are_records_and_nothing_stops(whole: bytes, listed: Path) -> None:
    found = [json.loads(line) for line in whole.splitlines()]
    assert [record["index"] for record in found] == list(range(27))
    errors = [record["error"] for record in found if "error" in record]
    for part_of_it in (
        "cannot be opened",
        "no picture",
        "is a folder",
        "max_position_embeddings",
        "no label",
        "line 5 is no JSON",
        "line 7 is no JSON object",
        "line 8 has no text as 'image'",
        "line 9 is no JSON (NaN",
    ):
        assert len([error for error in errors if part_of_it in error]) == 1, part_of_it
    assert len(errors) == 9
    given = [record for record in found if "id" in record]
    assert [record["id"] for record in given] == list(range(18))
    unnamed = [record for record in found if "line 8 has" in record.get("error", "")]
    assert [record["image"] for record in unnamed] == [None]
    assert all("text" in record for record in given)
    assert {"boxes" in record for record in given if record["prompt"] == PROMPTS[2]} == {True}


def test_the_exit_code_says_that_there_are_errors(listed: Path, tmp_path: Path, whole) -> None:
    output = tmp_path / "out.jsonl"
    for options in ([], ["--resume"]):
        result = run("batch", listed, "-o", output, *options)
        *errors, summary = result.stderr.splitlines()
        assert result.returncode == 3 and "9 errors" in summary
        assert len(errors) == (0 if options else 4)
    absent, broken, line, more = run("batch", listed, "-o", tmp_path / "b").stderr.splitlines()[:4]
    assert absent.startswith(f"npvlm: {listed.with_name('absent.png')} cannot be opened")
    assert broken.startswith(f"npvlm: {listed.with_name('broken.png')} is no picture")
    assert line.startswith(f"npvlm: {listed}: line 5 is no JSON")
    assert more == f"npvlm: more errors are in {tmp_path / 'b'}"
    assert output.read_bytes() == whole


@pytest.mark.parametrize("count", [3, 40])
def test_shards_join_to_the_whole(model, listed: Path, whole, tmp_path: Path, count: int) -> None:
    items = read_input([str(listed)], None)
    joined = b""
    for number in range(1, count + 1):
        output = tmp_path / f"{number}.jsonl"
        answered(model, part(items, number, count), output)
        joined += output.read_bytes()
    assert joined == whole


def test_a_shard_is_one_of_even_parts(photos: Path, tmp_path: Path) -> None:
    options = ["--task", "ocr", "--max-tokens", 1, "-q", "-o", tmp_path / "out.jsonl"]
    assert run("batch", photos, *options, "--shard", "2/3").returncode == 0
    indices = [record["index"] for record in records(tmp_path / "out.jsonl")]
    assert indices == list(range(10, 21))


# Going on


def test_a_resumed_file_has_the_bytes_of_an_unbroken_one(model, listed, whole, tmp_path) -> None:
    """Wherever it broke, other pictures are answered together then."""
    items, output = read_input([str(listed)], None), tmp_path / "out.jsonl"
    lines = whole.splitlines(keepends=True)
    for kept in (0, 5, 14, 26, 27):
        output.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept : kept + 1])[:-9])
        ended = answered(model, items, output, resume=True)
        assert (ended.kept, ended.done, ended.errors) == (kept, 27, 9)
        assert output.read_bytes() == whole


def expected_of(items: Sequence[Item]) -> list[tuple]:
    return [(item.head, {}) for item in items]


def test_a_line_cut_at_any_byte_is_dropped(listed: Path, whole: bytes, tmp_path: Path) -> None:
    expected, output = expected_of(read_input([str(listed)], None)), tmp_path / "out.jsonl"
    last = whole.splitlines(keepends=True)[-1]
    before = whole[: -len(last)]
    assert len(last) > 200
    for cut in range(len(last)):
        output.write_bytes(before + last[:cut])
        with open_records(output, expected, True) as file:
            assert file.kept == 26
        assert output.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="no such signal there")
def test_killed_at_random_moments_the_bytes_are_the_same(photos: Path, tmp_path: Path) -> None:
    options = ["--task", "detect", "--labels", "red star ; blue circle", "--model", "shapes", "-q"]
    options += ["--threads", "1"]  # gets on where others are busy, too
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert run("batch", photos, *options, "-o", whole).returncode == 0
    chance, kills = random.Random(11), 0
    for lines in (0, 5, 13, 22):
        command = [*CLI, "batch", str(photos), *options, "-o", str(broken), "--resume"]
        process = subprocess.Popen(command)
        while process.poll() is None and count_lines(broken) <= lines:
            time.sleep(0.001)
        time.sleep(chance.random() / 50)
        process.kill()
        kills += process.wait(60) == -signal.SIGKILL
        assert whole.read_bytes().startswith(broken.read_bytes())
    assert kills >= 3
    assert run("batch", photos, *options, "-o", broken, "--resume").returncode == 0
    assert broken.read_bytes() == whole.read_bytes()


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else -1


@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_batch_says_how_to_go_on(photos, tmp_path: Path, number, code) -> None:
    output = tmp_path / "out.jsonl"
    command = [*CLI, "batch", str(photos), "--task", "caption", "--model", "shapes"]
    command += ["--threads", "1"]
    process = subprocess.Popen(
        [*command, "-o", str(output)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and count_lines(output) < 2:
        time.sleep(0.001)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].split("\n")
    assert process.returncode == code and len(list(filter(None, said))) == 2
    assert f"of 32 records are in {output}; --resume goes on" in said[0]
    assert records(output)


Change = Callable[[list[dict]], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "another picture": (lambda r: r[5].update(image="other.png"), "line 6 has image .*other.png"),
    "another prompt": (lambda r: r[0].update(prompt="ocr"), 'line 1 has prompt "ocr", expected'),
    "another model": (lambda r: r[9].update(model="mine"), 'line 10 has model "mine", expected "s'),
    "another precision": (lambda r: r[9].update(precision="int8"), "has precision .*float32"),
    "another limit": (lambda r: r[9].update(max_tokens=7), "has max_tokens 7, expected"),
    "another field": (lambda r: r[9].update(id="z" * 999), "line 10 has id .*…, expected 3"),
    "one missing": (lambda r: r.pop(3), "line 4 has index 4, expected 3"),
    "too many": (lambda r: r.append(r[-1]), "line 28: expected 27 records"),
    "no record": (lambda r: r.insert(2, []), "line 3 is no record"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_something_else_is_refused(model, listed, whole, tmp_path, change: str) -> None:
    output, found = tmp_path / "out.jsonl", [json.loads(line) for line in whole.splitlines()]
    do, says = CHANGES[change]
    do(found)
    output.write_text("".join(json.dumps(record) + "\n" for record in found))
    before = output.read_bytes()
    with pytest.raises(npvlm.UsageError, match=says) as caught:
        answered(model, read_input([str(listed)], None), output, resume=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert output.read_bytes() == before


def test_what_is_there_is_not_overwritten(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    for options, says in (([], "--resume goes on"), (["--resume"], "line 1 is no record")):
        result = run("batch", photos, "--task", "ocr", "-o", output, *options)
        assert result.returncode == 2 and says in one_line(result)
    assert output.read_text() == "mine\n"


@pytest.mark.parametrize(
    "torn",
    [
        b"my notes",
        b"{",
        b'{"index": 2',
        b'{"index": 2, "image"',
        b'{"index": 3, "image": "a',
        b"\0",
    ],
)
@pytest.mark.parametrize("kept", [0, 2])
def test_a_last_line_that_begins_no_next_record_is_left_alone(tmp_path, torn, kept: int) -> None:
    expected = [({"index": i, "image": "a", "prompt": "b"}, {}) for i in range(4)]
    whole = b"".join(json.dumps(head).encode() + b"\n" for head, _ in expected[:kept])
    output = tmp_path / "out.jsonl"
    output.write_bytes(whole + torn)
    if torn == b"{" or (kept == 2 and torn.startswith(b'{"index": 2')):
        with open_records(output, expected, True) as file:
            assert file.kept == kept
        assert output.read_bytes() == whole
        return
    with (
        pytest.raises(npvlm.UsageError, match=f"line {kept + 1} is no record"),
        open_records(output, expected, True),
    ):
        pass
    assert output.read_bytes() == whole + torn


@pytest.mark.parametrize("was_there", [False, True])
def test_an_error_before_the_first_record_leaves_what_was_there(tmp_path, was_there) -> None:
    output = tmp_path / "out.jsonl"
    if was_there:
        output.touch()
    with (
        pytest.raises(npvlm.NpvlmError, match="no memory"),
        open_records(output, [({"index": 0}, {})], False),
    ):
        raise npvlm.NpvlmError("no memory")
    assert output.exists() is was_there


def test_two_cannot_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    output = tmp_path / "out.jsonl"
    with (
        open_records(output, [], False),
        pytest.raises(npvlm.UsageError, match="another npvlm"),
        open_records(output, [], True),
    ):
        pass
    with open_records(output, [], True) as again:
        assert again.kept == 0


@pytest.mark.parametrize(
    ("place", "says"),
    [("absent/out.jsonl", "is no folder"), ("/dev/full", "no regular file"), ("", "directory")],
)
def test_a_place_that_cannot_be_written_is_said(photos, tmp_path: Path, place, says) -> None:
    result = run("batch", photos, "--task", "ocr", "-o", tmp_path / place)
    assert result.returncode in (2, 3) and says in one_line(result)


def test_a_full_disk_is_said_and_gone_on_from(photos: Path, tmp_path: Path) -> None:
    """A limit on the size of files ends a write in the middle of a line, as a full disk does."""
    options = ["--task", "caption", "--max-tokens", 2, "-q", "--threads", 1]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run("batch", f"{photos}/0*.png", *options, "-o", whole).returncode == 0
    most = whole.stat().st_size // 3

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    result = run("batch", f"{photos}/0*.png", *options, "-o", output, preexec_fn=limit)
    assert result.returncode == 3
    assert "cannot be written (File too large); make room and go on with" in one_line(result)
    assert output.read_bytes() == whole.read_bytes()[:most]
    assert run("batch", f"{photos}/0*.png", *options, "-o", output, "--resume").returncode == 0
    assert output.read_bytes() == whole.read_bytes()
