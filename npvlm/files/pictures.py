"""Pictures from files to the numbers that the image tower reads.

Axis letters: R height and width after resizing.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from npvlm.config import Config, Fields, read_json
from npvlm.errors import NpvlmError, UsageError

Picture = str | Path | bytes | BinaryIO | Image.Image | NDArray[np.uint8]

_OPENING = threading.Lock()  # filters of warnings belong to all threads
if hasattr(os, "register_at_fork"):  # no child may find it held by a thread that it has not
    os.register_at_fork(
        before=_OPENING.acquire,
        after_in_parent=_OPENING.release,
        after_in_child=_OPENING.release,
    )
_FILTERS = range(6)  # nearest, Lanczos, bilinear, bicubic, box, Hamming: the same in all releases
_CLEAR_MODES = ("RGBA", "LA", "PA")
_WHITE = (255, 255, 255, 255)
_DEEPEST = 65535  # the largest value of 16 bits


@dataclass(frozen=True)
class Preprocessor:
    """How preprocessor_config.json has pictures resized and scaled."""

    height: int
    width: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float
    resample: int


def open_picture(source: Picture) -> Image.Image:
    """Read a picture as people see it: upright, on white where it is transparent, 8 bits a colour.

    Of an animation, the first frame.

    Parameters
    ----------
    source : str, Path, bytes, binary stream, PIL image or uint8 array
        A file that Pillow reads, its content, or what it made of one; an array is [H, W], [H, W, 3]
        or [H, W, 4]: red, green, blue, opacity.

    Returns
    -------
    PIL image of mode RGB

    Raises
    ------
    NpvlmError
        No such file, no picture, a damaged or an absurdly large one.
    """
    if isinstance(source, str) and not source:
        raise NpvlmError("a picture's name is empty, expected the path of a file")
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if isinstance(source, str | Path):
        said = str(source) if str(source).isprintable() else ascii(str(source))
        _check_file(Path(source), said)
    else:
        said = str(getattr(source, "filename", "") or getattr(source, "name", "") or "the picture")
    try:
        with _OPENING, warnings.catch_warnings():
            # Pillow warns of what it reads all the same, and of half the size that it refuses.
            warnings.simplefilter("ignore")
            if isinstance(source, Image.Image):
                if not (source.width and source.height):
                    raise NpvlmError(
                        f"{said} is {source.width} x {source.height} pixels; is it one?"
                    )
                return to_rgb(_upright(source), said)
            with Image.open(source) as picture:
                picture.load()
                return to_rgb(_upright(picture), said)
    except NpvlmError:
        raise
    except PermissionError as error:
        raise NpvlmError(f"{said} cannot be opened: {error.strerror}") from None
    except UnidentifiedImageError:
        raise NpvlmError(f"{said} is no picture that Pillow can read; give a PNG or JPEG") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise NpvlmError(
            f"{said} has more than {most} million pixels, expected a picture; make it smaller"
        ) from None
    except MemoryError:
        raise NpvlmError(f"{said} does not fit into memory; make it smaller") from None
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise NpvlmError(f"{said} cannot be read as a picture ({reason}); is it damaged?") from None


def to_rgb(picture: Image.Image, said: str = "the picture") -> Image.Image:
    """Turn any picture into 8-bit RGB: transparency shows white, 16 bits are scaled down.

    Pillow's own conversion of 16-bit greys cuts at 255 instead, which leaves them nearly white.

    Raises
    ------
    NpvlmError
        The picture holds numbers whose range is not known.
    """
    if picture.mode.startswith("I"):
        picture = _scale_down(picture, said)
    if picture.mode == "F":
        raise NpvlmError(f"{said} holds fractions, expected a picture of 8 or 16 bits a colour")
    if picture.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    if picture.mode in _CLEAR_MODES or picture.info.get("transparency") is not None:
        ground = Image.new("RGBA", picture.size, _WHITE)
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture.convert("RGB")


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
    fields = Fields(values or read_json(path), where, {"rescale_factor": 1 / 255, "resample": 3})
    for step in ("do_resize", "do_rescale", "do_normalize"):
        fields.one_of(step, (True,), "npvlm resizes, rescales and normalizes every picture")
    for step in ("do_center_crop", "do_pad"):
        fields.one_of(step, (False,), "npvlm shows the model the whole picture")

    height, width = _size(fields)
    image_size = config.vision_config.image_size
    if (height, width) != (image_size, image_size):
        raise NpvlmError(
            f"{path}: size is {height} x {width}, expected {image_size} x {image_size}, "
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


def _from_array(values: NDArray[np.uint8]) -> Image.Image:
    """Take an array as a picture, if it is one."""
    colours = values.shape[2:]
    if values.dtype != np.uint8 or not values.size or colours not in ((), (3,), (4,)):
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
    if not path.stat().st_size:
        raise NpvlmError(f"{said} is empty, expected a picture")


def _upright(picture: Image.Image) -> Image.Image:
    """Turn a picture as its camera held it; a damaged note about that turns nothing."""
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error, EOFError):
        return picture


def _scale_down(picture: Image.Image, said: str) -> Image.Image:
    """Scale greys of 16 bits to 8, to the nearest."""
    values = np.asarray(picture).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= _DEEPEST:
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
