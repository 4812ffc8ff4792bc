"""Kits: complete, small, the same each time, and every command in them is understood."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import npvlm
from npvlm.cli.compare import compare as compare_command
from npvlm.cli.kit import kit as kit_command
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.names import expected_shapes
from npvlm.files.pictures import open_picture, pixel_values
from npvlm.porting import kit as module
from npvlm.porting.compare import compare, model_of
from npvlm.porting.dumps import open_dump, save_trace
from npvlm.porting.kit import PROMPT, kit
from npvlm.porting.kit_page import STEPS
from npvlm.porting.stages import chosen, stages
from npvlm.porting.trace import trace
from npvlm.work.convert import convert

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("pg1", "pg2", "shapes")
MOST = 10_000_000  # bytes of a kit that is committed to a repository
COMMAND = re.compile(r"^npvlm compare (.*)$", re.MULTILINE)
ROW = re.compile(r"^\| `([\w.]+)` \| (.*) \|$", re.MULTILINE)


def quiet(what: str) -> None:
    """Listen to nothing."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "kit"
    kit(None, folder, quiet)
    return folder


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    return (made / "PORTING.md").read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """Behind each step's `npvlm compare`: reference, mine, --complete, --only, globs."""
    return [shlex.split(line) for line in COMMAND.findall(page)]


def test_a_kit_is_under_ten_megabytes(made: Path) -> None:
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) < MOST


def test_two_kits_have_the_same_bytes(made: Path, tmp_path: Path) -> None:
    kit(None, tmp_path / "kit", quiet)
    assert (tmp_path / "kit" / "kit.json").read_text() == (made / "kit.json").read_text()


def test_kit_json_lists_every_other_file_with_its_checksum(made: Path) -> None:
    listed = json.loads((made / "kit.json").read_text())["files"]
    files = {p.relative_to(made).as_posix(): p for p in made.rglob("*") if p.is_file()}
    assert set(listed) == set(files) - {"kit.json"}
    for name, notes in listed.items():
        data = files[name].read_bytes()
        assert notes == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_nothing_in_a_kit_names_the_folder_it_was_made_in(made: Path) -> None:
    for path in [*made.rglob("*.json"), *made.rglob("*.md")]:
        assert str(made.parent) not in path.read_text(encoding="utf-8"), path


# Models


@pytest.mark.parametrize("name", ["pg1", "pg2"])
def test_every_tensor_of_a_random_model_is_random(made: Path, name: str) -> None:
    model = npvlm.load(made / "models" / name, ops="numpy")
    for tensor, weight in model.weights.items():
        values = weight if isinstance(weight, np.ndarray) else weight.unpack()
        # Rounding to bfloat16, with 2^8 steps to a power of two, leaves few of these alike.
        assert len(np.unique(values)) > values.size**0.5, tensor


def test_the_random_models_are_of_both_families_with_one_and_two_key_value_heads(
    made: Path,
) -> None:
    configs = [npvlm.load(made / "models" / n, ops="numpy").config.text_config for n in MODELS[:2]]
    assert [(c.model_type, c.num_key_value_heads) for c in configs] == [("gemma", 1), ("gemma2", 2)]


@pytest.mark.parametrize("name", MODELS)
def test_the_stored_answers_are_those_of_the_kernels_too(made: Path, name: str) -> None:
    model = npvlm.load(made / "models" / name)
    asked = json.loads((made / "goldens" / name / "answers.json").read_text())
    assert len(asked) == 2
    for entry in asked:
        picture = made / entry["picture"]
        answer = model.generate(picture, entry["prompt"], max_tokens=entry["max_tokens"])[0]
        assert answer.token_ids == entry["token_ids"]
        assert answer.text == entry["text"]
        assert answer.prompt_token_ids == entry["prompt_token_ids"]


@pytest.mark.parametrize("name", ["pg1", "pg2"])
def test_random_models_do_not_say_one_token_for_ever(made: Path, name: str) -> None:
    asked = json.loads((made / "goldens" / name / "answers.json").read_text())
    assert all(len(set(entry["token_ids"])) > 3 for entry in asked)


# The page


def test_each_of_twelve_steps_ends_in_one_command_that_compare_understands(page: str) -> None:
    sections = re.split(r"^## \d+\. ", page, flags=re.MULTILINE)[1:]
    assert len(sections) == len(STEPS) == 12
    for section in sections:
        assert len(COMMAND.findall(section)) == 1
    for words in commands(page):
        assert compare_command.make_context("compare", words).params["only"]


