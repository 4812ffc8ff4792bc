"""Parquet on both ends of a batch: the same questions and records as in JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npvlm.errors import NpvlmError, UsageError
from npvlm.work.batch import pictures_of
from npvlm.work.batch_input import read_input
from npvlm.work.batch_output import while_running, write_whole
from npvlm.work.batch_parquet import write_parquet
from npvlm.work.demo import draw_picture
from tests.test_cli import one_line, run

pa = pytest.importorskip("pyarrow")
rows = pytest.importorskip("pyarrow.parquet")

DATA = [f"picture {i}".encode() * (i % 3) + b"\0" for i in range(50)]


def written(file: Path, group: int = 7, /, **columns) -> str:
    rows.write_table(pa.table(columns), file, row_group_size=group)
    return str(file)


@pytest.mark.parametrize("group", [1, 7, 1000])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), "struct"])
def test_pictures_come_out_as_they_went_in(tmp_path: Path, kind, group: int) -> None:
    if kind == "struct":
        column = pa.array([{"bytes": data, "path": f"p{i}"} for i, data in enumerate(DATA)])
    else:
        column = pa.array(DATA, kind)
    items = read_input([written(tmp_path / "a.parquet", group, image=column)], "ocr")
    assert [*pictures_of(items)] == DATA
    assert [*pictures_of(items[3:50:11])] == DATA[3:50:11]  # a part, as --resume and --shard take
    names = [f"p{i}" if kind == "struct" else f"{tmp_path}/a.parquet#{i}" for i in range(50)]
    assert [item.image for item in items] == names


def test_columns_of_text_and_numbers_go_into_the_records(tmp_path: Path) -> None:
    columns = {
        "image": [b"1", b"2"],
        "path": ["one", None],
        "prompt": ["ocr", None],
        "id": [5, 6],
        "score": [0.5, float("nan")],
        "good": [True, None],
        "thumbnail": [b"3", b"4"],
    }
    name = written(tmp_path / "a.parquet", **columns)
    one, two = read_input([name], None)
    assert one.head == {
        "index": 0,
        "image": "one",
        "prompt": "ocr",
        "id": 5,
        "score": 0.5,
        "good": True,
    }
    assert two.head["image"] == f"{name}#1" and two.error == "row 1 has no text as 'prompt'"
    assert two.head["score"] is None  # JSON has no such number


def test_several_files_are_one_input(tmp_path: Path) -> None:
    for i in (2, 1):
        written(tmp_path / f"{i}.parquet", image=[f"{i}{j}".encode() for j in range(3)])
    items = read_input([str(tmp_path / "*.parquet")], "ocr")
    assert [*pictures_of(items)] == [b"10", b"11", b"12", b"20", b"21", b"22"]
    assert [item.index for item in items] == list(range(6))


def test_a_column_of_paths_is_a_list(tmp_path: Path) -> None:
    items = read_input([written(tmp_path / "a.parquet", image=["x.png", "/y.png"])], "ocr")
    assert [*pictures_of(items)] == [tmp_path / "x.png", Path("/y.png")]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"picture": [b"1"]}, "has the columns picture, expected `image`"),
        ({"image": [5]}, "expected `image`, the bytes of pictures"),
        ({"image": [{"url": "x"}]}, "expected `image`, the bytes of pictures"),
        ({"image": [b"1"], "text": ["x"]}, "records have a field 'text'; rename yours"),
        ({"image": [b"1"], "prompt": ["x"]}, "leave out --task and --prompt"),
        ({"image": pa.array([], pa.binary())}, "is empty"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(tmp_path: Path, columns, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_input([written(tmp_path / "a.parquet", **columns)], "ocr")


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    written(path, image=DATA)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-9], b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises(NpvlmError, match=r"a\.parquet is no Parquet file that can be read"):
            read_input([str(path)], "ocr")
    path.write_bytes(whole)
    items = read_input([str(path)], "ocr")
    written(path, 3, image=DATA[:4])
    with pytest.raises(NpvlmError, match=r"has changed|no Parquet file"):
        list(pictures_of(items))


def test_records_of_any_kind_fit_a_table(tmp_path: Path) -> None:
    records = [
        {
            "index": i,
            "image": "\udcff\\",
            "mixed": [1, "a", [2]][i % 3],
            "float": [1, 0.5][i % 2],
        }
        for i in range(5000)
    ]
    records[4500] |= {"late": {"box": [1.5]}, "huge": 2**70, "mixed": None}
    write_parquet(records, records, tmp_path / "a.parquet")
    found = rows.read_table(tmp_path / "a.parquet").to_pylist()
    assert [r["index"] for r in found] == list(range(5000))
    assert {r["image"] for r in found} == {"\\udcff\\"}
    assert [r["mixed"] for r in found[:3]] == ["1", "a", "[2]"] and found[4500]["mixed"] is None
    assert [r["float"] for r in found[:2]] == [1.0, 0.5]
    assert found[4500]["late"] == {"box": [1.5]} and found[4500]["huge"] == str(2**70)
    assert found[0]["late"] is None


def test_a_table_of_records_is_whole_or_goes_on(tmp_path: Path) -> None:
    draw_picture().save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("image,prompt\na.png,caption en\na.png,detect red star\n")
    lines, table = tmp_path / "out.jsonl", tmp_path / "out.parquet"
    assert run("batch", tmp_path / "list.csv", "-o", lines).returncode == 0
    started = table.with_name("out.parquet.jsonl")
    started.write_bytes(lines.read_bytes()[:-5])
    ask = ["batch", tmp_path / "list.csv", "-o", table]
    assert "--resume goes on" in one_line(run(*ask, "-q"))
    assert run(*ask, "--resume").returncode == 0
    found = rows.read_table(table).to_pylist()
    expected = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [{k: v for k, v in r.items() if v is not None} for r in found] == expected
    assert not started.exists()


def test_a_table_that_is_whole_stays_as_it_is(tmp_path: Path) -> None:
    draw_picture().save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "prompt": "caption en", "mixed": 1},
        {"image": "absent.png", "prompt": "caption en", "mixed": "one"},
        {"image": "a.png", "prompt": "detect red star", "mixed": [None]},
    ]
    questions, table = tmp_path / "list.jsonl", tmp_path / "out.parquet"

    def write(lines) -> None:
        questions.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    write(lines)
    ask = ["batch", questions, "-o", table, "-q"]
    sheets = [tmp_path / "sheet.html", tmp_path / "again.html"]
    assert run(*ask, "--html", sheets[0]).returncode == 3
    whole = table.read_bytes()
    assert "out.parquet holds records; --resume goes on" in one_line(run(*ask))
    again = run(*ask, "--resume", "--html", sheets[1])
    assert again.returncode == 3 and "1 error from before" in one_line(again)
    first, second = (sheet.read_text() for sheet in sheets)
    assert first.count("data:image") == second.count("data:image") > 1
    for wrong, says in (
        (lines[:2], "has more records, expected 2; is the input another one?"),
        ([*lines, lines[0]], "has 3 records, expected 4; is the input another one?"),
        ([{**lines[0], "prompt": "ocr"}, *lines[1:]], 'row 0 has prompt "caption en", expected'),
        ([*lines[:2], {**lines[2], "mixed": [1]}], 'row 2 has mixed "[null]", expected "[1]"'),
    ):
        write(wrong)
        result = run(*ask, "--resume")
        assert result.returncode == 2 and says in one_line(result)
    write(lines)
    started = table.with_name("out.parquet.jsonl")
    plain = tmp_path / "out.jsonl"
    assert run("batch", questions, "-o", plain, "-q").returncode == 3
    for content, stays in ((b"my notes", True), (plain.read_bytes(), False)):
        started.write_bytes(content)  # in the second case by a kill before it was removed
        assert run(*ask, "--resume").returncode == 3
        assert table.read_bytes() == whole and started.exists() is stays
    table.write_text("text")
    assert "no Parquet file that can be read" in one_line(run(*ask, "--resume"))


def test_a_table_of_any_fields_can_be_resumed(tmp_path: Path) -> None:
    draw_picture().save(tmp_path / "a.png")
    metas = [{"a": 1}, {"b": [{"c": None}, {}]}, {}, None, "text", 2.5]
    for count in (2, 4, 6):
        lines = [{"image": "a.png", "prompt": "ocr", "meta": m, "empty": {}} for m in metas[:count]]
        (tmp_path / "list.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        ask = ["batch", tmp_path / "list.jsonl", "-o", tmp_path / f"{count}.parquet", "-q"]
        for options in ([], ["--resume"]):
            result = run(*ask, *options)
            assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"index": [0], "image": [{"bytes": b"x"}]}, "row 0 has image {'bytes': b'x'}, expected"),
        ({"index": [float("nan")]}, "row 0 has index nan, expected 0"),
        ({"image": [b"x"]}, "has no records of a batch in it; name another file"),
    ],
)
def test_a_table_of_something_else_is_not_resumed(tmp_path: Path, columns, says: str) -> None:
    draw_picture().save(tmp_path / "a.png")
    name = written(tmp_path / "f.parquet", **columns)
    result = run("batch", tmp_path / "a.png", "--task", "ocr", "-q", "-o", name, "--resume")
    assert result.returncode == 2 and says in one_line(result)


def test_a_table_that_comes_to_be_there_costs_no_records(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    running = while_running(output, False)
    running.write_text('{"index": 0}\n')
    written(output, image=["x"])
    with pytest.raises(UsageError, match=r"out\.parquet has come to be there meanwhile.*--resume"):
        write_whole(running, output)
    assert running.read_text() == '{"index": 0}\n'


def test_an_empty_file_is_no_table_yet(tmp_path: Path) -> None:
    draw_picture().save(tmp_path / "a.png")
    output = tmp_path / "out.parquet"
    output.touch()
    assert run("batch", tmp_path / "a.png", "--task", "ocr", "-q", "-o", output).returncode == 0
    assert len(rows.read_table(output)) == 1


def test_a_sheet_of_pictures_in_a_table_is_refused(tmp_path: Path) -> None:
    name = written(tmp_path / "a.parquet", image=DATA)
    result = run(
        "batch", name, "--task", "ocr", "-o", tmp_path / "o", "--html", tmp_path / "h.html"
    )
    assert result.returncode == 2 and "leave it out with a Parquet file" in one_line(result)
