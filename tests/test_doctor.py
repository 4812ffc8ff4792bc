"""`npvlm doctor`: nothing is wrong here, and what is planted wrong is found and exits with 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import npvlm
from npvlm import kernels, opening
from npvlm.api import Model
from npvlm.config import parse_config
from npvlm.errors import NpvlmError
from npvlm.files.tokenizer import load_tokenizer
from npvlm.kernels import compiling
from npvlm.kernels.vectors import features
from npvlm.model import ops as definitions
from npvlm.model import paligemma
from npvlm.model.cache import Rows, new_cache
from npvlm.work import doctor as doctoring
from npvlm.work.checks import bundled, machine, twins, words
from npvlm.work.checks.finding import NOTE, OK, WRONG, Finding, run_check
from npvlm.work.checks.published import (
    ANSWERS,
    ZERO_PICTURE,
    Expectation,
    HiddenState,
    first_hidden_state,
    published_checks,
)
from npvlm.work.checks.running import Trial
from npvlm.work.demo import draw_picture
from npvlm.work.kinds import Name
from tests.published import configs
from tests.test_cli import ROOT, one_line, run
from tests.test_tokenizer import REAL

SHAPES = Path(npvlm.__file__).parent / "bundled" / "shapes"
CHECKS = [
    *("Python", "libraries", "CPU", "threads", "kernels", "BLAS", "kernel cache", "memory", "disk"),
    *("kernels = definitions", "bundled files", "golden logits", "model = definitions"),
]
OF_A_MODEL = [
    *("load", "room", "tokenizer ids", "pictures together = alone", "cached = uncached"),
    *("batch = single", "answer"),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return npvlm.load("shapes")


def wrong(findings: list[Finding]) -> list[str]:
    return [found.name for found in findings if found.verdict == WRONG]


def lines(stdout: str) -> list[tuple[str, str, str]]:
    """The verdict, the name and the figures of each line."""
    return [
        (line[:5].strip(), *line[7:].partition(": ")[::2])  # type: ignore[misc]
        for line in stdout.splitlines()
    ]


# --- all is well -------------------------------------------------------------------------------


def test_nothing_is_wrong_here_and_every_check_is_a_line_and_made_once() -> None:
    result = run("doctor", "shapes")
    assert result.returncode == 0, result.stdout
    said = lines(result.stdout)
    assert [name for _, name, _ in said] == [*CHECKS, *OF_A_MODEL]
    assert {verdict for verdict, *_ in said} <= {OK, NOTE}
    assert all(says for *_, says in said)
    assert one_line(result) == f"{len(said)} checks, none wrong."


def test_a_model_of_ones_own_is_checked_behind_the_bundled_one() -> None:
    result = run("doctor", ROOT / "golden" / "pg2-f16-sharded", "--json", "--threads", 1)
    assert (result.returncode, result.stderr) == (0, "")
    values = json.loads(result.stdout)
    assert values["fine"] is True
    assert [check["name"] for check in values["checks"]] == [*CHECKS, *OF_A_MODEL, *OF_A_MODEL]
    assert list(values["checks"][0]) == ["name", "verdict", "says"]


def test_every_kernel_and_packer_is_held_against_its_definition() -> None:
    held = {case.name.split(" ")[0] for case in twins.cases()}
    assert held == {*kernels.__all__, "pack_int8", "pack_int4"}


def test_the_limits_of_kernels_are_near_to_what_is_measured() -> None:
    shares = [
        twins.relative_error(case.found(), case.truth()) / case.limit
        for case in twins.cases()
        if case.limit
    ]
    assert 0.1 < max(shares) <= 1


# --- what is planted is found ------------------------------------------------------------------


def test_a_wrong_kernel_is_named(monkeypatch) -> None:
    def no_one_plus(x, weight, eps):
        return definitions.rms_norm(x, weight, eps) - 1e-3 * x

    monkeypatch.setattr(kernels, "rms_norm", no_one_plus)
    checks = (twins.check_kernels, bundled.check_goldens, bundled.check_definitions)
    findings = [check() for check in checks]
    assert wrong(findings) == ["kernels = definitions", "golden logits", "model = definitions"]
    said = findings[0].says
    assert said.startswith("rms_norm is ") and "layer_norm" not in said


def test_a_kernel_that_breaks_is_a_finding(monkeypatch) -> None:
    def broken(x):
        raise ZeroDivisionError("no\nsuch luck")

    monkeypatch.setattr(kernels, "gelu_tanh", broken)
    found = run_check("kernels = definitions", twins.check_kernels)
    assert found.verdict == WRONG
    assert found.says == "the check broke with ZeroDivisionError: no such luck"


def test_a_kernel_whose_bits_depend_on_the_other_rows_is_found(monkeypatch, model) -> None:
    true = kernels.linear

    def dependent(x, w, bias=None):
        return true(x, w, bias) * np.float32(1 + 2**-22 * min(len(x), 60))

    monkeypatch.setattr(kernels, "linear", dependent)
    findings = [run_check(*check) for check in Trial(model, draw_picture(), 3).checks()]
    assert wrong(findings) == ["cached = uncached", "batch = single"]
    assert all("not bit for bit" in found.says for found in findings[1:3])


@pytest.fixture
def altered(tmp_path: Path) -> Path:
    """The bundled models with one bit of the weights changed."""
    folder = tmp_path / "bundled"
    shutil.copytree(SHAPES.parent, folder)
    path = folder / "shapes" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # the last bit of a bfloat16
    path.write_bytes(content)
    return folder


def test_an_altered_byte_of_the_weights_is_found_and_exits_with_1(altered: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from npvlm import opening\n"
        f"opening.BUNDLED = Path({str(altered)!r})\n"
        "from npvlm.cli import main\nsys.argv = ['npvlm', 'doctor']; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    found = {name: (verdict, says) for verdict, name, says in lines(result.stdout)}
    names = [name for name, (verdict, _) in found.items() if verdict == WRONG]
    assert (result.returncode, names) == (1, ["bundled files", "golden logits"])
    assert "model.safetensors" in found["bundled files"][1]
    assert one_line(result).endswith("2 wrong.")


def test_a_bundled_file_that_is_missing_is_found(altered: Path, monkeypatch) -> None:
    monkeypatch.setattr(opening, "BUNDLED", altered)
    (altered / "shapes" / "tokenizer.model").unlink()
    found = bundled.check_files()
    assert found.verdict == WRONG and "shapes/tokenizer.model" in found.says
    assert "tokenizer.model is missing" in run_check("", bundled.check_goldens).says


def test_other_bits_are_a_note_where_none_were_promised(monkeypatch) -> None:
    monkeypatch.setattr(bundled, "LOGITS", {"shapes": {"int8": "0" * 64}})
    monkeypatch.setattr(bundled, "features", lambda: features() | {"fma"})
    assert bundled.check_goldens().verdict == WRONG
    monkeypatch.setattr(bundled, "features", lambda: features() - {"fma"})
    found = bundled.check_goldens()
    assert found.verdict == NOTE and "shapes in int8" in found.says


def test_weights_that_are_no_numbers_are_found(model: Model) -> None:
    weights = dict(model.weights)
    name = "language_model.model.norm.weight"
    weights[name] = np.full(weights[name].shape, np.nan, np.float32)
    damaged = Model(**{**vars(model), "weights": type(model.weights)(weights)})
    findings = [run_check(*check) for check in Trial(damaged, draw_picture(), 3).checks()]
    assert wrong(findings) == ["cached = uncached", "batch = single", "answer"]
    assert all(f"{name} holds inf or nan" in found.says for found in findings[1:])


def test_a_model_that_does_not_load_is_wrong_with_the_very_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctoring, "_own_checks", list)
    folder = Path(shutil.copytree(ROOT / "golden" / "pg1", tmp_path / "pg1"))
    (folder / "tokenizer.model").write_text("none")
    with pytest.raises(NpvlmError) as caught:
        npvlm.load(folder)
    findings = list(doctoring.doctor(str(folder)))
    assert findings[-1] == Finding("load", WRONG, str(caught.value))
    assert wrong(findings) == ["load"]


def test_a_model_that_is_none_ends_before_any_check(tmp_path: Path) -> None:
    result = run("doctor", tmp_path / "absent")
    assert (result.returncode, result.stdout) == (3, "") and "is no model" in one_line(result)


def test_bad_use_exits_with_2(tmp_path: Path) -> None:
    for arguments in (["--pictures", tmp_path], ["shapes", "--pictures", tmp_path / "absent"]):
        result = run("doctor", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert "--pictures" in one_line(result)


# --- the tokenizer -----------------------------------------------------------------------------


def test_a_token_that_is_split_into_characters_is_found(model: Model) -> None:
    class Splitting:
        def __getattr__(self, name):
            return getattr(model.tokenizer, name)

        def encode(self, text):
            return [i for c in text for i in model.tokenizer.encode(c)]

    split = SimpleNamespace(tokenizer=Splitting(), config=model.config)
    found = words.check_words(split, SHAPES)  # type: ignore[arg-type]
    assert found.verdict == WRONG and "<loc0000> becomes [" in found.says
    assert "expected one id" in found.says


def test_a_layout_with_two_newlines_is_found(model: Model) -> None:
    class Doubled:
        newline_id = model.tokenizer.bos_id

        def __getattr__(self, name):
            return getattr(model.tokenizer, name)

    doubled = SimpleNamespace(tokenizer=Doubled(), config=model.config)
    found = words.check_words(doubled, SHAPES)  # type: ignore[arg-type]
    assert found.verdict == WRONG and "have the same id" in found.says


def test_golden_ids_are_held_where_the_vocabulary_is_the_published_one(model, monkeypatch) -> None:
    monkeypatch.setattr(
        words, "find_vocabulary", lambda *_: SimpleNamespace(published=True, ids={})
    )
    own = {text: model.tokenizer.encode(text) for text in words.GOLDEN_IDS}
    monkeypatch.setattr(words, "GOLDEN_IDS", own)
    found = words.check_words(model, SHAPES)
    assert found.verdict == OK and f"{len(own)} golden texts" in found.says
    own["caption en"] = own["caption en"][::-1]
    found = words.check_words(model, SHAPES)
    assert found.verdict == WRONG and found.says.startswith("'caption en' becomes [")


@pytest.mark.skipif(not REAL.is_dir(), reason="Gemma's vocabulary is not at hand")
def test_gemmas_own_vocabulary_has_the_golden_ids(tmp_path: Path) -> None:
    shutil.copy(REAL / "tokenizer.model", tmp_path)
    config = parse_config(configs()["paligemma-3b-pt-224"])
    real = SimpleNamespace(tokenizer=load_tokenizer(tmp_path, config), config=config)
    found = words.check_words(real, tmp_path)  # type: ignore[arg-type]
    assert found.verdict == OK and found.says.startswith("Gemma's, 10 golden texts")


# --- published expectations --------------------------------------------------------------------

HERE = Name("paligemma-3b-pt-224", "its name is paligemma-3b-pt-224", True)
BEGAN = Name("paligemma-3b-pt-224", "_name_or_path is paligemma-3b-pt-224", False)
ASKED = "answer en how many shapes?"


def expecting(answer: str, sure: bool = True) -> tuple[Expectation, ...]:
    return (Expectation(HERE.name, "drawn.png", ASKED, answer, sure),)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw_picture().save(tmp_path / "drawn.png")
    return tmp_path


def asked(*arguments) -> list[Finding]:
    return [run_check(*check) for check in published_checks(*arguments)]


def test_a_published_answer_is_held_to_the_model_that_gives_it(model, pictures: Path) -> None:
    answer = model.generate(draw_picture(), ASKED)[0].text
    [found] = asked(model, HERE, pictures, expecting(answer))
    assert (found.verdict, found.name) == (OK, "published answer 1") and answer in found.says
    [found] = asked(model, HERE, pictures, expecting(answer + "x"))
    assert found.verdict == WRONG and f"expected {answer + 'x'!r}" in found.says


def test_where_rounding_or_fine_tuning_may_be_why_a_difference_is_a_note(model, pictures) -> None:
    packed = npvlm.load("shapes", "int8")
    for arguments, why in (
        ((model, HERE, pictures, expecting("x", sure=False)), "rounding"),
        ((packed, HERE, pictures, expecting("x")), "rounding"),
        ((model, BEGAN, pictures, expecting("x")), "fine-tuned"),
    ):
        [found] = asked(*arguments)
        assert found.verdict == NOTE and why in found.says


def test_what_is_not_asked_is_noted(model, pictures: Path, tmp_path: Path) -> None:
    [found] = asked(model, HERE, None, expecting("x"))
    assert found.verdict == NOTE and "--pictures FOLDER with drawn.png" in found.says
    (pictures / "drawn.png").unlink()
    [found] = asked(model, HERE, pictures, expecting("x"))
    assert found.verdict == NOTE and "drawn.png is not there" in found.says
    for name in (None, Name("paligemma-3b-mix-448", "", True)):
        [found] = asked(model, name, pictures, expecting("x"))
        assert found.verdict == NOTE and "none is known" in found.says
        assert asked(model, name, None, expecting("x")) == []


def test_the_first_hidden_state_is_that_of_a_prefix_that_sees_itself(model: Model) -> None:
    config, ids = model.config, [70, 80, 90]
    seen = {}

    def tap(name, value):
        seen[name] = value
        return value

    numpy = npvlm.load("shapes", ops="numpy")
    side = config.vision_config.image_size
    pixels = np.zeros((1, 3, side, side), np.float32)
    [features] = paligemma.image_features(pixels, numpy.weights, config, ops=definitions, tap=tap)
    every = np.array([config.image_token_index] * len(features) + ids)
    x = paligemma.embed(every, features, numpy.weights, config, ops=definitions, tap=tap)
    cache = new_cache(config.text_config, len(x), x.dtype)
    rows = Rows.of(0, len(x), range(len(x)))
    wanted = np.arange(len(x))
    paligemma.forward(x, numpy.weights, config, cache, rows, wanted, ops=definitions, tap=tap)
    truth = seen["language_model.model.norm"][0]
    np.testing.assert_allclose(first_hidden_state(model, ids), truth, atol=1e-4)
    other = first_hidden_state(model, [*ids[:-1], 91])
    assert np.abs(other - truth).max() > 1e-3  # the first token sees the last


def test_a_picture_of_zeros_is_held_to_its_hidden_state(model: Model) -> None:
    ids = (70, 80, 90)
    first = tuple(map(float, first_hidden_state(model, ids)[:5]))
    wide = Model(**{**vars(model), "weights": widened(model)})

    def check(model: Model, name: Name, first: tuple[float, ...]) -> Finding:
        [found] = asked(model, name, None, (), HiddenState(HERE.name, ids, first, 0.01))
        return found

    off = (first[0] + 0.1, *first[1:])
    assert check(model, HERE, first).verdict == OK
    assert check(wide, HERE, first).verdict == OK
    assert check(wide, HERE, off).verdict == WRONG
    assert check(model, HERE, off).verdict == NOTE  # bfloat16, where the source had float32
    assert check(wide, BEGAN, off).verdict == NOTE
    assert "0.1" in check(wide, HERE, off).says


def widened(model: Model):
    """The same weights as float32."""
    tensors = {name: definitions.unpack(w, np.float32) for name, w in model.weights.items()}
    return type(model.weights)(tensors)


def test_what_is_expected_is_of_published_checkpoints() -> None:
    names = {name for name in configs() if not name.endswith("bfloat16")}
    assert {expected.checkpoint for expected in ANSWERS} | {ZERO_PICTURE.checkpoint} <= names


# --- the machine -------------------------------------------------------------------------------


def test_each_precision_says_how_its_products_are_done() -> None:
    for there, vectors in (({"avx2", "fma"}, "AVX2"), ({"neon"}, "NEON"), (set(), "this CPU")):
        used = machine.kernels_used(frozenset(there))
        assert list(used) == ["float32", "bfloat16", "int8", "int4"]
        assert used["float32"].endswith(vectors)
    assert "slowly" in used["float32"]


def test_a_cache_that_cannot_be_written_is_noted(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "WRITABLE", False)
    [found] = [
        run_check(*check) for check in machine.machine_checks() if check[0] == "kernel cache"
    ]
    assert found.verdict == NOTE and "NUMBA_CACHE_DIR" in found.says
