"""The checkpoints that Google has published on the Hugging Face hub, and what each is for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from npvlm.config import Values, parse_config
from npvlm.files.names import expected_shapes

OWNER = "google"
LICENCE = "Gemma terms of use"
STORED = 2  # bytes of a number at the revisions named here
IMAGE_TOKEN = 257152

VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "vocab_size": 257216,
}
GEMMA2 = {
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
}
TEXT: dict[str, dict[str, Any]] = {
    "paligemma-3b": GEMMA,
    "paligemma2-3b": GEMMA2,
    "paligemma2-10b": GEMMA2
    | {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
    },
    "paligemma2-28b": GEMMA2
    | {
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
    },
}

# Of each task that a PaliGemma 1 was fine-tuned for: what it does then, and how it is asked.
_CAPTION, _ASK = "caption en", "answer en QUESTION"
_CHOOSE = "answer en QUESTION choose from: A \\t B"
_TASKS: dict[str, tuple[str, str | None]] = {
    "ai2d": ("school-book diagrams, multiple choice", _CHOOSE),
    "aokvqa-da": ("questions that need common sense", _ASK),
    "aokvqa-mc": ("questions that need common sense, multiple choice", _CHOOSE),
    "chartqa": ("charts", "QUESTION"),
    "coco35l": ("captions in 35 languages", "caption LANGUAGE"),
    "cococap": ("captions", _CAPTION),
    "docvqa": ("scanned documents", "QUESTION"),
    "gqa": ("questions on things and how they relate", _ASK),
    "infovqa": ("infographics", _ASK),
    "nlvr2": ("is it true of two pictures?", "answer en SENTENCE"),
    "ocrvqa": ("book covers", _ASK),
    "okvqa": ("questions that need knowledge", _ASK),
    "refcoco-seg": ("box and mask of what a phrase means", "PHRASE"),
    "rsvqa-hr": ("aerial pictures", _ASK),
    "rsvqa-lr": ("satellite pictures", _ASK),
    "science-qa": ("school science, multiple choice, in a template of its own", None),
    "scicap": ("captions of figures in papers", _CAPTION),
    "screen2words": ("what a phone's screen is about", _CAPTION),
    "stvqa": ("text in photographs", _ASK),
    "tallyqa": ("counting", _ASK),
    "textcaps": ("captions that read text", _CAPTION),
    "textvqa": ("text in photographs", _ASK),
    "vizwizvqa": ("photographs that blind people took", _ASK),
    "vqav2": ("questions on photographs", _ASK),
    "widgetcap": ("what a button on a screen does", _CAPTION),
}
# These are known to be there at 896 as well. infovqa may be; so may models for videos at 224, under
# names that are not known. Whatever is there can be fetched by the name of its repository.
_AT_896 = ("docvqa", "ocrvqa", "refcoco-seg", "stvqa", "textvqa")
_DOCCI: tuple[str, str | None] = ("long descriptions", _CAPTION)

_PURPOSES = {
    "mix": "answers as it comes: caption, ask, ocr, detect, segment",
    "pt": "to be fine-tuned; captions a little",
}


@dataclass(frozen=True)
class Published:
    """One published checkpoint; its `name` is that of its repository without the owner."""

    size: str
    """Family and size of the decoder, such as "paligemma2-10b"."""
    kind: str
    """ "pt" as pretrained, "mix" tuned on many tasks, "ft" on one."""
    task: str | None
    resolution: int

    @property
    def name(self) -> str:
        """What it is called here."""
        return "-".join(filter(None, (self.size, self.kind, self.task, str(self.resolution))))

    @property
    def repo(self) -> str:
        """What the hub calls it."""
        return f"{OWNER}/{self.name}"

    @property
    def family(self) -> int:
        """PaliGemma 1 or 2."""
        return 2 if self.size.startswith("paligemma2") else 1

    @property
    def revision(self) -> str:
        """The revision with bfloat16 weights: `main` of PaliGemma 1 is float32, twice the size."""
        return "main" if self.family == 2 else "bfloat16"

    @property
    def purpose(self) -> str:
        """What it is for, in a few words."""
        if self.task is None:
            return _PURPOSES[self.kind]
        what, prompt = _DOCCI if self.task == "docci" else _TASKS[self.task]
        return what if prompt is None else f'{what}: "{prompt}"'

    @property
    def parameters(self) -> int:
        """Numbers in its weights; the embedding table, also the output layer, counts once."""
        return _parameters(self.size, self.resolution)

    @property
    def bytes(self) -> int:
        """Bytes of its weights at `revision`."""
        return STORED * self.parameters


def config_values(size: str, resolution: int) -> dict[str, Any]:
    """What config.json says of a size such as "paligemma2-10b", at 224, 448 or 896 pixels."""
    return whole_config(TEXT[size], VISION | {"image_size": resolution}, IMAGE_TOKEN, "bfloat16")


def whole_config(text: Values, vision: Values, image_token: int, dtype: str) -> dict[str, Any]:
    """What config.json says of a decoder and a tower, in the fields of the published files."""
    width = text["hidden_size"]
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "image_token_index": image_token,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": width,
        "text_config": dict(text),
        "torch_dtype": dtype,
        "vision_config": {**vision, "projection_dim": width},
    }


def preprocessor_values(image_size: int, patch_size: int) -> dict[str, Any]:
    """What preprocessor_config.json says, in the fields of the published files."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": (image_size // patch_size) ** 2,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }


@cache
def _parameters(size: str, resolution: int) -> int:
    shapes = expected_shapes(parse_config(config_values(size, resolution)))
    return sum(map(math.prod, shapes.values()))


def _all() -> list[Published]:
    found = []
    for size in TEXT:
        found += [Published(size, "mix", None, side) for side in (224, 448)]
        found += [Published(size, "pt", None, side) for side in (224, 448, 896)]
        if size in ("paligemma2-3b", "paligemma2-10b"):
            found.append(Published(size, "ft", "docci", 448))
    for task in _TASKS:
        sides = (224, 448, 896) if task in _AT_896 else (224, 448)
        found += [Published("paligemma-3b", "ft", task, side) for side in sides]
    return found


PUBLISHED = {model.name: model for model in _all()}