def test_every_reference_named_is_there_and_every_glob_fits_a_stage_of_it(
    made: Path, page: str
) -> None:
    for name in MODELS:
        for reference, _, _, _, only in commands(page.replace("pg1", name)):
            described = open_dump(made / reference).described()
            for pattern in only.split(","):
                assert any(chosen(stage, pattern) for stage in described), (reference, pattern)


@pytest.mark.parametrize("name", MODELS)
def test_the_steps_leave_no_stage_out(made: Path, page: str, name: str) -> None:
    config = npvlm.load(made / "models" / name, ops="numpy").config
    globs = ",".join(words[-1] for words in commands(page)[:-1])
    assert [stage.name for stage in stages(config) if not chosen(stage.name, globs)] == []


@pytest.mark.parametrize("column", range(len(MODELS)), ids=MODELS)
def test_the_shapes_shown_are_those_of_the_weights_and_stages(
    made: Path, page: str, column: int
) -> None:
    place = made / "goldens" / MODELS[column]
    config = npvlm.load(made / "models" / MODELS[column], ops="numpy").config
    weights = {name: list(shape) for name, shape in expected_shapes(config).items()}
    arrays = {name: e["shape"] for name, e in open_dump(place / "prefill.json").described().items()}
    step = {name: e["shape"] for name, e in open_dump(place / "step.json").described().items()}
    _, before, last = re.split(r"^(?=## (?:1|12)\. )", page, flags=re.MULTILINE)
    shown = set()
    for text, known in ((before, weights | arrays), (last, step)):
        for name, cells in ROW.findall(text):
            cell = cells.split(" | ")[column]
            assert cell == (json.dumps(known[name]) if name in known else "-"), name
            shown.add(name)
    first = {name for name in weights if not re.search(r"\.layers\.[1-9]", name)}
    assert first <= shown


def test_a_kit_of_one_family_says_nothing_of_the_other(tmp_path: Path) -> None:
    kit(str(ROOT / "golden" / "pg2"), tmp_path / "kit", quiet)
    page = (tmp_path / "kit" / "PORTING.md").read_text(encoding="utf-8")
    assert "- PaliGemma 2: " in page
    assert "- PaliGemma 1: " not in page
    assert not (tmp_path / "kit" / "models").exists()
    assert len(commands(page)) == 12
    assert all((tmp_path / "kit" / reference).exists() for reference, *_ in commands(page))


# Goldens


@pytest.mark.parametrize("ops", ["numpy", "kernels"])  # kernels have other sums than the goldens'
@pytest.mark.parametrize("name", MODELS)
def test_a_correct_port_passes_every_step(
    made: Path, page: str, name: str, ops: str, tmp_path: Path
) -> None:
    model = npvlm.load(made / "models" / name, ops=ops)
    step = json.loads((made / "goldens" / name / "step.json").read_text())["step"]
    for number, folder in ((0, "mine"), (step, "mine-step")):
        found = trace(model, made / "pictures" / "photo.png", PROMPT, step=number)
        save_trace(found, tmp_path / folder, {})
    for reference, mine, flag, _, only in commands(page.replace("pg1", name)):
        assert flag == "--complete"
        complete = ops == "numpy"  # kernels have no gate_proj and up_proj of their own
        report = compare(made / reference, tmp_path / mine, only=only, complete=complete)
        assert report.verdict.same, report.verdict.sentence


def test_a_step_is_not_passed_with_a_stage_that_is_missing(made: Path, tmp_path: Path) -> None:
    model = npvlm.load(made / "models" / "pg1")
    found = trace(model, made / "pictures" / "photo.png", PROMPT)
    del found.stages["vision_tower.vision_model.post_layernorm"]
    save_trace(found, tmp_path / "mine", {})
    golden, only = made / "goldens" / "pg1" / "prefill.safetensors", STEPS[5].only
    assert compare(golden, tmp_path / "mine", only=only, complete=True).verdict.kind == "missing"
    loose = compare(golden, tmp_path / "mine", only=only).verdict
    assert loose.same and loose.sentence.endswith(
        "Not in the dump: vision_tower.vision_model.post_layernorm."
    )


