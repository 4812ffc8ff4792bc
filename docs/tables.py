"""Write the tables of docs/porting.md from the code: `python docs/tables.py`."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from npvlm.config import Config, TextConfig, parse_config
from npvlm.files.names import expected_shapes
from npvlm.files.pictures import Preprocessor, scale_colours
from npvlm.model import ops
from npvlm.model.weights import Array
from npvlm.work.synthetic import synthetic_config

PORTING = Path(__file__).resolve().parent / "porting.md"
SIDES = (224, 448, 896)
# What the larger PaliGemma 2 have other than its 3B.
LARGER = {
    "10B": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "28B": {
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
}
LAYER = re.compile(r"layers\.\d+\.")


def models(side: int = 224) -> dict[str, Config]:
    """The four published sizes at a resolution, smallest first."""
    found = {
        "PaliGemma 3B": parse_config(synthetic_config(f"paligemma-3b-{side}")),
        "PaliGemma 2 3B": parse_config(synthetic_config(f"paligemma2-3b-{side}")),
    }
    for name, changes in LARGER.items():
        values = synthetic_config(f"paligemma2-3b-{side}")
        text = values["text_config"] | changes
        wider = values | {"text_config": text, "projection_dim": text["hidden_size"]}
        found[f"PaliGemma 2 {name}"] = parse_config(wider)
    return found


def cache_numbers(text: TextConfig) -> int:
    """How many numbers the keys and values of one token are, in all layers."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def parameters(config: Config) -> int:
    """How many numbers all tensors of a model have together."""
    return sum(map(math.prod, expected_shapes(config).values()))


def sizes() -> list[str]:
    """The decoder's sizes, a column for each model."""
    texts = {name: config.text_config for name, config in models().items()}

    def row(name: str, value: Callable[[TextConfig], object]) -> list[str]:
        return [name, *(_said(value(text)) for text in texts.values())]

    def capped(text: TextConfig) -> str:
        scores, logits = text.attn_logit_softcapping, text.final_logit_softcapping
        return "none" if scores is None else f"{scores:g}, {logits:g}"

    fields = (
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "query_pre_attn_scalar",
        "vocab_size",
        "sliding_window",
    )
    rows = [row(f"`{field}`", lambda text, f=field: getattr(text, f)) for field in fields]
    return _table(
        ["", *texts],
        [
            row("`model_type`", lambda text: text.model_type),
            *rows,
            row("scores are multiplied by", lambda text: f"1/{1 / text.attention_scale:g}"),
            row("soft-caps: scores, logits", capped),
            row("rows of `q_proj`", lambda text: text.num_attention_heads * text.head_dim),
            row(
                "rows of `k_proj`, `v_proj`", lambda text: text.num_key_value_heads * text.head_dim
            ),
            row("cached numbers per token", lambda text: f"{cache_numbers(text):,}"),
        ],
    )


def pictures() -> list[str]:
    """What the resolution changes."""
    rows = []
    for side in SIDES:
        config = models(side)["PaliGemma 3B"]
        vision, shapes = config.vision_config, expected_shapes(config)
        tower = sum(math.prod(s) for name, s in shapes.items() if name.startswith("vision_tower"))
        grid = side // vision.patch_size
        rows.append(
            [f"{side} px", f"{grid} x {grid}", f"{vision.num_patches:,}", f"{tower:,}"]
            + [f"{parameters(model):,}" for model in models(side).values()]
        )
    tensors = [f"{len(expected_shapes(model))} tensors" for model in models().values()]
    head = ["", "patches", "image tokens", "tower", *models()]
    return _table(head, [*rows, ["", "", "", "", *tensors]])


def tensors() -> list[str]:
    """Every tensor of a checkpoint at 224 px; {i} counts layers."""
    shapes = {name: _once(expected_shapes(config)) for name, config in models().items()}
    rows = []
    for tensor in shapes["PaliGemma 2 3B"]:
        found = [_said(shapes[name].get(tensor, "-")) for name in shapes]
        rows.append([f"`{tensor}`", *([found[0]] if len(set(found)) == 1 else found)])
    same = [row for row in rows if len(row) == 2]
    other = [row for row in rows if len(row) > 2]
    return [
        *_table(["decoder and projector", *shapes], other),
        "",
        *_table(["the same in all", "shape at 224 px"], same),
    ]


def checks() -> list[str]:
    """Small inputs of the operations, and what comes out."""
    x = np.array([[1.0, -2.0, 3.0, 0.5]])
    w, b = np.array([0.5, -0.25, 0.75, 2.0]), np.array([0.1, 0.2, 0.3, 0.4])
    q = np.arange(1.0, 9.0).reshape(1, 1, 8)
    half, colours = Preprocessor(1, 1, (0.5,) * 3, (0.5,) * 3, 1 / 255, 3), (0, 1, 128, 255)
    pixels = np.array(colours, np.uint8).reshape(1, 4, 1).repeat(3, axis=2)
    rows = (
        ("RoPE", "1, 2, ... 8 at position 3", ops.rope(q, np.array([3]), 10000.0)),
        ("RMSNorm, Gemma's", f"x = {_row(x)}; w = {_row(w)}", ops.rms_norm(x, w, 1e-6)),
        ("LayerNorm", "the same; b = " + _row(b), ops.layer_norm(x, w, b, 1e-6)),
        ("GeLU", f"x = {_row(x)}", ops.gelu_tanh(x)),
        ("softmax", "the same", ops.softmax(x)),
        ("soft-cap at 2", "the same", ops.soft_cap(x, 2.0)),
        ("pixel values", ", ".join(map(str, colours)), scale_colours(pixels, half)[0]),
    )
    return _table(
        ["operation", "of", "is"], [[name, of, _row(value, 6)] for name, of, value in rows]
    )


TABLES: dict[str, Callable[[], list[str]]] = {
    "sizes": sizes,
    "pictures": pictures,
    "tensors": tensors,
    "checks": checks,
}


def current(text: str) -> str:
    """The document with every table as the code has it now."""
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = "".join([before, start, "\n".join(make()), "\n", end, after])
    return text


def _once(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Each tensor of the layers one time, under the name of any layer."""
    return {LAYER.sub("layers.{i}.", name): shape for name, shape in shapes.items()}


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _row(values: Array, digits: int = 0) -> str:
    return ", ".join(f"{value:.{digits}f}" if digits else f"{value:g}" for value in values.flat)


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main() -> None:
    """Bring the document up to date."""
    PORTING.write_text(current(PORTING.read_text()))


if __name__ == "__main__":
    main()
