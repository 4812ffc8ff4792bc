"""Arrays of an .npz file are views of it, and whatever else a file may be is one sentence."""

from __future__ import annotations

import io
import pickle
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from npvlm.errors import NpvlmError
from npvlm.files import npz as module
from npvlm.files.npz import Npz

NUMBERS = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
ARRAYS = {
    "a/b": NUMBERS,
    "fortran": np.asfortranarray(NUMBERS),
    "half": NUMBERS.astype(np.float16),
    "bits": (NUMBERS.view(np.uint32) >> 16).astype(np.uint16).view("V2"),
    "whole": np.arange(7),
    "one": np.float32(3).reshape(()),
    "none": np.zeros((0, 4), np.float32),
}


def head(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    """An .npy file's head with any text in it."""
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text.encode("latin1")


def said_of(npz: Path, name: str = "x") -> str:
    with pytest.raises(NpvlmError) as caught:
        Npz(npz).array(name)
    said = str(caught.value)
    assert "\n" not in said and str(npz) in said and len(said) < 400
    return said


def packed(path: Path, content: bytes, name: str = "x.npy", kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr(name, content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(tmp_path: Path, save: object) -> None:
    path = tmp_path / "x.npz"
    save(path, **ARRAYS)  # type: ignore[operator]
    npz = Npz(path)
    assert npz.names == list(ARRAYS)
    for name, expected in ARRAYS.items():
        found = npz.array(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    npz.check(npz.names)


def test_stored_arrays_are_read_only_views_of_the_mapped_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(5_000_000, np.float32))
    tracemalloc.start()
    array = Npz(tmp_path / "x.npz").array("a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 < array.nbytes
    assert not array.flags.owndata and not array.flags.writeable


def test_members_with_64_bit_sizes_and_offsets_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a", "b"):
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, NUMBERS)
    assert np.array_equal(Npz(path).array("b"), NUMBERS)


def test_a_zip_behind_other_bytes_is_read_where_it_lies(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=NUMBERS)
    behind = tmp_path / "y.npz"
    behind.write_bytes(b"something else\n" * 9 + (tmp_path / "x.npz").read_bytes())
    assert np.array_equal(Npz(behind).array("a"), NUMBERS)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "sprung"),))  # type: ignore[return-value]

    np.savez(tmp_path / "x.npz", x=np.array([Trap()], dtype=object))
    said = said_of(tmp_path / "x.npz")
    assert "Python objects" in said
    packed(tmp_path / "y.npz", pickle.dumps(Trap()))
    said_of(tmp_path / "y.npz")
    assert not (tmp_path / "sprung").exists()


def described(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


HEADS = {
    "a call": described("(exit(),)"),
    "a name": described("(1,)", "__import__"),
    "brackets": "(" * 9000,
    "minus signs": "-" * 9000 + "1",
    "other keys": "{'descr': '<f4', 'shape': (1,)}",
    "no literal": "{'descr'",
    "a negative axis": described("(-1, -1)"),
    "a huge axis": described(f"({10**30},)"),
    "axes whose product wraps": described(f"({2**33}, {2**31})"),
    "a fraction of an axis": described("(1.5,)"),
    "a thousand axes": described(str((1,) * 1000)),
    "an unknown type": described("(1,)", "'bfloat17'"),
    "objects inside": described("(1,)", "[('a', '|O'), ('b', '<f4')]"),
    "too few numbers": described("(3,)"),
}


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("text", HEADS.values(), ids=HEADS)
def test_a_head_that_describes_no_array_here_is_refused(
    tmp_path: Path, text: str, version: tuple[int, int]
) -> None:
    said_of(packed(tmp_path / "x.npz", head(text, version) + b"\0" * 4))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x03\x00\xff\xff\xff\xff",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"{" * 50,
        b"plain text",
        head(HEADS["too few numbers"])[:-20],
    ],
)
def test_a_member_that_is_no_array_is_refused(tmp_path: Path, content: bytes) -> None:
    said_of(packed(tmp_path / "x.npz", content))


def test_large_compressed_arrays_are_refused_and_small_ones_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros(100_000, np.float32))
    assert Npz(path).array("x").shape == (100_000,)
    monkeypatch.setattr(module, "LARGEST_UNPACKED", 100_000)
    assert "is compressed, expected" in said_of(path) and "zip -0" in said_of(path)


