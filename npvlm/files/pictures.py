"""Pictures from files to the numbers that the image tower reads.

Axis letters: R height and width after resizing.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError  # noqa: F401 (see _OPENING)

from npvlm.config import Config, Fields, Values, read_json
from npvlm.errors import NpvlmError, UsageError, shortened, why

Picture = str | Path | bytes | BinaryIO | Image.Image | NDArray[np.uint8]

# What is opened: Pillow decodes each of these itself. Its reader of EPS runs another program.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX"),
    *("PNG", "PPM", "PSD", "SGI", "TGA", "TIFF", "WEBP"),
)
MOST_BYTES = 2**29  # of a file: more than any picture of that many pixels needs
MOST_PIXELS, MOST_SIDE = 2**27, 2**20
_HUNGRY = ("AVIF", "JPEG2000", "WEBP")  # whose decoders take twice the memory of others
_STEPS, _SCANS = 10**6, 200  # of reading one file, and of one JPEG: far more than any needs
_SCAN = b"\xff\xda"
_LONGEST = 1024  # characters of a name that are said
_TILE = 2048  # pixels of a side that are converted at once

# Filters of warnings belong to all threads. No child may find it held by a thread that it has not,
# nor a module that such a thread imports: readers are imported with the lock, ImageFile above.
_OPENING = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_OPENING.acquire,
        after_in_parent=_OPENING.release,
        after_in_child=_OPENING.release,
    )
_FILTERS = range(6)  # nearest, Lanczos, bilinear, bicubic, box, Hamming: the same in all releases
_CLEAR_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_WHITE = (255, 255, 255, 255)
_DEEPEST = 65535  # the largest value of 16 bits
_ORIENTATION = 0x0112  # of the camera, in EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Preprocessor:
    """How preprocessor_config.json has pictures resized and scaled."""

    height: int
    width: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float
    resample: int


def open_picture(source: Picture, draft: int | None = None) -> Image.Image:
    """Read a picture as people see it: upright, on white where it is transparent, 8 bits a colour.

    Of an animation or several pages, the first. A file may be hostile: it is read whole, in a
    bounded number of steps, by readers that run no other program, and unpacked only if its size is
    within bounds.

    Parameters
    ----------
    source : str, Path, bytes, binary stream, PIL image or uint8 array
        A file in one of FORMATS, its content, or what Pillow made of one; an array is [H, W],
        [H, W, 3] or [H, W, 4]: red, green, blue, opacity.
    draft : int, optional
        A JPEG may come in the smallest size that its decoder makes at once and whose sides are no
        shorter than this.

    Returns
    -------
    PIL image of mode RGB

    Raises
    ------
    NpvlmError
        No such file, no picture, a damaged or an absurdly large one.
    """
    said = _said(source)
    try:
        with _OPENING, warnings.catch_warnings():
            # Pillow warns of what it reads all the same, and of half the size that it refuses.
            warnings.simplefilter("ignore")
            if isinstance(source, np.ndarray):
                return to_rgb(_from_array(source), said)
            if isinstance(source, Image.Image):
                rgb, orientation = _decoded(source, said)
            else:
                rgb, orientation = _unpacked(_Content(_bytes_of(source, said)), said, draft)
            turn = _UPRIGHT.get(orientation)
            return rgb if turn is None else rgb.transpose(turn)
    except NpvlmError:
        raise
    except UnidentifiedImageError:
        raise NpvlmError(
            f"{said} is no picture of a kind that npvlm reads; give a PNG or JPEG"
        ) from None
    except Image.DecompressionBombError:
        most = MOST_PIXELS // 10**6
        raise NpvlmError(
            f"{said} has more than {most} million pixels, expected a picture; make it smaller"
        ) from None
    except MemoryError:
        raise NpvlmError(f"{said} does not fit into memory; make it smaller") from None
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        raise NpvlmError(
            f"{said} cannot be read as a picture ({why(error)}); is it damaged?"
        ) from None


def read_bounded(file: BinaryIO, said: str) -> bytes:
    """All that a file or a stream holds; one that never ends is refused.

    Raises
    ------
    NpvlmError
        It holds more than MOST_BYTES.
    """
    parts, count = [], 0
    while part := file.read(2**20):
        parts.append(part)
        count += len(part)
        if count > MOST_BYTES:
            raise NpvlmError(
                f"{said} has more than {MOST_BYTES // 10**6} million bytes, expected a picture; "
                "make it smaller"
            )
    return b"".join(parts)


def said_name(name: str | Path) -> str:
    """A name as errors say it: on one line, and short enough to read."""
    return shortened(name, _LONGEST)


def to_rgb(picture: Image.Image, said: str = "the picture") -> Image.Image:
    """Turn any picture into 8-bit RGB: transparency shows white, 16 bits are scaled down.

    Pillow's own conversion of 16-bit greys cuts at 255 instead, which leaves them nearly white.

    Raises
    ------
    NpvlmError
        The picture holds numbers whose range is not known.
    """
    if picture.mode == "F":
        raise NpvlmError(f"{said} holds fractions, expected a picture of 8 or 16 bits a colour")
    clear = picture.mode in _CLEAR_MODES or picture.info.get("transparency") is not None
    if not clear and not picture.mode.startswith("I"):
        return picture.convert("RGB")
    rgb = Image.new("RGB", picture.size)  # by tiles: all steps at once would take much memory
    for top in range(0, picture.height, _TILE):
        for left in range(0, picture.width, _TILE):
            right, bottom = min(left + _TILE, picture.width), min(top + _TILE, picture.height)
            tile = picture.crop((left, top, right, bottom))
            rgb.paste(_tile_to_rgb(tile, said), (left, top))
    return rgb


def pixel_values(picture: Image.Image, preprocessor: Preprocessor) -> NDArray[np.float32]:
    """Resize a picture to the square that the tower reads and scale its colours around zero.

    Parameters
    ----------
    picture : PIL image of mode RGB
        As open_picture returns it.
    preprocessor : Preprocessor

    Returns
    -------
    float32 [3, R, R]
    """
    return scale_colours(resize(picture, preprocessor), preprocessor)


def resize(picture: Image.Image, preprocessor: Preprocessor) -> NDArray[np.uint8]:
    """Squeeze a picture to the square that the tower reads; its aspect ratio is not kept.

    A picture of mode RGB -> [R, R, 3]
    """
    p = preprocessor
    return np.asarray(picture.resize((p.width, p.height), Image.Resampling(p.resample)))


def scale_colours(resized: NDArray[np.uint8], preprocessor: Preprocessor) -> NDArray[np.float32]:
    """Scale 8-bit colours around zero, channels first.

    The order of the roundings is transformers': rescaled in float64, then everything in float32.

    resized [R, R, 3] -> [3, R, R]
    """
    p = preprocessor
    scaled = (resized.astype(np.float64) * p.rescale_factor).astype(np.float32)
    mean, std = np.array(p.image_mean, np.float32), np.array(p.image_std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def read_preprocessor(folder: Path, config: Config) -> Preprocessor:
    """Read how a model wants its pictures.

    Parameters
    ----------
    folder : Path
        Holds preprocessor_config.json as published, or processor_config.json as newer releases
        of transformers save it, which has the same fields under image_processor.
    config : Config
        Its image_size must be the one that the file asks for.

    Returns
    -------
    Preprocessor

    Raises
    ------
    NpvlmError
        No such file, or a step in it that npvlm does not take.
    """
    path, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    where, values = f"{path}: ", None
    if newer.is_file() and not path.exists():
        path, where = newer, f"{newer}: image_processor."
        values = Fields(read_json(newer), f"{newer}: ").part("image_processor", {})
    return parse_preprocessor(values or read_json(path), where, config)


def parse_preprocessor(values: Values, where: str, config: Config) -> Preprocessor:
    """Make sense of the contents of preprocessor_config.json.

    where : what messages begin with, "FILE: " or the path of a part in it
    """
    fields = Fields(values, where, {"rescale_factor": 1 / 255, "resample": 3})
    for step in ("do_resize", "do_rescale", "do_normalize"):
        fields.one_of(step, (True,), "npvlm resizes, rescales and normalizes every picture")
    for step in ("do_center_crop", "do_pad"):
        fields.one_of(step, (False,), "npvlm shows the model the whole picture")

    height, width = _size(fields)
    image_size = config.vision_config.image_size
    if (height, width) != (image_size, image_size):
        raise NpvlmError(
            f"{where}size is {height} x {width}, expected {image_size} x {image_size}, "
            "the image_size of config.json; are the files of two models mixed?"
        )
    resample = fields.get("resample")
    if type(resample) is not int or resample not in _FILTERS:
        raise fields.wrong("resample", f"a filter of Pillow from 0 to {max(_FILTERS)}")
    return Preprocessor(
        height=height,
        width=width,
        image_mean=_colours(fields, "image_mean"),
        image_std=_colours(fields, "image_std"),
        rescale_factor=fields.positive("rescale_factor"),
        resample=resample,
    )


class _Content(io.BytesIO):
    """What a file holds, for readers that may be led to read it without end."""

    steps = scans = 0
    is_jpeg = False

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.steps += 1
        if self.is_jpeg:  # each scan may be a few bytes, and goes over the whole picture
            self.scans += content.count(_SCAN)
        if self.steps > _STEPS or self.scans > _SCANS:
            raise OSError("it takes more steps to read than any picture")
        return content


def _said(source: Picture) -> str:
    """How errors call a picture."""
    if isinstance(source, str | Path):
        return said_name(source)
    name = str(getattr(source, "filename", "") or getattr(source, "name", ""))
    return said_name(name or "the picture")


def _bytes_of(source: str | Path | bytes | BinaryIO, said: str) -> bytes:
    """What a file or a stream holds."""
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path):
        with contextlib.suppress(OSError, AttributeError):  # not all can be rewound
            source.seek(0)
        return read_bounded(source, said)
    if source == "":
        raise NpvlmError("a picture's name is empty, expected the path of a file")
    _check_file(Path(source), said)
    try:
        # A pipe that has taken the file's place by now is not waited for.
        with open(source, "rb", opener=_open_at_once) as file:
            content = read_bounded(file, said)
    except OSError as error:
        raise NpvlmError(f"{said} cannot be opened: {error.strerror}") from None
    if not content:
        raise NpvlmError(f"{said} is empty, expected a picture")
    return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unpacked(content: _Content, said: str, draft: int | None) -> tuple[Image.Image, int]:
    """What a file shows as 8-bit RGB, as it is stored, and the note on how the camera was held."""
    with Image.open(content, formats=FORMATS) as picture:
        _check_size(picture, said)
        if draft is not None:
            picture.draft("RGB", (draft, draft))
        content.is_jpeg = picture.format in ("JPEG", "MPO")
        content.steps -= 2 * picture.width * picture.height  # some are read pixel by pixel
        picture.load()
        _check_size(picture, said)  # some readers find out only now
        return _decoded(picture, said)


def _decoded(picture: Image.Image, said: str) -> tuple[Image.Image, int]:
    """A picture as 8-bit RGB, as it is stored, and the note on how the camera was held."""
    if picture.format == "EPS":
        raise NpvlmError(f"{said} is an EPS, which is a program; give a PNG or JPEG")
    if not (picture.width and picture.height):
        raise NpvlmError(f"{said} is {picture.width} x {picture.height} pixels; is it one?")
    rgb = to_rgb(picture, said)
    try:
        return rgb, int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged note turns nothing
        return rgb, 1


def _check_size(picture: Image.Image, said: str) -> None:
    """Refuse a picture that takes too much memory, before it is unpacked."""
    most = MOST_PIXELS // 2 if picture.format in _HUNGRY else MOST_PIXELS
    if picture.width * picture.height > most or max(picture.size) > MOST_SIDE:
        raise NpvlmError(
            f"{said} is {picture.width} x {picture.height} pixels, expected at most "
            f"{most // 10**6} million and {MOST_SIDE:,} on a side; make it smaller"
        )


def _from_array(values: NDArray[np.uint8]) -> Image.Image:
    """Take an array as a picture, if it is one."""
    shaped = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if values.dtype != np.uint8 or not values.size or not shaped:
        raise UsageError(
            f"the array is {values.dtype} {list(values.shape)}, expected uint8 of height x width, "
            "perhaps x 3 or x 4 colours"
        )
    return Image.fromarray(values)


def _check_file(path: Path, said: str) -> None:
    """Refuse what is no file before it is opened: opening a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if any(mark in said for mark in "*?["):
            reason += "; does no file match the pattern?"
        raise NpvlmError(f"{said} cannot be opened: {reason}") from None
    if stat.S_ISDIR(mode) and not os.access(path, os.R_OK | os.X_OK):
        raise NpvlmError(f"{said} is a folder that may not be read")
    if stat.S_ISDIR(mode):
        raise NpvlmError(f"{said} is a folder, expected a picture")
    if not stat.S_ISREG(mode):
        raise NpvlmError(f"{said} is no regular file, expected a picture")


