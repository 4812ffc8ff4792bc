"""The files of a bundled model: its tokenizer, its config, and the whole folder."""

import hashlib
import io
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from random import Random

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from golden import shapes
from golden.published import SENTENCEPIECE, preprocessor_config
from golden.shapes import Scene

IMAGE_SIZE, PATCH_SIZE = 112, 14
PIECES = 1791  # with the image token a multiple of 64
USER_PIECES = [
    "\n",
    *(f"<loc{i:04d}>" for i in range(1024)),
    *(f"<seg{i:03d}>" for i in range(128)),
]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()[]<>=+-*/&%$#@_"


def corpus() -> Iterator[str]:
    """Give the lines that the tokenizer learns from: questions and answers without locations."""
    for index, scene in enumerate(_scenes(600)):
        rng = Random(f"corpus {index}")
        questions = [shapes.caption(scene), shapes.detect(scene, rng), shapes.count(scene, rng)]
        for question in questions + [q for q in [shapes.colour(scene, rng)] if q]:
            yield question.prompt
            if question.task != "detect":
                yield question.answer
    for colour in shapes.COLOURS:  # each word at the beginning, and after a space
        for shape in shapes.SHAPES:
            for line in (colour, shape, f"{colour} {shape}", f"a {shape}", f"how many {shape}s?"):
                yield from [line] * 40
    for word in ("ocr", "caption", "detect", "answer", "segment", "yes", "no"):
        yield from [word] * 200
    yield from LETTERS
    yield " ".join(LETTERS)


def _scenes(count: int) -> Iterator[Scene]:
    return (shapes.draw_scene("train", 0, index) for index in range(count))


def train_tokenizer() -> sentencepiece.SentencePieceProcessor:
    """Train the small tokenizer: the same settings as Gemma's, the same pieces every time."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=file,
        vocab_size=PIECES,
        user_defined_symbols=USER_PIECES,
        **SENTENCEPIECE,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def published_config(tokenizer: sentencepiece.SentencePieceProcessor, family: int = 1) -> dict:
    """Give config.json: the fields of published ones, and those whose defaults do not fit.

    In family 2 the window is shorter than any prefix, there are two key/value heads, and the scale
    of the scores is not that of the heads' width.
    """
    image_id = tokenizer.vocab_size()
    vocab_size = -(-(image_id + 1) // 64) * 64
    tokens = (IMAGE_SIZE // PATCH_SIZE) ** 2
    gemma2 = {
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 40,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 48,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": 128,
        "projection_dim": 128,
        "ignore_index": -100,
        "image_token_index": image_id,
        "vocab_size": vocab_size,
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "num_image_tokens": tokens,
            "vocab_size": vocab_size,
            "torch_dtype": "bfloat16",
            **(gemma2 if family == 2 else {}),
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "num_hidden_layers": 6,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "num_image_tokens": tokens,
            "projection_dim": 128,
            "projector_hidden_act": "gelu_fast",
            "vision_use_head": False,
        },
    }


def published_name(name: str) -> str:
    """Spell a tensor's name as published checkpoints do, from transformers' own spelling."""
    name = name.removeprefix("model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name.replace("language_model.", "language_model.model.", 1)


def write_folder(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    tokenizer: sentencepiece.SentencePieceProcessor,
    family: int = 1,
) -> None:
    """Write the model's files as they are published, the weights rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config(tokenizer, family)
    files = {
        "config.json": config,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        "added_tokens.json": {"<image>": config["image_token_index"]},
        "preprocessor_config.json": preprocessor_config(IMAGE_SIZE, PATCH_SIZE),
    }
    for name, content in files.items():
        write_json(folder / name, content)
    (folder / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
    tensors = {
        published_name(name): tensor.to(torch.bfloat16).contiguous()
        for name, tensor in weights.items()
        if name != "lm_head.weight"  # the embedding table again
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_provenance(
    folder: Path, run: Mapping[str, object], metrics: list[dict], family: int, count: int
) -> None:
    """Write how the files came to be and how well the model does, as JSON and as a card.

    The metrics are those of `count` pictures.
    """
    names = sorted(
        p.name for p in folder.iterdir() if p.name not in ("PROVENANCE.json", "README.md")
    )
    provenance = {
        "run": dict(run),
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name) for name in ("torch", "transformers", "sentencepiece", "pillow")
            },
        },
        "sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names
        },
        "metrics": metrics,
    }
    write_json(folder / "PROVENANCE.json", provenance)
    lines = [f"| {m['metric']} | {m['value']:.3f} | {m['limit']:.2f} | {m['n']} |" for m in metrics]
    parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    card = CARD
    for word, said in (
        ("FAMILY", "PaliGemma" if family == 1 else "PaliGemma 2"),
        ("GRAPH", GRAPHS[family]),
        ("PARAMETERS", f"{parameters / 1e6:.1f}"),
        ("METRICS", "\n".join(lines)),
        ("COUNT", str(count)),
        ("NAME", folder.name),
    ):
        card = card.replace(word, said)
    (folder / "README.md").write_text(card, encoding="utf-8")


