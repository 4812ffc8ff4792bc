"""Whatever a file or an answer holds: a value or a sentence, and nothing else is touched.

`pytest tests/test_fuzz.py --hypothesis-profile thorough` tries ten times as much, each time anew.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

import npvlm
from npvlm.answers.boxes import parse_boxes
from npvlm.answers.detection import read_detection
from npvlm.answers.drawing import draw_boxes
from npvlm.answers.formats import csv_lines
from npvlm.answers.lines import json_line
from npvlm.answers.masks import Field, cut_out, outlines, place, run_lengths
from npvlm.answers.scores import Scores, candidates
from npvlm.api import Model
from npvlm.config import read_config
from npvlm.files.checkpoint import open_checkpoint
from npvlm.files.masks import open_mask_decoder
from npvlm.files.pictures import read_preprocessor
from npvlm.files.tokenizer import load_tokenizer
from npvlm.model.weights import unpack
from npvlm.porting.dumps import open_dump, save_trace
from npvlm.porting.layouts import layouts
from npvlm.porting.names import found_in, read_map
from npvlm.porting.stages import row_size, shape_of, stages
from npvlm.porting.trace import Trace, trace
from npvlm.work.batch_input import read_input
from npvlm.work.batch_output import open_records
from npvlm.work.convert import convert
from tests.fuzz import strategies as make
from tests.fuzz.changes import damaged
from tests.fuzz.claims import touching_only, value_or_sentence
from tests.fuzz.targets import (
    TARGETS,
    Change,
    change_header,
    change_json,
    check_config,
    detection,
    written,
)

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"
BUNDLED = Path(npvlm.__file__).parent / "bundled"
KEPT = sorted((HERE / "fuzz").glob("c*/*/*"))  # corpus and crashes


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_fuzzer_found_keeps_its_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [path for path in KEPT if path.parent.name == target]
    assert found
    for path in found:
        TARGETS[target][0](path.read_bytes())


# Files


@dataclass(frozen=True)
class Parser:
    """A folder that is read, the file of it that is not as it should be, and how it is changed."""

    folder: str
    file: str
    read: Callable[[Path], object]
    change: Change = change_json


def _weights(folder: Path) -> None:
    config = read_config(folder)
    for weight in open_checkpoint(folder, config).values():
        assert unpack(weight[:1], np.float32).shape[1:] == weight.shape[1:]


def _config(folder: Path) -> None:
    check_config(read_config(folder))


def _tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, read_config(folder))
    ids = tokenizer.encode("detect a cat ; <loc0012>\n \U0001f600")
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    for token in range(tokenizer.vocab_size):
        tokenizer.piece(token)
    assert isinstance(tokenizer.decode([*ids, tokenizer.vocab_size, -1]), str)


def _preprocessor(folder: Path) -> None:
    found = read_preprocessor(folder, read_config(folder))
    assert min(found.image_std) > 0 and min(found.height, found.width) > 0


def _dump(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        dump = open_dump(folder / name)
        for stage, entry in dump.described().items():
            assert stage == entry["name"]
        for stage in dump.dtypes:
            assert (
                value_or_sentence(dump.read, stage) is None or dump.read(stage).dtype.kind in "fiub"
            )

    return read


def _map(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        named = read_map(folder / name)
        assert all(isinstance(value, str) and value for value in named)
        found_in(["final", "embeds"], ["language_model.model.norm", "inputs_embeds"], named, folder)

    return read


def _list(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for item in read_input([str(folder / name)], None):
            assert (item.error is None) == (item.image is not None and item.prompt is not None)
            json_line(item.head)

    return read


def _masks(name: str) -> Callable[[Path], object]:
    return lambda folder: open_mask_decoder(folder / name)


PARSERS = {
    "config": Parser("pg2", "config.json", _config),
    "generation config": Parser("pg1", "generation_config.json", _config),
    "header": Parser("pg1", "model.safetensors", _weights, change_header),
    "packed header": Parser("int4", "model.safetensors", _weights, change_header),
    "packed config": Parser("int4", "config.json", _weights),
    "index": Parser("pg2-f16-sharded", "model.safetensors.index.json", _weights),
    "tokenizer": Parser("pg1", "tokenizer.model", _tokenizer, damaged),
    "tokenizer config": Parser("pg2", "tokenizer_config.json", _tokenizer),
    "added tokens": Parser("shapes", "added_tokens.json", _tokenizer),
    "preprocessor": Parser("pg1", "preprocessor_config.json", _preprocessor),
    "newer preprocessor": Parser("newer", "processor_config.json", _preprocessor),
    "mask decoder": Parser("dumps", "vae.npz", _masks("vae.npz"), damaged),
    "newer mask decoder": Parser(
        "dumps", "vae.safetensors", _masks("vae.safetensors"), change_header
    ),
    "dump": Parser("dumps", "full.safetensors", _dump("full.safetensors"), change_header),
    "manifest": Parser("dumps", "full.json", _dump("full.safetensors")),
    "compact trace": Parser("dumps", "compact.json", _dump("compact.json")),
    "raw dump": Parser("dumps", "raw.json", _dump("raw.bin")),
    "npz dump": Parser("dumps", "mine.npz", _dump("mine.npz"), damaged),
    "npy dump": Parser("dumps/folder", "positions.npy", _dump("."), damaged),
    "map": Parser("dumps", "map.toml", _map("map.toml"), damaged),
    "JSON map": Parser("dumps", "map.json", _map("map.json")),
    "JSON list": Parser("dumps", "list.jsonl", _list("list.jsonl"), damaged),
    "CSV list": Parser("dumps", "list.csv", _list("list.csv"), damaged),
}
MAP = {"language_model.model.norm": "final", "language_model.model.layers.{i}": "blk.{i}"}
LINES = [{"image": "a.png", "prompt": "ocr", "id": 7}, {"image": "b, c.png", "prompt": 'say "é"'}]
TABLE = 'image,prompt,id\r\na.png,ocr,7\r\n"b, c.png","say ""é""\nnow",\r\n'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid folders, small ones, for the tests to damage and mend again."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("pg1", "pg2", "pg2-f16-sharded"):
        shutil.copytree(GOLDEN / name, root / name)
    shutil.copytree(BUNDLED / "shapes", root / "shapes")
    convert(GOLDEN / "pg2", root / "int4", "int4", lambda *_: None)
    image = read_config(root / "pg2").image_token_index
    entry = {"content": "<image>", "special": True, "lstrip": False}
    _write(root / "pg2/tokenizer_config.json", {"added_tokens_decoder": {str(image): entry}})
    shutil.copytree(root / "pg1", root / "newer")
    older = (root / "newer/preprocessor_config.json").rename(root / "newer/processor_config.json")
    _write(older, {"image_processor": json.loads(older.read_text())})
    dumps = root / "dumps"
    dumps.mkdir()
    run = _traced()
    save_trace(run, dumps / "full.safetensors", {})
    save_trace(run, dumps / "raw.bin", {})
    save_trace(run, dumps / "compact.json", {}, compact=True)
    save_trace(run, dumps / "folder", {})
    np.savez(dumps / "mine.npz", **run.stages)
    vae = shutil.copy(BUNDLED / "vae.safetensors", dumps)
    arrays = open_mask_decoder(Path(vae)).items()
    np.savez(dumps / "vae.npz", **{name: unpack(w, np.float16) for name, w in arrays})
    _write(dumps / "map.json", MAP)
    (dumps / "map.toml").write_text("\n".join(f'"{key}" = "{name}"' for key, name in MAP.items()))
    (dumps / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (dumps / "list.csv").write_text(TABLE, newline="")
    return root


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def _traced() -> Trace:
    """A trace of few and small stages."""
    run = trace(npvlm.load(GOLDEN / "pg1", ops="numpy"), Image.new("RGB", (4, 3)), "ocr")
    wanted = ("positions", "input_ids", "language_model.model.norm")
    return replace(run, stages={name: run.stages[name] for name in wanted})


@pytest.mark.parametrize("name", PARSERS)
def test_a_file_that_is_changed_is_read_or_refused_in_a_sentence(folders: Path, name: str) -> None:
    parser = PARSERS[name]
    folder = folders / parser.folder
    path = folder / parser.file
    valid = path.read_bytes()
    parser.read(folder)  # imports what it takes, too

    @given(make.mutated(parser.change, valid) | make.noise())
    def holds(content: bytes) -> None:
        path.write_bytes(content)
        with touching_only(folder):
            value_or_sentence(parser.read, folder)

    try:
        holds()
    finally:
        path.write_bytes(valid)


# Answers


def test_any_answer_is_taken_apart_and_put_together_again() -> None:
    @given(st.binary(max_size=60))
    def holds(content: bytes) -> None:
        TARGETS["answers"][0](content)

    holds()


@given(st.data(), st.sampled_from([(1, 1), (3, 7), (640, 480)]), st.sampled_from([1023, 1024]))
def test_boxes_read_back_as_they_were_written(
    data: st.DataObject, size: tuple[int, int], bins: int
) -> None:
    made = data.draw(st.lists(make.boxes(*size, bins), max_size=4))
    text = " ; ".join(written(box, *size, bins) for box in made)
    found = parse_boxes(text, *size, bins)
    assert found.boxes == made and not found.unread
    rows = csv_lines(detection(text, made, [], *size))
    again = list(csv.reader(io.StringIO("\r\n".join(rows), newline="")))
    assert [row[1] for row in again] == [box.label for box in made]


@pytest.fixture(scope="module")
def model() -> Model:
    return npvlm.load("shapes", ops="numpy")


@given(data=st.data())
def test_any_tokens_make_an_answer_whose_parts_are_as_sure_as_their_tokens(
    model: Model, data: st.DataObject
) -> None:
    [first], [last] = model.tokenizer.encode("<loc0000>"), model.tokenizer.encode("<seg127>")
    tokens = st.integers(first, last) | st.integers(0, model.config.text_config.vocab_size + 2)
    ids = data.draw(st.lists(tokens, max_size=40))
    chances = data.draw(st.lists(st.floats(-50, 0), min_size=len(ids), max_size=len(ids)))
    text = model.tokenizer.decode(ids)
    answer = replace(
        detection(text, [], [], 9, 9).answer, token_ids=ids, logprobs=chances, nearby=chances
    )
    found = read_detection(answer, b"", (640, 480), model.tokenizer)
    assert all(0 <= box.confidence <= 1 for box in found.boxes)
    assert json.loads(found.to_json())["text"] == text


@given(data=st.data(), field=make.fields())
def test_masks_keep_to_their_picture_and_read_back(data: st.DataObject, field: Field) -> None:
    width, height = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    box = replace(data.draw(make.boxes(width, height)), painted=field)
    mask = place(field, box, width, height)
    assert mask.shape == (height, width)
    counts = run_lengths(mask)
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)  # outside, inside, outside, ...
    assert np.array_equal(values.reshape(width, height).T, mask)
    for ring in outlines(field, box):
        assert len(ring) >= 3
        assert all(math.isfinite(x) and math.isfinite(y) for x, y in ring)
    picture = Image.new("RGB", (width, height))
    assert min(cut_out(picture, mask, box).size) >= 1
    draw_boxes(picture, [box])
    found = detection("", [box], [], width, height)
    assert json.loads(found.to_json())["boxes"][0]["label"] == box.label
    assert found.to_coco()["annotations"][0]["area"] == np.count_nonzero(mask)


@given(st.lists(st.lists(st.floats(-1e6, 0), min_size=1, max_size=5), min_size=1, max_size=5))
def test_shares_of_scores_add_up_to_one(logprobs: list[list[float]]) -> None:
    texts = ["a"] * len(logprobs)
    found = candidates(texts, [[1]] * len(texts), logprobs)
    assert math.isclose(math.fsum(one.share for one in found), 1)
    scores = Scores("a.png", "b", found, [], "m", "float32")
    again = json.loads(scores.to_json())["candidates"]
    assert [one["total"] for one in again] == [one.total for one in found]
    assert scores.ranked()[0].total == max(one.total for one in found)


@given(st.dictionaries(make.any_text(), make.any_text() | st.floats(-1e300, 1e300)))
def test_a_line_of_json_reads_back(values: dict[str, Any]) -> None:
    line = json_line(values)
    assert json.loads(line.encode()) == values and len(line.split("\n")) == 1


# Records and dumps


RECORDS = [
    {"index": i, "image": f"{i}.png", "prompt": "ocr", "text": "é\u2028 a"} for i in range(4)
]
WHOLE = b"".join(f"{json_line(record)}\n".encode() for record in RECORDS)


@given(make.mutated(damaged, WHOLE) | st.integers(0, len(WHOLE)).map(lambda at: WHOLE[:at]))
def test_records_are_gone_on_with_from_a_whole_line_or_left_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    path.write_bytes(content)
    expected = [({key: r[key] for key in ("index", "image", "prompt")}, {}) for r in RECORDS]

    def resume() -> int:
        with open_records(path, expected, resume=True) as records:
            return records.kept

    kept = value_or_sentence(resume)
    left = path.read_bytes()
    if kept is None:
        assert left == content
    else:
        assert left == b"".join(content.splitlines(True)[:kept]) and left.count(b"\n") == kept
        assert [json.loads(line)["index"] for line in left.splitlines()] == list(range(kept))


@pytest.mark.parametrize("name", ["pg1", "pg2"])
def test_any_array_is_read_as_a_stage_of_its_shape_or_not_at_all(name: str) -> None:
    config = read_config(GOLDEN / name)
    known = stages(config)

    @given(st.data())
    def holds(data: st.DataObject) -> None:
        stage = data.draw(st.sampled_from(known))
        tokens = data.draw(st.integers(1, 6))
        shape = shape_of(stage, config, row_size(stage, config) * tokens)
        assume(shape is not None)
        assert shape is not None
        near = [shape, shape[::-1], (1, *shape), (*shape, 1), (math.prod(shape),), (), (0,), (2, 3)]
        value = data.draw(make.arrays(near))
        for layout in layouts(value, stage.name, shape, config):
            assert layout.value.shape == shape

    holds()
