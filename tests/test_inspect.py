"""`npvlm inspect`: what a folder holds is said, and what is broken in it costs no other fact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import npvlm
from npvlm.config import parse_config
from npvlm.errors import NpvlmError
from npvlm.files.names import EMBED_TOKENS, LM_HEAD
from npvlm.work import inspect as inspecting
from npvlm.work.convert import convert
from npvlm.work.inspect import GEMMA_IDS, Inspection, inspect
from npvlm.work.inspect_page import page
from npvlm.work.kinds import likely_kind, published_name
from tests.published import configs
from tests.test_checkpoint import tensors_of, write
from tests.test_cli import one_line, run
from tests.test_names import COUNTS, respelled
from tests.test_tokenizer import REAL

GOLDEN = Path(npvlm.__file__).parents[1] / "golden"
WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies of whole random checkpoints: pg1, pg2, and pg2-f16-sharded, which is in four files."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def tensors_in(folder: Path) -> dict:
    """The tensors of a folder's only file, to write some of them back."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def read(folder: Path) -> tuple[Inspection, str]:
    """What is found out, and the page about it in one line of single spaces."""
    found = inspect(str(folder))
    return found, " ".join(page(found).split())


def load_says(folder: Path) -> str:
    with pytest.raises(NpvlmError) as caught:
        npvlm.load(folder)
    return str(caught.value)


# --- whole folders -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes", "pg1", "pg2", "pg2-f16-sharded"])
def test_a_whole_model_has_every_part_and_no_problem(name: str) -> None:
    folder = name if name == "shapes" else str(GOLDEN / name)
    found, model = inspect(folder), npvlm.load(folder)
    assert found.refusal is None and found.problems == {}
    text, vision = model.config.text_config, model.config.vision_config
    assert found.sizes is not None and found.vocabulary is not None and found.differences
    assert found.sizes.family == f"PaliGemma {2 if text.model_type == 'gemma2' else 1}"
    assert (found.sizes.size, found.sizes.resolution) == (None, vision.image_size)
    assert found.sizes.image_tokens == vision.num_patches
    assert found.sizes.window == text.sliding_window
    assert found.differences.said() == []
    assert found.vocabulary.ids["<image>"] == model.tokenizer.image_id
    assert found.vocabulary.ids["\n"] == model.tokenizer.newline_id
    assert found.vocabulary.ids["<loc0000>"] == model.tokenizer.encode("<loc0000>")[0]
    assert not found.vocabulary.published
    assert sum(kind.tensors for kind in found.types) == len(model.weights)
    assert found.own_head == (LM_HEAD in model.weights)
    assert [need.precision for need in found.needs] == ["float32", "bfloat16", "int8", "int4"]
    text_page = page(found)
    assert "load        would open it" in text_page
    assert not [line for line in text_page.splitlines() if len(line) > 100 and folder not in line]


def test_parameters_are_those_of_the_weights(copied) -> None:
    for name in ("pg1", "pg2"):
        folder = copied(name)
        found, model = inspect(str(folder)), npvlm.load(folder)
        sizes = {tensor: weight.shape for tensor, weight in model.weights.items()}

        def count(start: str, sizes: dict = sizes) -> int:
            total = 0
            for tensor, shape in sizes.items():
                size = 1
                for side in shape:
                    size *= side
                total += size if tensor.startswith(start) else 0
            return total

        counts = found.parameters
        assert counts is not None
        assert counts.total == count("")
        assert counts.tower == count("vision_tower")
        assert counts.projector == count("multi_modal_projector")
        assert counts.embedding == count(EMBED_TOKENS)
        assert counts.decoder == count("language_model") - counts.embedding - count(LM_HEAD)


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_are_recognised_from_config_json_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    values = configs()[name]
    (folder / "config.json").write_text(json.dumps(values))
    found, said = read(folder)
    family, size, kind, resolution = name.split("-")
    assert found.sizes is not None and found.parameters is not None
    assert found.sizes.family == ("PaliGemma 2" if family == "paligemma2" else "PaliGemma 1")
    assert found.sizes.size == size.upper()
    assert found.sizes.resolution == int(resolution)
    assert found.parameters.total == COUNTS[name][1]
    assert found.kind.kind == kind
    assert [need.weights for need in found.needs][:2] == [2 * COUNTS[name][1]] * 2
    assert found.refusal == load_says(folder)
    assert f"{size.upper()} pictures {resolution} px" in said