def test_a_compressed_member_that_says_it_is_small_is_not_unpacked_further(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros(30_000_000, np.uint8))
    path = packed(tmp_path / "x.npz", stream.getvalue(), kind=zipfile.ZIP_DEFLATED)
    size = struct.pack("<I", len(stream.getvalue()))
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 1000)))
    tracemalloc.start()
    said_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_packed_as_numpy_packs_none_is_refused(tmp_path: Path, kind: int) -> None:
    assert "packed in a way" in said_of(
        packed(tmp_path / "x.npz", head(HEADS["a call"]), kind=kind)
    )


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_head_is_held_to_the_size_of_its_member_before_that_is_unpacked(
    tmp_path: Path, kind: int
) -> None:
    content = head(described("(7,)")) + bytes(50_000_000)
    npz = Npz(packed(tmp_path / "x.npz", content, kind=kind))
    for work in (npz.head, npz.array, lambda name: npz.check([name])):
        tracemalloc.start()
        with pytest.raises(NpvlmError, match="has not the size that its shape"):
            work("x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1e6


@pytest.mark.parametrize(
    "values",
    [np.zeros(3, "V4"), np.array(["ab"]), np.zeros(3, "M8[s]"), np.zeros(3, "u1,u1")],
    ids=lambda values: str(values.dtype),
)
def test_what_is_no_number_is_refused_and_its_neighbours_are_not(
    tmp_path: Path, values: np.ndarray
) -> None:
    np.savez(tmp_path / "x.npz", x=values, y=NUMBERS)
    assert "expected an array of numbers" in said_of(tmp_path / "x.npz")
    assert np.array_equal(Npz(tmp_path / "x.npz").array("y"), NUMBERS)


def test_encrypted_and_misplaced_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=NUMBERS)
    whole = path.read_bytes()
    entry = whole.index(b"PK\1\2")
    for at, value in ((entry + 8, b"\1\0"), (entry + 42, b"\7\0\0\0"), (entry + 42, b"\xff" * 3)):
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(NpvlmError):
            Npz(path).array("x")


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/b.npy", head(HEADS["too few numbers"]))
        file.writestr("a\\b.npy", head(HEADS["too few numbers"]))
    with pytest.raises(NpvlmError, match="a/b is there twice"):
        Npz(path)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "x" * 501])
def test_names_that_cannot_be_printed_are_refused(tmp_path: Path, name: str) -> None:
    path = packed(tmp_path / "x.npz", head(HEADS["too few numbers"]), f"{name}.npy")
    with pytest.raises(NpvlmError, match="an array whose name is none that could be printed"):
        Npz(path)


def test_what_is_no_file_or_no_zip_is_refused(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "absent.npz", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(NpvlmError, match=says):
            Npz(path)
    path = tmp_path / "x.npz"
    for content in (b"", b"no zip", b"PK\5\6" + b"\xff" * 18):
        path.write_bytes(content)
        with pytest.raises(NpvlmError, match=r"x\.npz is no \.npz file"):
            Npz(path)
    path.write_bytes(b"PK\5\6" + b"\0" * 18)
    assert Npz(path).names == []


def test_a_changed_bit_of_an_array_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=NUMBERS)
    whole = path.read_bytes()
    start = whole.index(NUMBERS.tobytes())
    for at in range(start, start + NUMBERS.nbytes, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(NpvlmError, match=r"x cannot be read \(Bad CRC-32"):
            Npz(path).check(["x"])


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_one_sentence(tmp_path: Path, seed: int) -> None:
    path, draw = tmp_path / "x.npz", random.Random(seed)
    np.savez(path, **ARRAYS)
    whole = path.read_bytes()
    refused = 0
    for _ in range(100):
        changed = bytearray(whole)
        at, length = draw.randrange(len(whole)), draw.randrange(1, 30)
        changed[at : at + length] = draw.randbytes(draw.choice([0, length, 2 * length]))
        path.write_bytes(changed)
        try:
            npz = Npz(path)
            npz.check(npz.names)
            for name in npz.names:
                assert npz.array(name).tobytes() == ARRAYS[name].tobytes() or name not in ARRAYS
        except NpvlmError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50
