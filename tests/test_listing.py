"""What is named on a command line becomes a list of pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import npvlm
from npvlm.files.listing import list_pictures, picture_suffixes
from npvlm.files.pictures import open_picture

NAMES = ["b.png", "a.JPG", "note.txt", "sub/c.webp", "sub/deep/d.tiff", ".hidden/e.png", ".f.png"]
INSIDE = ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tiff"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `photos` below the working folder; nothing of it is opened here."""
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def listed(*names: str | Path) -> list[str]:
    return [path.as_posix() for path in list_pictures(names)]


def test_a_folder_gives_its_pictures_by_path_without_hidden_ones(photos: Path) -> None:
    assert listed("photos") == listed("photos/") == [f"photos/{name}" for name in INSIDE]


def test_paths_begin_as_the_names_do(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed(photos.absolute()) == [f"{photos.absolute()}/{name}" for name in INSIDE]
    monkeypatch.chdir(photos)
    assert listed(".") == INSIDE


def test_a_file_is_taken_whatever_its_name(photos: Path) -> None:
    assert listed("photos/note.txt", "photos/.f.png") == ["photos/note.txt", "photos/.f.png"]


def test_patterns_give_the_files_that_match(photos: Path) -> None:
    assert listed("photos/*.png") == ["photos/b.png"]
    assert listed("photos/*") == ["photos/a.JPG", "photos/b.png", "photos/note.txt"]
    assert listed("photos/**/*.[wt]*") == [
        "photos/note.txt",
        "photos/sub/c.webp",
        "photos/sub/deep/d.tiff",
    ]


def test_names_keep_their_order_and_nothing_comes_twice(photos: Path) -> None:
    again = ["photos/sub", "./photos/b.png", photos.absolute(), "photos/*.png", "photos/sub/c.webp"]
    found = listed(*again)
    assert found[:3] == ["photos/sub/c.webp", "photos/sub/deep/d.tiff", "photos/b.png"]
    assert [Path(path).name for path in found[3:]] == ["a.JPG"]


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_file_whose_name_is_a_pattern_or_no_text_is_found(photos: Path) -> None:
    for name in (b"[1]*.png", b"caf\xe9.png", b"two\nlines.png"):
        Path("photos", os.fsdecode(name)).touch()
    assert listed("photos/[1]*.png") == ["photos/[1]*.png"]
    assert os.fsencode(photos / os.fsdecode(b"caf\xe9.png")) in map(os.fsencode, listed("photos"))


def test_links_to_files_count_and_links_to_folders_are_not_followed(photos: Path) -> None:
    try:
        Path("photos/sub/loop").symlink_to(photos.absolute())
        Path("photos/sub/link.png").symlink_to(Path("photos/b.png").absolute())
    except OSError:
        pytest.skip("no links here")
    assert listed("photos/sub") == [
        "photos/sub/c.webp",
        "photos/sub/deep/d.tiff",
        "photos/sub/link.png",
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent.png", "absent.png is no file or folder"),
        ("", "an empty name"),
        ("photos/*.bmp", "matches no file"),
        ("photos/sub*", "matches no file"),
        ("empty", "empty holds no picture"),
        ("x" * 5000, "is no file or folder"),
    ],
)
def test_a_name_without_a_picture_is_refused_in_one_sentence(photos, name, says) -> None:
    Path("empty").mkdir()
    Path("empty/note.txt").touch()
    with pytest.raises(npvlm.NpvlmError, match=says) as caught:
        list_pictures(["photos", name])
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_read_is_said(photos: Path, monkeypatch) -> None:
    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", "photos/sub"))
        return []

    monkeypatch.setattr(os, "walk", walk)
    assert list_pictures(["photos"]) == [Path("photos/sub")]
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(npvlm.NpvlmError, match="photos/sub is a folder that may not be read"):
        open_picture(Path("photos/sub"))


def test_suffixes_are_those_of_pictures() -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".gif", ".bmp"} <= picture_suffixes()
    assert not {".pdf", ".mpg", ".eps", ".h5", ".txt", ""} & picture_suffixes()
