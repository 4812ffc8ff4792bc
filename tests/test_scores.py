"""How probable given answers are: one prefill for all, and the numbers of each alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm import kernels
from npvlm.answers.scores import Scores, candidates
from npvlm.decoding import score as scoring
from npvlm.decoding.generate import generate, logits
from npvlm.decoding.sampling import Chooser, Sampling
from npvlm.decoding.score import score
from npvlm.errors import NpvlmError
from npvlm.model import paligemma
from npvlm.model.tap import closed
from npvlm.work.demo import draw_picture
from tests.test_cli import one_line, run
from tests.tiny import EOS, tiny_pixels, tiny_prompt

ANSWERS = [[7, 8, 9, EOS], [EOS], [7, 8, EOS], [90, EOS], [7, 8, 9, EOS], [5] * 30]
QUESTION = "answer en how many shapes?"


@pytest.fixture
def asked(config, weights, ops):
    """A prompt with its picture."""
    features = paligemma.image_features(
        tiny_pixels(config, 1), weights, config, ops=ops, tap=closed
    )
    return tiny_prompt(config, 6), features.reshape(-1, features.shape[-1])


def scored(asked, answers, weights, config, ops):
    prompt, features = asked
    given = [np.array(answer) for answer in answers]
    return score(prompt, given, features, weights, config, ops=ops, tap=closed)


def hold(found, expected, ops) -> None:
    """The same bits with kernels; with the definitions as near as products in other shapes are."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if ops is kernels else 2e-5)


def test_answers_scored_together_are_each_scored_alone(ops, config, weights, asked) -> None:
    together = scored(asked, ANSWERS, weights, config, ops)
    assert [len(own) for own in together] == [len(answer) for answer in ANSWERS]
    for answer, found in zip(ANSWERS, together, strict=True):
        [alone] = scored(asked, [answer], weights, config, ops)
        assert found.dtype == alone.dtype == np.float64
        hold(found, alone, ops)


def test_a_score_is_the_log_softmax_of_one_pass_without_a_cache(
    ops, config, weights, asked
) -> None:
    prompt, features = asked
    for answer, found in zip(ANSWERS, scored(asked, ANSWERS, weights, config, ops), strict=True):
        given = np.array(answer)
        rows = logits(prompt, given, features, weights, config, ops=ops, tap=closed)
        behind = rows[len(prompt) - 1 : -1]
        hold(found, [ops.log_softmax(row)[i] for row, i in zip(behind, answer, strict=True)], ops)


def test_a_greedy_answer_has_the_log_probabilities_that_it_was_written_with(
    ops, config, weights, asked
) -> None:
    prompt, features = asked
    chooser = Chooser(Sampling(), None, ops=ops)
    steps = generate([prompt], features, weights, config, [chooser], [9], ops=ops, tap=closed)
    tokens = [token for step in steps for token in step]
    answers = [[EOS], [token.id for token in tokens], [3, EOS]]
    hold(scored(asked, answers, weights, config, ops)[1], [t.logprob for t in tokens], ops)


def test_the_prefix_is_read_once_whatever_the_number_of_answers(
    ops, config, weights, asked, monkeypatch
) -> None:
    read = []
    forward = paligemma.forward

    def counted(x, *arguments, **named):
        read.append(len(x))
        return forward(x, *arguments, **named)

    monkeypatch.setattr(paligemma, "forward", counted)
    scored(asked, ANSWERS * 2, weights, config, ops)
    assert read == [len(asked[0]), 2 * sum(len(answer) - 1 for answer in ANSWERS)]
    read.clear()
    scored(asked, [[EOS]] * 3, weights, config, ops)
    assert read == [len(asked[0])]


@pytest.mark.parametrize(("rows", "tokens"), [(1, 10**6), (150, 10**6), (10**6, 1), (10**6, 8)])
def test_how_answers_are_cut_into_packs_changes_nothing(
    ops, config, weights, asked, monkeypatch, rows, tokens
) -> None:
    together = scored(asked, ANSWERS, weights, config, ops)
    monkeypatch.setattr(scoring, "PACKED_ROWS", rows)
    monkeypatch.setattr(scoring, "PACKED_TOKENS", tokens)
    for one, other in zip(scored(asked, ANSWERS, weights, config, ops), together, strict=True):
        hold(one, other, ops)


def test_weights_that_are_no_numbers_are_said(ops, config, weights, asked) -> None:
    weights["language_model.model.layers.1.mlp.up_proj.weight"][3, 2] = np.inf
    with np.errstate(all="ignore"), pytest.raises(NpvlmError, match="damaged"):
        scored(asked, ANSWERS, weights, config, ops)


# --- what is made of them ------------------------------------------------------------------------


