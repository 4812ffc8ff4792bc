"""Known mistakes before the model: how a picture is prepared, and how ids are laid out.

Axis letters: R side of the square · h, w height and width of a picture · P image tokens · T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from npvlm.files.pictures import scale_colours
from npvlm.model.weights import Array
from npvlm.porting.suspects_case import Case, Guess, Suspect

Colours = tuple[float, float, float]
Filter = Callable[[Array, int, int], Array]

FILLS = (0.0, 127.0, 127.5, 128.0, 255.0)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROUNDED = 0.01  # relative: what a resizing that is right may differ by, a level or two of 255
EQUAL = 1e-4  # relative: the same where neither rounds to levels


# Resizing: each takes a picture [h, w, 3], and gives one of the height and width asked for.


def pillow(number: int) -> Filter:
    """One of Pillow's own filters, which smooth what they make smaller."""

    def resized(rgb: Array, height: int, width: int) -> Array:
        picture = Image.fromarray(rgb.astype(np.uint8))
        return np.asarray(picture.resize((width, height), Image.Resampling(number)))

    return resized


def floored(rgb: Array, height: int, width: int) -> Array:
    """The nearest pixel towards the corner, not towards the middle of the new one."""
    h, w = rgb.shape[:2]
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    return rgb[rows[:, None], columns]


def sampled(kernel: Callable[[Array], Array]) -> Filter:
    """A filter as wide as the old pixels, however small the picture becomes: not smoothed."""

    def resized(rgb: Array, height: int, width: int) -> Array:
        x = rgb.astype(np.float64)
        for axis, count in enumerate((height, width)):
            side = x.shape[axis]
            centre = (np.arange(count) + 0.5) * side / count - 0.5
            first = np.floor(centre).astype(np.int64) - 1
            total = np.zeros((*x.shape[:axis], count, *x.shape[axis + 1 :]))
            for tap in range(4):
                place = first + tap
                weight = kernel(centre - place).reshape(-1, *[1] * (x.ndim - axis - 1))
                total += np.take(x, np.clip(place, 0, side - 1), axis) * weight
            x = total
        return np.clip(x, 0, 255)

    return resized


def linear_kernel(x: Array) -> Array:
    return np.maximum(0, 1 - np.abs(x))


def cubic_kernel(a: float) -> Callable[[Array], Array]:
    """The cubic that passes through the pixels, with slope a at distance one."""

    def kernel(x: Array) -> Array:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    return kernel


def unrounded(rgb: Array, height: int, width: int) -> Array:
    """Pillow's bicubic in floating point: nothing is rounded to 8 bits between or after."""
    colours = [Image.fromarray(rgb[..., i].astype(np.float32)) for i in range(rgb.shape[-1])]
    made = [colour.resize((width, height), Image.Resampling.BICUBIC) for colour in colours]
    return np.clip(np.stack([np.asarray(colour) for colour in made], axis=-1), 0, 255)


NEAREST = {"of Pillow": pillow(0), "rounded down": floored}
BILINEAR = {"of Pillow": pillow(2)}
LANCZOS = {"of Pillow": pillow(1)}
UNROUNDED = {
    "": unrounded,
    "rounded once, at the end": lambda *args: np.rint(unrounded(*args)),
    "cut off to whole numbers": lambda *args: np.floor(unrounded(*args)),
}
OTHER_FILTERS = {"box, a mean of areas": pillow(4), "Hamming": pillow(5)}
UNSMOOTHED = {
    "bicubic, a = -0.5": sampled(cubic_kernel(-0.5)),
    "bicubic, a = -0.75": sampled(cubic_kernel(-0.75)),
    "bilinear": sampled(linear_kernel),
}
FILTERS = {
    "bicubic": pillow(3),
    "bilinear": pillow(2),
    "nearest": pillow(0),
    "Lanczos": pillow(1),
    **{f"{name}, without antialias": f for name, f in UNSMOOTHED.items()},
}


def by_filter(filters: Mapping[str, Filter]) -> Callable[[Case], Iterator[Guess]]:
    """Guesses of another filter."""

    def guesses(c: Case) -> Iterator[Guess]:
        rgb, p = picture(c), c.context.preprocessor
        if rgb is not None:
            for name, resized in filters.items():
                yield name, shown(c, resized(rgb, p.height, p.width))

    return guesses


