"""`npvlm embed` and `npvlm search` as people use them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from npvlm.work.demo import draw_picture
from tests.retriever import build_retriever
from tests.test_cli import CLI, ROOT, run
from tests.test_examples import run as run_line
from tests.test_examples import run_python

PAGE = ROOT / "docs" / "retrieval.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, three pages, one that is none, and an index of them."""
    place = tmp_path_factory.mktemp("place")
    build_retriever(place / "colpali")
    (place / "pages").mkdir()
    for number in range(3):
        picture = draw_picture().resize((90, 60)).rotate(30 * number)
        picture.save(place / "pages" / f"{number}.png")
    result = run(
        "embed", "pages", "-o", "index.safetensors", "--model", "colpali", cwd=place, env=PLAIN
    )
    assert result.returncode == 0, result.stderr
    (place / "pages" / "broken.png").write_bytes(b"no picture")
    return place


PLAIN = {"NPVLM_MODEL": ""}


def said(result: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_search_prints_the_best_pages_first(place) -> None:
    result = run("search", "index.safetensors", "a red circle", "--top", "2", cwd=place)
    assert result.returncode == 0, result.stderr
    rows = [row.split("\t") for row in result.stdout.splitlines()]
    assert [row[0] for row in rows] == ["1", "2"]
    assert float(rows[0][1]) >= float(rows[1][1])
    assert all(row[2].startswith(f"pages{os.sep}") for row in rows)


def test_a_search_as_json_draws_where_words_fit(place, tmp_path) -> None:
    result = run(
        "search", "index.safetensors", "a red circle", "--json", "--heat", tmp_path / "heat",
        cwd=place,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = [json.loads(row) for row in result.stdout.splitlines()]
    assert [page["rank"] for page in found] == [1, 2, 3]
    assert {(page["width"], page["height"]) for page in found} == {(90, 60)}
    assert [word["text"] for word in found[0]["words"]] == [" a", " red", " circle"]
    drawn = {f"{page['rank']}-{Path(page['page']).stem}.png" for page in found}
    assert {path.name for path in (tmp_path / "heat").iterdir()} == drawn


def test_a_page_that_is_gone_is_found_and_said_not_to_be_drawn(place, tmp_path) -> None:
    shutil.copytree(place, tmp_path / "place")
    (tmp_path / "place" / "pages" / "1.png").unlink()
    result = run("search", "index.safetensors", "x", "--heat", "heat", cwd=tmp_path / "place")
    assert result.returncode == 3
    assert "1.png cannot be opened: No such file or directory." in said(result)
    assert len(result.stdout.splitlines()) == 3
    assert len(list((tmp_path / "place" / "heat").iterdir())) == 2


def test_an_unreadable_page_is_said_and_left_out(place) -> None:
    result = run("embed", "pages", "-o", "other", "--model", "colpali", cwd=place, env=PLAIN)
    assert result.returncode == 3
    assert "broken.png is no picture of a kind that npvlm reads" in said(result)
    assert "1 page of 4 left out" in result.stderr
    assert (place / "other").exists() and not (place / "other.part").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["embed", "pages", "-o", "x"], 2, "no ColPali is bundled: --model names one"),
        (["embed", "pages", "-o", "x", "--model", "shapes"], 3, "without a projection, expected"),
        (["embed", "-", "-o", "x", "--model", "colpali"], 2, "not stdin"),
        (["embed", "pages", "-o", "no/x", "--model", "colpali"], 2, "no is no folder"),
        (["embed", "pages", "-o", "pages/0.png", "--model", "colpali"], 2, "one of the pages"),
        (["embed", "pages", "-o", "index.safetensors", "--model", "colpali"], 2, "--resume adds"),
        (["caption", "pages/0.png", "--model", "colpali"], 3, "is a ColPali, which finds pages"),
        (["search", "absent", "x"], 3, "absent is not there; `npvlm embed"),
        (["search", "pages/0.png", "x"], 3, "pages/0.png is no whole index, expected one"),
        (["search", "colpali/model.safetensors", "x"], 3, "is no index of pages"),
        (["search", "index.safetensors", " "], 2, "the query is empty"),
        (["search", "index.safetensors", "x", "--top", "0"], 2, "0 is not in the range"),
        (["search", "index.safetensors", "x", "--model", "shapes"], 3, "without a projection"),
        (["search", "index.safetensors", "x", "--heat", "pages"], 2, "is where pages of"),
        (["search", "index.safetensors", "x", "--heat", "pages/new"], 2, "is where pages of"),
        (["search", "index.safetensors", "x", "--heat", "index.safetensors/a"], 2, "is no folder"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_a_sentence(place, arguments, code, says) -> None:
    result = run(*arguments, cwd=place, env=PLAIN)
    assert (result.returncode, result.stdout) == (code, "")
    assert says in said(result)
    assert len([row for row in result.stderr.splitlines() if "toy" not in row]) == 1


def test_a_model_that_moved_is_asked_for(place, tmp_path) -> None:
    result = run("search", place / "index.safetensors", "x", cwd=tmp_path)
    assert result.returncode == 3
    assert "index.safetensors names its model: 'colpali' is no model" in said(result)
    assert "; name it with --model." in said(result)
    result = run("search", place / "index.safetensors", "x", "--model", place / "colpali")
    assert result.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_goes_on(place, tmp_path, number) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    for count in range(30):
        shutil.copy(place / "pages" / f"{count % 3}.png", pages / f"{count:02}.png")
    command = ["embed", "pages", "-o", "index", "--model", str(place / "colpali")]
    process = subprocess.Popen([*CLI, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "index.part"
    while not (part.exists() and part.stat().st_size > 12_000) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    stderr = process.communicate()[1]
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert "Traceback" not in stderr
    if number != signal.SIGKILL:
        assert re.search(r"\d+ of 30 pages are done; --resume goes on\.", stderr)
    assert not (tmp_path / "index").exists()
    result = run(*command, "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "30 in all" in result.stderr
    assert not re.search(r"\b30 pages more", result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "pages"]


def test_the_page_on_finding_pages_shows_what_works(place, tmp_path) -> None:
    shutil.copytree(place, tmp_path / "place")
    there = tmp_path / "place"
    (there / "pages" / "0.png").rename(there / "pages" / "one.png")
    (there / "pages" / "broken.png").unlink()
    (there / "index.safetensors").unlink()
    (there / "more").mkdir()
    shutil.copy(there / "pages" / "one.png", there / "more" / "two.png")
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "sh", "python"]
    for line in "".join(block for kind, block in blocks if kind == "sh").splitlines():
        result = run_line(there, line)
        assert result.returncode == 0, f"{line}: {result.stderr}"
    assert len(list((there / "found").iterdir())) == 3
    result = run_python(there, blocks[2][1])
    assert result.returncode == 0, result.stderr
    *hits, a, red, circle, score = [row.split() for row in result.stdout.splitlines()]
    assert [word[0] for word in (a, red, circle)] == ["a", "red", "circle"]
    assert float(score[0]) <= float(hits[0][1]) + 0.01  # the best is kept in float16
    assert (there / "match.png").exists()
    links = re.findall(r"\]\(([^)#:]+)\)", page)
    assert links and [link for link in links if not (PAGE.parent / link).exists()] == []
