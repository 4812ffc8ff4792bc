"""An index of pages: what is in the file, what breaks off, and what is added later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from npvlm.errors import NpvlmError, UsageError
from npvlm.files.index import STORES, PageIndex, open_index
from npvlm.retrieval import Retriever, load_retriever
from npvlm.work.demo import draw_picture
from npvlm.work.embed import Embedded, embed_pages
from npvlm.work.embed_draft import open_draft
from tests.retriever import WIDTH, build_retriever

NAMES = ("one.png", "two\n.png", "drei é.png", "four.png")


class Broken(Exception):
    """Stands for whatever ends a run early."""


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = build_retriever(tmp_path_factory.mktemp("models") / "colpali")
    return load_retriever(folder, ops="numpy")


@pytest.fixture(scope="module")
def vectors(retriever: Retriever) -> dict[str, np.ndarray]:
    """The vectors of each page, made once."""
    return {name: retriever.embed_page(drawn(number)) for number, name in enumerate(NAMES)}


def drawn(number: int):
    return draw_picture().resize((64, 64)).rotate(40 * number)


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pages"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        drawn(number).save(folder / name)
    return [folder / name for name in NAMES]


@pytest.fixture
def embed(retriever, vectors, monkeypatch) -> Callable[..., Embedded]:
    """`embed_pages`, with vectors that are there already."""
    monkeypatch.setattr(Retriever, "embed_page", lambda self, seen: vectors[Path(seen.name).name])

    def run(pages: list[Path], output: Path, store: str = "float16", stop: int = 99, **more):
        def tell(progress: Embedded) -> None:
            if progress.done >= stop:
                raise Broken

        errors: list[str] = []
        ended = embed_pages(retriever, pages, output, store, tell, errors.append, **more)
        assert len(errors) == ended.failed
        return ended

    return run


def part_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


@pytest.mark.parametrize(("store", "most"), [("float32", 0), ("float16", 2**-11), ("int8", 0.01)])
def test_an_index_holds_the_vectors_as_near_as_it_keeps_them(
    embed, pages, vectors, tmp_path, store, most
) -> None:
    embed(pages, tmp_path / "index", store)
    index = open_index(tmp_path / "index")
    assert [Path(page.path).name for page in index.pages] == list(NAMES)
    assert {(page.width, page.height) for page in index.pages} == {(64, 64)}
    for number, name in enumerate(NAMES):
        found = index.vectors(number)
        assert found.shape == vectors[name].shape
        assert np.max(np.abs(found - vectors[name])) <= most


def test_an_index_is_mapped_and_any_reader_of_safetensors_reads_it(
    embed, pages, vectors, tmp_path
) -> None:
    embed(pages, tmp_path / "index", "float32")
    index = open_index(tmp_path / "index")
    assert isinstance(index.parts["vectors"].base, np.memmap)
    with safe_open(tmp_path / "index", framework="numpy") as other:
        read = other.get_tensor("vectors")
        origin = json.loads(other.metadata()["origin"])
    assert np.array_equal(read, np.stack(list(vectors.values())))
    assert (origin["size"], origin["width"], origin["store"]) == (len(read[0]), WIDTH, "float32")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_broke_off_goes_on_and_ends_as_an_unbroken_one(
    embed, pages, tmp_path, store, stop
) -> None:
    embed(pages, tmp_path / "whole", store)
    with pytest.raises(Broken):
        embed(pages, tmp_path / "index", store, stop=stop)
    assert not (tmp_path / "index").exists()
    ended = embed(pages, tmp_path / "index", store, resume=True)
    assert (ended.kept, ended.done) == (stop, len(pages))
    assert (tmp_path / "index").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not part_of(tmp_path / "index").exists()


def test_whatever_a_kill_leaves_of_a_page_is_dropped(embed, pages, tmp_path) -> None:
    embed(pages, tmp_path / "whole", "int8")
    with pytest.raises(Broken):
        embed(pages, tmp_path / "index", "int8", stop=3)
    left = part_of(tmp_path / "index").read_bytes()
    for size in [*range(0, 300, 37), *range(300, len(left), 1511), len(left) - 1]:
        (tmp_path / "index").unlink(missing_ok=True)
        part_of(tmp_path / "index").write_bytes(left[:size])
        embed(pages, tmp_path / "index", "int8", resume=True)
        assert (tmp_path / "index").read_bytes() == (tmp_path / "whole").read_bytes(), size


def test_a_page_whose_bytes_were_damaged_on_the_way_is_made_again(embed, pages, tmp_path) -> None:
    embed(pages, tmp_path / "whole")
    with pytest.raises(Broken):
        embed(pages, tmp_path / "index", stop=2)
    left = bytearray(part_of(tmp_path / "index").read_bytes())
    left[-100] ^= 4
    part_of(tmp_path / "index").write_bytes(left)
    assert embed(pages, tmp_path / "index", resume=True).kept == 1
    assert (tmp_path / "index").read_bytes() == (tmp_path / "whole").read_bytes()


def test_pages_are_added_and_those_that_changed_are_made_again(embed, pages, tmp_path) -> None:
    embed(pages[:2], tmp_path / "index")
    before = open_index(tmp_path / "index").stored(1)["vectors"].tobytes()
    drawn(3).save(pages[0])  # another picture, of another size, under the same name
    pages[1].unlink()  # its vectors stay
    ended = embed([pages[0], *pages[2:]], tmp_path / "index", resume=True)
    assert (ended.kept, ended.done, ended.pages) == (0, 3, 4)
    index = open_index(tmp_path / "index")
    assert [page.path for page in index.pages] == [*map(str, pages)]
    assert index.pages[0].bytes == pages[0].stat().st_size
    assert index.stored(1)["vectors"].tobytes() == before
    assert embed(pages, tmp_path / "index", resume=True).kept == len(pages)


def test_a_page_that_cannot_be_read_is_left_out_and_tried_again(embed, pages, tmp_path) -> None:
    whole = pages[1].read_bytes()
    pages[1].write_bytes(b"no picture")
    ended = embed(pages, tmp_path / "index")
    assert (ended.done, ended.failed, ended.pages) == (3, 1, 3)
    pages[1].write_bytes(whole)
    ended = embed(pages, tmp_path / "index", resume=True)
    assert (ended.kept, ended.done, ended.failed, ended.pages) == (3, 4, 0, 4)


def test_an_index_of_nothing_is_not_written(embed, pages, tmp_path) -> None:
    pages[0].write_bytes(b"no picture")
    with pytest.raises(NpvlmError, match="no page could be read"):
        embed(pages[:1], tmp_path / "index")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "pages"]


def test_a_run_that_ends_before_its_first_page_leaves_nothing(embed, pages, tmp_path) -> None:
    with pytest.raises(Broken):
        embed(pages, tmp_path / "index", stop=0)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "pages"]


def test_what_is_there_is_not_written_over_without_a_word(embed, pages, tmp_path) -> None:
    embed(pages, tmp_path / "index")
    whole = (tmp_path / "index").read_bytes()
    with pytest.raises(UsageError, match="index is there already; --resume adds"):
        embed(pages, tmp_path / "index")
    with pytest.raises(UsageError, match="--store float16, expected float32 and int8"):
        embed(pages, tmp_path / "index", "int8", resume=True)
    part_of(tmp_path / "other").write_bytes(b"somebody's download")
    for more in ({"resume": True}, {}):
        with pytest.raises(UsageError, match=r"other\.part"):
            embed(pages, tmp_path / "other", **more)
    assert part_of(tmp_path / "other").read_bytes() == b"somebody's download"
    with pytest.raises(UsageError, match="is one of the pages"):
        embed(pages, pages[0])
    assert (tmp_path / "index").read_bytes() == whole


def test_two_runs_do_not_write_one_index(embed, pages, retriever, tmp_path) -> None:
    busy = pytest.raises(UsageError, match="is being written by another npvlm")
    with open_draft(part_of(tmp_path / "index"), retriever.origin("float16")), busy:
        embed(pages, tmp_path / "index", resume=True)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_a_truncated_index_is_refused(embed, pages, tmp_path, keep) -> None:
    embed(pages, tmp_path / "index")
    whole = (tmp_path / "index").read_bytes()
    (tmp_path / "index").write_bytes(whole[:keep])
    with pytest.raises(NpvlmError, match="is no whole index"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (b'npvlm index"', b'other index"', "is no index of pages"),
        (b'version": "1', b'version": "2', "of version 2, expected 1"),
        (b'"size\\"', b'"sise\\"', "is a damaged index"),
        (b'float16\\"', b'float61\\"', "is a damaged index"),
        (b'height', b'heighd', "is a damaged index"),
    ],
)  # fmt: skip
def test_an_index_that_says_something_else_is_refused(
    embed, pages, tmp_path, before, after, says
) -> None:
    embed(pages, tmp_path / "index")
    whole = (tmp_path / "index").read_bytes()
    assert before in whole
    (tmp_path / "index").write_bytes(whole.replace(before, after))
    with pytest.raises(NpvlmError, match=says):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("origin", "size", None),  # the same number, but no whole one
        ("origin", "precision", 5),
        ("origin", "model", ["m"]),
        ("pages", "path", 3),
        ("pages", "width", "80"),
        ("pages", "bytes", True),
    ],
)
def test_an_index_whose_fields_have_other_types_is_refused(
    embed, pages, tmp_path, part, field, value
) -> None:
    embed(pages, tmp_path / "index")
    with safe_open(tmp_path / "index", framework="numpy") as file:
        about = file.metadata()
    said, tensors = json.loads(about[part]), load_file(tmp_path / "index")
    about_it = said if part == "origin" else said[0]
    about_it[field] = float(about_it[field]) if value is None else value
    save_file(tensors, tmp_path / "other", about | {part: json.dumps(said)})
    with pytest.raises(NpvlmError, match="is a damaged index"):
        open_index(tmp_path / "other")


def test_no_index_is_told_how_to_make_one(tmp_path) -> None:
    with pytest.raises(NpvlmError, match=r"is not there; `npvlm embed PAGES\.\.\. -o"):
        open_index(tmp_path / "absent")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_vectors_that_are_damaged_are_named_by_their_page(
    embed, pages, retriever, tmp_path
) -> None:
    embed(pages, tmp_path / "index", "float32")
    index = retriever.open(tmp_path / "index")
    for value in (np.nan, -np.nan, np.inf, 1e9):
        spoiled = index.parts["vectors"].copy()
        spoiled[2, 5] = value
        other = PageIndex(index.file, index.origin, index.pages, {"vectors": spoiled})
        with pytest.raises(NpvlmError, match=r"vectors of .*drei é\.png are damaged"):
            retriever.search(other, "a red circle")
