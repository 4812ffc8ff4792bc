"""What a checkpoint was likely trained for, told from its names and its card, and what to ask it.

Nothing in the weights says it: pretrained (pt), mixed tasks (mix) and fine-tuned (ft) models of one
size have the same tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npvlm.config import Values, read_json
from npvlm.errors import NpvlmError
from npvlm.opening import BUNDLED

_PUBLISHED = re.compile(
    r"(?<![a-z0-9])paligemma[-_]?2?[-_](?:3b|10b|28b)[-_](pt|mix|ft)(?:[-_]([a-z0-9-]+?))?"
    r"[-_](?:224|448|896)(?![0-9])",
    re.IGNORECASE,
)
# Words beside it that do not make it another model: revisions, precisions, owners.
_PLAIN = {
    "",
    "google",
    "models",
    "main",
    "hf",
    "float32",
    "bfloat16",
    "bf16",
    "float16",
    "int8",
    "int4",
}
_BASE = re.compile(r"^base_model:\s*(?:-\s*)?(\S+)", re.MULTILINE)
_WEIGHTS = re.compile(r"\bweights,\s+(pre-?trained|fine-?tuned)\b([^.]*)", re.IGNORECASE)
_CARD = "README.md"
_CARD_BYTES = 200_000  # of a card that are looked at

_PRETRAINED = (
    "caption en (or the code of another language)",
    "ocr",
    "answer en QUESTION",
    "question en ANSWER",
    "detect THING ; THING",
    "segment THING ; THING",
    "caption <loc0000><loc0000><loc0511><loc0511>",
)
_MIXED = (*_PRETRAINED, "describe en", "cap en", "a plain question")
_ANSWER = "answer en QUESTION"
_TASKS = {
    "cococap": "caption en",
    "textcaps": "caption en",
    "widgetcap": "caption en",
    "screen2words": "caption en",
    "scicap": "caption en",
    "coco35l": "caption LANGUAGE",
    "xm3600": "caption LANGUAGE",
    "docvqa": "QUESTION",
    "chartqa": "QUESTION",
    "ai2d": "answer en QUESTION choose from: OPTION \\t OPTION",
    "aokvqa-mc": "answer en QUESTION choose from: OPTION \\t OPTION",
    "nlvr2": "answer en SENTENCE (about two pictures)",
    "refcoco-seg": "THING",
    **dict.fromkeys(("vqav2", "okvqa", "aokvqa-da", "gqa", "ocrvqa", "textvqa"), _ANSWER),
    **dict.fromkeys(("tallyqa", "rsvqa-lr", "rsvqa-hr", "vizwizvqa", "stvqa", "infovqa"), _ANSWER),
}
_SHORT = (
    "It follows no instructions: a prompt is these few words and nothing more. A long one, or "
    "words behind it, are answered shortly, wrongly or not at all."
)


@dataclass(frozen=True)
class Kind:
    """A guess, and what it rests on.

    kind : "pt", "mix", "ft", "toy" for a bundled model, or None where nothing tells
    because : the sentence that says why
    prompts : what it likely knows
    warning : what users of this kind get wrong
    """

    kind: str | None
    because: str
    prompts: tuple[str, ...]
    warning: str | None


@dataclass(frozen=True)
class Name:
    """A published model's name, where it was found, and whether it is the folder's own.

    Else it may be that of the model from which this one was fine-tuned.
    """

    name: str
    where: str
    own: bool


def published_name(model: str, folder: Path, values: Values) -> Name | None:
    """Find which published checkpoint a folder is, or began from, by what it is called.

    A folder of the hub's cache is called snapshots/REVISION: the name stands above.
    """
    resolved = folder.expanduser().resolve()
    cached = resolved.parents[1].name if resolved.parent.name == "snapshots" else ""
    named = values.get("_name_or_path")
    names = [(Path(model).name, "its name"), (resolved.name, "its name"), (cached, "its name")]
    if isinstance(named, str):
        names.append((named, "_name_or_path of its config.json"))
    for name, where in names:
        if found := _PUBLISHED.search(name):
            beside = re.split(r"[-_/.]+", name[: found.start()] + "-" + name[found.end() :])
            own = where == "its name" and {word.lower() for word in beside} <= _PLAIN
            return Name(found[0].lower().replace("_", "-"), f"{where} is {name}", own)
    return None


def likely_kind(model: str, folder: Path, values: Values) -> Kind:
    """Guess what a model was trained for: from its name, else its card, else its config.json.

    Parameters
    ----------
    model : as it was named
    values : the contents of config.json, empty where it cannot be read
    """
    if folder.resolve().parent == BUNDLED.resolve():
        prompts = f"those of {folder / _CARD}"
        return Kind("toy", "a toy that is in the box", (prompts,), None)
    name, card = published_name(model, folder, values), _card(folder)
    if name is not None and name.own:
        return _kind_of(name.name, name.where)
    if base := _BASE.search(card):
        return _fine_tuned(None, f"its {_CARD} names {base[1]} as the model that it began from")
    if name is not None:
        guess = _kind_of(name.name, name.where)
        if guess.kind == "ft":
            return guess
        because = f"{guess.because}; or fine-tuned from that"
        return Kind(guess.kind, because, guess.prompts, guess.warning)
    if said := _WEIGHTS.search(card):
        because = f'its {_CARD} says "{" ".join(said[0].split())[:100]}"'
        if said[1].lower().startswith("pre"):
            return Kind("pt", because, _PRETRAINED, _SHORT)
        if "mixture" in said[2].lower():
            return Kind("mix", because, _MIXED, None)
        return _fine_tuned(None, because)
    where = f"; its {_CARD} may say what to ask it" if card else ""
    return Kind(None, f"neither its name nor config.json nor a card tells{where}", (), None)


def _kind_of(name: str, because: str) -> Kind:
    found = _PUBLISHED.search(name)
    assert found is not None
    kind, task = found[1], found[2]
    if kind == "pt":
        return Kind("pt", because, _PRETRAINED, _SHORT)
    if kind == "mix":
        return Kind("mix", because, _MIXED, None)
    return _fine_tuned(task, because)


def _fine_tuned(task: str | None, because: str) -> Kind:
    prompt = _TASKS.get(task or "")
    said = f"the prompt of its task{f' ({task})' if task else ''}, as it was trained"
    return Kind("ft", because, (prompt or said,), _SHORT)


def _card(folder: Path) -> str:
    """The model card, or nothing where there is none that can be read."""
    path = folder / _CARD
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def raw_values(folder: Path) -> dict[str, Any]:
    """What config.json holds, for its names alone: empty where it is none."""
    try:
        return read_json(folder / "config.json")
    except NpvlmError:
        return {}
