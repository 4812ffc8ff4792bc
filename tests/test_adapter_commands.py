"""--adapter on the command line: what answers, what is said, what is recorded."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest

import npvlm
from npvlm.cli.commands import COMMANDS
from npvlm.errors import UsageError
from npvlm.opening import BUNDLED
from npvlm.porting.compare import compare, model_of
from npvlm.porting.dumps import save_trace
from npvlm.porting.trace import trace
from npvlm.work.demo import draw_picture
from npvlm.work.doctor import doctor
from npvlm.work.inspect_adapter import adapter_page, inspect_adapter
from npvlm.work.limits import stored_bytes
from tests.lora import lora_tensors, save_lora
from tests.test_cli import one_line, run

BASE = BUNDLED / "shapes"
GOLDEN = Path(__file__).parent.parent / "golden"
ANSWER = "a red circle and a blue square and an orange star"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    draw_picture().save(path)
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that makes `shapes` answer otherwise."""
    targets = ("q_proj", "v_proj", "up_proj", "linear")
    return save_lora(
        tmp_path_factory.mktemp("lora"),
        lora_tensors(BASE, targets=targets),
        "modules of transformers 5",
        base_model_name_or_path="me/base",
    )


def test_an_adapter_answers_and_another_base_is_said(photo: Path, lora: Path) -> None:
    result = run("caption", photo, "--adapter", lora)
    assert result.returncode == 0 and result.stdout.strip() != ANSWER
    assert result.stderr.startswith(
        f"npvlm: {lora} was made for me/base; it is right if shapes is the same.\n"
    )
    assert run("caption", photo, "--adapter", lora, "-q").stderr == ""


def test_every_command_that_runs_a_model_takes_an_adapter() -> None:
    known = {
        command.name: {p.name for p in command.params} for command in chain(*COMMANDS.values())
    }
    with_model = {name for name, params in known.items() if params & {"model", "source"}}
    without = {"fetch", "inspect", "kit", "models", "tokens"}  # which run none, or as published
    without |= {"embed", "search"}  # of a ColPali, which is one with its adapter merged
    assert {name for name in with_model if "adapter" not in known[name]} <= without
    assert {name for name, params in known.items() if "adapter" in params} >= {
        *("ask", "batch", "bench", "caption", "chat", "compare", "convert", "detect", "doctor"),
        *("explain", "features", "generate", "ocr", "replay", "score", "segment", "trace"),
    }


@pytest.mark.parametrize(
    "arguments",
    [["detect", "PHOTO", "cat"], ["bench"], ["convert", "shapes", "new"]],
    ids=lambda arguments: arguments[0],
)
def test_an_adapter_that_is_not_there_is_said(
    photo: Path, tmp_path: Path, arguments: list[str]
) -> None:
    given = [str(photo) if word == "PHOTO" else word for word in arguments]
    result = run(*given, "--adapter", tmp_path / "absent", cwd=tmp_path)
    assert result.returncode == 3
    assert (
        f"{tmp_path / 'absent'} is not there, expected a folder with adapter_config.json"
        in (result.stderr.splitlines()[-1])
    )
    assert list(tmp_path.iterdir()) == []


def test_records_name_the_adapter_and_a_run_with_another_is_not_resumed(
    photo: Path, lora: Path, tmp_path: Path
) -> None:
    command = ["batch", photo, "--task", "caption", "-q", "-o", tmp_path / "x.jsonl"]
    assert run(*command, "--adapter", lora).returncode == 0
    assert json.loads((tmp_path / "x.jsonl").read_text())["model"] == f"shapes+{lora}"
    assert run(*command, "--resume", "--adapter", lora).returncode == 0
    result = run(*command, "--resume")
    assert result.returncode == 2 and f'has model "shapes+{lora}"' in one_line(result)


def test_convert_merges_without_a_precision(lora: Path, photo: Path, tmp_path: Path) -> None:
    result = run("convert", "shapes", tmp_path / "merged", "--adapter", lora)
    assert result.returncode == 0 and "was made for me/base" in result.stderr
    merged, beside = npvlm.load(tmp_path / "merged"), npvlm.load("shapes", adapter=lora)
    assert merged.caption(photo).text == beside.caption(photo).text != ANSWER


