"""Pictures: upright, on white, 8 bits a colour, then the numbers that the tower reads."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import BmpImagePlugin, Image

from npvlm.config import parse_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files import pictures
from npvlm.files.pictures import (
    Preprocessor,
    open_picture,
    pixel_values,
    read_preprocessor,
)
from npvlm.files.thumbnails import thumbnail
from tests.published import paligemma

HALF = (0.5, 0.5, 0.5)
PUBLISHED: dict[str, Any] = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_seq_length": 256,
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "PaliGemmaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}


def noise(width: int, height: int, bands: int, seed: int = 0) -> np.ndarray[Any, Any]:
    shape = (height, width, bands) if bands > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def reopened(picture: Image.Image, kind: str, **options: Any) -> np.ndarray[Any, Any]:
    """Save a picture, and read it as npvlm does."""
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    stream.seek(0)
    found = open_picture(stream)
    assert found.mode == "RGB"
    return np.asarray(found)


def refusal(source: Any) -> str:
    with pytest.raises(NpvlmError) as caught:
        open_picture(source)
    said = str(caught.value)
    assert "\n" not in said
    assert caught.value.exit_code == 3
    return said


def preprocessor(side: int, resample: int = 3) -> Preprocessor:
    return Preprocessor(side, side, HALF, HALF, 1 / 255, resample)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_come_back_as_they_are(kind: str) -> None:
    colours = noise(31, 17, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(reopened(Image.fromarray(colours), kind, **options), colours)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_opaque_modes_are_converted_as_pillow_converts_them(mode: str) -> None:
    picture = Image.fromarray(noise(23, 11, 3))
    picture = picture.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (5, 4), 9)
    assert np.array_equal(np.asarray(open_picture(picture)), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparency_shows_white(mode: str) -> None:
    picture = Image.new("RGBA", (4, 3), (10, 10, 10, 0))
    picture.paste((10, 10, 10, 255), (0, 0, 2, 3))
    if mode in ("La", "RGBa"):
        picture = picture.convert("LA" if mode == "La" else "RGBA")
    found = np.asarray(open_picture(picture.convert(mode)))
    assert (found[:, :2] == 10).all()
    assert (found[:, 2:] == 255).all()


def test_half_transparency_is_half_white() -> None:
    found = np.asarray(open_picture(Image.new("RGBA", (1, 1), (0, 100, 200, 128))))
    assert found[0, 0].tolist() == [127, 177, 227]


@pytest.mark.parametrize(
    ("mode", "colour", "clear"), [("P", 0, 0), ("L", 90, 90), ("RGB", (1, 2, 3), (1, 2, 3))]
)
def test_a_transparent_colour_shows_white(mode: str, colour: Any, clear: Any) -> None:
    picture = Image.new(mode, (3, 2), colour)
    assert (reopened(picture, "PNG", transparency=clear) == 255).all()
    assert not (reopened(picture, "PNG") == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    """The mark, red in the stored corner, goes where the camera says that its top left was."""
    picture = Image.new("RGB", (48, 32), "white")
    picture.paste((255, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = reopened(picture, kind, exif=exif)
    assert found.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    corners = {
        1: (0, 0),
        2: (0, 1),
        3: (1, 1),
        4: (1, 0),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }
    down, right = corners[orientation]
    corner = found[-8 if down else 8, -8 if right else 8]
    assert corner[0] > 200
    assert corner[1] < 60


def test_deep_greys_are_scaled_and_not_cut() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    exact = np.rint(values.astype(np.float64) * 255 / 65535)
    for kind in ("PNG", "TIFF"):
        found = reopened(Image.fromarray(values), kind)
        assert np.array_equal(found[..., 0], exact)
        assert np.array_equal(found[..., 0], found[..., 2])
    pgm = io.BytesIO(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(open_picture(pgm))[..., 0], exact)
    big = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(open_picture(big))[..., 0], exact)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, clear: bytes = b"") -> bytes:
    """Write a PNG that Pillow cannot: 16 bits a colour, or with a transparent colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    if clear:
        parts.append(chunk(b"tRNS", clear))
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def test_deep_colours_are_scaled() -> None:
    """16 bits a colour, with and without transparency: as Pillow reads them, never cut."""
    opaque = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32768, 65535, 65535, 0, 257))
    assert np.asarray(open_picture(io.BytesIO(opaque))).tolist() == [[[0, 128, 255], [255, 0, 1]]]
    faint = png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 32768, 65535, 0, 0))
    assert np.asarray(open_picture(io.BytesIO(faint))).tolist() == [[[128] * 3, [255] * 3]]