def test_what_fits_is_told_from_the_memory_that_is_free(copied, monkeypatch) -> None:
    folder = copied("pg1")
    for free, fits in ((10**12, True), (10**6, False), (None, None)):
        monkeypatch.setattr(inspecting, "available_memory", lambda free=free: free)
        assert {need.fits for need in inspect(str(folder)).needs} == {fits}


def test_float32_files_take_four_bytes_a_number_in_float32(copied) -> None:
    folder = copied("pg1")
    config = parse_config(json.loads((folder / "config.json").read_text()))
    write(folder / WEIGHTS, tensors_of(config, "F32"))
    found = inspect(str(folder))
    assert found.refusal is None and found.parameters is not None
    needs = {need.precision: need.weights for need in found.needs}
    assert needs["float32"] == 4 * found.parameters.total
    assert needs["bfloat16"] == 2 * found.parameters.total
    assert [(kind.dtype, kind.bytes) for kind in found.types] == [("F32", needs["float32"])]


@pytest.mark.parametrize(
    ("release", "says"),
    [
        ("published", "as published"),
        ("saved by 5", "as saved by transformers 5"),
        ("modules of 4.52", "modules of transformers 4.52 and later"),
        ("modules of 5", "modules of transformers 5"),
    ],
)
def test_the_spelling_of_names_is_told(copied, release: str, says: str) -> None:
    folder = copied("pg1")
    tensors = {respelled(name, release): tensor for name, tensor in tensors_in(folder).items()}
    write(folder / WEIGHTS, tensors)
    found = inspect(str(folder))
    assert found.refusal is None
    assert found.layout == says


def test_a_head_of_its_own_is_told_and_counted(copied) -> None:
    folder = copied("pg1")
    tied = inspect(str(folder))
    tensors = tensors_in(folder)
    write(folder / WEIGHTS, tensors | {"lm_head.weight": tensors[EMBED_TOKENS]})
    own, said = read(folder)
    assert (tied.own_head, own.own_head, own.refusal) == (False, True, None)
    assert tied.parameters is not None and own.parameters is not None
    assert own.parameters.total == tied.parameters.total + tied.parameters.embedding
    assert own.parameters.decoder == tied.parameters.decoder
    assert "an output layer of its own" in said


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_packed_folder_says_so_and_has_one_precision(tmp_path: Path, precision: str) -> None:
    convert("shapes", tmp_path / "small", precision, lambda *_: None)
    found, said = read(tmp_path / "small")
    assert found.refusal is None and found.problems == {}
    assert f"packed for {precision}, by npvlm convert" in said
    [need] = found.needs
    assert need.precision == precision
    assert need.weights == sum(kind.bytes for kind in found.types)


def test_a_bundled_model_is_a_toy_and_its_page_says_what_to_ask() -> None:
    found = inspect("shapes")
    assert found.kind.kind == "toy"
    lines = " ".join(page(found).split())
    card = Path(npvlm.__file__).parent / "bundled" / "shapes" / "README.md"
    assert f"kind a toy that is in the box prompts those of {card} load" in lines
    assert "What to ask" in card.read_text()


@pytest.mark.skipif(not REAL.is_dir(), reason="Gemma's vocabulary is not at hand")
def test_gemmas_vocabulary_is_recognised(tmp_path: Path) -> None:
    shutil.copy(REAL / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(configs()["paligemma-3b-pt-224"]))
    found, said = read(tmp_path)
    assert found.vocabulary is not None and found.vocabulary.published
    assert found.vocabulary.ids == GEMMA_IDS
    assert "as Gemma's published one" in said


# --- broken folders ----------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_all_named(copied) -> None:
    folder = copied("pg1")
    tensors = tensors_in(folder)
    norm, bias = "language_model.model.norm.weight", "multi_modal_projector.linear.bias"
    ups = [name for name in tensors if name.endswith("mlp.up_proj.weight")]
    for name in (norm, *ups):
        del tensors[name]
    tensors[bias] = ("F32", (3,), bytes(12))
    odd = {f"block{i}.odd": ("F32", (1,), bytes(4)) for i in range(80)}
    write(folder / WEIGHTS, tensors | odd)
    found, said = read(folder)
    assert found.differences is not None
    assert set(found.differences.missing) == {norm, *ups}
    assert found.differences.unexpected == list(odd)
    assert list(found.differences.misshapen) == [bias]
    assert f"{len(ups) + 1} missing:" in said and f"{{0-{len(ups) - 1}}}.mlp.up_proj" in said
    assert f"1 of another shape: {bias} is [3], expected [45]" in said
    assert all(name in said for name in odd)  # however many: load's own sentence is cut
    assert found.refusal == load_says(folder)
    assert found.vocabulary is not None and found.sizes is not None


