"""A decoder of random weights as a GGUF file, for llama.cpp: the sizes of a Gemma, nothing else.

Axis letters: D hidden_size, F intermediate_size, V vocabulary.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from npvlm.config import TextConfig
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.names import Shapes

_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_F32 = 0
_MAGIC, _VERSION = b"GGUF", 3
_REPEATED = 131_071  # blocks of random weights in a row; a prime, so that no two rows are alike


@dataclass(frozen=True)
class Kind:
    """How GGUF stores a matrix: its number, the weights in a block, and the bytes of a block."""

    name: str
    number: int
    weights: int
    bytes: int


KINDS = {
    "float32": Kind("BF16", 30, 1, 2),
    "bfloat16": Kind("BF16", 30, 1, 2),
    "int8": Kind("Q8_0", 8, 32, 34),
    "int4": Kind("Q4_0", 2, 32, 18),
}


def gguf_bytes(config: TextConfig, kind: Kind) -> int:
    """How large the file will be, but for its header."""
    return sum(_size(shape, kind) for shape in _shapes(config).values())


def write_gguf(path: Path, config: TextConfig, kind: Kind) -> None:
    """Write a decoder of random weights, its embedding table packed as the layers are.

    Raises
    ------
    UsageError
        Where the widths do not fill whole blocks.
    NpvlmError
        Where it cannot be written.
    """
    shapes = _shapes(config)
    if any(len(shape) == 2 and shape[1] % kind.weights for shape in shapes.values()):
        raise UsageError(
            f"{kind.name} of llama.cpp takes {kind.weights} weights at a time, and the widths of "
            "this model are no multiples of that; take another --precision or model."
        )
    try:
        with path.open("wb") as file:
            _write_header(file, config, shapes, kind)
            block = _random_blocks(kind)
            for shape in shapes.values():
                left = _size(shape, kind)
                if len(shape) == 1:
                    file.write(np.full(shape, 1.0, "<f4").tobytes())
                while len(shape) == 2 and left:
                    left -= file.write(block[:left])
                _pad(file)
            file.flush()
            os.fsync(file.fileno())  # or the disk would still be busy when the clock starts
    except OSError as error:
        reason = error.strerror or str(error)
        raise NpvlmError(f"{path}: cannot be written ({reason}); name another $TMPDIR.") from error


def _shapes(config: TextConfig) -> Shapes:
    """The tensors under llama.cpp's names, each [out, in]."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer: Shapes = {
        "attn_norm": (D,),
        "attn_q": (queries, D),
        "attn_k": (keys, D),
        "attn_v": (keys, D),
        "attn_output": (D, queries),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    if config.model_type == "gemma2":
        layer |= {"post_attention_norm": (D,), "post_ffw_norm": (D,)}
    shapes: Shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _write_header(file: BinaryIO, config: TextConfig, shapes: Shapes, kind: Kind) -> None:
    family = config.model_type
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        numbers["attention.sliding_window"] = config.sliding_window
    floats = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    entries = [
        _text("general.architecture") + struct.pack("<I", _STRING) + _text(family),
        _text("tokenizer.ggml.model") + struct.pack("<I", _STRING) + _text("none"),
    ]
    for name, number in numbers.items():
        entries.append(_text(f"{family}.{name}") + struct.pack("<II", _UINT32, number))
    for name, value in floats.items():
        if value is not None:
            entries.append(_text(f"{family}.{name}") + struct.pack("<If", _FLOAT32, value))

    file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(shapes), len(entries)))
    file.write(b"".join(entries))
    offset = 0
    for name, shape in shapes.items():
        # GGUF counts axes from the innermost.
        axes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        number = kind.number if len(shape) == 2 else _F32
        file.write(_text(name) + struct.pack("<I", len(shape)) + axes)
        file.write(struct.pack("<IQ", number, offset))
        offset += -(-_size(shape, kind) // _ALIGNMENT) * _ALIGNMENT
    _pad(file)


def _size(shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of a tensor; a vector is float32."""
    if len(shape) == 1:
        return 4 * shape[0]
    return math.prod(shape) // kind.weights * kind.bytes


def _random_blocks(kind: Kind) -> bytes:
    """Random weights as they are stored, of a spread near 0.02."""
    random = np.random.default_rng(0)
    if kind.weights == 1:
        numbers = random.standard_normal(32 * _REPEATED, np.float32) * np.float32(0.02)
        return (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    blocks = random.integers(0, 256, (_REPEATED, kind.bytes), np.uint8)
    scale = 0.02 / 74 if kind.name == "Q8_0" else 0.02 / 4.6  # over the spread of the integers
    blocks[:, :2] = np.array([scale], "<f2").view(np.uint8)
    return blocks.tobytes()


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
