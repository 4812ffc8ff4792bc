"""transformers as the oracle: random PaliGemma checkpoints, and what PyTorch makes of them.

A model runs in float32, as people run it, and in float64, which is the truth. Every stage of a run
has the path of its module in a published checkpoint: `language_model.model.layers.2` is the output
of that layer. Nothing of npvlm is used here.

Axis letters: N pictures · R picture side · T tokens · V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import logging

from golden.published import SENTENCEPIECE, preprocessor_config

STEPS = 20
PROMPTS = (
    (1, "caption en"),
    (1, "detect red circle ; blue square and the <loc0007><seg003> cat that is not a dog é"),
    (2, "answer en how many circles?"),
)

Stages = dict[str, np.ndarray]
Values = dict[str, Any]


def quiet(threads: int) -> None:
    """No progress bars, a fixed number of threads."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Recipe:
    """What one random checkpoint looks like: its numbers, and how its files are written."""

    name: str
    seed: int
    dtype: str  # of the file: float32 | float16 | bfloat16
    spelling: str  # of the tensor names, a key of SPELLINGS
    vision: Values
    text: Values
    tied: bool = True  # the embedding table is the last layer too
    shard: str | None = None  # largest size of a file
    image_row: bool = True  # the embedding table has a row for <image>
    locations: int = 1024  # pieces <loc0000> and so on
    preprocessor: Values = field(default_factory=dict)


def _vision(
    image_size: int, patch_size: int, width: int, inner: int, layers: int, heads: int
) -> Values:
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vision_use_head": False,
    }


