"""Links in a model's folder: those of the hub's tools are followed, those that lead out are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from npvlm.errors import NpvlmError
from npvlm.files import links
from npvlm.files.links import refuse_links_out
from npvlm.opening import BUNDLED, find_folder
from npvlm.porting.dumps import open_dump


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED / "shapes", tmp_path / "model"))


def moved(file: Path, place: Path) -> None:
    """Put a file elsewhere and leave a link to it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    file.replace(place)
    file.symlink_to(place)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.model", "README.md"]
)
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    moved(folder / name, tmp_path / "elsewhere" / name)
    with pytest.raises(NpvlmError, match=f"{name} is a link to .*elsewhere.*expected the file"):
        find_folder(folder)


def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    moved(folder / "config.json", folder / "real" / "config.json")
    assert find_folder(folder) == folder


def test_links_from_a_snapshot_to_its_blobs_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    folder = folder.replace(tmp_path / "models--a--b" / "blobs")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    refuse_links_out(snapshot)
    elsewhere = tmp_path / "models--c--d" / "blobs" / "config.json"
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(elsewhere)
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text("{}")
    with pytest.raises(NpvlmError, match="is a link to"):
        refuse_links_out(snapshot)


def test_blobs_that_are_a_link_themselves_lead_out(folder: Path, tmp_path: Path) -> None:
    storage = tmp_path / "models--a--b"
    (storage / "snapshots").mkdir(parents=True)
    snapshot = folder.replace(storage / "snapshots" / "main")
    moved(snapshot / "config.json", tmp_path / "secrets" / "config.json")
    (storage / "blobs").symlink_to(tmp_path / "secrets")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(Path("..", "..", "blobs", "config.json"))
    with pytest.raises(NpvlmError, match="is a link to"):
        refuse_links_out(snapshot)


def test_links_into_the_hubs_cache_are_followed_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "cache_folder", lambda: tmp_path / "hub")
    moved(folder / "config.json", tmp_path / "hub" / "models--a--b" / "blobs" / "0")
    assert find_folder(folder) == folder
    moved(folder / "README.md", tmp_path / "hub" / "version.txt")
    with pytest.raises(NpvlmError, match=r"README\.md is a link"):
        find_folder(folder)


def test_a_folder_of_arrays_opens_none_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "dump").mkdir()
    (tmp_path / "other.npy").write_bytes(b"")
    (tmp_path / "dump" / "norm.npy").symlink_to(tmp_path / "other.npy")
    with pytest.raises(NpvlmError, match=r"norm\.npy is a link to"):
        open_dump(tmp_path / "dump")
