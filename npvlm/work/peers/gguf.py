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
_MAGIC, _VERSION = b"GGUF", 3
_REPEATED = 131_071  # blocks of random weights in a row; a prime, so that no two rows are alike


@dataclass(frozen=True)
class Kind:
    """How GGUF stores a matrix: its number, the weights in a block, and the bytes of a block.

    A block's float16 scale stands at byte `scale`; `spread` is about how wide its integers are.
    """

    name: str
    number: int
    weights: int
    bytes: int
    scale: int = 0
    spread: float = 1.0


F32 = Kind("F32", 0, 1, 4)
Q6_K = Kind("Q6_K", 14, 256, 210, scale=208, spread=18.5 * 74)
Q8_0 = Kind("Q8_0", 8, 32, 34, spread=74)
KINDS = {
    "float32": Kind("BF16", 30, 1, 2),
    "bfloat16": Kind("BF16", 30, 1, 2),
    "int8": Q8_0,
    "int4": Kind("Q4_0", 2, 32, 18, spread=4.6),
}

Tensors = dict[str, tuple[tuple[int, ...], Kind]]


def gguf_bytes(config: TextConfig, kind: Kind) -> int:
    """How large the file will be, but for its header."""
    return sum(_size(*tensor) for tensor in _tensors(config, kind).values())


def write_gguf(path: Path, config: TextConfig, kind: Kind) -> None:
    """Write a decoder of random weights, packed as llama.cpp's own quantizer packs a Gemma.

    Raises
    ------
    UsageError
        Where the widths do not fill whole blocks.
    NpvlmError
        Where it cannot be written.
    """
    tensors = _tensors(config, kind)
    for shape, own in tensors.values():
        if shape[-1] % own.weights:
            raise UsageError(
                f"{own.name} of llama.cpp takes {own.weights} weights at a time, and the widths of "
                "this model are no multiples of that; take another --precision or model."
            )
    try:
        with path.open("wb") as file:
            _write_header(file, config, tensors)
            blocks = {own: _random_blocks(own) for _, own in tensors.values() if own != F32}
            for shape, own in tensors.values():
                if own == F32:
                    file.write(np.full(shape, 1.0, "<f4").tobytes())
                else:
                    left, block = _size(shape, own), blocks[own]
                    while left:
                        left -= file.write(block[:left])
                _pad(file)
            file.flush()
            os.fsync(file.fileno())  # or the disk would still be busy when the clock starts
    except OSError as error:
        reason = error.strerror or str(error)
        raise NpvlmError(f"{path}: cannot be written ({reason}); name another $TMPDIR.") from error


def _tensors(config: TextConfig, kind: Kind) -> Tensors:
    """The tensors under llama.cpp's names, each [out, in], and how each is stored.

    Beside Q4_0, the table of a model without an output matrix is Q6_K, or Q8_0 where the width does
    not fill its blocks: what llama.cpp's `llama_model_quantize` makes of a Gemma.
    """
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    table = kind if kind.name != "Q4_0" else Q8_0 if D % Q6_K.weights else Q6_K
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
    shapes: Shapes = {"output_norm.weight": (D,)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    rest = {name: (shape, kind if len(shape) == 2 else F32) for name, shape in shapes.items()}
    return {"token_embd.weight": ((V, D), table)} | rest


def _write_header(file: BinaryIO, config: TextConfig, tensors: Tensors) -> None:
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

    file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(entries)))
    file.write(b"".join(entries))
    offset = 0
    for name, (shape, own) in tensors.items():
        # GGUF counts axes from the innermost.
        axes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        file.write(_text(name) + struct.pack("<I", len(shape)) + axes)
        file.write(struct.pack("<IQ", own.number, offset))
        offset += -(-_size(shape, own) // _ALIGNMENT) * _ALIGNMENT
    _pad(file)


def _size(shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) // kind.weights * kind.bytes


def _random_blocks(kind: Kind) -> bytes:
    """Random weights as they are stored, of a spread near 0.02."""
    random = np.random.default_rng(0)
    if kind.weights == 1:
        numbers = random.standard_normal(32 * _REPEATED, np.float32) * np.float32(0.02)
        return (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    blocks = random.integers(0, 256, (_REPEATED, kind.bytes), np.uint8)
    scale = np.array([0.02 / kind.spread], "<f2").view(np.uint8)
    blocks[:, kind.scale : kind.scale + 2] = scale
    return blocks.tobytes()


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