def centre_crop(c: Case) -> Iterator[Guess]:
    rgb, p = picture(c), c.context.preprocessor
    if rgb is None:
        return
    (h, w), R = rgb.shape[:2], p.width
    side = min(h, w)
    for name, resized in FILTERS.items():
        top, left = (h - side) // 2, (w - side) // 2
        yield name, shown(c, resized(rgb[top : top + side, left : left + side], R, R))
        for rounded in (math.floor, round):
            height, width = (max(R, rounded(a * R / side)) for a in (h, w))
            top, left = (height - R) // 2, (width - R) // 2
            whole = resized(rgb, height, width)
            yield f"{name}, then cut", shown(c, whole[top : top + R, left : left + R])


def letterbox(c: Case) -> Iterator[Guess]:
    rgb, p = picture(c), c.context.preprocessor
    if rgb is None:
        return
    (h, w), R = rgb.shape[:2], p.width
    for name, resized in FILTERS.items():
        for rounded in (math.floor, round):
            height, width = (max(1, rounded(a * R / max(h, w))) for a in (h, w))
            small = resized(rgb, height, width)
            for top, left in ((0, 0), ((R - height) // 2, (R - width) // 2)):
                for fill in FILLS:
                    square = np.full((R, R, 3), fill)
                    square[top : top + height, left : left + width] = small
                    yield f"{name}, {fill:g} around it", shown(c, square)


def bgr(c: Case) -> Iterator[Guess]:
    return turned(c, lambda x: x[..., ::-1])


def transposed_picture(c: Case) -> Iterator[Guess]:
    return turned(c, lambda x: x.swapaxes(0, 1))


def flipped_picture(c: Case) -> Iterator[Guess]:
    yield from turned(c, lambda x: x[:, ::-1], "left is right")
    yield from turned(c, lambda x: x[::-1], "it hangs upside down")
    yield from turned(c, lambda x: x[::-1, ::-1], "it is turned by half a circle")


def turned(c: Case, change: Callable[[Array], Array], detail: str = "") -> Iterator[Guess]:
    """Guesses of a picture whose pixels stand elsewhere: before resizing, or after it."""
    rgb, resized, p = picture(c), square(c), c.context.preprocessor
    if c.stage == "image.rgb":
        yield detail, None if rgb is None else change(rgb)
        return
    if resized is not None:
        yield detail, shown(c, change(resized))
    if rgb is not None:
        yield detail, shown(c, pillow(p.resample)(change(rgb), p.height, p.width))


def range_0_1(c: Case) -> Iterator[Guess]:
    return coloured(c, {"": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))})


def range_other(c: Case) -> Iterator[Guess]:
    """Means and deviations of colours from 0 to 1."""
    level = 1 / 255
    return coloured(
        c,
        {
            "0 to 255": ((0.0,) * 3, (level,) * 3),
            "-127.5 to 127.5": ((0.5,) * 3, (level,) * 3),
            "-128 to 127": ((128 * level,) * 3, (level,) * 3),
            "divided by 128, not 127.5": ((0.5,) * 3, (128 * level,) * 3),
            "divided by 128, less 1": ((128 * level,) * 3, (128 * level,) * 3),
            "-0.5 to 0.5": ((0.5,) * 3, (1.0,) * 3),
        },
    )


def imagenet_norm(c: Case) -> Iterator[Guess]:
    return coloured(c, {"ImageNet's": IMAGENET, "CLIP's": CLIP})


def coloured(c: Case, known: dict[str, tuple[Colours, Colours]]) -> Iterator[Guess]:
    """Guesses of another mean and another deviation."""
    resized = square(c)
    if resized is not None and c.stage != "image.resized":
        for name, (mean, std) in known.items():
            p = replace(c.context.preprocessor, image_mean=mean, image_std=std)
            yield name, read_by_tower(c, scale_colours(resized, p))


def channels_last(c: Case) -> Iterator[Guess]:
    """The numbers of pixel_values read as if the channels were behind, or stored so."""
    resized = square(c)
    if resized is not None and c.stage != "image.resized":
        pixels = scale_colours(resized, c.context.preprocessor)
        yield "of pixel_values", read_by_tower(c, pixels.transpose(1, 2, 0).reshape(pixels.shape))


def picture(c: Case) -> Array | None:
    """The picture as it came [h, w, 3]."""
    return c.given.get("image.rgb", c.context.reference("image.rgb"))


def square(c: Case) -> Array | None:
    """The picture resized as it should be [R, R, 3]."""
    rgb, p = picture(c), c.context.preprocessor
    known = c.given.get("image.resized", c.context.reference("image.resized"))
    if known is not None or rgb is None:
        return known
    return pillow(p.resample)(rgb, p.height, p.width)


def shown(c: Case, resized: Array) -> Array | None:
    """What the stage of a case becomes of a resized picture [R, R, 3]."""
    if c.stage == "image.resized":
        return resized
    return read_by_tower(c, scale_colours(resized, c.context.preprocessor))


