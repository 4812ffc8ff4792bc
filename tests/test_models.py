"""`npvlm models`: what it lists, for whom, and what it says of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from npvlm.config import PRECISIONS, parse_config
from npvlm.files.needs import weight_bytes, working_bytes
from npvlm.files.published import PUBLISHED, config_values
from npvlm.work import models as job
from npvlm.work.models import Listed, list_models
from tests.test_cli import one_line, run
from tests.test_hub import COMMIT, ONE, SHARDS, WHOLE, save
from tests.test_hub import home as home  # a fixture: every test here has an empty cache


def by_name(*words: str) -> dict[str, Listed]:
    return {model.name: model for model in list_models(words).models}


def shown(*arguments: str) -> str:
    result = run("models", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 100
    return result.stdout


def test_a_new_user_sees_what_is_for_general_use_and_where_the_rest_is() -> None:
    text = shown()
    assert "shapes" in text and len(text.splitlines()) < 50
    for name, model in PUBLISHED.items():
        assert (f"{name} " in text) == (model.task in (None, "docci"))
    assert "55 more" in text and "`npvlm models --all`" in text
    assert "Apache-2.0" in text and "Gemma terms of use" in text


def test_all_of_them_are_shown_when_asked_for() -> None:
    text = shown("--all")
    assert all(f"  {name} " in text for name in PUBLISHED)
    assert "more are" not in text


def test_words_choose_by_name_and_by_purpose() -> None:
    assert set(by_name("mix", "448", "2-")) == {f"paligemma2-{n}b-mix-448" for n in (3, 10, 28)}
    assert set(by_name("documents")) == {f"paligemma-3b-ft-docvqa-{n}" for n in (224, 448, 896)}
    assert set(by_name("PT")) == {name for name, m in PUBLISHED.items() if m.kind == "pt"}
    assert set(by_name("toy")) == {"shapes"}
    assert "paligemma-3b-ft-docvqa-896" in shown("documents")
    nothing = run("models", "mix", "nothing")
    assert nothing.returncode == 2 and "mix and nothing" in one_line(nothing)


def test_json_has_every_number_in_bytes() -> None:
    result = run("models", "paligemma2-28b-pt-896", "--json")
    listing = json.loads(result.stdout)
    assert list(listing) == ["memory_free", "disk_free", "cache", "models"]
    [model] = listing["models"]
    assert model["fetch"] == 55_309_821_408 and model["repo"] == "google/paligemma2-28b-pt-896"
    assert (model["licence"], model["here"]) == ("Gemma terms of use", "")
    config = parse_config(config_values("paligemma2-28b", 896))
    for precision in PRECISIONS:
        weights, need = weight_bytes(config, precision), model["needs"][precision]
        assert need["memory"] == weights + working_bytes(config)
        packed = weights if precision in ("int8", "int4") else 0
        assert need["disk"] == model["fetch"] + packed


@pytest.mark.parametrize("free", [5_000_000_000, 2_500_000_000, None])
def test_what_does_not_fit_is_said_at_each_precision(monkeypatch, free: int | None) -> None:
    monkeypatch.setattr(job, "available_memory", lambda: free)
    needs = by_name("paligemma-3b-mix-224")["paligemma-3b-mix-224"].needs
    fits = {precision: need.memory_suffices for precision, need in needs.items()}
    expected = {"float32": False, "bfloat16": False, "int8": free == 5e9, "int4": True}
    assert fits == (dict.fromkeys(PRECISIONS) if free is None else expected)


def test_a_disk_may_hold_what_is_fetched_and_not_a_packed_copy_as_well(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=8_000_000_000))
    needs = by_name("paligemma-3b-mix-224")["paligemma-3b-mix-224"].needs
    fits = {precision: need.disk_suffices for precision, need in needs.items()}
    assert fits == {"float32": True, "bfloat16": True, "int8": False, "int4": True}
    assert not any(n.disk_suffices for n in by_name("10b-pt-224").popitem()[1].needs.values())


def test_what_is_here_as_a_whole_or_in_part_is_said(home: Path) -> None:
    save(home, ONE, "bfloat16", COMMIT, WHOLE)
    partial = save(home, "google/paligemma2-3b-mix-224", "main", COMMIT, SHARDS)
    (partial / "model-2.safetensors").unlink()
    found = by_name()
    assert {name: m.here for name, m in found.items() if m.here} == {
        "shapes": "yes",
        "shapes2": "yes",
        "paligemma-3b-mix-224": "yes",
        "paligemma2-3b-mix-224": "part",
    }
    assert found["paligemma-3b-mix-224"].needs["float32"].disk == 0
    lines = shown("mix", "224").splitlines()
    ends = {line.split()[0]: line.split()[-1] for line in lines if line.startswith("  pali")}
    assert (ends["paligemma-3b-mix-224"], ends["paligemma2-3b-mix-224"]) == ("yes", "part")


def test_numbers_too_large_for_this_machine_are_marked() -> None:
    listing = list_models(("paligemma2-28b-mix-224",))
    [row] = [line for line in shown("28b-mix-224").splitlines() if line.startswith("  pali")]
    need = listing.models[0].needs["float32"]
    assert ("!" in row.split()[1]) == (not need.disk_suffices)
    if need.memory_suffices is not None:
        assert ("!" in row.split()[2]) == (not need.memory_suffices)