def _gemma(width: int, inner: int, layers: int, heads: int, groups: int, head_dim: int) -> Values:
    return {
        "model_type": "gemma",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


def _gemma2(window: int, scalar: int, attn: float, final: float, **more: Any) -> Values:
    return {
        "model_type": "gemma2",
        "sliding_window": window,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": attn,
        "final_logit_softcapping": final,
        **more,
    }


# Sizes are odd where the maths allows and all different, so that no transpose can pass. No width is
# a perfect square, so that its root is rounded; head_dim is even, no multiple of 16 and never
# hidden_size / heads. Windows are shorter than the sequences, soft-caps low enough to bend. Some
# pictures leave a rest behind the last patch; one model has eps and a rotary base of its own.
RECIPES = (
    Recipe(
        "pg1", 11, "bfloat16", "published",
        _vision(15, 5, 39, 71, layers=2, heads=3),
        _gemma(45, 93, layers=3, heads=3, groups=1, head_dim=10),
        locations=64,
    ),
    Recipe(
        "pg1-f32-sharded", 12, "float32", "modules5",
        _vision(30, 4, 55, 83, layers=3, heads=5) | {"layer_norm_eps": 1e-2},
        _gemma(35, 101, layers=2, heads=5, groups=1, head_dim=18)
        | {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        tied=False, shard="60KB",
    ),
    Recipe(
        "pg1-f16-k2", 13, "float16", "saved",
        _vision(21, 7, 33, 61, layers=2, heads=3),
        _gemma(52, 87, layers=3, heads=4, groups=2, head_dim=12),
    ),
    Recipe(
        "pg1-1024", 44, "bfloat16", "modules",
        _vision(64, 2, 51, 67, layers=2, heads=3),
        _gemma(39, 77, layers=2, heads=3, groups=1, head_dim=14),
        tied=False, shard="60KB",
    ),
    Recipe(
        "pg2", 31, "bfloat16", "published",
        _vision(20, 5, 57, 79, layers=2, heads=3),
        _gemma(54, 95, layers=4, heads=6, groups=2, head_dim=14)
        | _gemma2(window=7, scalar=11, attn=1.5, final=1.0),
        locations=64,
    ),
    Recipe(
        "pg2-f16-sharded", 22, "float16", "modules",
        _vision(18, 3, 35, 59, layers=2, heads=5),
        _gemma(33, 89, layers=4, heads=3, groups=1, head_dim=20)
        | _gemma2(window=9, scalar=13, attn=2.5, final=3.0),
        tied=False, shard="60KB", locations=64,
        preprocessor={
            "resample": 2, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]
        },
    ),
    Recipe(
        "pg2-f32-order", 63, "float32", "modules5",
        _vision(23, 11, 42, 73, layers=3, heads=2),
        _gemma(44, 85, layers=4, heads=4, groups=2, head_dim=22)
        | _gemma2(window=5, scalar=17, attn=1.25, final=1.5,
                  layer_types=["full_attention", "sliding_attention"] * 2),
        image_row=False,
    ),
    Recipe(
        "pg2-1024", 24, "bfloat16", "saved",
        _vision(32, 1, 34, 63, layers=2, heads=2),
        _gemma(42, 81, layers=4, heads=6, groups=2, head_dim=10)
        | _gemma2(window=301, scalar=7, attn=2.0, final=6.0),
        tied=False,
    ),
)  # fmt: skip

# Sums as long as a real model's, in which rounding errors add up differently.
WIDE = Recipe(
    "pg2-wide", 25, "bfloat16", "modules",
    _vision(56, 14, 1152, 4304, layers=1, heads=16),
    _gemma(1302, 5203, layers=2, heads=6, groups=2, head_dim=250)
    | _gemma2(window=11, scalar=217, attn=2.0, final=3.0),
    tied=False, shard="40MB",
)  # fmt: skip


# --- writing a checkpoint ------------------------------------------------------------------------


def build_checkpoint(folder: Path, recipe: Recipe) -> Path:
    """Write a random PaliGemma checkpoint folder: config, weights, tokenizer and preprocessor.

    Every tensor is random, norms and biases included: zeros would hide a forgotten `1 + weight`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = train_tokenizer(folder / "tokenizer.model", recipe.seed, recipe.locations)
    config = _config(recipe, vocabulary)
    model = PaliGemmaForConditionalGeneration(config)
    generator = np.random.default_rng(recipe.seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            weight.copy_(torch.from_numpy(_draw(generator, name, tuple(weight.shape), recipe.tied)))
    model = model.to(getattr(torch, recipe.dtype))
    model.save_pretrained(folder, max_shard_size=recipe.shard or "1GB")
    assert bool(recipe.shard) == (folder / "model.safetensors.index.json").exists()
    _rename_tensors(folder, SPELLINGS[recipe.spelling])
    if recipe.spelling == "published":
        _shorten_config(folder / "config.json")
    _write_json(folder / "preprocessor_config.json", _preprocessor(recipe))
    return folder


def _config(recipe: Recipe, vocabulary: int) -> PaliGemmaConfig:
    """The config of a recipe; `<image>` has the first id behind the vocabulary, as published."""
    rows = vocabulary + 5 if recipe.image_row else vocabulary
    common = {"vocab_size": rows, "tie_word_embeddings": recipe.tied}
    kind = Gemma2Config if recipe.text["model_type"] == "gemma2" else GemmaConfig
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**recipe.vision),
        text_config=kind(**recipe.text | common),
        image_token_index=vocabulary,
        projection_dim=recipe.text["hidden_size"],
        hidden_size=recipe.text["hidden_size"],
        eos_token_id=1,
        bos_token_id=2,
        pad_token_id=0,
        **common,
    )


def _draw(
    generator: np.random.Generator, name: str, shape: tuple[int, ...], tied: bool
) -> np.ndarray:
    values = generator.standard_normal(shape, dtype=np.float32)
    if "norm" in name:  # SigLIP's gains are around one; Gemma's are stored as the distance from one
        centre = 1.0 if "vision_tower" in name and name.endswith("weight") else 0.0
        return centre + np.float32(0.3) * values
    if "embed_tokens" in name:  # small where tied, else a token is followed by itself for ever
        return np.float32(0.05 if tied else 0.4) * values
    if len(shape) == 1 or "position" in name:
        return np.float32(0.3) * values
    return np.float32(1.4 / math.sqrt(np.prod(shape[1:]))) * values  # lively, but not growing


def _preprocessor(recipe: Recipe) -> Values:
    size, patch_size = recipe.vision["image_size"], recipe.vision["patch_size"]
    return preprocessor_config(size, patch_size) | recipe.preprocessor


WORDS = """caption detect segment answer describe en what where how many red blue circle square dog
cat the a is"""


def train_tokenizer(path: Path, seed: int, locations: int) -> int:
    """Train a small SentencePiece model laid out as PaliGemma's; return how many pieces it has."""
    generator = np.random.default_rng(seed)
    words = WORDS.split()
    lines = (" ".join(generator.choice(words, generator.integers(2, 9))) for _ in range(200))
    places = [f"<loc{i:04d}>" for i in range(locations)]
    extra = ["\n", *places, *(f"<seg{i:03d}>" for i in range(locations // 8))]
    size = 4 + len(extra) + 256 + 60 + seed % 7
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            vocab_size=size,
            user_defined_symbols=extra,
            **SENTENCEPIECE,
        )
    return size


def _rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        save_file(
            {rename(published(name)): w for name, w in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        values["weight_map"] = {
            rename(published(name)): shard for name, shard in values["weight_map"].items()
        }
        _write_json(index, values)


def published(name: str) -> str:
    """The published spelling of a tensor or module that transformers 5 names its own way."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    name = re.sub(r"^language_model\.(?!model\.|lm_head)", "language_model.model.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def _modules(name: str) -> str:
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "published": lambda name: name,
    "saved": lambda name: name.replace("vision_model.", "").replace(
        "language_model.lm_head", "lm_head"
    ),
    "modules": _modules,
    "modules5": lambda name: _modules(name).replace("vision_model.", ""),
}

# What the published config.json files say; class defaults fill in the rest.
PUBLISHED = {
    "": """architectures model_type bos_token_id eos_token_id pad_token_id projection_dim
        image_token_index vocab_size""",
    "vision_config": """model_type hidden_size intermediate_size num_hidden_layers
        num_attention_heads patch_size image_size vision_use_head""",
    "text_config": """model_type hidden_size intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads head_dim vocab_size query_pre_attn_scalar
        sliding_window attn_logit_softcapping final_logit_softcapping""",
}


def _shorten_config(path: Path) -> None:
    """Leave out what the published files leave out (tied weights are a default too)."""
    values = json.loads(path.read_text())

    def only(part: str, given: Values) -> Values:
        return {key: given[key] for key in PUBLISHED[part].split() if key in given}

    parts = {part: only(part, values[part]) for part in PUBLISHED if part}
    _write_json(path, only("", values) | parts)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


# --- the models ----------------------------------------------------------------------------------


def load_float32(folder: Path) -> PaliGemmaForConditionalGeneration:
    """Load a checkpoint as people do on a CPU: weights widened to float32, eager attention."""
    return _load(folder, torch.float32)


def load_bfloat16(folder: Path) -> PaliGemmaForConditionalGeneration:
    """Load a checkpoint to compute in bfloat16, eager attention."""
    return _load(folder, torch.bfloat16)


def _load(folder: Path, dtype: torch.dtype) -> PaliGemmaForConditionalGeneration:
    model, found = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind, names in found.items() if names and kind != "error_msgs"}
    if wrong:
        raise AssertionError(f"transformers does not find all tensors of {folder}: {wrong}")
    return model.eval()


def load_float64(model: PaliGemmaForConditionalGeneration) -> PaliGemmaForConditionalGeneration:
    """The same model with every number and every operation in float64: the truth.

    A cast alone is not enough: norms, rotary tables, softmax and the embedding scale drop to
    float32 inside transformers. They are lifted here, and in `run_float64`.
    """
    with lifted():
        truth = PaliGemmaForConditionalGeneration._from_config(
            model.config, dtype=torch.float64, attn_implementation="eager"
        )
    truth.load_state_dict(model.state_dict())
    for (name, wide), narrow in zip(
        truth.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(wide, narrow.double()), f"{name} is not the same in the oracle"
    return truth.eval()


class _Lift(TorchFunctionMode):
    """Hand out float64 to whoever asks for float32, by `.float()` or by naming the dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


class _Witness(TorchDispatchMode):
    """Look at what every operation of torch gives, and refuse a number narrower than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.operations += 1
                if value.dtype is not torch.float64:
                    raise AssertionError(f"{func} gave {value.dtype} inside the float64 oracle")
        return result


@contextlib.contextmanager
def lifted() -> Iterator[_Witness]:
    """Inside, torch computes in float64 alone; the witness counts, and raises at anything else."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lift(), _Witness() as witness:
            yield witness
    finally:
        torch.set_default_dtype(before)


# --- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A prompt with its pictures, and all that transformers makes of it."""

    pictures: list[Image.Image]
    prompt: str
    pixels: np.ndarray  # [N, 3, R, R] float32
    ids: list[int]
    answer: list[int]  # greedy
    text: str | None  # of the answer
    scores: np.ndarray  # logits of each step through the cache [T, V]
    torchs: Stages  # float32, of one pass over everything
    truth: Stages  # float64
    operations: int  # of the truth, seen to be in float64


def cases(
    folder: Path,
    recipe: Recipe,
    float32: PaliGemmaForConditionalGeneration,
    float64: PaliGemmaForConditionalGeneration,
) -> list[Case]:
    """Let transformers answer three prompts: a short one, a long one, one about two pictures."""
    generator = np.random.default_rng(1000 + recipe.seed)
    asked = [
        ([random_picture(generator) for _ in range(count)], prompt) for count, prompt in PROMPTS
    ]
    return [ask(folder, pictures, prompt, float32, float64) for pictures, prompt in asked]


def ask(
    folder: Path,
    pictures: list[Image.Image],
    prompt: str,
    float32: PaliGemmaForConditionalGeneration,
    float64: PaliGemmaForConditionalGeneration,
) -> Case:
    """Let transformers answer one prompt."""
    pixels = np.stack([pixel_values(folder, picture) for picture in pictures])
    ids = layout(folder, prompt, len(pictures))
    answer, scores = greedy(float32, pixels, ids, STEPS)
    torchs = run(float32, pixels, ids, answer)
    truth, operations = run_float64(float64, pixels, ids, answer)
    said = text(folder, answer)
    return Case(pictures, prompt, pixels, ids, answer, said, scores, torchs, truth, operations)


def random_picture(generator: np.random.Generator) -> Image.Image:
    """Coarse colours under fine noise, of any size and orientation."""
    height, width = generator.integers(9, 60, 2)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    noise = generator.integers(-40, 41, (height, width, 3))
    values = np.clip(np.asarray(coarse.resize((width, height))) + noise, 0, 255)
    return Image.fromarray(values.astype(np.uint8))


# --- runs ----------------------------------------------------------------------------------------


def pixel_values(folder: Path, picture: Image.Image) -> np.ndarray:
    """What transformers' image processor makes of a picture: [3, R, R] float32."""
    processor = SiglipImageProcessorPil.from_pretrained(folder, do_convert_rgb=True)
    return np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])


def layout(folder: Path, prompt: str, pictures: int) -> list[int]:
    """The ids of a prompt: image tokens of all pictures, <bos>, the prompt's, newline."""
    config = json.loads((folder / "config.json").read_text())
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    image = [config["image_token_index"]] * patches * pictures
    return [
        *image,
        vocabulary.piece_to_id("<bos>"),
        *vocabulary.encode(prompt),
        vocabulary.piece_to_id("\n"),
    ]


def text(folder: Path, answer: list[int]) -> str | None:
    """An answer in words, up to <eos>; an id behind the vocabulary has none.

    None where bytes make no character: what stands for these is not the same in all decoders.
    """
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    end = answer.index(vocabulary.eos_id()) if vocabulary.eos_id() in answer else len(answer)
    words = vocabulary.decode([i for i in answer[:end] if i < len(vocabulary)])
    return None if "\ufffd" in words else words


def _inputs(
    model: PaliGemmaForConditionalGeneration, pixels: np.ndarray, ids: list[int], answer: list[int]
) -> Values:
    every = torch.tensor([[*ids, *answer]])
    kinds = torch.tensor(
        [[0] * len(ids) + [1] * len(answer)]
    )  # without these, eager attention is causal everywhere
    return {
        "input_ids": every,
        "attention_mask": torch.ones_like(every),
        "token_type_ids": kinds,
        "pixel_values": torch.from_numpy(pixels.astype(np.float64)).to(model.dtype),
    }


@torch.no_grad()
def run(
    model: PaliGemmaForConditionalGeneration, pixels: np.ndarray, ids: list[int], answer: list[int]
) -> Stages:
    """One uncached pass over pictures, prompt and answer; every stage as rows [N * P or T, ...].

    pixels [N, 3, R, R]
    """
    with recorded(model) as stages:
        output = model(**_inputs(model, pixels, ids, answer), use_cache=False)
    stages["inputs_embeds"] = stages["inputs_embeds"][: len(ids)]  # of pictures and prompt
    stages["language_model.logits"] = _rows(output.logits)
    return stages


@torch.no_grad()
def logits(
    model: PaliGemmaForConditionalGeneration, pixels: np.ndarray, ids: list[int], answer: list[int]
) -> np.ndarray:
    """The logits [T, V] of one uncached pass, whatever stands in the modules' places.

    pixels [N, 3, R, R]
    """
    return _rows(model(**_inputs(model, pixels, ids, answer), use_cache=False).logits)


@torch.no_grad()
def insides(model: PaliGemmaForConditionalGeneration, pixels: np.ndarray, ids: list[int]) -> Stages:
    """Features [N, P, D] and tower [N, P, D] of the pictures, and what transformers calls
    output_hidden_states [L + 1, T, D] and output_attentions [L, H, T, T] of a pass over a prompt.

    pixels [N, 3, R, R]
    """
    inputs = _inputs(model, pixels, ids, [])
    output = model(**inputs, use_cache=False, output_hidden_states=True, output_attentions=True)
    tower = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    return {
        "features": _numpy(model.model.multi_modal_projector(tower)),
        "tower": _numpy(tower),
        "hidden states": np.stack([_numpy(states[0]) for states in output.hidden_states]),
        "attention": np.stack([_numpy(weights[0]) for weights in output.attentions]),
    }


@torch.no_grad()
def run_float64(
    truth: PaliGemmaForConditionalGeneration, pixels: np.ndarray, ids: list[int], answer: list[int]
) -> tuple[Stages, int]:
    """`run` as the truth; also how many float64 operations were witnessed."""
    with lifted() as witness:
        stages = run(truth, pixels, ids, answer)
    return stages, witness.operations


@torch.no_grad()
def greedy(
    model: PaliGemmaForConditionalGeneration, pixels: np.ndarray, ids: list[int], steps: int
) -> tuple[list[int], np.ndarray]:
    """transformers' greedy answer through its cache, and the logits of each step [T, V]."""
    settings = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
        eos_token_id=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    output = model.generate(**_inputs(model, pixels, ids, []), generation_config=settings)
    return output.sequences[0, len(ids) :].tolist(), np.concatenate(
        [_numpy(step) for step in output.logits]
    )


@torch.no_grad()
def beam_search(
    model: PaliGemmaForConditionalGeneration,
    pixels: np.ndarray,
    ids: list[int],
    steps: int,
    beams: int,
    ends: list[int],
) -> tuple[list[int], float]:
    """transformers' answer by beams through its cache, and its score; `ends` are the ids of eos."""
    settings = GenerationConfig(
        max_new_tokens=steps,
        num_beams=beams,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    output = model.generate(**_inputs(model, pixels, ids, []), generation_config=settings)
    answer = output.sequences[0, len(ids) :].tolist()
    length = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[:length], float(output.sequences_scores[0])


@contextlib.contextmanager
def recorded(model: PaliGemmaForConditionalGeneration) -> Iterator[Stages]:
    """While the model runs inside, collect what every module gives, and attention's own values."""
    stages: Stages = {}
    names = {module: published(name) for name, module in model.named_modules()}

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        name, value = names[module], output[0] if isinstance(output, tuple) else output
        if name.endswith("patch_embedding"):  # a convolution: [N, D, side, side]
            value = value.flatten(2).transpose(1, 2)
        if name.endswith("down_proj"):
            stages[name.replace("down_proj", "gated")] = _rows(inputs[0])
        if isinstance(value, torch.Tensor):
            stages[name.replace("activation_fn", "gelu")] = _rows(value)

    def attention(original: Callable[..., Any]) -> Callable[..., Any]:
        def attend(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            *rest: Any,
            **named: Any,
        ) -> Any:
            output, weights = original(module, query, key, *rest, **named)
            name = names[module]
            if name.startswith("language_model"):
                stages[f"{name}.q_rope"] = _rows(query.transpose(1, 2))
                stages[f"{name}.k_rope"] = _rows(key.transpose(1, 2))
            stages[f"{name}.attend"] = _rows(output)
            return output, weights

        return attend

    def embeds(module: torch.nn.Module, inputs: Any, named: Any) -> None:
        stages["inputs_embeds"] = _rows(named["inputs_embeds"])

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(keep).remove)
        language = model.model.language_model
        stack.callback(language.register_forward_pre_hook(embeds, with_kwargs=True).remove)
        for modeling in (modeling_siglip, modeling_gemma, modeling_gemma2):
            original = modeling.eager_attention_forward
            stack.callback(setattr, modeling, "eager_attention_forward", original)
            modeling.eager_attention_forward = attention(original)
        yield stages


def _rows(value: torch.Tensor) -> np.ndarray:
    """Pictures, or the one sequence of a batch, end to end: [N, P, ...] -> [N * P, ...]."""
    return _numpy(value.flatten(0, 1))


def _numpy(value: torch.Tensor) -> np.ndarray:
    if value.dtype is torch.bfloat16:  # which NumPy does not have
        value = value.float()
    return value.detach().numpy().copy()