def test_a_trace_names_its_adapter_and_is_held_against_that_model_alone(
    lora: Path, tmp_path: Path
) -> None:
    own, plain = npvlm.load("shapes", ops="numpy", adapter=lora), npvlm.load("shapes", ops="numpy")
    path = tmp_path / "x.safetensors"
    save_trace(trace(own, draw_picture(), "caption en", only="*logits"), path, {})
    assert json.loads(path.with_suffix(".json").read_text())["adapter"] == str(lora)
    found = model_of(path)
    assert found is not None and found.adapter is not None and found.adapter.folder == lora
    assert compare(path, path, model=own).verdict.same
    with pytest.raises(UsageError, match=f"that of shapes with --adapter {lora}"):
        compare(path, path, model=plain)
    save_trace(trace(plain, draw_picture(), "caption en", only="*logits"), path, {})
    with pytest.raises(UsageError, match="is not the model of"):
        compare(path, path, model=own)


def test_the_doctor_checks_a_model_with_its_adapter(
    lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npvlm.work.doctor._own_checks", list)
    found = [f for f in doctor("shapes", None, lora) if f.verdict != "note"]
    loaded = [number for number, f in enumerate(found) if f.name == "load"][-1]
    assert found[loaded].says == f"shapes+{lora}, float32"
    assert {f.name for f in found[loaded:]} >= {"cached = uncached", "batch = single", "answer"}
    assert {f.verdict for f in found} == {"ok"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "a", "b", "--adapter", "x"], "--adapter goes with --model"),
        (["doctor", "--adapter", "x"], "--adapter is for a MODEL"),
        (["bench", "--adapter", "x", "--against", "transformers"], "--adapter is for a --model"),
        (
            ["bench", "--adapter", "x", "--synthetic", "paligemma-3b-224"],
            "--adapter is for a --mod",
        ),
        (["tokens", "hi", "--adapter", "x"], "No such option"),
        (["caption", "x.png", "--adapter", ""], "--adapter names nothing"),
        (["caption", "x.png", "--adapter", "x", "--adapter", "y"], "--adapter is given twice"),
        (["caption", "x.png", "--model", ""], "--model names nothing"),
    ],
)
def test_an_adapter_where_it_means_nothing_is_refused(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2 and says in one_line(result)


def test_inspect_says_what_an_adapter_is(lora: Path) -> None:
    result = run("inspect", lora)
    assert result.returncode == 0
    for part in ("a LoRA of rank 4, beside", "self_attn.q_proj.weight", "me/base", "would open it"):
        assert part in result.stdout
    found = json.loads(run("inspect", lora, "--json").stdout)
    tensors = lora_tensors(BASE, targets=("q_proj", "v_proj", "up_proj", "linear"))
    assert found["numbers"] == sum(w.size for w in tensors.values())
    assert found["bytes"] == (lora / "adapter_model.safetensors").stat().st_size
    assert set(found["corrected"].values()) == {4}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pg1-patterns", ["rank 3, 5, 18, beside 34 weights", "mlp.fc1.weight", "base        pg1"]),
        ("pg1-trained", ["in place of the model's", "embed_tokens.weight", "layer_norm1.bias"]),
        ("pg2-dora", ["a DoRA of rank 6"]),
        ("pg2-tables", ["position_embedding.weight"]),
    ],
)
def test_inspect_knows_every_kind(name: str, parts: list[str]) -> None:
    page = adapter_page(inspect_adapter(GOLDEN / "adapters" / name))
    assert all(part in page for part in parts)


def test_inspect_says_why_an_adapter_would_be_refused(tmp_path: Path) -> None:
    save_lora(tmp_path, lora_tensors(BASE), peft_type="IA3")
    result = run("inspect", tmp_path)
    assert result.returncode == 1 and "would refuse it" in result.stdout
    assert "of type 'IA3', expected LORA" in " ".join(result.stdout.split())


def test_a_correction_counts_to_what_a_weight_takes(lora: Path) -> None:
    weights = npvlm.load("shapes", adapter=lora).weights
    own = weights["multi_modal_projector.linear.weight"]
    base = npvlm.load("shapes").weights["multi_modal_projector.linear.weight"]
    assert stored_bytes(own) == stored_bytes(base) + 4 * 16 * sum(own.shape)