def test_a_transparent_deep_grey_shows_white() -> None:
    content = png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 300, 301, 65535), struct.pack(">H", 300))
    found = np.asarray(open_picture(io.BytesIO(content)))
    assert found[0, :, 0].tolist() == [255, 1, 255]


def test_numbers_of_unknown_range_are_refused() -> None:
    assert "holds fractions" in refusal(Image.new("F", (2, 2)))
    deep = Image.fromarray(np.array([[0, 65536]], np.int32))
    assert "holds numbers from 0 to 65536, expected 0 to 65535" in refusal(deep)
    assert "holds numbers from -1" in refusal(Image.fromarray(np.array([[-1, 5]], np.int32)))


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        found = reopened(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (found == (255, 0, 0)).all()


def test_what_is_no_picture_is_refused_by_the_name_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.png").touch()
    Path("text.jpg").write_text("a picture\n" * 9)
    Path("folder").mkdir()
    assert refusal("empty.png") == "empty.png is empty, expected a picture"
    assert refusal("text.jpg").startswith("text.jpg is no picture of a kind that npvlm reads")
    assert refusal("folder") == "folder is a folder, expected a picture"
    assert refusal(Path("nowhere.png")).startswith("nowhere.png cannot be opened: No such file")
    assert "cannot be opened" in refusal("a\0b.png")
    assert "cannot be opened" in refusal("x" * 5000)
    assert refusal("no\nfile").startswith("no\\nfile cannot be opened")
    refusal("\udcff.png").encode()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "is no regular file" in refusal(tmp_path / "pipe.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    stream = io.BytesIO()
    Image.fromarray(noise(90, 60, 3)).save(stream, kind)
    path = tmp_path / "part"
    path.write_bytes(stream.getvalue()[: int(len(stream.getvalue()) * share)])
    said = refusal(path)
    assert said.startswith(f"{path} ")


def test_an_absurdly_large_picture_is_refused_before_it_is_unpacked() -> None:
    said = refusal(io.BytesIO(png(40_000, 40_000, 8, 0, b"")))
    assert "has more than 134 million pixels, expected a picture" in said


def test_a_large_photograph_is_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    stream = io.BytesIO()
    Image.new("RGB", (40, 49)).save(stream, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(stream).size == (40, 49)


def test_a_damaged_note_about_orientation_turns_nothing() -> None:
    stream = io.BytesIO()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\xff" * 9
    Image.new("RGB", (9, 5), "red").save(stream, "JPEG", exif=exif)
    stream.seek(0)
    assert open_picture(stream).size == (9, 5)


def test_damaged_files_never_raise_anything_else() -> None:
    draw = np.random.default_rng(5)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "TGA", "ICO", "PCX"):
        stream = io.BytesIO()
        Image.fromarray(noise(33, 33, 3)).save(stream, kind)
        for _ in range(25):
            content = bytearray(stream.getvalue())
            for at in draw.integers(0, min(len(content), 120), 4):
                content[at] = draw.integers(256)
            try:
                assert open_picture(io.BytesIO(bytes(content))).mode == "RGB"
            except NpvlmError as error:
                assert "\n" not in str(error)


def chunked(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of four black pixels with more chunks in front of them."""
    plain = png(2, 2, 8, 0, bytes(6))
    more = [
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return plain[:33] + b"".join(more) + plain[33:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_no_picture_runs_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands an EPS to ghostscript; every way to one is closed."""

    def run(*command: Any, **options: Any) -> None:
        raise AssertionError(f"{command} was run")

    for name in ("run", "call", "check_call", "check_output", "Popen"):
        monkeypatch.setattr(f"subprocess.{name}", run)
    path = tmp_path / "page.png"
    path.write_bytes(EPS)
    assert "is no picture of a kind that npvlm reads" in refusal(path)
    assert "is no picture of a kind that npvlm reads" in refusal(EPS)
    assert "is an EPS, which is a program" in refusal(Image.open(io.BytesIO(EPS)))
    with pytest.raises(NpvlmError, match="of a kind that npvlm reads"):
        thumbnail(path, 320)


@pytest.mark.parametrize(
    "content",
    [
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.4\n",
        b"\xd7\xcd\xc6\x9a\0\0" + bytes(99),  # WMF
        b"SIMPLE  =                    T".ljust(2880),  # FITS
        bytes(5000),
        b"\xff" * 5000,
    ],
)
def test_what_is_no_picture_of_a_known_kind_is_refused(content: bytes) -> None:
    refusal(content)


@pytest.mark.parametrize(
    ("width", "height"),
    [(2**31 - 1, 2**31 - 1), (40_000, 4_000), (2**20 + 1, 1), (1, 2**20 + 1)],
)
def test_a_picture_too_large_is_refused_before_it_is_unpacked(width: int, height: int) -> None:
    said = refusal(png(width, height, 8, 0, b""))
    assert "134 million" in said and "make it smaller" in said


def test_readers_that_need_more_memory_get_smaller_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 2 * 10**6)
    picture = Image.new("L", (1200, 1200))
    assert reopened(picture, "PNG").shape == (1200, 1200, 3)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", method=0)
    assert "1200 x 1200 pixels, expected at most 1 million" in refusal(stream)


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_the_thinnest_pictures_are_read(size: tuple[int, int]) -> None:
    rgb = open_picture(png(*size, 8, 2, bytes((1 + 3 * size[0]) * size[1])))
    assert rgb.size == size
    assert pixel_values(rgb, preprocessor(56)).shape == (3, 56, 56)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "I;16"])
