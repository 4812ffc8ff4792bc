"""What is said of a model's memory, held to what is written and to what was measured."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from npvlm.config import Config, parse_config, read_config
from npvlm.files.needs import TEXT, weight_bytes, working_bytes
from npvlm.files.published import config_values
from npvlm.model.cache import new_cache
from npvlm.work.convert import convert
from tests.test_convert import SHAPES, a_source, quiet

# Peak anonymous memory in `npvlm bench`, one picture: the largest of its precisions.
MEASURED = {("paligemma-3b", 224): 161e6, ("paligemma2-3b", 448): 430e6}


def published(size: str, resolution: int) -> Config:
    return parse_config(config_values(size, resolution))


def tensor_bytes(folder: Path) -> int:
    """Bytes of the numbers in a folder's safetensors files, headers and padding left out."""
    total = 0
    for path in folder.glob("model*.safetensors"):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        spans = (entry["data_offsets"] for entry in header.values())
        total += sum(end - start for start, end in spans)
    return total


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("source", ["shapes", "gemma", "gemma2 untied", "gemma half"])
def test_weights_take_what_convert_writes(tmp_path: Path, source: str, precision: str) -> None:
    stored, folder = 2, SHAPES
    if source != "shapes":
        family, _, how = source.partition(" ")
        stored = 2 if how == "half" else 4
        kind = "F16" if how == "half" else "F32"
        folder, _ = a_source(tmp_path / "source", family, kind, tied=how != "untied")
    config = read_config(folder)
    assert weight_bytes(config, "float32", stored) == tensor_bytes(folder)
    convert(folder, tmp_path / "new", precision, quiet)
    written = tensor_bytes(tmp_path / "new")
    assert weight_bytes(config, precision, stored) == written
    if precision != "bfloat16":  # a packed folder has one precision, whatever is asked
        assert weight_bytes(read_config(tmp_path / "new"), "float32", stored) == written


def test_a_3b_takes_what_the_format_page_says() -> None:
    config = published("paligemma-3b", 224)
    sizes = {name: weight_bytes(config, name) for name in ("bfloat16", "int8", "int4")}
    assert {name: round(size / 1e9, 1) for name, size in sizes.items()} == {
        "bfloat16": 5.8,
        "int8": 2.9,
        "int4": 2.1,
    }
    assert weight_bytes(config, "float32", 4) == 2 * weight_bytes(config, "float32")


@pytest.mark.parametrize("size", MEASURED)
def test_a_run_takes_at_most_what_is_said_and_not_far_less(size: tuple[str, int]) -> None:
    said = working_bytes(published(*size))
    assert MEASURED[size] <= said <= 1.2 * MEASURED[size]


@pytest.mark.parametrize("size", ["paligemma-3b", "paligemma2-10b"])
def test_larger_pictures_take_more_and_the_cache_is_part_of_it(size: str) -> None:
    said = [working_bytes(published(size, side)) for side in (224, 448, 896)]
    assert said == sorted(said) and said[0] < said[2] / 3
    config = published(size, 224)
    rows = config.vision_config.num_patches + TEXT
    cache = new_cache(config.text_config, rows, "float32")
    assert said[0] > sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)
