"""How much memory a model and its calls need, told from the config before anything is made."""

from __future__ import annotations

import math
from collections.abc import Mapping

from npvlm.config import Config
from npvlm.files.big_vision import Turned
from npvlm.files.names import expected_shapes
from npvlm.files.packed import packing, part_tensors, parts_of
from npvlm.model.weights import Adapted, Array, BFloat16, Packed, Weight

_BYTES = {"I8": 1, "U8": 1, "BF16": 2, "F32": 4}

# Bytes that Python, NumPy, numba and the compiled kernels take before any weight is read.
PROCESS = 100_000_000
TEXT = 64  # tokens of a short prompt and its answer


def weight_bytes(config: Config, precision: str, stored: int = 2) -> int:
    """How much the weights take, mapped from a file or packed in memory.

    Parameters
    ----------
    precision : "float32" takes weights as they are stored, the others are as `npvlm convert`
        writes them; a config that is packed already has one precision only
    stored : bytes of each number in the published files: 2 for bfloat16 and float16, 4 for float32
    """
    precision = config.quantization or precision
    number = 2 if precision == "bfloat16" else stored
    total = 0
    for name, shape in expected_shapes(config).items():
        if kind := packing(name, shape, precision):
            parts = part_tensors(name, shape, kind).values()
            total += sum(_BYTES[dtype] * math.prod(size) for dtype, size in parts)
        else:
            total += number * math.prod(shape)
    return total


def made_bytes(weights: Mapping[str, Weight | Turned], precision: str) -> int:
    """What a precision makes in memory of weights as published; the rest stays mapped."""
    total = 0
    for name, weight in weights.items():
        if precision == "bfloat16" and not isinstance(weight, BFloat16):
            total += 2 * math.prod(weight.shape)
        elif kind := packing(name, weight.shape, precision):
            parts = part_tensors(name, weight.shape, kind).values()
            total += sum(_BYTES[dtype] * math.prod(size) for dtype, size in parts)
        elif isinstance(weight, Turned):
            total += weight.nbytes
    return total


def mapped_bytes(weights: Mapping[str, Weight]) -> int:
    """What of opened weights lies in their files alone, and is read from there when it is used."""
    bare = (w.base if isinstance(w, Adapted) else w for w in weights.values())
    arrays = (
        array
        for weight in bare
        for array in (parts_of(weight) if isinstance(weight, Packed) else (_bits(weight),))
    )
    return sum(array.nbytes for array in arrays if not array.flags.owndata)


def _bits(weight: Array | BFloat16) -> Array:
    return weight.bits if isinstance(weight, BFloat16) else weight


def working_bytes(config: Config) -> int:
    """About what a run takes beside the weights: one picture, a short prompt, a short answer.

    It is meant to be a little too much: `npvlm bench` measured 123 to 161 MB for a PaliGemma 3B at
    224 px, which is 176 here, and 430 MB for a PaliGemma 2 3B at 448 px, 495 here. Compiling the
    kernels, once on a machine, takes about 150 MB more.
    """
    tokens = config.vision_config.num_patches + TEXT
    return PROCESS + run_bytes(config, tokens, tokens, pictures=1)


def run_bytes(config: Config, tokens: int, rows: int, pictures: int, scored: int = 1) -> int:
    """About what a call takes: so many tokens read at once, rows of the cache and pictures.

    The keys and values of every row are kept. A layer holds its widest product, the same again as
    the next product reads it, and a few vectors for each token. A picture is scaled in 8 bits and
    then held as float32; each of the `scored` tokens has a score for every entry of the vocabulary,
    twice while it is capped.
    """
    text, vision = config.text_config, config.vision_config
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    queries = text.num_attention_heads * text.head_dim
    decoder = tokens * (2 * text.intermediate_size + 6 * text.hidden_size + 2 * queries)
    patches = pictures * vision.num_patches
    tower = patches * (3 * vision.intermediate_size + 6 * vision.hidden_size)
    pixels = pictures * 2 * vision.num_channels * vision.image_size**2
    return 4 * (rows * kept + max(decoder, tower, 2 * scored * text.vocab_size) + pixels)