def test_candidates_are_ranked_by_total_or_by_mean_and_equals_stay_in_order() -> None:
    found = candidates(
        ["long", "short", "same"],
        [[5, 6, 7, 1], [5, 1], [8, 1]],
        [[-0.5] * 4, [-0.75] * 2, [-1.0, -0.5]],
    )
    scores = Scores("x.png", "caption en", found, [1, 2], "shapes", "float32")
    assert [c.total for c in found] == [-2.0, -1.5, -1.5]
    assert [c.text for c in scores.ranked()] == ["short", "same", "long"]
    assert [c.text for c in scores.ranked("mean")] == ["long", "short", "same"]
    assert [c.text for c in scores.candidates] == ["long", "short", "same"]
    assert sum(c.share for c in found) == pytest.approx(1, abs=1e-15)
    assert found[1].share / found[0].share == pytest.approx(math.exp(0.5))
    with pytest.raises(npvlm.UsageError, match="'total' or 'mean'"):
        scores.ranked("length")


def test_shares_of_very_unlikely_answers_are_numbers() -> None:
    found = candidates(["a", "b"], [[1], [1]], [[-1e5], [-1e5 - 800]])
    assert [c.share for c in found] == [1, 0]


@pytest.fixture(scope="module")
def model() -> npvlm.Model:
    return npvlm.load("shapes")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "drawn.png"
    draw_picture().save(path)
    return path


def test_the_models_own_answer_wins_with_the_numbers_of_its_generation(model, picture) -> None:
    [answer] = model.generate(picture, QUESTION)
    scores = model.score(picture, QUESTION, ["12", answer.text, "", "a cat", answer.text])
    assert [c.text for c in scores.candidates] == ["12", answer.text, "", "a cat", answer.text]
    best = scores.ranked()[0]
    assert (best.token_ids, best.logprobs) == (answer.token_ids, answer.logprobs)
    assert scores.candidates[1] == scores.candidates[4]
    empty = scores.candidates[2]
    assert empty.token_ids == [model.tokenizer.eos_id] and empty.total == empty.mean
    assert scores.prompt_token_ids == answer.prompt_token_ids
    read = json.loads(scores.to_json())
    assert "\n" not in scores.to_json()
    assert [c["logprobs"] for c in read["candidates"]] == [c.logprobs for c in scores.candidates]
    assert read["image"] == str(picture)


def test_several_pictures_go_in_front_of_one_prompt(model, picture) -> None:
    with Image.open(picture) as opened:
        scores = model.score([picture, opened], QUESTION, "3")
    assert scores.image == [str(picture), str(picture)]
    patches = model.config.vision_config.num_patches
    assert scores.prompt_token_ids.count(model.tokenizer.image_id) == 2 * patches
    assert [c.share for c in scores.candidates] == [1]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([], "no answer"),
        (["a", 5], "no text"),
        ([None], "no text"),
        (["a <image>"], "<image>"),
        (["word " * 9000], "max_position_embeddings"),
        (["\ud800"], "UTF-8"),
    ],
)
def test_answers_that_are_none_are_refused(model, picture, answers, says) -> None:
    with pytest.raises(npvlm.UsageError, match=says):
        model.score(picture, QUESTION, answers)


def test_a_picture_and_a_prompt_are_needed(model, picture) -> None:
    with pytest.raises(npvlm.UsageError, match="picture"):
        model.score([], QUESTION, ["3"])
    with pytest.raises(npvlm.UsageError, match="no text"):
        model.score(picture, 5, ["3"])


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_ranked_table_and_json(model, picture) -> None:
    answers = ["12", "3", "", "a\tb\\\n"]
    result = run("score", picture, QUESTION, *answers)
    assert (result.returncode, result.stderr) == (0, "")
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["total", "mean", "share", "answer"]
    ranked = model.score(picture, QUESTION, answers).ranked()
    for line, expected in zip(lines, ranked, strict=True):
        total, mean, share = line.split()[:3]
        assert float(total) == pytest.approx(expected.total, abs=6e-5)
        assert float(mean) == pytest.approx(expected.mean, abs=6e-5)
        assert float(share.rstrip("%")) / 100 == pytest.approx(expected.share, abs=6e-5)
    texts = [line[32:] for line in lines]
    assert sorted(texts) == sorted(["12", "3", "", r"a\tb\\\n"])

    by_mean = run("score", picture, QUESTION, *answers, "--by", "mean").stdout.splitlines()
    means = [float(line.split()[1]) for line in by_mean[1:]]
    assert means == sorted(means, reverse=True) and set(by_mean) == {head, *lines}
    read = json.loads(run("score", picture, QUESTION, *answers, "--json").stdout)
    assert [c["text"] for c in read["candidates"]] == answers
    assert [c["total"] for c in read["candidates"]] == [
        c.total for c in model.score(picture, QUESTION, answers).candidates
    ]


def test_the_toy_is_said_unless_quiet(picture) -> None:
    unnamed = {"NPVLM_MODEL": ""}
    said = run("score", picture, QUESTION, "3", env=unnamed)
    assert "toy" in one_line(said)
    quiet = run("score", picture, QUESTION, "3", "-q", "--precision", "int8", env=unnamed)
    assert (quiet.returncode, quiet.stderr) == (0, "") and quiet.stdout


def test_bad_use_exits_with_2(picture) -> None:
    for arguments in ([picture, QUESTION], [picture, QUESTION, "<image>"]):
        result = run("score", *arguments)
        assert result.returncode == 2 and one_line(result) and result.stdout == ""
    assert run("score", picture, QUESTION, "--", "-3").returncode == 0
