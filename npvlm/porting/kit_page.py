"""PORTING.md: twelve steps with the sizes, weights and stages of the models in a kit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from textwrap import fill

import npvlm
from npvlm.config import Config
from npvlm.files.names import expected_shapes
from npvlm.porting.kit_pictures import MAIN
from npvlm.porting.stages import SCHEMA, TEXT, TOWER, chosen

TEMPLATE = Path(__file__).parent / "kit_files" / "PORTING.md"
ABSENT = "-"
WIDTH = 100  # of what is filled in
FAMILIES = {"gemma": "- PaliGemma 1: ", "gemma2": "- PaliGemma 2: "}  # lines of one alone

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One of the twelve.

    golden : the file of goldens/MODEL/ to compare with
    only : globs of the stages it is about
    weights : globs of the tensors it takes
    shown : globs of the stages to list, where that is not all
    mine : the folder of the port's dump
    """

    golden: str
    only: str
    weights: str = ""
    shown: str | None = None
    mine: str = "mine"


STEPS = (
    Step(f"pictures/{MAIN}", "image.*"),
    Step("prefill", "pixel_values"),
    Step("prefill", "input_ids,positions"),
    Step("prefill", f"{TOWER}.embeddings*", f"{TOWER}.embeddings.*"),
    Step("prefill", f"{TOWER}.encoder.layers.0*", f"{TOWER}.encoder.layers.0.*"),
    Step("prefill", f"{TOWER}.*", f"{TOWER}.post_layernorm.*", f"{TOWER}.post_layernorm"),
    Step("prefill", "multi_modal_projector", "multi_modal_projector.*"),
    Step("prefill", "inputs_embeds", f"{TEXT}.embed_tokens.*"),
    Step("prefill", f"{TEXT}.layers.0*", f"{TEXT}.layers.0.*"),
    Step("prefill", f"{TEXT}.*", f"{TEXT}.norm.*", f"{TEXT}.norm"),
    Step("prefill", "language_model.logits", f"{TEXT}.embed_tokens.*,language_model.lm_head.*"),
    Step(
        "step",
        "positions,language_model.*",
        shown="positions,language_model.logits",
        mine="mine-step",
    ),
)


@dataclass(frozen=True)
class Golden:
    """What the page says of one model of a kit.

    shapes : of the stages of each golden, "prefill", "step" and pictures, by name
    held : whether the prefill's golden has the numbers of every stage
    answer : the ids of the answer before the decoding step
    """

    name: str
    config: Config
    shapes: Mapping[str, Mapping[str, Shape]]
    held: bool
    prompt: str
    answer: Sequence[int]


def page(goldens: Sequence[Golden], folder: str | None) -> str:
    """The text of PORTING.md; the commands are for the first model.

    folder : of the models inside the kit, None where their weights are not in it
    """
    main = goldens[0]
    values = {
        "made_by": f"npvlm {npvlm.__version__}",
        "schema": str(SCHEMA),
        "main": main.name,
        "prompt": main.prompt,
        "step": str(len(main.answer)),
        "answer": " ".join(map(str, main.answer)),
        "models": _models(goldens, folder),
        "held": _held(goldens),
        "sizes": _sizes(goldens),
        "next": _next(goldens),
    }
    for number, step in enumerate(STEPS, 1):
        values[f"compare_{number}"] = command(step, main.name)
        values[f"stages_{number}"] = _stages(step, goldens)
        values[f"weights_{number}"] = _weights(step, goldens)
    present = {golden.config.text_config.model_type for golden in goldens}
    text = _for_families(TEMPLATE.read_text(encoding="utf-8"), present)
    return Template(text).substitute(values)


def command(step: Step, model: str) -> str:
    """The command that ends a step."""
    golden = f"goldens/{model}/{step.golden}.safetensors"
    return f"npvlm compare {golden} {step.mine}/ --complete --only '{step.only}'"


def _for_families(text: str, present: set[str]) -> str:
    """Drop the lines that begin with a family that no model is of."""
    absent = tuple(start for family, start in FAMILIES.items() if family not in present)
    lines = [line for line in text.splitlines() if not line.startswith(absent or "\0")]
    return "\n".join(lines) + "\n"


def _models(goldens: Sequence[Golden], folder: str | None) -> str:
    names = " and ".join(f"`{golden.name}`" for golden in goldens)
    if folder is None:
        return f"The goldens are of {names}, whose weights are not in this folder."
    places = ", ".join(f"`{folder}/{golden.name}`" for golden in goldens)
    return _wrapped(
        f"The models are in {places}: config.json, weights and vocabulary, in the form in which "
        "real ones are published. `pg1` (PaliGemma 1, float32 weights) and `pg2` (PaliGemma 2, "
        "bfloat16 weights, two key/value heads) are random and small; `shapes` (PaliGemma 1, "
        "bfloat16 weights) is trained, to speak about drawn shapes. Each has goldens of its own; "
        "the commands below are for the first."
    )


