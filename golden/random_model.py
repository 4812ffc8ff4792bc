"""Write a full-size checkpoint of random bfloat16 weights: real sizes and files, no knowledge.

python golden/random_model.py FOLDER --tokenizer tokenizer.model [--family paligemma2] [--size 448]

For measuring time and memory. Every tensor repeats one block of random numbers, so that 6 GB are
written in seconds; the real vocabulary is Google's and has to be brought along.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.published import preprocessor_config
from npvlm.config import parse_config
from npvlm.files.names import expected_shapes

BLOCK = 2**22
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
TEXT = {
    "paligemma": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "vocab_size": 257216,
    },
    "paligemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "vocab_size": 257216,
    },
}


def config_of(family: str, size: int) -> dict:
    """The config.json of a published 3B."""
    width = TEXT[family]["hidden_size"]
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "image_token_index": 257152,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": width,
        "text_config": TEXT[family],
        "torch_dtype": "bfloat16",
        "vision_config": VISION | {"image_size": size, "projection_dim": width},
    }


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Write one safetensors file of bfloat16 tensors, block by block."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(seed).standard_normal(BLOCK, np.float32) * np.float32(0.02)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                file.write(block[: min(left, BLOCK)].data)
                left -= min(left, BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--family", choices=list(TEXT), default="paligemma")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    config = config_of(args.family, args.size)
    (args.folder / "config.json").write_text(json.dumps(config, indent=2))
    (args.folder / "added_tokens.json").write_text(json.dumps({"<image>": 257152}))
    preprocessor = json.dumps(preprocessor_config(args.size, VISION["patch_size"]), indent=2)
    (args.folder / "preprocessor_config.json").write_text(preprocessor)
    shutil.copyfile(args.tokenizer, args.folder / "tokenizer.model")
    shapes = expected_shapes(parse_config(config))
    write_tensors(args.folder / "model.safetensors", shapes, args.seed)
    print(f"{sum(map(math.prod, shapes.values())):,} parameters, {len(shapes)} tensors")


if __name__ == "__main__":
    main()
