"""Explanations: attention weights, words, occlusion, and what people get to see of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import npvlm
from golden.explain import is_lit, pictures, things_of
from golden.shapes import caption
from npvlm.answers.attention import AttentionTap, attention_weights
from npvlm.answers.confidence import NEAR
from npvlm.answers.explanation import METHODS, Explanation, Word
from npvlm.answers.heat import wash
from npvlm.answers.occlusion import cover, log_odds, occlude, parts
from npvlm.answers.reading import answer_rows, read_answer
from npvlm.answers.words import in_words, split_words, sureness
from npvlm.cli import explain
from npvlm.config import Config
from npvlm.decoding.generate import logits
from npvlm.errors import NpvlmError, UsageError
from npvlm.model.tap import closed
from npvlm.model.weights import Array, Weights
from npvlm.work.demo import draw_picture
from tests.test_cli import one_line, run
from tests.tiny import tiny_config, tiny_prompt, tiny_weights

ANSWER = np.array([5, 17, 6, 44])
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & $title ${picture}'


def features_of(config: Config) -> Array:
    """Random image features of one picture."""
    size = config.vision_config.num_patches, config.text_config.hidden_size
    return np.random.default_rng(3).standard_normal(size).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> npvlm.Model:
    return npvlm.load("shapes")


@pytest.fixture(scope="module")
def explained(model: npvlm.Model) -> Explanation:
    return model.explain(draw_picture(), "caption en")


# --- attention ----------------------------------------------------------------------------------


def test_weights_sum_to_one_and_mix_the_values_to_what_attend_gives(
    config: Config, weights: Weights, ops: ModuleType
) -> None:
    """In every layer: with one and several key heads, soft-cap, and windows that hide patches."""
    stages: dict[str, Array] = {}

    def record(name: str, value: Array) -> Array:
        stages[name] = value.copy()
        return value

    prompt, text = tiny_prompt(config, 4), config.text_config
    read_answer(prompt, ANSWER, features_of(config), weights, config, range(0), ops=ops, tap=record)
    rows, wanted = answer_rows(len(prompt), len(ANSWER))
    for layer, kind in enumerate(text.layer_types):
        name = f"language_model.model.layers.{layer}.self_attn"
        q, k, v, attend = (
            stages[f"{name}.{stage}"] for stage in ("q_rope", "k_rope", "v_proj", "attend")
        )
        last = layer == text.num_hidden_layers - 1
        q, attend = (q, attend) if last else (q[wanted], attend[wanted])
        seen = rows.sliding(text.sliding_window if kind == "sliding_attention" else None).at(wanted)
        found = attention_weights(
            q, k, seen.first, seen.last, text.attention_scale, text.attn_logit_softcapping
        )
        at = np.arange(found.shape[-1])
        hidden = (at < seen.first[:, None]) | (at >= seen.last[:, None])
        assert not found[:, hidden].any()
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
        values = v.reshape(len(v), text.num_key_value_heads, -1)
        groups = np.repeat(values, text.num_attention_heads // values.shape[1], axis=1)
        mixed = np.einsum("has,shd->ahd", found, groups)
        np.testing.assert_allclose(mixed, attend.reshape(mixed.shape), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("family", "window", "layers"),
    [("gemma", None, [0, 1, 2, 3]), ("gemma2", 5, [1, 3]), ("gemma2", 64, [0, 1, 2, 3])],
)
def test_layers_whose_window_ends_inside_the_picture_are_left_out(
    family: str, window: int | None, layers: list[int], ops: ModuleType
) -> None:
    config = tiny_config(family, **({"sliding_window": window} if window else {}))
    prompt, features = tiny_prompt(config, 4), features_of(config)
    watch = AttentionTap(config.text_config, len(prompt), len(ANSWER), len(features))
    read_answer(
        prompt, ANSWER, features, tiny_weights(config), config, range(0), ops=ops, tap=watch
    )
    assert list(watch.layers) == layers
    heads = config.text_config.num_attention_heads
    assert {w.shape for w in watch.layers.values()} == {(heads, len(ANSWER), len(features))}
    everything = np.stack(list(watch.layers.values()))
    np.testing.assert_allclose(watch.mean(), everything.mean((0, 1)), rtol=1e-5)
    assert (watch.mean().sum(-1) < 1).all()  # the rest went to words


def test_the_tap_keeps_the_weights_over_the_picture_of_the_tokens_before_the_answer_s(
    config: Config, weights: Weights, ops: ModuleType
) -> None:
    stages: dict[str, Array] = {}
    prompt, features, text = tiny_prompt(config, 4), features_of(config), config.text_config
    watch = AttentionTap(text, len(prompt), len(ANSWER), len(features))

    def both(name: str, value: Array) -> Array:
        stages[name] = value.copy()
        return watch(name, value)

    read_answer(prompt, ANSWER, features, weights, config, range(0), ops=ops, tap=both)
    assert watch.layers
    length = len(prompt) + len(ANSWER) - 1
    for layer, found in watch.layers.items():
        name = f"language_model.model.layers.{layer}.self_attn"
        q, k = stages[f"{name}.q_rope"][-len(ANSWER) :], stages[f"{name}.k_rope"]
        for i, h in np.ndindex(len(ANSWER), text.num_attention_heads):
            at = len(prompt) - 1 + i  # sees itself and all before
            scores = k[: at + 1, h * k.shape[1] // q.shape[1]] @ q[i, h] * text.attention_scale
            if cap := text.attn_logit_softcapping:
                scores = cap * np.tanh(scores / cap)
            expected = np.exp(scores - scores.max())
            expected = (expected / expected.sum())[: len(features)]
            np.testing.assert_allclose(found[h, i], expected, rtol=1e-4, atol=1e-7)
        assert len(k) == length


def test_an_answer_read_at_once_has_the_probabilities_of_the_whole_pass(
    config: Config, weights: Weights, ops: ModuleType
) -> None:
    prompt, features = tiny_prompt(config, 4), features_of(config)
    read = read_answer(prompt, ANSWER, features, weights, config, range(0), ops=ops, tap=closed)
    scores = logits(prompt, ANSWER, features, weights, config, ops=ops, tap=closed)
    rows = range(len(prompt) - 1, len(scores) - 1)
    expected = [ops.log_softmax(scores[r])[i] for r, i in zip(rows, ANSWER, strict=True)]
    np.testing.assert_allclose(read, expected, rtol=1e-4, atol=1e-5)


def test_a_location_counts_with_those_near_to_it_and_no_other_token_does(
    config: Config, weights: Weights, ops: ModuleType
) -> None:
    prompt, features, places = tiny_prompt(config, 4), features_of(config), range(6, 40)
    arguments = prompt, ANSWER, features, weights, config
    alone = read_answer(*arguments, range(0), ops=ops, tap=closed)
    read = read_answer(*arguments, places, ops=ops, tap=closed)
    scores = logits(prompt, ANSWER, features, weights, config, ops=ops, tap=closed)
    for i, token in enumerate(ANSWER):
        if token not in places:
            assert read[i] == alone[i]
            continue
        chances = np.exp(ops.log_softmax(scores[len(prompt) - 1 + i]))
        near = [at for at in places if abs(at - token) <= NEAR]
        assert read[i] == pytest.approx(np.log(chances[near].sum()), rel=1e-4)


def test_damaged_weights_are_said_to_be_so(config: Config, ops: ModuleType) -> None:
    weights, features = tiny_weights(config, dtype=np.float32), features_of(config)
    features[0, 0] = np.nan
    with pytest.raises(NpvlmError, match="not finite"):
        prompt = tiny_prompt(config, 4)
        read_answer(prompt, ANSWER, features, weights, config, range(0), ops=ops, tap=closed)


def test_on_shapes_the_named_thing_lies_under_the_peak(model: npvlm.Model) -> None:
    """Some of the pictures that golden/explain.py measures: 98 % of many, 85 % required."""
    marks = []
    for scene in islice(pictures(21, 12), 12):
        found = model.explain(scene.picture, "caption en")
        if found.answer == caption(scene).answer:
            marks += [is_lit(found.words[at].peak, t, 0) for at, _, t in things_of(scene)]
    assert len(marks) > 40
    assert np.mean(marks) >= 0.85


# --- words --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_words_cover_the_tokens_without_a_gap_and_join_to_the_answer(
    model: npvlm.Model, data: st.DataObject
) -> None:
    tokenizer = model.tokenizer
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    words = split_words(tokenizer, ids)
    assert [at for word in words for at in range(word.start, word.stop)] == list(range(len(ids)))
    assert all(word.start < word.stop for word in words)
    assert "".join(word.text for word in words) == tokenizer.decode(ids)


BOX = "<loc0001><loc0002><loc0003><loc0004>"
OUTLINE = "".join(f"<seg{i:03d}>" for i in range(16))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red circle", ["a", " red", " circle"]),
        ("extraordinarily so, são", ["extraordinarily", " so,", " são"]),
        (" two\nlines", [" two\n", "lines"]),
        (f"{BOX} red circle ; {BOX} cat", [BOX, " red", " circle", " ; ", BOX, " cat"]),
        (f"{BOX}{BOX}", [BOX, BOX]),
        (f"{BOX}{OUTLINE} cat", [f"{BOX}{OUTLINE}", " cat"]),
        ("", []),
    ],
)
def test_words_are_cut_where_people_would(model: npvlm.Model, text: str, words: list[str]) -> None:
    ids = model.tokenizer.encode(text)
    assert [word.text for word in split_words(model.tokenizer, ids)] == words


class Pieces:
    """A tokenizer whose ids count characters of a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def decode(self, ids: list[int]) -> str:
        return "".join(self.text[i] for i in ids)

    def is_whole(self, token_id: int) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "words"), [("赤い丸。", ["赤", "い", "丸。"]), ("한국 말", ["한국 ", "말"])]
)
def test_scripts_without_spaces_are_cut_at_every_piece(text: str, words: list[str]) -> None:
    found = split_words(Pieces(text), range(len(text)))
    assert [word.text for word in found] == words


