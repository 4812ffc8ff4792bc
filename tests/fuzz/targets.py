"""The parsers that are fuzzed: each takes any bytes, and holds what must be true of its result.

What is read from a file is put into the current folder.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from npvlm.answers.answer import Answer, Seconds
from npvlm.answers.boxes import MASK_CODES, Box, parse_boxes
from npvlm.answers.detection import Detection
from npvlm.answers.formats import COLUMNS, coco, csv_lines, label_numbers, yolo_lines
from npvlm.answers.masks import whole_pixels
from npvlm.config import Config, parse_config, parse_json, read_json
from npvlm.files.checkpoint import by_name, find_differences, grouped, read_header
from npvlm.files.writer import ITEM_BYTES
from npvlm.porting.dumps import open_dump
from tests.fuzz.changes import Pick, change, damaged, safetensors
from tests.fuzz.claims import value_or_sentence
from tests.tiny import tiny_config

Target = Callable[[bytes], None]
Change = Callable[[bytes, Pick], bytes]

_SIDES = (1, 2, 3, 7, 224, 640, 1024, 65535)
_WORDS = (
    *["<loc", "<seg", ">", "0", "1", "9", "1023", "1024", "000", "127", "128", ";"],
    *(" ", " ; ", "-", "cat", "red circle", "é", "\n", "\t", "\0", "\x1b", '"', ",", "<"),
    *("<image>", "<eos>", "\u2028"),
    *("<loc0000>", "<loc1023>", "<loc0512>", "<seg000>", "<seg127>", "<seg064>" * 16, "\ud800"),
)
_PLACE = re.compile(r"<loc(?:0\d{3}|10[01]\d|102[0-3])>", re.ASCII)
_CODE = re.compile(r"<seg(?:0\d{2}|1[01]\d|12[0-7])>", re.ASCII)
_TOKEN = re.compile(f"{_PLACE.pattern}|{_CODE.pattern}", re.ASCII)


def answers(data: bytes) -> None:
    """Boxes lie in the picture, say the text they came from, and no part of an answer is lost."""
    head, rest = (data + bytes(4))[:4], data[4:]
    width, height = _SIDES[head[0] % len(_SIDES)], _SIDES[head[1] % len(_SIDES)]
    bins, whole = (1024, 1023)[head[2] % 2], bool(head[3] % 2)
    text = answer_text(rest)
    found = parse_boxes(text, width, height, bins, whole=whole)
    for box in found.boxes:
        _check_box(box, text, width, height, bins)
    if head[3] & 4:
        for box in found.boxes:
            again = parse_boxes(written(box, width, height, bins), width, height, bins)
            assert again.boxes == [box] and again.unread == []
    unread = "\n".join(found.unread)
    assert len(_PLACE.findall(text)) == 4 * len(found.boxes) + len(_PLACE.findall(unread))
    masks = sum(bool(box.codes) for box in found.boxes)
    assert len(_CODE.findall(text)) == MASK_CODES * masks + len(_CODE.findall(unread))
    kept = "".join(box.label for box in found.boxes) + _TOKEN.sub("", unread)
    assert sorted(_letters(kept)) == sorted(_letters(_TOKEN.sub("", text)))
    if head[3] & 2:
        _check_formats(detection(text, found.boxes, found.unread, width, height))


def answer_text(data: bytes) -> str:
    """Bytes as an answer: most of them stand for what answers are made of."""
    text = []
    for i, byte in enumerate(data):
        if byte < len(_WORDS):
            text.append(_WORDS[byte])
        elif byte >= 128:  # a place that depends on its neighbour, too
            text.append(f"<loc{(8 * (byte - 128) + data[i - 1] % 8):04d}>")
        else:
            text.append(chr(byte))
    return "".join(text)


def _letters(text: str) -> str:
    """All but the spaces and what stands between boxes."""
    return "".join(text.replace(";", "").split())


def _check_box(box: Box, text: str, width: int, height: int, bins: int) -> None:
    assert 0 <= box.x0 < box.x1 <= width * 1023 / bins
    assert 0 <= box.y0 < box.y1 <= height * 1023 / bins
    x0, y0, x1, y1 = whole_pixels(box)
    assert 0 <= x0 < x1 and 0 <= y0 < y1
    (first, last), *rest = box.spans
    assert text[first:last] == written(box, width, height, bins)[: last - first]
    for start, end in rest:
        assert text[start:end] == box.label


def written(box: Box, width: int, height: int, bins: int) -> str:
    """A box as a model writes it."""
    shares = (box.y0 / height, box.x0 / width, box.y1 / height, box.x1 / width)
    places = "".join(f"<loc{round(share * bins):04d}>" for share in shares)
    codes = "".join(f"<seg{code:03d}>" for code in box.codes)
    return f"{places}{codes} {box.label}" if box.label else places + codes


def detection(text: str, boxes: list[Box], unread: list[str], width: int, height: int) -> Detection:
    """What `detect` would give for these boxes."""
    seconds = Seconds(0.0, 0.0, 0.0)
    answer = Answer(
        "a.png", "detect cat", text, [], [], [], [], "eos", "m", "float32", None, seconds
    )
    return Detection(answer, width, height, ["cat"], boxes, unread, b"")


def _check_formats(found: Detection) -> None:
    """Every format reads back, and says the same boxes."""
    again = json.loads(found.to_json())
    assert [box["label"] for box in again["boxes"]] == [box.label for box in found.boxes]
    assert again["text"] == found.answer.text and again["unread"] == found.unread
    lines = csv_lines(found)
    rows = list(csv.reader(io.StringIO("\n".join(lines), newline="")))
    assert [row[1] for row in rows] == [box.label for box in found.boxes]
    assert all(len(row) == len(COLUMNS) for row in rows)
    numbers = label_numbers([found])
    names = {number: label for label, number in numbers.items()}
    for line, box in zip(yolo_lines(found, numbers), found.boxes, strict=True):
        number, *shares = line.split(" ")
        assert names[int(number)] == box.label
        assert len(shares) == 4 and all(0 <= float(share) <= 1 for share in shares)
    boxes = coco([found])["annotations"]
    assert [names[box["category_id"] - 1] for box in boxes] == [box.label for box in found.boxes]


def config(data: bytes) -> None:
    """A config that is read has sizes that fit each other; its "generation" is the other file."""
    try:
        values: Any = parse_json(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        path = Path("config.json")
        path.write_bytes(data)
        assert value_or_sentence(read_json, path) is None
        return
    generation = values.pop("generation", None)
    generation = generation if isinstance(generation, dict) else None
    found = value_or_sentence(parse_config, values, generation, "x/")
    if found is not None:
        check_config(found)


def check_config(found: Config) -> None:
    """What the computation takes for granted."""
    text, vision = found.text_config, found.vision_config
    assert text.num_attention_heads % text.num_key_value_heads == 0 and text.head_dim % 2 == 0
    assert vision.head_dim * vision.num_attention_heads == vision.hidden_size
    assert vision.num_patches >= 1 and found.projection_dim == text.hidden_size
    assert len(text.layer_types) == text.num_hidden_layers
    assert text.sliding_window is not None or "sliding_attention" not in text.layer_types
    assert 0 < text.attention_scale < float("inf")
    assert all(type(token) is int and token >= 0 for token in found.eos_token_ids)
    hash(found)


def header(data: bytes) -> None:
    """Every tensor of a header that is read lies in its file, and is as large as it says."""
    path = Path("model.safetensors")
    path.write_bytes(data)
    tensors = value_or_sentence(read_header, path)
    if tensors is None:
        return
    for tensor in tensors:
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)
        if size := ITEM_BYTES.get(tensor.dtype):
            assert size * math.prod(tensor.shape) == tensor.nbytes
    stored = value_or_sentence(by_name, tensors)
    if stored is not None:
        for _, names in find_differences(stored, _small()).said():
            grouped(names)


@cache
def _small() -> Config:
    return tiny_config("gemma2", num_hidden_layers=1)


def manifest(data: bytes) -> None:
    """A manifest that is read describes every stage that it lists."""
    path = Path("manifest.json")
    path.write_bytes(data)
    dump = value_or_sentence(open_dump, path)
    if dump is not None:
        for name, entry in dump.described().items():
            assert entry["name"] == name and isinstance(entry["shape"], list)


def change_json(data: bytes, pick: Pick) -> bytes:
    """One place in a JSON document changed, or one byte."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return damaged(data, pick)
    if not pick(8):
        return damaged(data, pick)
    return json.dumps(change(value, pick)).encode("utf-8", "surrogatepass")


def change_header(data: bytes, pick: Pick) -> bytes:
    """One place in a safetensors header changed, mostly with the file as long as it says."""
    size = int.from_bytes(data[:8], "little")
    try:
        value: Any = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError, OverflowError):
        return damaged(data, pick)
    if not pick(8):
        return damaged(data, pick)
    value, rest = change(value, pick), data[8 + size :]
    entries = value.values() if isinstance(value, dict) else ()
    ends = [entry.get("data_offsets") for entry in entries if isinstance(entry, dict)]
    ends = [end[1] for end in ends if isinstance(end, list) and len(end) == 2]
    length = max(
        (end for end in ends if type(end) is int and 0 <= end <= len(rest) + 64), default=0
    )
    if pick(4):
        rest = (rest + bytes(length))[:length]
    return safetensors(value, rest)


TARGETS: dict[str, tuple[Target, Change]] = {
    "answers": (answers, damaged),
    "config": (config, change_json),
    "header": (header, change_header),
    "manifest": (manifest, change_json),
}