def _tile_to_rgb(tile: Image.Image, said: str) -> Image.Image:
    """A part of a picture that is deep or clear somewhere."""
    if tile.mode.startswith("I"):
        tile = _scale_down(tile, said)
    if tile.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        tile = tile.convert("LA" if tile.mode == "La" else "RGBA")
    if tile.mode not in _CLEAR_MODES and tile.info.get("transparency") is None:
        return tile.convert("RGB")
    ground = Image.new("RGBA", tile.size, _WHITE)
    return Image.alpha_composite(ground, tile.convert("RGBA")).convert("RGB")


def _scale_down(picture: Image.Image, said: str) -> Image.Image:
    """Scale greys of 16 bits to 8, to the nearest."""
    values = np.asarray(picture).astype(np.int64)
    if not 0 <= values.min() <= values.max() <= _DEEPEST:
        raise NpvlmError(
            f"{said} holds numbers from {values.min()} to {values.max()}, "
            f"expected 0 to {_DEEPEST}; save it with 8 or 16 bits a colour"
        )
    grey = Image.fromarray(((values * 255 + _DEEPEST // 2) // _DEEPEST).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):  # the one grey that stands for nothing
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _size(fields: Fields) -> tuple[int, int]:
    """Read the size that pictures get: a number, or a height and a width."""
    if isinstance(fields.get("size"), dict):
        inner = Fields(fields.get("size"), f"{fields.where}size.")
        for key in ("shortest_edge", "longest_edge", "max_height", "max_width"):
            inner.one_of(key, (), "")
        return inner.whole("height"), inner.whole("width")
    side = fields.whole("size")
    return side, side


def _colours(fields: Fields, key: str) -> tuple[float, float, float]:
    """Read one finite number for each of red, green and blue; those to divide by are above zero."""
    given: Any = fields.get(key)
    least = 0.0 if key == "image_std" else -1e30
    if (
        not isinstance(given, list)
        or len(given) != 3
        or any(type(c) not in (int, float) or not least < c <= 1e30 for c in given)
    ):
        above = " above 0" if key == "image_std" else ""
        raise fields.wrong(key, f"three numbers{above}, for red, green and blue")
    red, green, blue = given
    return float(red), float(green), float(blue)