def test_a_shard_that_was_cut_off_leaves_the_others_readable(copied) -> None:
    folder = copied("pg2-f16-sharded")
    cut = folder / "model-00002-of-00004.safetensors"
    cut.write_bytes(cut.read_bytes()[:20_000])
    found, said = read(folder)
    problems = {file.name: file.problem for file in found.files}
    assert [name for name, problem in problems.items() if problem] == [cut.name]
    assert "no whole safetensors file" in (problems[cut.name] or "")
    assert {file.bytes for file in found.files} >= {20_000}
    assert 0 < sum(kind.tensors for kind in found.types) < 86
    assert found.differences is None and "not all files can be read" in found.problems["tensors"]
    assert found.sizes is not None and found.vocabulary is not None
    assert found.refusal == load_says(folder) and found.refusal in said


def test_a_shard_that_is_missing_leaves_the_others_readable(copied) -> None:
    folder = copied("pg2-f16-sharded")
    (folder / "model-00002-of-00004.safetensors").unlink()
    found, said = read(folder)
    assert len(found.files) == 3 and all(file.problem is None for file in found.files)
    assert "1 of them are missing: model-00002-of-00004.safetensors" in found.problems["weights"]
    assert found.differences is None and found.types
    assert found.refusal == load_says(folder) and found.refusal in said


def test_without_a_tokenizer_the_rest_still_comes(copied) -> None:
    folder = copied("pg1")
    (folder / "tokenizer.model").unlink()
    found, said = read(folder)
    assert found.vocabulary is None
    assert list(found.problems) == ["tokenizer"] and found.refusal == found.problems["tokenizer"]
    assert "tokenizer.model is missing" in said
    assert found.differences is not None and found.differences.said() == []


def test_a_tokenizer_of_another_model_is_shown_beside_what_is_wrong_with_it(copied) -> None:
    folder = copied("pg1")
    shutil.copy(GOLDEN.parent / "npvlm/bundled/shapes/tokenizer.model", folder)
    found, said = read(folder)
    assert found.vocabulary is not None and found.vocabulary.pieces > 1000
    assert f"{found.vocabulary.pieces} pieces" in said
    assert "expected at most" in found.problems["tokenizer"]
    assert found.refusal == load_says(folder)


@pytest.mark.parametrize("content", ["not JSON", '{"model_type": "llama"}', "[]", ""])
def test_a_config_that_is_none_costs_only_what_is_told_from_it(copied, content: str) -> None:
    folder = copied("pg1")
    (folder / "config.json").write_text(content)
    found, said = read(folder)
    assert found.sizes is None and found.parameters is None and found.needs == []
    assert found.problems["config"] == found.refusal == load_says(folder)
    assert found.types and found.layout == "as published"
    assert found.vocabulary is not None and found.vocabulary.ids["<bos>"] == 2
    assert f"would refuse it: {found.refusal}" in said


def test_an_empty_folder_is_said_to_be_one(tmp_path: Path) -> None:
    found, said = read(tmp_path)
    assert set(found.problems) == {"config", "weights", "tokenizer"}
    assert found.files == [] and found.layout is None
    assert "neither model.safetensors" in said and "config.json is missing" in said


def test_one_tensor_twice_is_said_in_its_place(copied) -> None:
    folder = copied("pg1")
    tensors = tensors_in(folder)
    norm = "language_model.model.norm.weight"
    write(folder / WEIGHTS, tensors | {"model.language_model.norm.weight": tensors[norm]})
    found, _ = read(folder)
    assert "are the same tensor" in found.problems["tensors"]
    assert found.refusal == found.problems["tensors"] == load_says(folder)
    assert found.types


