"""The tour and its neighbours say what is so: quotes, links, figures, tables, printed output."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import npvlm
from docs import figures, tables
from npvlm.config import parse_config
from npvlm.files.pictures import Preprocessor, pixel_values
from npvlm.porting.stages import stages
from tests.published import paligemma, paligemma2
from tests.tiny import tiny_config

ROOT = Path(npvlm.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [DOCS / name for name in ("tour.md", "porting.md", "errors.md")]
TOUR, PORTING, ERRORS = (page.read_text(encoding="utf-8") for page in PAGES)

SOURCE = re.compile(r"^From \[([^\]]+)\]\(\.\./([^)]+)\), `([^`]+)`:$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


def quotes() -> list[tuple[str, str, str]]:
    """Every quoted block of the tour: its file, its function, its lines."""
    found = []
    for block in BLOCK.finditer(TOUR):
        *_, source = SOURCE.finditer(TOUR, 0, block.start())
        assert source[1] == source[2]
        found.append((source[1], source[3], block[1]))
    return found


def lines_of(path: str, function: str) -> str:
    """The source of a function, which may be a method."""
    text = (ROOT / path).read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for name in function.split("."):
        node = next(n for n in ast.walk(node) if getattr(n, "name", "") == name)
    assert isinstance(node, ast.FunctionDef)
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])


@pytest.mark.parametrize(("path", "function", "lines"), quotes(), ids=lambda v: v.split("\n")[0])
def test_every_quote_of_the_tour_stands_in_its_function(
    path: str, function: str, lines: str
) -> None:
    source = lines_of(path, function).splitlines()
    count = len(lines.splitlines())
    runs = (source[i : i + count] for i in range(len(source)))
    assert lines in [textwrap.dedent("\n".join(run)) + "\n" for run in runs]


def test_the_tour_has_thirteen_stops_and_each_quotes_code_and_names_stages() -> None:
    stops = re.split(r"^## (?=\d+\. )", TOUR, flags=re.MULTILINE)[1:]
    assert [int(stop.split(".")[0]) for stop in stops] == list(range(1, 14))
    for stop in stops:
        assert SOURCE.search(stop)
        assert "**In and out.**" in stop or stop.startswith("1. ")
        assert "**What ports get wrong.**" in stop
        assert "In a trace:" in stop


def test_the_names_of_a_trace_in_the_tour_are_stages() -> None:
    known = {stage.name for family in ("gemma", "gemma2") for stage in stages(tiny_config(family))}
    said = re.findall(r"^In a trace:(.*?)(?:\n\n|\Z)", TOUR, re.MULTILINE | re.DOTALL)
    names = [n.replace("{i}", "0") for part in said for n in re.findall(r"`([^`]+)`", part)]
    assert len(names) > 30
    short = {"k_proj", "v_proj"}
    assert [name for name in names if name not in known | short] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_figures_are_there(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_figure_is_shown_by_the_tour() -> None:
    shown = {Path(link).stem for link in LINK.findall(TOUR) if link.endswith(".svg")}
    drawn = {path.stem for path in figures.FOLDER.glob("*.svg")}
    assert shown == drawn == set(figures.FIGURES)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_xml_and_what_the_script_draws(name: str) -> None:
    stored = (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(stored).tag.endswith("svg")
    drawn = figures.FIGURES[name]().svg()
    if name in figures.TRAINED:
        assert drawn.count("<") == stored.count("<")
    else:
        assert drawn == stored, "run: python docs/figures.py"


def test_the_tables_of_the_porting_page_are_those_of_the_code() -> None:
    assert tables.current(PORTING) == PORTING, "run: python docs/tables.py"
    assert PORTING.count("<!-- end of table -->") == len(tables.TABLES)


@pytest.mark.parametrize("side", tables.SIDES)
def test_the_sizes_of_the_tables_are_those_of_the_published_configs(side: int) -> None:
    published = [paligemma(side), *(paligemma2(size, side) for size in ("3b", "10b", "28b"))]
    for values, config in zip(published, tables.models(side).values(), strict=True):
        assert parse_config(values) == config


@pytest.mark.parametrize("seed", range(4))
def test_the_listing_of_the_porting_page_makes_pixels_to_the_bit(seed: int) -> None:
    listing: dict[str, Any] = {}
    exec(BLOCK.findall(PORTING)[0], listing)
    rng, side = np.random.default_rng(seed), 28
    settings = Preprocessor(side, side, (0.5,) * 3, (0.5,) * 3, 1 / 255, Image.Resampling.BICUBIC)
    sizes = [*rng.integers(1, 130, (20, 2)), (28, 28), (28, 90), (90, 28), (300, 29)]
    for h, w in sizes:
        picture = rng.integers(0, 256, (h, w, 3), np.uint8)
        ours = pixel_values(Image.fromarray(picture), settings)
        np.testing.assert_array_equal(listing["pixel_values"](picture, side), ours)


@pytest.mark.parametrize(("code", "output"), SHOWN.findall(ERRORS))
def test_the_page_of_errors_prints_what_it_says(code: str, output: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    assert said.getvalue() == output


def test_every_listing_of_the_page_of_errors_has_its_output() -> None:
    assert len(BLOCK.findall(ERRORS)) == len(SHOWN.findall(ERRORS)) == ERRORS.count('\n## "')