def _held(goldens: Sequence[Golden]) -> str:
    pictures = "Those of pictures have the 8-bit stages, where these are small."
    thin = [f"`{golden.name}`" for golden in goldens if not golden.held]
    if not thin:
        return _wrapped(f"The safetensors of runs have the numbers of every stage. {pictures}")
    return _wrapped(
        f"To stay small, the prefill of {' and '.join(thin)} has the numbers of some stages only, "
        f"of the first layers and of what stands between the parts. {pictures} The rest is "
        "compared by its sketches."
    )


def _next(goldens: Sequence[Golden]) -> str:
    last = "Then a published model: `npvlm kit FOLDER -o DIR` writes all this for it."
    others = [golden.name for golden in goldens[1:]]
    if not others:
        return last
    names = " and ".join(f"`{name}`" for name in others)
    return _wrapped(f"Do the same for {names}: put the name in the commands. {last}")


def _sizes(goldens: Sequence[Golden]) -> str:
    rows: list[tuple[str, Callable[[Config], object]]] = [
        ("`text_config.model_type`", lambda c: c.text_config.model_type),
        ("R, `image_size`", lambda c: c.vision_config.image_size),
        ("`patch_size`", lambda c: c.vision_config.patch_size),
        ("P", lambda c: c.vision_config.num_patches),
        ("tower: layers", lambda c: c.vision_config.num_hidden_layers),
        ("tower: D", lambda c: c.vision_config.hidden_size),
        ("tower: F", lambda c: c.vision_config.intermediate_size),
        ("tower: H", lambda c: c.vision_config.num_attention_heads),
        ("tower: d", lambda c: c.vision_config.head_dim),
        ("decoder: layers", lambda c: c.text_config.num_hidden_layers),
        ("decoder: D", lambda c: c.text_config.hidden_size),
        ("decoder: F", lambda c: c.text_config.intermediate_size),
        ("decoder: H", lambda c: c.text_config.num_attention_heads),
        ("decoder: K", lambda c: c.text_config.num_key_value_heads),
        ("decoder: d", lambda c: c.text_config.head_dim),
        ("V", lambda c: c.text_config.vocab_size),
        ("`rms_norm_eps`", lambda c: c.text_config.rms_norm_eps),
        ("`rope_theta`", lambda c: c.text_config.rope_theta),
        ("scores are multiplied by", lambda c: f"{c.text_config.attention_scale:.8g}"),
        ("soft-cap of scores", lambda c: c.text_config.attn_logit_softcapping or ABSENT),
        ("soft-cap of logits", lambda c: c.text_config.final_logit_softcapping or ABSENT),
        ("window", lambda c: c.text_config.sliding_window or ABSENT),
        ("id of an image token", lambda c: c.image_token_index),
        ("ids that end an answer", lambda c: ", ".join(map(str, c.eos_token_ids))),
    ]
    return _table("", goldens, ((name, [value(g.config) for g in goldens]) for name, value in rows))


def _stages(step: Step, goldens: Sequence[Golden]) -> str:
    shapes = [golden.shapes[step.golden] for golden in goldens]
    return _shape_table("stage", step.shown or step.only, shapes, goldens)


def _weights(step: Step, goldens: Sequence[Golden]) -> str:
    shapes = [expected_shapes(golden.config) for golden in goldens]
    return _shape_table("tensor", step.weights, shapes, goldens)


def _shape_table(
    head: str, patterns: str, shapes: Sequence[Mapping[str, Shape]], goldens: Sequence[Golden]
) -> str:
    """A row for each name that fits, in the order of the model that has the most of them."""
    fitting = [[name for name in known if chosen(name, patterns)] for known in shapes]
    names = max(fitting, key=len)
    rows = ((f"`{n}`", [_shape(known.get(n)) for known in shapes]) for n in names)
    return _table(head, goldens, rows)


def _shape(shape: Shape | None) -> str:
    return ABSENT if shape is None else json.dumps(list(shape))


def _wrapped(text: str) -> str:
    return fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _table(
    head: str, goldens: Sequence[Golden], rows: Iterable[tuple[str, Sequence[object]]]
) -> str:
    lines = [[head, *(f"`{golden.name}`" for golden in goldens)]]
    lines.append(["---"] * len(lines[0]))
    lines += [[name, *map(str, values)] for name, values in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