def test_boxes_are_shown_in_words() -> None:
    assert in_words(f" {BOX}") == "(box)"
    assert in_words(f"{BOX}{OUTLINE}") == "(box and outline)"
    assert in_words(" red") == "red" and in_words("\n") == "(space)"
    assert sureness("red", 0.994) == "99% sure" and sureness("red", 0.001) == "under 1% sure"
    assert sureness(BOX, 0.5) == "50% sure of these places"


# --- occlusion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 3, 8, 16, 27, 32, 64])
def test_parts_lie_side_by_side_from_edge_to_edge(side: int) -> None:
    runs = parts(side)
    assert [row for run in runs for row in range(run.start, run.stop)] == list(range(side))
    assert len(runs) == min(side, 8)


def test_a_cover_has_the_mean_colour_and_leaves_the_rest() -> None:
    picture = np.random.default_rng(0).random((3, 20, 20))
    covered = cover(picture, slice(5, 10), slice(0, 10))
    changed = (covered != picture).any(0)
    assert changed[5:10, 0:10].all() and changed.sum() == 50
    np.testing.assert_allclose(covered[:, 7, 3], picture.mean((1, 2)))


def test_heat_is_how_far_the_odds_fall_under_the_cover() -> None:
    """Two tokens that each need one place, and one that a place holds back."""
    picture = np.zeros((3, 64, 64))
    places, certain = [(4, 60), (40, 20), (20, 44)], np.array([8.0, 0.5, -9.0])
    for row, column in places:
        picture[:, row, column] = 1.0

    def read(pixels: Array) -> np.ndarray:
        seen = np.array([pixels[0, row, column] for row, column in places])
        odds = certain + np.array([1.0, 2.0, -1.0]) * seen
        return -np.log1p(np.exp(-odds))

    told = []
    falls = occlude(picture, 16, read, read(picture), lambda *done: told.append(done))
    assert falls.shape == (3, 16 * 16)
    falls = falls.reshape(3, 16, 16)
    for fall, (row, column), size in zip(falls, places, (1, 2, -1), strict=True):
        assert fall[row // 4, column // 4] == pytest.approx(size, rel=1e-2)
        assert np.count_nonzero(np.abs(fall) > 1e-9) == 4  # a part is two by two patches
    assert told[-1] == (64, 64) and len(told) == 64


def test_certainty_has_large_and_finite_odds() -> None:
    assert log_odds(np.log([0.5, 0.9])) == pytest.approx([0, np.log(9)])
    assert 30 < log_odds(np.zeros(1))[0] < 40


def test_occlusion_lights_what_is_named(model: npvlm.Model) -> None:
    """Words of shape on two of the pictures that golden/explain.py measures; by chance 7 %."""
    marks = []
    for scene in islice(pictures(21, 2), 2):
        found = model.explain(scene.picture, "caption en", method="occlusion")
        assert (found.answer, found.layers) == (caption(scene).answer, [])
        words = [
            (found.words[at], thing) for at, kind, thing in things_of(scene) if kind == "shape"
        ]
        marks += [is_lit(word.peak, thing, 0) for word, thing in words]
    assert len(marks) >= 4 and np.mean(marks) >= 0.6


# --- the explanation ----------------------------------------------------------------------------


def test_words_have_the_tokens_and_probabilities_of_the_answer(
    model: npvlm.Model, explained: Explanation
) -> None:
    answer = model.generate(draw_picture(), "caption en")[0]
    assert explained.answer == answer.text and explained.own
    assert [i for word in explained.words for i in word.token_ids] == answer.token_ids[:-1]
    together = np.prod([word.probability for word in explained.words])
    assert together == pytest.approx(np.exp(sum(answer.logprobs[:-1])), rel=1e-3)
    for word in explained.words:
        assert word.heat.shape == (8, 8) and 0 < word.heat.sum() < 1


def test_a_given_answer_is_explained_in_place_of_the_models_own(model: npvlm.Model) -> None:
    found = model.explain(draw_picture(), "caption en", answer="a green star")
    assert [word.text for word in found.words] == ["a", " green", " star"] and not found.own
    assert found.words[1].probability < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "attention, occlusion"),
        ({"answer": "  "}, "expected words"),
        ({"answer": "a <image>"}, "without <image>"),
    ],
)
def test_what_cannot_be_explained_is_refused(model: npvlm.Model, options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.explain(draw_picture(), "caption en", **options)


def test_an_empty_answer_is_said_to_be_one(model: npvlm.Model) -> None:
    with pytest.raises(NpvlmError, match="answers nothing to 'ocr'"):
        model.explain(draw_picture(), "ocr")


def test_json_reads_back(explained: Explanation) -> None:
    facts = json.loads(explained.to_json())
    assert facts["size"] == [448, 448] and facts["layers"] == [0, 1, 2, 3]
    assert "".join(word["text"] for word in facts["words"]) == facts["answer"]
    word, told = explained.words[2], facts["words"][2]
    np.testing.assert_allclose(told["heat"], word.heat, rtol=1e-5)
    assert told["peak"] == [int(word.peak[0] * 448), int(word.peak[1] * 448)]


# --- what is seen -------------------------------------------------------------------------------


def hostile(size: tuple[int, int] = (90, 30)) -> Explanation:
    """An explanation whose every text is an attack."""
    heat = np.zeros((4, 4))
    heat[1, 3] = 1.0
    words = [Word(HOSTILE, [1, 2], 0.5, heat), Word(" é", [3], 0.004, np.zeros((4, 4)))]
    picture = Image.new("RGB", size, "white")
    texts = {"prompt": HOSTILE, "answer": HOSTILE, "model": HOSTILE, "image": f'"{HOSTILE}'}
    return Explanation(
        picture=picture,
        own=False,
        precision="int8",
        method="attention",
        layers=[0],
        words=words,
        **texts,
    )


@pytest.mark.parametrize("size", [(90, 30), (3, 900), (2000, 7), (1, 1)])
def test_the_sheet_shows_each_word_whatever_the_picture(
    size: tuple[int, int], tmp_path: Path
) -> None:
    hostile(size).draw(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert 640 <= sheet.width < 2400 and 200 < sheet.height < 2400
        assert len(sheet.getcolors(10**7)) > 20


def test_a_wash_is_brightest_at_the_peak_and_clear_where_nothing_is() -> None:
    heat = np.full((8, 8), 0.01)
    heat[6, 1] = 0.5
    colours = np.asarray(wash(heat, (160, 80), "attention")).astype(int)
    light = colours[..., :3].sum(-1) * colours[..., 3]
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert row // 10 == 6 and column // 20 == 1
    assert colours[:40, 80:, 3].max() == 0
    assert np.asarray(wash(np.ones((8, 8)), (8, 8), "attention"))[..., 3].max() == 0


def test_a_word_that_needs_nothing_is_dark_under_occlusion_alone() -> None:
    heat = np.zeros((8, 8))
    heat[6, 1] = 1e-3
    covers = {m: np.asarray(wash(heat, (8, 8), m))[..., 3].max() for m in METHODS}
    assert covers["occlusion"] < 3 and covers["attention"] > 150


class Tags(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_complete_in_itself_and_nothing_in_it_runs(tmp_path: Path) -> None:
    hostile().html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    tags = Tags(page)
    assert [name for name, _ in tags.found].count("script") == 1
    assert [a["id"] for name, a in tags.found if name == "button"] == ["word-1", "word-2"]
    sources = [value for _, a in tags.found for key, value in a.items() if key in ("src", "href")]
    assert sources and all(str(source).startswith("data:image/") for source in sources)
    assert not re.search(r"https?:|@import|url\(", page)
    assert tags.text.count(HOSTILE) == 4  # title, prompt, word and model
    assert not any(key.startswith("on") for _, a in tags.found for key in a)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("word", [1, 3])
def test_a_word_in_the_address_lights_the_picture(
    explained: Explanation, tmp_path: Path, word: int
) -> None:
    explained.html(tmp_path / "page.html")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    flags += "--disable-background-networking --disable-component-update --disable-sync"
    address = f"{(tmp_path / 'page.html').as_uri()}#word-{word}"
    place = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *flags.split(), place, "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    tags = Tags(shown.stdout)
    lit = [a["id"] for _, a in tags.found if "lit" in (a.get("class") or "").split()]
    assert sorted(lit) == [f"heat-{word}", f"word-{word}"]
    [stage] = [a for _, a in tags.found if a.get("id") == "stage"]
    assert stage["class"] == "stage on"
    pressed = [a["id"] for _, a in tags.found if a.get("aria-pressed") == "true"]
    assert pressed == [f"word-{word}"]
    assert explained.words[word - 1].text.strip() + ": " in tags.text


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "my photo.png"
    draw_picture().resize((500, 200)).save(path)
    return path


def test_the_command_answers_and_says_where_the_picture_is(photo: Path, tmp_path: Path) -> None:
    result = run("explain", photo, "answer en how many shapes?", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "3\n")
    assert "npvlm-explain.png" in one_line(result)
    assert [path.name for path in tmp_path.iterdir()] == ["npvlm-explain.png"]


def test_the_command_writes_what_is_asked_for(photo: Path, tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    options = ["--html", page, "--json", "-q", "--answer", "a blue star", "--method", "occlusion"]
    result = run("explain", photo, "caption en", *options, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    assert facts["size"] == [500, 200] and facts["image"] == str(photo)
    assert [word["text"] for word in facts["words"]] == ["a", " blue", " star"]
    assert [path.name for path in tmp_path.iterdir()] == ["why.html"]
    assert "my photo.png" in page.read_text("utf-8") and str(photo.parent) not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["caption en", "-o", "out.jpg"], 2, "out.jpg is no name"),
        (["caption en", "--answer", " "], 2, "expected words"),
        (["ocr"], 3, "answers nothing"),
        (["caption en", "-o", "missing/out.png"], 2, "missing is no folder"),
        (["caption en", "--html", "missing/out.html"], 2, "missing is no folder"),
    ],
)
def test_the_command_fails_in_one_sentence(
    photo: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run("explain", photo, *arguments, cwd=tmp_path)
    assert result.returncode == code and message in one_line(result)
    assert list(tmp_path.iterdir()) == []


def test_the_command_offers_the_methods_that_there_are() -> None:
    assert explain.METHODS == METHODS


def test_a_picture_that_is_not_there_is_named() -> None:
    result = run("explain", "nowhere.png", "caption en")
    assert result.returncode == 3 and "nowhere.png" in one_line(result)
