"""ColPali: vectors as transformers has them, and what is found with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import npvlm
from golden import our_colpali, ours
from golden.our_ops import error
from npvlm.answers import explanation_sheet
from npvlm.answers import match as answers_match
from npvlm.answers.explanation_sheet import Panel
from npvlm.config import parse_config, read_json
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.index import STORES, Origin, Page, PageIndex, pack
from npvlm.files.pictures import open_picture, pixel_values
from npvlm.model.ops import unit
from npvlm.retrieval import Retriever
from npvlm.work.convert import convert
from npvlm.work.inspect import inspect
from tests.retriever import build_retriever

GOLDEN = Path(ours.__file__).parent
RECORD = json.loads((GOLDEN / "colpali-run.json").read_text())


@pytest.fixture(scope="module", params=["numpy", "kernels"])
def golden(request: pytest.FixtureRequest) -> Retriever:
    return npvlm.load_retriever(GOLDEN / "colpali", ops=request.param)


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "colpali-run.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_retriever(tmp_path_factory.mktemp("models") / "colpali")


@pytest.fixture(scope="module")
def retriever(folder: Path) -> Retriever:
    return npvlm.load_retriever(folder, ops="numpy")


def test_ids_and_pixel_values_are_transformers_own(golden, stored) -> None:
    assert golden.page_ids.tolist() == RECORD["page_ids"]
    for query, ids in zip(RECORD["queries"], RECORD["query_ids"], strict=True):
        assert golden.query_ids(query).tolist() == ids
    pictures = [Image.fromarray(v) for k, v in sorted(stored.items()) if k.startswith("picture.")]
    pixels = [pixel_values(open_picture(p), golden.model.preprocessor) for p in pictures]
    assert len(pictures) == 3
    assert np.array_equal(np.stack(pixels), stored["pixel_values"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_vectors_and_scores_are_as_near_to_the_truth_as_torchs(golden, stored, dtype) -> None:
    given = stored["pixel_values"], RECORD["page_ids"], RECORD["query_ids"]
    found = our_colpali.run(golden, *given, dtype)
    torchs = RECORD["torch_float32_error"]
    assert found.keys() == torchs.keys()
    limit = ours.limit_float64 if dtype == np.float64 else ours.limit_float32
    shares = []
    for name, value in found.items():
        assert value.dtype == dtype
        shares.append(error(value, stored[name]) / limit(torchs[name]))
    assert 0.01 <= max(shares) <= 1, shares


def test_a_page_and_a_query_have_the_vectors_of_the_goldens(golden, stored) -> None:
    for name, found in (
        ("page.1", golden.embed_page(stored["picture.1"])),
        ("query.2", golden.embed_query(RECORD["queries"][2])),
    ):
        limit = ours.limit_float32(RECORD["torch_float32_error"][name])
        assert error(found, stored[name]) <= limit


def index_of(pages: np.ndarray, store: str) -> PageIndex:
    """An index in memory. pages [N, S, E]"""
    packed = [pack(page, store) for page in pages]
    parts = {name: np.stack([page[name] for page in packed]) for name in packed[0]}
    origin = Origin("m", "", "float32", store, *pages.shape[1:])
    named = [Page(f"{n}.png", 1, 1, 1) for n in range(len(pages))]
    return PageIndex(Path("memory"), origin, named, parts)


@pytest.mark.parametrize("store", STORES)
def test_the_best_pages_come_first_and_equal_ones_in_their_order(
    retriever, store, monkeypatch
) -> None:
    rng = np.random.default_rng(3)
    pages = unit(rng.standard_normal((7, 5, 24)).astype(np.float32))
    pages[4] = pages[1]
    index = index_of(pages, store)
    query = retriever.embed_query("a red circle")
    truth = np.max(query @ pages.transpose(0, 2, 1), axis=2).sum(1)
    order = np.argsort(-truth, kind="stable").tolist()
    hits = retriever.search(index, "a red circle", top=4)
    assert [hit.number for hit in hits] == order[:4]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert len(retriever.search(index, "a red circle", top=99)) == 7
    monkeypatch.setattr("npvlm.retrieval.AT_ONCE", 2)
    assert retriever.search(index, "a red circle", top=4) == hits


def test_int8_loses_little_of_what_pages_score(retriever) -> None:
    rng = np.random.default_rng(4)
    pages = unit(rng.standard_normal((40, 30, 128)).astype(np.float32))
    query = unit(rng.standard_normal((20, 128)).astype(np.float32))
    scores = {store: retriever.scores(index_of(pages, store), query) for store in STORES}
    spread = np.std(scores["float32"])
    off = {store: np.sqrt(np.mean((s - scores["float32"]) ** 2)) for store, s in scores.items()}
    assert off["float16"] < 0.002 * spread
    assert 0.002 * spread < off["int8"] < 0.05 * spread


def test_a_match_lights_the_patches_that_a_word_fits(retriever, tmp_path, monkeypatch) -> None:
    picture = Image.new("RGB", (80, 40), "white")
    picture.save(tmp_path / "page.png")
    page = retriever.embed_page(picture)
    query = "a red circle"
    own = retriever.embed_query(query)
    words = retriever.model.tokenizer.encode(retriever.query_prefix + query)
    red = 1 + words.index(retriever.model.tokenizer.encode(" red")[0])
    page[11] = own[red]  # one patch says exactly what the word does
    index = replace(
        index_of(page[None], "float32"), pages=[Page(str(tmp_path / "page.png"), 80, 40, 1)]
    )
    [hit] = retriever.search(index, query)
    match = retriever.match(index, hit, query)
    assert [word.text for word in match.words] == [" a", " red", " circle"]
    assert match.words[1].score == pytest.approx(1, abs=1e-6)
    assert match.words[1].peak == pytest.approx(((11 % 8 + 0.5) / 8, (11 // 8 + 0.5) / 8))
    assert sum(word.score for word in match.words) < match.score == hit.score
    assert match.facts()[1] == {"text": " red", "score": match.words[1].score, "peak": [35, 7]}
    expected = np.mean(own @ page[:64].T, axis=0).reshape(8, 8)
    np.testing.assert_allclose(match.heat, expected, atol=1e-6)
    laid: list[tuple[str, str]] = []

    def lay_out(panels: list[Panel], *_: str) -> Image.Image:
        laid.extend((panel.title, panel.note) for panel in panels)
        return explanation_sheet.lay_out(panels, *_)

    monkeypatch.setattr(answers_match, "lay_out", lay_out)
    match.draw(tmp_path / "match.png")
    assert [title for title, _ in laid] == ["", "(all)", "a", "red", "circle"]
    scores = [match.score, *(word.score for word in match.words)]
    assert [note for _, note in laid] == ["the page", *(f"{score:.2f}" for score in scores)]
    with Image.open(tmp_path / "match.png") as drawn:
        assert drawn.width > 600
    (tmp_path / "page.png").unlink()
    with pytest.raises(NpvlmError, match=r"page\.png cannot be opened"):
        retriever.match(index, hit, query)


@pytest.mark.parametrize("query", ["", " \n", "a <image> b", "y " * 9000, "\udcff", None])
def test_what_is_no_query_is_refused(retriever, query) -> None:
    with pytest.raises(UsageError):
        retriever.embed_query(query)


def test_marks_of_a_sequence_are_plain_text_in_a_query(retriever) -> None:
    padding = retriever.model.tokenizer.pad_id
    for query in ("red", "red <pad>", "<bos> red <eos>"):
        ids = retriever.query_ids(query).tolist()
        assert ids.count(padding) == 10 and ids[0] == retriever.model.tokenizer.bos_id
        assert ids.count(ids[0]) == 1


@pytest.mark.parametrize(
    ("named", "query", "page"),
    [
        ({}, "Question: ", "Describe the image."),
        ({"query_prefix": "Query: "}, "Query: ", "Describe the image."),
        ({"visual_prompt_prefix": ""}, "Question: ", ""),
    ],
)
def test_the_words_in_front_are_those_that_the_processors_file_names(
    folder, tmp_path, named, query, page
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "processor_config.json").write_text(json.dumps(named))
    found = npvlm.load_retriever(tmp_path / "m", ops="numpy")
    encode = found.model.tokenizer.encode
    assert found.query_ids("red").tolist()[1:-11] == encode(f"{query}red")
    assert found.page_ids.tolist()[found.patches + 1 : -1] == encode(page)
    (tmp_path / "m" / "processor_config.json").write_text('{"query_prefix": 3}')
    with pytest.raises(NpvlmError, match="query_prefix is 3, expected a text"):
        npvlm.load_retriever(tmp_path / "m", ops="numpy")


def test_every_layout_of_the_files_gives_the_same_vectors(folder, retriever, tmp_path) -> None:
    """As transformers 4 and 5 save it, and merged by colpali-engine with its fixed width."""
    wide = build_retriever(tmp_path / "wide", width=128)
    expected = npvlm.load_retriever(wide, ops="numpy").embed_query("red")
    values, tensors = read_json(wide / "config.json"), load_file(wide / "model.safetensors")
    engine = {**values["vlm_config"], "architectures": ["ColPali"]}

    def newer(name: str) -> str:
        name = name.replace("language_model.model.", "model.language_model.")
        return name.replace("vlm.vision_tower.vision_model", "vlm.model.vision_tower")

    def merged(name: str) -> str:
        return name.replace("vlm.", "model.").replace("embedding_proj_layer", "custom_text_proj")

    for number, (config, rename) in enumerate(((values, newer), (engine, merged))):
        shutil.copytree(wide, tmp_path / str(number))
        (tmp_path / str(number) / "config.json").write_text(json.dumps(config))
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, tmp_path / str(number) / "model.safetensors")
        found = npvlm.load_retriever(tmp_path / str(number), ops="numpy").embed_query("red")
        assert np.array_equal(found, expected)


def test_an_untied_colpali_needs_no_output_layer(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    values = read_json(folder / "config.json")
    values["vlm_config"]["tie_word_embeddings"] = False
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    assert npvlm.load_retriever(tmp_path / "m", ops="numpy").embed_query("red").shape[1] == 24


def test_each_kind_of_model_is_told_from_the_other(folder) -> None:
    with pytest.raises(NpvlmError, match="colpali is a ColPali, which finds pages and writes no"):
        npvlm.load(folder)
    with pytest.raises(NpvlmError, match="shapes is a PaliGemma without a projection"):
        npvlm.load_retriever("shapes")


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "colqwen2"},
        {"model_type": "qwen2_vl", "architectures": ["ColQwen2"]},
        {"model_type": "colpali", "vlm_config": {"model_type": "colidefics3"}},
    ],
)
def test_other_models_that_find_pages_are_refused_by_name(values) -> None:
    with pytest.raises(NpvlmError, match="of the models that find pages, npvlm runs ColPali alone"):
        parse_config(values)


def test_another_models_index_is_refused(folder, retriever, tmp_path) -> None:
    from npvlm.work.embed import embed_pages

    picture = tmp_path / "page.png"
    Image.new("RGB", (30, 20), "red").save(picture)
    index = tmp_path / "index"
    embed_pages(retriever, [picture], index, "int8", lambda _: None, lambda _: None)
    shutil.copytree(folder, tmp_path / "copy")
    assert npvlm.load_retriever(tmp_path / "copy", ops="numpy").open(index).pages[0].width == 30
    other = npvlm.load_retriever(build_retriever(tmp_path / "other", seed=6), ops="numpy")
    with pytest.raises(NpvlmError, match=r"was made with another model than .*other"):
        other.open(index)


def test_a_packed_colpali_points_nearly_the_same_way(folder, retriever, tmp_path) -> None:
    convert(folder, tmp_path / "small", "int8", lambda *_: None)
    found = npvlm.load_retriever(tmp_path / "small", ops="numpy").embed_query("a red circle")
    cosines = np.sum(found * retriever.embed_query("a red circle"), axis=1)
    assert 0.98 < cosines.min() < 0.99999


def test_inspect_says_what_it_is_and_that_it_opens(folder) -> None:
    found = inspect(str(folder))
    assert found.sizes.family == "ColPali on PaliGemma 1"
    assert found.refusal is None
