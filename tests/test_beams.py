"""Beam search: it finds what transformers' rules say, however it is packed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import npvlm
from golden import ours
from npvlm import kernels
from npvlm.decoding import beams as searching
from npvlm.decoding.beams import Beam, Search, beam_search
from npvlm.decoding.generate import generate, logits
from npvlm.decoding.sampling import Chooser, Sampling
from npvlm.errors import NpvlmError
from npvlm.model import ops as definitions
from npvlm.model import paligemma
from npvlm.model.cache import new_cache
from npvlm.model.tap import closed
from npvlm.work.demo import draw_picture
from tests.test_cli import one_line, run
from tests.tiny import EOS, tiny_config, tiny_pixels, tiny_prompt, tiny_weights

GOLDEN = Path(ours.__file__).parent
RECORD = json.loads((GOLDEN / "beams.json").read_text())
LENGTHS = (5, 1, 9)
ENDS = (EOS, *range(3, 97, 7))  # so many that answers of all lengths are found


def features_of(pixels, weights, config, ops):
    features = paligemma.image_features(pixels, weights, config, ops=ops, tap=closed)
    return features.reshape(-1, features.shape[-1])


def search(prompts, features, weights, config, ops, beams, max_tokens=8):
    """The ids and log-probabilities that each prompt's best beam has."""
    found = {}
    limits = [max_tokens] * len(prompts)
    for tokens in beam_search(
        prompts, features, weights, config, beams, limits, ops=ops, tap=closed
    ):
        for token in tokens:
            ids, sure = found.setdefault(token.sequence, ([], []))
            ids.append(token.id)
            sure.append(token.logprob)
    return [found[i] for i in range(len(prompts))]


def uncached(prompt, ids, features, weights, config, ops):
    """The log-probabilities of an answer by one pass without a cache."""
    scores = logits(prompt, np.array(ids), features, weights, config, ops=ops, tap=closed)
    rows = scores[len(prompt) - 1 : -1]
    return [float(ops.log_softmax(row)[i]) for row, i in zip(rows, ids, strict=True)]


@pytest.fixture
def packed(config, weights, ops):
    """Three prompts of different lengths, each with a picture."""
    prompts = [tiny_prompt(config, n, seed=n) for n in LENGTHS]
    return prompts, features_of(tiny_pixels(config, 3), weights, config, ops)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_beam_for_every_answer_there_is_the_best_is_found(family, seed) -> None:
    """By trying all: five ids, of which two end an answer, and at most three tokens."""
    config = replace(tiny_config(family, vocab_size=5), eos_token_ids=(1, 3))
    weights = tiny_weights(config, seed)
    images = np.full(config.vision_config.num_patches, config.image_token_index)
    prompt = np.concatenate([images, [2, 4, seed]])
    features = features_of(tiny_pixels(config, 1), weights, config, kernels)

    means, growing = {}, {(): 0.0}
    for length in (1, 2, 3):
        for begun, total in list(growing.items()):
            answer = np.array(begun, np.int64)
            rows = logits(prompt, answer, features, weights, config, ops=kernels, tap=closed)
            for i, logprob in enumerate(kernels.log_softmax(rows[-1])):
                ends = i in config.eos_token_ids or length == 3
                (means if ends else growing)[*begun, i] = total + logprob
            del growing[begun]
    means = {ids: total / len(ids) for ids, total in means.items()}
    assert len(means) == 2 + 3 * 2 + 3 * 3 * 5
    best = max(means, key=lambda ids: means[ids])
    [(found, sure)] = search([prompt], features, weights, config, kernels, 125, max_tokens=3)
    assert tuple(found) == best
    assert np.mean(sure) == pytest.approx(means[best], abs=1e-12)


def test_one_beam_is_greedy(ops, config, weights, packed) -> None:
    config = replace(config, eos_token_ids=ENDS)
    prompts, features = packed
    found = search(prompts, features, weights, config, ops, 1)
    choosers = [Chooser(Sampling(), None, ops=ops) for _ in prompts]
    greedy = [([], []) for _ in prompts]
    for tokens in generate(
        prompts, features, weights, config, choosers, [8] * len(prompts), ops=ops, tap=closed
    ):
        for token in tokens:
            greedy[token.sequence][0].append(token.id)
            greedy[token.sequence][1].append(token.logprob)
    assert [ids for ids, _ in found] == [ids for ids, _ in greedy]
    for (_, sure), (_, expected) in zip(found, greedy, strict=True):
        np.testing.assert_allclose(sure, expected, atol=0 if ops is kernels else 2e-5)


@pytest.mark.parametrize("beams", [2, 5])
def test_packed_prompts_find_what_each_finds_alone(ops, config, weights, packed, beams) -> None:
    config = replace(config, eos_token_ids=ENDS)
    prompts, features = packed
    found = search(prompts, features, weights, config, ops, beams, max_tokens=12)
    P = config.vision_config.num_patches
    for i, (ids, sure) in enumerate(found):
        own = features[i * P : (i + 1) * P]
        [(alone, alone_sure)] = search(prompts[i : i + 1], own, weights, config, ops, beams, 12)
        assert ids == alone
        np.testing.assert_allclose(sure, alone_sure, atol=0 if ops is kernels else 2e-5)


