"""Masks in the picture, and the files their decoder comes in."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

from npvlm.answers.boxes import Box
from npvlm.answers.drawing import draw_boxes
from npvlm.answers.masks import cut_out, outlines, place, run_lengths
from npvlm.errors import NpvlmError
from npvlm.files.masks import find_mask_decoder, open_mask_decoder
from npvlm.opening import BUNDLED
from tests.test_vqvae import published_weights

ROWS, COLUMNS = np.mgrid[:64, :64]
FIELDS = {
    "disc": 20.0 - np.hypot(ROWS - 31, COLUMNS - 31),
    "all": np.ones((64, 64)),
    "two": np.maximum(8 - np.hypot(ROWS - 12, COLUMNS - 12), 9 - np.hypot(ROWS - 50, COLUMNS - 50)),
    "left half": 31.5 - COLUMNS,
    "touching": np.where((ROWS < 32) == (COLUMNS < 32), 1.0, -1.0),
    "none": -np.ones((64, 64)),
}
BOX = Box("thing", 10.3, 5.7, 150.2, 99.9)


def field(name: str) -> np.ndarray:
    return FIELDS[name].astype(np.float32)


@pytest.mark.parametrize("name", FIELDS)
def test_run_lengths_say_the_mask_again(name: str) -> None:
    mask = place(field(name), BOX, 200, 120)
    counts = run_lengths(mask)
    inside = np.arange(len(counts)) % 2 == 1
    assert np.array_equal(np.repeat(inside, counts).reshape(200, 120).T, mask)
    assert all(count > 0 for count in counts[1:])


@pytest.mark.parametrize("bits", [[[0]], [[1]], [[1, 0], [0, 1]], [[1, 1], [1, 1]]])
def test_run_lengths_of_small_masks(bits: list[list[int]]) -> None:
    mask = np.array(bits, bool)
    counts = run_lengths(mask)
    inside = np.arange(len(counts)) % 2 == 1
    assert np.array_equal(np.repeat(inside, counts).reshape(mask.T.shape).T, mask)


@pytest.mark.parametrize(("name", "parts"), [("disc", 1), ("all", 1), ("two", 2), ("left half", 1)])
def test_outlines_enclose_the_mask(name: str, parts: int) -> None:
    rings = outlines(field(name), BOX)
    assert len(rings) == parts
    filled = Image.new("L", (1600, 960))
    for ring in rings:
        ImageDraw.Draw(filled).polygon([(8 * x, 8 * y) for x, y in ring], fill=255)
    drawn, mask = np.asarray(filled.reduce(8)) > 127, place(field(name), BOX, 200, 120)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.99


def test_outlines_of_straight_edges_have_their_corners_alone() -> None:
    assert [sorted(ring) for ring in outlines(field("all"), BOX)] == [
        [(10, 5), (10, 99), (150, 5), (150, 99)]
    ]
    assert outlines(field("none"), BOX) == []


def test_outlines_of_noise_close_and_never_fail() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rings = outlines(rng.standard_normal((9, 7)).astype(np.float32), Box("", 0, 0, 70, 90))
        assert all(len(ring) >= 3 for ring in rings)
        assert all(0 <= x <= 70 and 0 <= y <= 90 for ring in rings for x, y in ring)


def test_a_speck_too_small_for_corners_is_no_outline() -> None:
    speck = np.full((3, 3), -1, np.float32)
    speck[1, 1] = 1e-5
    assert outlines(speck, Box("", 0, 0, 1, 1)) == []
    draw_boxes(Image.new("RGB", (9, 9)), [Box("", 0, 0, 1, 1, painted=speck)])


def test_a_hole_is_no_outline_of_its_own() -> None:
    ring = (6 - np.abs(np.hypot(ROWS - 31, COLUMNS - 31) - 20)).astype(np.float32)
    assert len(outlines(ring, BOX)) == 1
    assert not place(ring, BOX, 200, 120)[52, 80]


@pytest.mark.parametrize(
    "box", [Box("", 0, 0, 0.2, 0.2), Box("", 199.9, 119.9, 200, 120), Box("", 3, 3, 3.5, 90)]
)
def test_the_smallest_box_has_a_pixel(box: Box) -> None:
    assert place(field("all"), box, 200, 120).sum() >= 1
    assert min(cut_out(Image.new("RGB", (200, 120)), np.ones((120, 200), bool), box).size) == 1


def test_a_cut_out_is_clear_around_the_thing() -> None:
    picture = Image.new("RGB", (200, 120), (9, 8, 7))
    cut = cut_out(picture, place(field("left half"), BOX, 200, 120), BOX)
    assert cut.size == (140, 94)
    assert cut.getpixel((10, 50)) == (9, 8, 7, 255) and cut.getpixel((130, 50))[3] == 0


def as_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in published_weights(seed).items()}


def test_the_published_file_and_a_safetensors_one_are_read_alike(tmp_path: Path) -> None:
    arrays = as_arrays()
    more = {"encoder.0.weight": np.zeros((16, 1, 4, 4), np.float32)}
    np.savez(tmp_path / "vae-oid.npz", **arrays, **more)
    save_file(arrays, tmp_path / "vae.safetensors")
    one, other = (open_mask_decoder(tmp_path / name) for name in ("vae-oid.npz", "vae.safetensors"))
    for name, array in arrays.items():
        assert one[name].dtype == other[name].dtype == np.float32
        assert np.array_equal(one[name], array) and np.array_equal(other[name], array)


def test_a_model_s_mask_decoder_lies_in_its_folder_or_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(NpvlmError, match=r"vae-oid\.npz.*curl -o .*vae-oid\.npz https://"):
        find_mask_decoder(folder)
    (tmp_path / "vae-oid.npz").touch()
    assert find_mask_decoder(folder) == tmp_path / "vae-oid.npz"
    (folder / "vae.safetensors").touch()
    assert find_mask_decoder(folder) == folder / "vae.safetensors"
    assert find_mask_decoder(BUNDLED / "shapes") == BUNDLED / "vae.safetensors"


def test_a_damaged_mask_decoder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vae-oid.npz"
    for content in (b"", b"no archive", b"PK\x03\x04 half of one"):
        path.write_bytes(content)
        with pytest.raises(NpvlmError, match=r"is no \.npz file"):
            open_mask_decoder(path)
    arrays = as_arrays()
    whole = tmp_path / "whole.npz"
    np.savez(whole, **arrays)
    path.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(NpvlmError, match=r"is no \.npz file"):
        open_mask_decoder(path)
    for at in range(0, len(whole.read_bytes()), 400_001):
        content = bytearray(whole.read_bytes())
        content[at : at + 30] = b"\xff" * 30
        path.write_bytes(content)
        with contextlib.suppress(NpvlmError):  # no other exception, and damage in a number is none
            open_mask_decoder(path)
    for change, says in (
        ({"decoder.4.bias": None}, "decoder.4.bias is missing"),
        ({"decoder.4.bias": np.zeros(3, np.float32)}, r"decoder.4.bias is \[3\], expected \[128\]"),
        ({"decoder.4.bias": np.full(128, np.nan, np.float32)}, "not finite"),
        ({"decoder.4.bias": np.array([object()])}, "pickle|object"),
        ({"decoder.4.bias": np.zeros(128, np.complex64)}, "complex64, expected floating"),
        ({"decoder.4.bias": np.zeros(128, np.int64)}, "int64, expected floating"),
    ):
        changed = {k: v for k, v in (arrays | change).items() if v is not None}
        np.savez(path, **changed)
        with pytest.raises(NpvlmError, match=says):
            open_mask_decoder(path)


def packed(path: Path, member: bytes, times: int = 1) -> None:
    """The archive of the published tensors with the bytes of one of them replaced."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in as_arrays().items():
            if name != "decoder.4.bias":
                with archive.open(f"{name}.npy", "w") as stream:
                    np.lib.format.write_array(stream, np.asarray(array))
        for _ in range(times):
            archive.writestr("decoder.4.bias.npy", member)


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode() + data


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}"
HOSTILE = {
    "a shape of terabytes": npy(HEADER.format("'<f4'", "(1000000000000,)")),
    "sides below zero": npy(HEADER.format("'<f4'", "(-1, -128)"), bytes(512)),
    "a type of gigabytes": npy(HEADER.format("'|V2000000000'", "(128,)"), bytes(512)),
    "records": npy(HEADER.format("[('a', '<f4'), ('b', 'O')]", "(128,)"), bytes(512)),
    "a pickle with a header": npy(HEADER.format("'|O'", "(128,)"), b"cos\nsystem\n(S'false'\ntR."),
    "a pickle alone": b"\x80\x04cos\nsystem\n(S'false'\ntR.",
    "a call as its shape": npy(HEADER.format("'<f4'", "__import__('os').abort()"), bytes(512)),
    "a call as its header": npy("__import__('os').abort()", bytes(512)),
    "brackets without end": npy("(" * 9000),
    "more than it says": npy(HEADER.format("'<f4'", "(128,)"), bytes(2**20)),
    "less than it says": npy(HEADER.format("'<f4'", "(128,)"), bytes(511)),
    "a version that is none": npy(HEADER.format("'<f4'", "(128,)"), bytes(512), b"\x09\x00"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("member", HOSTILE.values(), ids=HOSTILE)
def test_an_array_that_is_not_what_its_header_says_is_refused_unread(
    tmp_path: Path, member: bytes
) -> None:
    packed(tmp_path / "vae-oid.npz", member)
    tracemalloc.start()
    with pytest.raises(
        NpvlmError, match=r"decoder\.4\.bias (cannot be read|is .*, expected an array)"
    ):
        open_mask_decoder(tmp_path / "vae-oid.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    good = npy(HEADER.format("'<f4'", "(128,)"), bytes(512))
    packed(tmp_path / "vae-oid.npz", good)
    assert open_mask_decoder(tmp_path / "vae-oid.npz")["decoder.4.bias"].shape == (128,)
    packed(tmp_path / "vae-oid.npz", good, times=2)
    with pytest.raises(NpvlmError, match="is there twice"):
        open_mask_decoder(tmp_path / "vae-oid.npz")


@pytest.mark.parametrize("name", ["vae-oid.npz", "vae.safetensors"])
def test_a_mask_decoder_of_gigabytes_is_refused_unread(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**33)  # a file with holes
    with pytest.raises(NpvlmError, match=r"8,589,934,592 bytes, expected at most 33,554,432"):
        open_mask_decoder(tmp_path / name)
