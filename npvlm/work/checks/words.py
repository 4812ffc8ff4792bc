"""Checks of a tokenizer: Gemma's published ids, or a vocabulary of its own that is sound."""

from __future__ import annotations

from pathlib import Path

from npvlm.api import Model
from npvlm.decoding.prompt import layout
from npvlm.work.checks.finding import Finding, settle
from npvlm.work.inspect import find_vocabulary

# Text between <bos> and the newline, and its ids in Gemma's vocabulary.
GOLDEN_IDS: dict[str, list[int]] = {
    "": [],
    "caption en": [21209, 659],
    "answer en Where is the cow standing?": [13072, 659, 7890, 603, 573, 13910, 9980, 235336],
    "detect cat ; dog": [39208, 4401, 2161, 5929],
    "  two  spaces ": [139, 9721, 139, 46633, 235248],
    "<loc0001><loc0002><loc0003><loc1023> cat ; <loc0000>": [
        *(256001, 256002, 256003, 257023, 4401, 2161, 235248, 256000)
    ],
    "segment a dog<seg005>": [32318, 476, 5929, 257029],
    "ünïcode 🐄 x": [5268, 236370, 2564, 235248, 246873, 1141],
    "cow standing on the beach": [14706, 9980, 611, 573, 8318],
    "beach": [54901],
}
TEXTS = ("caption en", "answer en how many circles?", "  two  spaces ", "a\nb", "482 ; ünï 🐄")
_MARKS = ("<loc", "<seg")


def check_words(model: Model, folder: Path) -> Finding:
    """Hold the tokenizer against the golden ids where its vocabulary is Gemma's, and to itself."""
    vocabulary = find_vocabulary(folder, model.config)
    goldens = GOLDEN_IDS if vocabulary.published else {}
    marks = [piece for piece, token in vocabulary.ids.items() if token and piece[:4] in _MARKS]
    wrong = [*_wrong_layout(model), *_wrong_ids(model, marks, goldens)]
    said = f"{len(TEXTS)} texts there and back; 1 id each for {' and '.join(marks) or 'no mark'}"
    whose = f"Gemma's, {len(goldens)} golden texts" if goldens else "a vocabulary of its own"
    return settle("tokenizer ids", not wrong, "; ".join(wrong) or f"{whose}; {said}")


def _wrong_layout(model: Model) -> list[str]:
    """An empty prompt about a picture of two tokens: <bos> once, behind it, and one newline."""
    tokenizer = model.tokenizer
    image, bos, newline = tokenizer.image_id, tokenizer.bos_id, tokenizer.newline_id
    wrong = []
    if len({image, bos, newline, tokenizer.eos_id}) < 4:
        wrong.append("two of <image>, <bos>, <eos> and newline have the same id")
    if layout(tokenizer, "", 2).tolist() != [image, image, bos, newline]:
        wrong.append("an empty prompt is laid out wrongly, expected <image> <image> <bos> newline")
    return wrong


def _wrong_ids(model: Model, marks: list[str], goldens: dict[str, list[int]]) -> list[str]:
    """Marks are one id each, golden texts have their ids, and every text comes back as it was."""
    tokenizer, wrong = model.tokenizer, []
    for text in (*TEXTS, *marks, *goldens):
        ids = tokenizer.encode(text)
        back = tokenizer.decode(ids)
        if text in marks and len(ids) != 1:
            wrong.append(f"{text} becomes {ids}, expected one id")
        elif ids != goldens.get(text, ids):
            wrong.append(f"{text!r} becomes {ids}, expected {goldens[text]}")
        elif back != text:
            wrong.append(f"{text!r} comes back as {back!r}")
    return wrong