def test_the_models_of_a_kit_are_found_from_any_folder(made: Path) -> None:
    for name in MODELS:
        found = model_of(made / "goldens" / name / "prefill.safetensors")
        assert found is not None and Path(found.name) == made / "models" / name


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_port_fails_at_the_step_that_is_wrong(
    made: Path, name: str, tmp_path: Path
) -> None:
    model = npvlm.load(made / "models" / name)
    found = trace(model, made / "pictures" / "photo.png", PROMPT)
    wrong = "vision_tower.vision_model.encoder.layers.0.mlp.gelu"
    found.stages[wrong][3, 5] += 1
    save_trace(found, tmp_path / "mine", {})
    golden = made / "goldens" / name / "prefill.safetensors"
    assert compare(golden, tmp_path / "mine", only=STEPS[3].only).verdict.same
    assert compare(golden, tmp_path / "mine", only=STEPS[4].only).verdict.stage == wrong


def test_without_room_for_all_numbers_every_stage_is_described_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 30_000
    monkeypatch.setattr(module, "ROOM", room)
    monkeypatch.setattr(module, "PICTURE_ROOM", room)
    kit(str(ROOT / "golden" / "pg1"), tmp_path / "kit", quiet)
    config = npvlm.load(ROOT / "golden" / "pg1", ops="numpy").config
    for name, count in (("prefill", len(stages(config))), ("pictures/photo", 3)):
        dump = open_dump(tmp_path / "kit" / "goldens" / "pg1" / f"{name}.safetensors")
        assert len(dump.described()) == count
        assert sum(dump.read(stage).nbytes for stage in dump.dtypes) <= room
        assert "image.resized" in dump.dtypes
    assert "input_ids" in open_dump(tmp_path / "kit/goldens/pg1/prefill.safetensors").dtypes


# Pictures


def test_the_pictures_are_what_their_names_say(made: Path) -> None:
    names = "white ramp bars checkerboard photo tall dot transparent turned"
    files = {name: made / "pictures" / f"{name}.png" for name in names.split()}
    assert set(files.values()) == set((made / "pictures").iterdir())
    stored = {}
    for name, path in files.items():
        with Image.open(path) as picture:
            stored[name] = np.asarray(picture)
    assert np.all(stored["white"] == 255)
    assert stored["dot"].shape == (1, 1, 3)
    assert stored["transparent"].shape[2] == 4
    height, width, _ = stored["tall"].shape
    assert height > 2 * width
    upright = np.asarray(open_picture(files["turned"]))
    assert np.array_equal(upright, np.rot90(stored["turned"], k=-1))  # a quarter clockwise
    shown = np.asarray(open_picture(files["transparent"]))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert stored["transparent"][0, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", MODELS)
def test_each_picture_has_a_golden_of_what_the_tower_reads(made: Path, name: str) -> None:
    model = npvlm.load(made / "models" / name, ops="numpy")
    for path in (made / "pictures").iterdir():
        dump = open_dump(made / "goldens" / name / "pictures" / f"{path.stem}.safetensors")
        assert dump.manifest is not None
        assert dump.manifest["image"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        pixels = pixel_values(open_picture(path), model.preprocessor)
        entry = dump.described()["pixel_values"]
        assert entry["shape"] == [1, *pixels.shape]
        assert entry["sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
        rounded = np.rint(pixels.transpose(1, 2, 0) * 127.5 + 127.5)
        assert np.array_equal(dump.read("image.resized"), rounded)


# The command


def test_the_command_says_what_it_does_and_where_to_begin(tmp_path: Path) -> None:
    place = tmp_path / "kit"
    result = CliRunner().invoke(kit_command, [str(ROOT / "golden" / "pg1"), "-o", str(place)])
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[0].startswith("npvlm: pg1: runs")
    assert lines[-1] == f"npvlm: {place} is written; begin with {place / 'PORTING.md'}."
    assert result.stdout == ""


def test_what_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    convert(ROOT / "golden" / "pg1", tmp_path / "packed", "int8", lambda *progress: None)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="packed as int8, expected a checkpoint as it was"):
        kit(str(tmp_path / "packed"), tmp_path / "kit", quiet)
    with pytest.raises(NpvlmError, match="'nowhere' is no model"):
        kit("nowhere", tmp_path / "kit", quiet)
    with pytest.raises(UsageError, match="is there already"):
        kit(None, tmp_path / "packed", quiet)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_files_of_a_kit_are_installed_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["npvlm"]
    package = Path(npvlm.__file__).parent
    files = [p.relative_to(package).as_posix() for p in (package / "porting/kit_files").iterdir()]
    assert len(files) == 4
    assert [f for f in files if not any(fnmatch(f, pattern) for pattern in patterns)] == []