def read_by_tower(c: Case, pixels: Array) -> Array | None:
    """What the stage of a case becomes of pixel values [3, R, R]."""
    if c.stage == "pixel_values":
        return pixels
    return c.run(given={"pixel_values": pixels[None]}) if c.stage != "image.rgb" else None


# Ids: those of the reference are image tokens, <bos>, prompt, newline.


def bos_missing(c: Case) -> Iterator[Guess]:
    for image, _, text, newline in laid_out(c):
        yield "", embedded(c, image, text, newline)


def bos_first(c: Case) -> Iterator[Guess]:
    for image, bos, text, newline in laid_out(c):
        yield "", embedded(c, bos, image, text, newline)
        yield "and once more behind the picture", embedded(c, bos, image, bos, text, newline)


def newline_missing(c: Case) -> Iterator[Guess]:
    for image, bos, text, _ in laid_out(c):
        yield "", embedded(c, image, bos, text)


def newline_twice(c: Case) -> Iterator[Guess]:
    for image, bos, text, newline in laid_out(c):
        yield "", embedded(c, image, bos, text, newline, newline)
        yield "the token of two newlines", embedded(c, image, bos, text, newline + 1)


def image_tokens_short(c: Case) -> Iterator[Guess]:
    for image, bos, text, newline in laid_out(c):
        count = int((c.mine == image[0]).sum())
        if c.stage == "input_ids" and count < len(image):
            found = f"{count} instead of {len(image)}"
            yield found, embedded(c, image[:count], bos, text, newline)


def image_after_text(c: Case) -> Iterator[Guess]:
    for image, bos, text, newline in laid_out(c):
        yield "", embedded(c, bos, text, newline, image)
        yield "before the newline", embedded(c, bos, text, image, newline)


def laid_out(c: Case) -> Iterator[tuple[Array, Array, Array, Array]]:
    """The ids as they should be: picture, <bos>, prompt, newline; nothing where none are known."""
    ids = c.given.get("input_ids", c.context.reference("input_ids"))
    if ids is not None and c.context.step == 0:
        P = int((ids == c.config.image_token_index).sum())
        if 0 < P < len(ids) - 1:
            yield ids[:P], ids[P : P + 1], ids[P + 1 : -1], ids[-1:]


def embedded(c: Case, *pieces: Array) -> Array | None:
    """What the stage of a case becomes of these ids."""
    ids = np.concatenate(pieces)
    if c.stage == "input_ids":
        return ids
    return c.run(given={"input_ids": ids}) if c.stage == "inputs_embeds" else None


def positions_restart(c: Case) -> Iterator[Guess]:
    T, P = c.tokens, c.patches
    for first in (0, 1):
        places = np.concatenate([np.arange(P) + first, np.arange(T - P) + first])
        yield f"from {first} again", moved(c, places)
    yield "the whole picture has one", moved(c, np.maximum(np.arange(T) - P + 2, 1))


def rope_shift(c: Case) -> Iterator[Guess]:
    T, P = c.tokens, c.patches
    if c.context.step == 0:
        for by in (1, -1, 2, -2):
            places = np.arange(T) + 1 + by * (np.arange(T) >= P)
            yield f"the prompt's by {by:+}", moved(c, places)
    right = c.rows
    if right is not None and c.stage.endswith(("positions", "q_rope", "k_rope")):
        for by in (1, -1, 2, -2) if c.context.step else (1, 2, -2):  # a prefill may count from 0
            what = {"q_rope": "of queries ", "k_rope": "of keys "}.get(c.stage[-6:], "")
            yield f"all {what}by {by:+}", moved(c, right.positions + by)
    if c.stage.endswith("attend"):
        for by in (1, -1):
            yield f"queries by {by:+} against the keys", c.run(attend=apart(c, by))


def apart(c: Case, by: int) -> Callable[..., Array]:
    """Attention whose queries, those of the decoder, are turned a little further than its keys."""
    text = c.config.text_config

    def attend(q: Array, *rest: Array) -> Array:
        if q.shape[1:] == (text.num_attention_heads, text.head_dim):
            q = c.ops.rope(q, np.full(len(q), by), text.rope_theta)
        mixed: Array = c.ops.attend(q, *rest)
        return mixed

    return attend


def moved(c: Case, places: Array) -> Array | None:
    """What the stage of a case becomes of these positions [T]."""
    if c.stage == "positions":
        return places
    rows = c.rows
    if rows is None or len(rows.positions) != len(places):
        return None
    return c.run(rows=replace(rows, positions=places))