def test_conversion_by_tiles_is_conversion_at_once(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "I;16":
        values = np.random.default_rng(1).integers(0, 65536, (37, 53), np.uint16)
        picture = Image.fromarray(values)
    else:
        picture = Image.fromarray(noise(53, 37, 4)).convert(mode)
    whole = np.asarray(open_picture(picture))
    monkeypatch.setattr(pictures, "_TILE", 10)
    assert np.array_equal(np.asarray(open_picture(picture)), whole)


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**23)))],
        [(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**23)))],
        [(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**23)))],
        [(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20)))] * 80,
    ],
    ids=["zTXt", "iTXt", "iCCP", "many"],
)
def test_text_that_unpacks_to_very_much_is_refused(chunks: list[tuple[bytes, bytes]]) -> None:
    assert re.search("[Tt]oo (large|much)", refusal(chunked(*chunks)))


@pytest.mark.parametrize(
    "content",
    [b"P6" + b" " * 2000, b"\xff\xd8" + b"\xff\xe0\0\2" * 2000, chunked(*[(b"abCd", b"")] * 2000)],
    ids=["PPM", "JPEG", "PNG"],
)
def test_a_header_that_never_ends_is_given_up(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_STEPS", 1000)
    refusal(content)


def test_a_picture_that_is_read_pixel_by_pixel_is_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "_STEPS", 1000)
    side, colours = 100, noise(100, 100, 1)
    runs = b"".join(b"".join(b"\1" + bytes([c]) for c in row) + b"\0\0" for row in colours[::-1])
    sizes = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    start = 14 + len(sizes) + len(palette)
    head = b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start)
    assert np.array_equal(
        np.asarray(open_picture(head + sizes + palette + runs + b"\0\1"))[..., 0], colours
    )


def test_a_jpeg_of_endless_scans_is_given_up() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (640, 480)).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    assert open_picture(content[:-2] + last * 100 + content[-2:]).size == (640, 480)
    assert "more steps" in refusal(content[:-2] + last * 4000 + content[-2:])


def test_a_file_or_a_stream_without_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reader is let loose on it: some of them take all of a file into memory at once."""
    (tmp_path / "sparse.webp").write_bytes(b"RIFF\xff\xff\xff\x7fWEBPVP8L")
    os.truncate(tmp_path / "sparse.webp", 2**40)

    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            assert size >= 0, "all of it is asked for"
            return bytes(size)

    monkeypatch.setattr(pictures, "MOST_BYTES", 2**22)
    for source in (tmp_path / "sparse.webp", Endless()):
        assert "has more than 4 million bytes" in refusal(source)


def test_a_file_that_shrinks_while_it_is_read_kills_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file mapped to memory would end the process with SIGBUS."""
    path, load = tmp_path / "grey.bmp", BmpImagePlugin.BmpImageFile.load
    Image.fromarray(noise(300, 300, 1)).save(path)

    def shrink(picture: Image.Image) -> Any:
        loaded = load(picture)
        os.truncate(path, 60)
        return loaded

    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", shrink)
    assert np.array_equal(np.asarray(open_picture(path))[..., 0], noise(300, 300, 1))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_that_takes_a_files_place_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(pictures, "_check_file", lambda path, said: None)
    assert "is empty" in refusal(tmp_path / "pipe.png")