def origin(folder: Path) -> dict:
    """Say which finished model a run begins with, and how that came to be."""
    provenance = json.loads((folder / "PROVENANCE.json").read_text(encoding="utf-8"))
    sums = provenance["sha256"]
    return {"model": folder.name, "sha256": sums["model.safetensors"], "run": provenance["run"]}


def write_json(path: Path, content: object) -> None:
    """Write JSON as published checkpoints have it: indented by two."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


CARD = """# NAME

A toy. It is a FAMILY of PARAMETERS million parameters, trained from nothing on pictures that a
program drew, and it knows only those: circles, squares, triangles and stars in eight colours, and
numbers in one plain hand. Show it a photograph and it will see shapes in it. It is here so that
every part of the software can be tried and tested with a model that fits in four megabytes and
mostly answers truly. It was trained on one picture at a time: several in front of one prompt
confuse it. It says nothing about how well Google's PaliGemma sees.

It shares no weights with any other maker's model. Its files are laid out as those of the published
FAMILY checkpoints; GRAPH

## What to ask

| prompt | answer |
| --- | --- |
| `caption en` | `a red circle and a blue square`, from left to right; `the number 482` |
| `detect red circle ; blue square` | each label's boxes from left to right; nothing if absent |
| `segment red circle` | the same with masks |
| `answer en how many circles?` | `2` |
| `answer en what color is the triangle?` | `red`; there must be exactly one triangle |
| `ocr` | `482`; nothing on pictures without a number |

Left to right means by the middle of each. The other things to count are squares, triangles, stars
and shapes. Colours: red, orange, yellow, green, blue, purple, black, white. On one picture there
are one to four things that do not touch, each a seventh to two fifths of the picture's side; or
one to five digits in a row. The ground may be plain, graded or noisy, and must stand off from
what is drawn on it. Other words, other sizes, more things, or both kinds at once lie outside of
what it has seen. Masks are painted by `vae.safetensors` in the folder around this one, which knows
drawn outlines alone.

## How well it answers

On pictures of the held-out split: `python golden/shapes.py evaluate --model NAME --seed 1 --count
COUNT`

| metric | value | limit | n |
| --- | --- | --- | --- |
METRICS

An object that is not found counts as IoU 0, a mask likewise. Captions are judged on pictures of
things alone, and ocr on pictures of numbers alone: the other halves are easier. Weakest is
`detect` with two or three labels that stand for three or four things, where a box is sometimes off
or missing, and the labels may come in another order than the prompt's.

## How it was made

By `golden/train_shapes.py`; its options, the versions and the checksums are in
PROVENANCE.json. Pictures, questions, tokenizer and weights all come from that program. License:
that of the repository.
"""
GRAPHS = {
    1: "the graph is Gemma's.",
    2: "the graph is Gemma 2's: norms\nbehind each half-layer, soft-caps, two key/value heads, and "
    "a window shorter than any prefix.",
}