def test_a_beam_has_the_probabilities_of_a_pass_over_its_tokens_alone(
    ops, config, weights, packed, monkeypatch
) -> None:
    """Although beams took over each other's rows of the cache on the way."""
    taken = []
    fork = searching.fork

    def counted(cache, start, forks, tokens):
        taken.append(len(tokens))
        fork(cache, start, forks, tokens)

    monkeypatch.setattr(searching, "fork", counted)
    config = replace(config, eos_token_ids=())
    prompts, features = packed
    P = config.vision_config.num_patches
    found = search(prompts, features, weights, config, ops, 4, max_tokens=10)
    assert sum(1 < tokens < 10 for tokens in taken) > 5
    for i, (ids, sure) in enumerate(found):
        own = features[i * P : (i + 1) * P]
        expected = uncached(prompts[i], ids, own, weights, config, ops)
        np.testing.assert_allclose(sure, expected, atol=0 if ops is kernels else 2e-5)


def grow(search: Search, *rows: list[float], last: bool = False) -> bool:
    """One step with these probabilities of the ids 0 to 3 for each beam; 3 ends an answer."""
    return search.grow(np.log(rows), [3], last)


def test_an_end_counts_if_it_is_among_the_best_and_the_best_others_go_on() -> None:
    search = Search(0, 7, [0, 20])
    assert not grow(search, [0.5, 0.1, 0.05, 0.35])
    assert [beam.ids for beam in search.finished] == [(3,)]
    assert [beam.ids for beam in search.beams] == [(0,), (1,)]
    # 0.2, 0.15 and then the ends, 0.1 and 0.001
    assert not grow(search, [0.4, 0.3, 0.1, 0.2], [0.3, 0.3, 0.39, 0.01])
    assert [beam.ids for beam in search.finished] == [(3,)]
    assert [beam.ids for beam in search.beams] == [(0, 0), (0, 1)]
    assert search.beams[0].score == pytest.approx(np.log(0.5 * 0.4) / 2)


def test_equal_continuations_come_in_the_order_of_beams_and_ids() -> None:
    search = Search(0, 7, [0, 20, 40])
    grow(search, [0.3, 0.3, 0.3, 0.1])
    assert [beam.ids for beam in search.beams] == [(0,), (1,), (2,)]
    grow(search, *[[0.3, 0.3, 0.3, 0.1]] * 3)
    assert [beam.ids for beam in search.beams] == [(0, 0), (0, 1), (0, 2)]


def test_a_search_is_over_when_its_best_beam_is_no_better_than_the_worst_finished() -> None:
    """By means: a beam of two tokens has the root of their product."""
    for best, over in ((0.999, False), (0.1, True)):
        search = Search(0, 7, [0, 20])
        rest = (1 - 0.39) / 2
        assert not grow(search, [0.39, rest, rest, 0.39 - 1e-9])  # in no way a sum of one
        # (0, 3) ends with 0.39 as its mean; (0, 0) goes on with the root of 0.39 * best.
        left = [best, 1e-9, 1e-9, 0.39]
        assert grow(search, left, [1e-9] * 4) == over
        assert [beam.ids for beam in search.finished] == [(0, 3), (3,)]


def test_at_the_last_step_the_best_end_whatever_they_say() -> None:
    search = Search(0, 7, [0, 20])
    assert grow(search, [0.5, 0.3, 0.1, 0.1], last=True)
    assert [beam.ids for beam in search.finished] == [(0,), (1,)]


def test_a_beam_whose_run_is_taken_moves_to_one_that_nobody_continues(config) -> None:
    """Three beams of which one goes on twice, one once and one not at all."""
    cache = new_cache(config.text_config, 30, np.float32)
    for layer in cache:
        layer.keys[:] = layer.values[:] = np.arange(30)[:, None, None]
    search = Search(0, 4, [0, 10, 20])
    before = [Beam(run, (5, 6, 7), (-1.0,) * 3, -3.0) for run in (10, 20, 20)]
    search.beams = list(before)
    search.settle(cache)
    assert [beam.run for beam in search.beams] == [10, 20, 0]
    assert [beam.ids for beam in search.beams] == [beam.ids for beam in before]
    for layer in cache:
        expected = np.arange(30)
        expected[4:6] = [24, 25]  # of the answer what has been read: all but its last token
        for slab in (layer.keys, layer.values):
            np.testing.assert_array_equal(slab[:, 0, 0], expected)


def test_a_search_may_be_over_before_the_last_step() -> None:
    config = replace(tiny_config("gemma"), eos_token_ids=tuple(range(0, 97, 2)))
    weights = tiny_weights(config)
    features = features_of(tiny_pixels(config, 1), weights, config, kernels)
    steps = list(
        beam_search(
            [tiny_prompt(config, 4)], features, weights, config, 3, [60], ops=kernels, tap=closed
        )
    )
    assert 1 < len(steps) < 60 and not any(steps[:-1])
    assert [token.id % 2 for token in steps[-1]] == [1] * (len(steps[-1]) - 1) + [0]