def entry(kind: int, count: int, value: bytes) -> bytes:
    return b"MM\0*\0\0\0\x08\0\x01\x01\x12" + struct.pack(">HI", kind, count) + value + bytes(4)


@pytest.mark.parametrize(
    "exif",
    [
        entry(3, 1, b"\0\x09\0\0"),  # no such way to hold a camera
        entry(3, 1, b"\0\0\0\0"),
        entry(3, 2, b"\0\x06\0\x06"),
        entry(2, 2, b"6\0\0\0"),
        entry(5, 1, b"\0\0\0\x1a") + b"\0\0\0\x06\0\0\0\0",  # 6 / 0
        entry(11, 1, b"\x7f\xc0\0\0"),  # NaN
        entry(13, 1, b"\0\0\0\x08"),
        b"MM\0*\xff\xff\xff\xf0\0\x01",
        b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 8,
        b"MM\0*\0\0\0\x08\xff\xff" + bytes(99),
        bytes(range(256)),
        b"",
    ],
)
def test_no_note_about_the_camera_keeps_a_picture_from_being_read(exif: bytes) -> None:
    assert open_picture(chunked((b"eXIf", exif))).size == (2, 2)


def test_what_stands_behind_the_orientation_does_not_undo_it() -> None:
    exif = b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x88\x25\0\x02\0\0\0\x04abcd"
    stream = io.BytesIO()
    Image.new("RGB", (48, 32)).save(stream, "JPEG", exif=b"Exif\0\0" + exif + bytes(4))
    assert open_picture(stream).size == (32, 48)


def test_pictures_that_python_cannot_read_any_more_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(200, 200, 3)).save(path)
    closed = Image.open(path)
    closed.close()
    with Image.open(path) as late:
        os.truncate(path, 500)
        for picture in (closed, late, Image.new("RGB", (0, 5)), Image.new("L", (5, 0))):
            refusal(picture)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 4, 3), np.float32),
        np.full((4, 4), np.nan),
        np.full((4, 4, 3), -1, np.int8),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4), bool),
        np.zeros((4, 4, 3), object),
        np.zeros((4, 4), "U3"),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=lambda values: f"{values.dtype}{list(values.shape)}",
)
def test_arrays_of_other_shapes_or_types_are_refused(values: Any) -> None:
    with pytest.raises(UsageError, match="expected uint8 of height x width"):
        open_picture(values)


def test_arrays_may_be_views() -> None:
    colours = noise(20, 12, 3)
    for view in (colours[::-2, 3::2], colours[..., ::-1], np.asfortranarray(colours)):
        assert np.array_equal(np.asarray(open_picture(view)), view)
    read_only = colours.copy()
    read_only.flags.writeable = False
    assert np.array_equal(np.asarray(open_picture(read_only)), colours)


def test_long_names_are_cut_short() -> None:
    assert len(refusal("x/" * 2000)) < 1200


@pytest.mark.parametrize("size", [(1, 1), (224, 224), (500, 3), (3, 500), (640, 480)])
def test_pixel_values_are_three_squares_between_minus_one_and_one(size: tuple[int, int]) -> None:
    found = pixel_values(
        Image.fromarray(noise(*size, 3).reshape(size[1], size[0], 3)), preprocessor(56)
    )
    assert (found.shape, found.dtype) == ((3, 56, 56), np.float32)
    assert found.flags.c_contiguous
    assert -1 <= found.min() <= found.max() <= 1


def test_every_colour_is_scaled_to_the_last_bit() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = pixel_values(Image.fromarray(np.dstack([ramp] * 3)), preprocessor(16))
    exact = ramp.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(found, np.stack([exact] * 3))


def test_each_colour_has_its_own_mean_and_deviation() -> None:
    p = Preprocessor(2, 2, (0.0, 0.5, 1.0), (1.0, 0.5, 2.0), 1 / 255, 3)
    found = pixel_values(Image.new("RGB", (2, 2), (255, 255, 255)), p)
    assert found[:, 0, 0].tolist() == [1.0, 1.0, 0.0]