PIXELS = ("image.resized", "pixel_values")
ROTATED = ("positions", "language_model.*_rope", "language_model.*.attend")

INPUT_SUSPECTS = (
    Suspect(
        "bilinear",
        PIXELS,
        "the picture is resized with a bilinear filter: PaliGemma's is bicubic",
        by_filter(BILINEAR),
        ROUNDED,
    ),
    Suspect(
        "nearest",
        PIXELS,
        "the picture is resized by taking the nearest pixels: PaliGemma's filter is bicubic",
        by_filter(NEAREST),
        ROUNDED,
    ),
    Suspect(
        "no_antialias",
        PIXELS,
        "the picture is resized without antialias: what is made smaller has to be smoothed first, "
        "as Pillow does",
        by_filter(UNSMOOTHED),
        ROUNDED,
    ),
    Suspect(
        "lanczos",
        PIXELS,
        "the picture is resized with a Lanczos filter: PaliGemma's is bicubic",
        by_filter(LANCZOS),
        ROUNDED,
    ),
    Suspect(
        "other_filter",
        PIXELS,
        "the picture is resized with another filter: PaliGemma's is bicubic",
        by_filter(OTHER_FILTERS),
        ROUNDED,
    ),
    Suspect(
        "not_rounded",
        PIXELS,
        "the picture is resized in floating point: Pillow rounds to 8 bits after each direction",
        by_filter(UNROUNDED),
        EQUAL,
    ),
    Suspect(
        "centre_crop",
        PIXELS,
        "only the middle of the picture is taken: PaliGemma squeezes the whole picture to the "
        "square",
        centre_crop,
        ROUNDED,
    ),
    Suspect(
        "letterbox",
        PIXELS,
        "the picture keeps its aspect and gets bars: PaliGemma squeezes it to the square",
        letterbox,
        ROUNDED,
    ),
    Suspect(
        "bgr",
        ("image.rgb", *PIXELS),
        "the colours are blue, green, red: PaliGemma reads red, green, blue",
        bgr,
        ROUNDED,
    ),
    Suspect(
        "range_0_1",
        ("pixel_values",),
        "colours run from 0 to 1: PaliGemma's run from -1 to 1",
        range_0_1,
        ROUNDED,
    ),
    Suspect(
        "range_other",
        ("pixel_values",),
        "colours run over another range: PaliGemma's run from -1 to 1",
        range_other,
        ROUNDED,
    ),
    Suspect(
        "imagenet_norm",
        ("pixel_values",),
        "colours have another data set's mean and deviation: PaliGemma's are 0.5 for every colour",
        imagenet_norm,
        ROUNDED,
    ),
    Suspect(
        "transposed_picture",
        ("image.rgb", *PIXELS),
        "rows and columns of the picture are swapped",
        transposed_picture,
        ROUNDED,
    ),
    Suspect(
        "flipped_picture",
        ("image.rgb", *PIXELS),
        "the picture is mirrored",
        flipped_picture,
        ROUNDED,
    ),
    Suspect(
        "conv_hwc",
        ("pixel_values",),
        "channels-last numbers are read as channels first: transpose them, a reshape does not",
        channels_last,
        ROUNDED,
    ),
    Suspect(
        "bos_missing",
        ("input_ids",),
        "there is no <bos>: it belongs between the image tokens and the prompt",
        bos_missing,
    ),
    Suspect(
        "bos_first",
        ("input_ids",),
        "<bos> stands before the picture: it belongs behind the image tokens, once",
        bos_first,
    ),
    Suspect(
        "newline_missing",
        ("input_ids",),
        "the prompt does not end in a newline: PaliGemma was trained with exactly one",
        newline_missing,
    ),
    Suspect(
        "newline_twice",
        ("input_ids",),
        "the prompt ends in two newlines: PaliGemma was trained with exactly one",
        newline_twice,
    ),
    Suspect(
        "image_tokens_short",
        ("input_ids",),
        "there are too few image tokens: one for each patch, (image_size / patch_size) squared",
        image_tokens_short,
    ),
    Suspect(
        "image_after_text",
        ("input_ids",),
        "the picture stands behind the prompt: image tokens come first",
        image_after_text,
    ),
    Suspect(
        "positions_restart",
        ROTATED,
        "positions start anew behind the picture: the prompt goes on counting where the image "
        "tokens end",
        positions_restart,
    ),
    Suspect(
        "rope_shift",
        ROTATED,
        "positions are off: every token is one further than the token before it, and queries "
        "count as keys do",
        rope_shift,
    ),
)