def test_weights_that_are_no_numbers_are_said(ops, config, weights, packed) -> None:
    weights["language_model.model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    prompts, features = packed
    with np.errstate(all="ignore"), pytest.raises(NpvlmError, match="damaged"):
        search(prompts, features, weights, config, ops, 2)


# --- what transformers found ---------------------------------------------------------------------


@cache
def open_golden(name: str, ops: str) -> tuple[npvlm.Model, dict]:
    return npvlm.load(GOLDEN / name, ops=ops), load_file(GOLDEN / f"{name}.safetensors")


@pytest.mark.parametrize("ops_name", ["numpy", "kernels"])
@pytest.mark.parametrize("name", RECORD["searches"])
def test_the_best_beams_are_those_of_transformers(name: str, ops_name: str) -> None:
    """Token for token; a score is as near as twice the error of torch's own float32 logits."""
    model, tensors = open_golden(name, ops_name)
    prompts = json.loads((GOLDEN / f"{name}.json").read_text())["prompts"]
    pictures = [
        [Image.fromarray(tensors[f"{number}.picture.{i}"]) for i in range(prompt["pictures"])]
        for number, prompt in enumerate(prompts)
    ]
    every = RECORD["searches"][name]
    for beams, ends in sorted({(found["beams"], tuple(found["ends"])) for found in every}):
        own = [found for found in every if (found["beams"], tuple(found["ends"])) == (beams, ends)]
        numbers = [found["prompt"] for found in own]
        answers = replace(model, config=replace(model.config, eos_token_ids=ends)).generate(
            [pictures[i] for i in numbers],
            [prompts[i]["prompt"] for i in numbers],
            max_tokens=20,
            beams=beams,
        )
        for found, answer in zip(own, answers, strict=True):
            assert answer.token_ids == found["answer"]
            assert answer.stop == ("eos" if answer.token_ids[-1] in ends else "length")
            error = abs(np.mean(answer.logprobs) - found["score"])
            assert error <= 2 * RECORD["logits_off"][name][found["prompt"]]


def test_the_goldens_are_of_all_kinds() -> None:
    """Both families; answers that end early and that do not; greedy ones and others."""
    kinds = set()
    for name, searches in RECORD["searches"].items():
        model, _ = open_golden(name, "numpy")
        prompts = json.loads((GOLDEN / f"{name}.json").read_text())["prompts"]
        for found in searches:
            answer = found["answer"]
            greedy = prompts[found["prompt"]]["answer"][: len(answer)] == answer
            early = len(answer) < 20
            kinds |= {model.config.text_config.model_type, found["beams"], ("greedy", greedy)}
            kinds |= {("early", early, greedy)}
    assert {"gemma", "gemma2", 2, 3, 5, ("early", True, False), ("early", False, False)} <= kinds
    assert ("greedy", True) in kinds


# --- the public face -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "drawn.png"
    draw_picture().save(path)
    return path


def test_answers_by_beams_are_likelier_per_token_than_greedy_ones_and_come_whole(picture) -> None:
    model = npvlm.load("shapes")
    prompts = ["caption en", "answer en how many circles?", "detect red circle"]
    together = model.generate([picture] * 3, prompts, beams=3)
    for answer, greedy, prompt in zip(
        together, model.generate([picture] * 3, prompts), prompts, strict=True
    ):
        assert np.mean(answer.logprobs) >= np.mean(greedy.logprobs)
        assert answer.seed is None and answer.stop == "eos"
        events = list(model.events(picture, prompt, Sampling(), beams=3))
        assert "".join(event.text for event in events) == 2 * answer.text
        assert events[-1].logprobs == answer.logprobs


@pytest.mark.parametrize(
    "arguments", [{"beams": 0}, {"beams": 2.0}, {"beams": True}, {"beams": 2, "top_k": 3}]
)
def test_bad_use_is_refused(picture, arguments) -> None:
    with pytest.raises(npvlm.UsageError, match="beams"):
        npvlm.load("shapes").generate(picture, "caption en", **arguments)


def test_the_command_takes_beams(picture) -> None:
    options = ["generate", picture, "--prompt", "caption en", "--beams", 3]
    [answer] = npvlm.load("shapes").generate(picture, "caption en", beams=3)
    assert json.loads(run(*options, "--json").stdout)["logprobs"] == answer.logprobs
    assert run(*options, "--temperature", 0).stdout == answer.text + "\n"
    refused = run(*options, "--do_sample", "True")
    assert refused.returncode == 2 and "--beams" in one_line(refused)


def test_definitions_and_kernels_find_the_same(config, weights) -> None:
    config = replace(config, eos_token_ids=ENDS)
    prompt = tiny_prompt(config, 4)
    features = features_of(tiny_pixels(config, 1), weights, config, definitions)
    [slow], [fast] = (
        search([prompt], features, weights, config, ops, 3) for ops in (definitions, kernels)
    )
    assert slow[0] == fast[0]