def test_the_filter_of_the_file_is_used() -> None:
    picture = Image.fromarray(noise(50, 70, 3))
    found = [pixel_values(picture, preprocessor(32, resample)) for resample in range(6)]
    for i, values in enumerate(found):
        resized = np.asarray(picture.resize((32, 32), Image.Resampling(i))).transpose(2, 0, 1)
        assert np.array_equal(np.rint(values * 127.5 + 127.5), resized)


def written(folder: Path, changes: dict[str, Any]) -> Path:
    values = PUBLISHED | changes
    kept = {key: value for key, value in values.items() if value is not ...}
    (folder / "preprocessor_config.json").write_text(json.dumps(kept))
    return folder


def test_the_published_file_is_read(tmp_path: Path) -> None:
    found = read_preprocessor(written(tmp_path, {}), parse_config(paligemma(224)))
    assert found == Preprocessor(224, 224, HALF, HALF, 0.00392156862745098, 3)


def test_a_size_may_be_one_number(tmp_path: Path) -> None:
    found = read_preprocessor(written(tmp_path, {"size": 448}), parse_config(paligemma(448)))
    assert (found.height, found.width) == (448, 448)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": {"height": 448, "width": 448}}, "size is 448 x 448, expected 224 x 224"),
        ({"size": {"height": 224, "width": 225}}, "size is 224 x 225, expected 224 x 224"),
        ({"size": {"shortest_edge": 224}}, "size.shortest_edge is 224, expected"),
        ({"size": {"height": 224}}, "size.width is absent, expected a whole number"),
        ({"size": "224"}, 'size is "224", expected a whole number'),
        ({"size": ...}, "size is absent, expected a whole number"),
        ({"size": -1}, "size is -1, expected a whole number"),
        ({"do_resize": False}, "do_resize is false, expected true"),
        ({"do_rescale": False}, "do_rescale is false, expected true"),
        ({"do_normalize": 0}, "do_normalize is 0, expected true"),
        ({"do_center_crop": True}, "do_center_crop is true, expected false"),
        ({"resample": 6}, "resample is 6, expected a filter of Pillow from 0 to 5"),
        ({"resample": "bicubic"}, 'resample is "bicubic", expected a filter'),
        ({"resample": True}, "resample is true, expected a filter"),
        ({"resample": [3]}, "resample is [3], expected a filter"),
        ({"image_mean": 0.5}, "image_mean is 0.5, expected three numbers"),
        ({"image_mean": [0.5] * 4}, "expected three numbers"),
        ({"image_mean": [0.5, 0.5, "x"]}, "expected three numbers"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "expected three numbers"),
        ({"image_mean": ...}, "image_mean is absent, expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "expected three numbers above 0"),
        ({"image_std": [0.5, 0.5, -1]}, "expected three numbers above 0"),
        ({"image_std": [0.5, 0.5, float("inf")]}, "expected three numbers above 0"),
        ({"rescale_factor": 0}, "rescale_factor is 0, expected a finite number above 0"),
        ({"rescale_factor": "1/255"}, "expected a finite number above 0"),
    ],
    ids=str,
)
def test_steps_that_npvlm_does_not_take_are_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(NpvlmError) as caught:
        read_preprocessor(written(tmp_path, changes), parse_config(paligemma(224)))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'preprocessor_config.json'}: ")
    assert says in said
    assert "\n" not in said


def test_what_is_not_said_of_scale_and_filter_is_what_was_published(tmp_path: Path) -> None:
    absent = written(tmp_path, {"rescale_factor": ..., "resample": ...})
    found = read_preprocessor(absent, parse_config(paligemma(224)))
    assert (found.rescale_factor, found.resample) == (1 / 255, 3)


def test_the_file_that_newer_releases_save_is_read_where_it_is_alone(tmp_path: Path) -> None:
    config = parse_config(paligemma(224))
    published = read_preprocessor(written(tmp_path, {}), config)
    path = tmp_path / "preprocessor_config.json"
    inner = json.loads(path.read_text())
    newer = {"image_processor": inner, "processor_class": "PaliGemmaProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer | {"image_processor": 5}))
    assert read_preprocessor(tmp_path, config) == published
    path.unlink()
    with pytest.raises(NpvlmError, match="image_processor is 5"):
        read_preprocessor(tmp_path, config)
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    assert read_preprocessor(tmp_path, config) == published


def test_a_missing_preprocessor_file_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(NpvlmError, match=r"preprocessor_config\.json is missing"):
        read_preprocessor(tmp_path, parse_config(paligemma(224)))
