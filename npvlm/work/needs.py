"""How much memory a model needs at each precision, told from its config alone."""

from __future__ import annotations

import math

from npvlm.config import Config
from npvlm.files.names import expected_shapes
from npvlm.files.packed import packing, part_tensors

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


def working_bytes(config: Config) -> int:
    """About what a run takes beside the weights: one picture, a short prompt, a short answer.

    The keys and values of every token are kept. A layer holds its widest product, the same again
    as the next product reads it, and a few vectors for each token. It is meant to be a little too
    much: `npvlm bench` measured 123 to 161 MB for a PaliGemma 3B at 224 px, which is 169 here, and
    430 MB for a PaliGemma 2 3B at 448 px, 472 here. Compiling the kernels, once on a machine, takes
    about 150 MB more.
    """
    text, vision = config.text_config, config.vision_config
    tokens = vision.num_patches + TEXT
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    decoder = tokens * (2 * text.intermediate_size + 6 * text.hidden_size)
    tower = vision.num_patches * (3 * vision.intermediate_size + 6 * vision.hidden_size)
    return PROCESS + 4 * (tokens * kept + max(decoder, tower))