def test_pictures_of_another_size_are_said_in_their_place(copied) -> None:
    folder = copied("pg1")
    shutil.copy(GOLDEN / "pg2" / "preprocessor_config.json", folder)
    found, said = read(folder)
    assert list(found.problems) == ["pictures"] and found.problems["pictures"] in said
    assert found.refusal == load_says(folder)


# --- the likely kind ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "knows"),
    [
        ("paligemma-3b-pt-224", "pt", "detect THING ; THING"),
        ("google/paligemma2-10b-mix-448", "mix", "a plain question"),
        ("paligemma-3b-ft-cococap-448", "ft", "caption en"),
        ("paligemma-3b-ft-docvqa-896", "ft", "QUESTION"),
        ("paligemma-3b-ft-refcoco-seg-224", "ft", "THING"),
        ("paligemma-3b-mix-224-bfloat16", "mix", "describe en"),
        ("PaliGemma_3b_pt_448", "pt", "ocr"),
    ],
)
def test_the_kind_is_told_from_the_folders_name(tmp_path, name: str, kind: str, knows: str) -> None:
    found = likely_kind(name, tmp_path / name, {})
    assert found.kind == kind and knows in found.prompts
    assert (found.warning is None) == (kind == "mix")
    assert Path(name).name in found.because


def test_the_hubs_cache_has_the_name_two_folders_up(tmp_path: Path) -> None:
    folder = tmp_path / "models--google--paligemma-3b-mix-224" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    name = published_name(str(folder), folder, {})
    assert name is not None and (name.name, name.own) == ("paligemma-3b-mix-224", True)


def test_a_name_in_config_json_may_be_the_base_of_a_fine_tune(tmp_path: Path) -> None:
    values = {"_name_or_path": "final-hf/paligemma-3b-pt-224-main"}
    found = likely_kind("mine", tmp_path, values)
    assert found.kind == "pt" and "or fine-tuned from that" in found.because
    more = likely_kind("paligemma-3b-pt-224-on-my-dogs", tmp_path, {})
    assert more.kind == "pt" and "or fine-tuned from that" in more.because
    (tmp_path / "README.md").write_text("---\nbase_model: google/paligemma-3b-pt-224\n---\n")
    for name in ("mine", "paligemma-3b-pt-224-on-my-dogs"):
        found = likely_kind(name, tmp_path, values)
        assert found.kind == "ft" and "google/paligemma-3b-pt-224" in found.because


@pytest.mark.parametrize(
    ("card", "kind"),
    [
        ("Some weights, pre-trained with 224*224 input images. See the mix models.", "pt"),
        ("Some weights, fine-tuned with 448*448 input images on a mixture of tasks.", "mix"),
        ("Some weights, fine-tuned with 448*448 input images on the VQAv2 dataset.", "ft"),
        ("A model that sees. Try google/paligemma-3b-mix-224.", None),
        (None, None),
    ],
)
def test_the_card_is_read_where_no_name_tells(tmp_path: Path, card: str | None, kind) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    found = likely_kind("mine", tmp_path, {"_name_or_path": 7})
    assert found.kind == kind
    assert (found.warning is not None) == (kind in ("pt", "ft"))


# --- the command -------------------------------------------------------------------------------


def test_the_command_exits_with_0_1_or_3(copied) -> None:
    whole = run("inspect", "shapes")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "would open it" in whole.stdout
    folder = copied("pg1")
    (folder / "tokenizer.model").unlink()
    broken = run("inspect", folder)
    assert (broken.returncode, broken.stderr) == (1, "")
    assert broken.stdout.splitlines()[-1].endswith(f"would refuse it: {load_says(folder)}")
    for absent in (folder / "absent", folder / "config.json", ""):
        result = run("inspect", absent)
        assert (result.returncode, result.stdout) == (3, "") and "is no model" in one_line(result)
        assert ("but another file" in one_line(result)) is (absent == folder / "config.json")


def test_json_holds_what_the_page_says(copied) -> None:
    folder = copied("pg1")
    (folder / "tokenizer.model").unlink()
    result = run("inspect", folder, "--json")
    values = json.loads(result.stdout)
    assert result.returncode == 1
    assert values["refusal"] == values["problems"]["tokenizer"] == load_says(folder)
    assert values["vocabulary"] is None and values["sizes"]["family"] == "PaliGemma 1"
    assert values["differences"] == {
        "missing": [],
        "unexpected": [],
        "misshapen": {},
        "mistyped": {},
    }
