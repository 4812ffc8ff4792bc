"""The whole model on tiny random weights: what must hold whatever the weights are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from npvlm.decoding import generate as generating
from npvlm.decoding.generate import generate, logits
from npvlm.decoding.sampling import Chooser, Sampling
from npvlm.errors import NpvlmError
from npvlm.model import ops as definitions
from npvlm.model import paligemma
from npvlm.model.cache import Rows, fork, new_cache
from npvlm.model.tap import closed
from npvlm.porting.stages import stages
from tests.tiny import IMAGE, tiny_config, tiny_pixels, tiny_prompt, tiny_weights

GREEDY, DRAWN = Sampling(), Sampling(temperature=1.0)


def features_of(pixels, weights, config, ops, tap=closed):
    features = paligemma.image_features(pixels, weights, config, ops=ops, tap=tap)
    return features.reshape(-1, features.shape[-1])


def answer(prompts, features, weights, config, ops, max_tokens=8, sampling=GREEDY):
    """The ids and log-probabilities of packed sequences."""
    choosers = [Chooser(sampling, 5, ops=ops) for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    sure: list[list[float]] = [[] for _ in prompts]
    limits = [max_tokens] * len(prompts)
    steps = generate(prompts, features, weights, config, choosers, limits, ops=ops, tap=closed)
    for tokens in steps:
        for token in tokens:
            ids[token.sequence].append(token.id)
            sure[token.sequence].append(token.logprob)
    return ids, sure


def test_cached_decode_equals_one_uncached_pass(ops, config, weights) -> None:
    features = features_of(tiny_pixels(config, 1), weights, config, ops)
    prompt = tiny_prompt(config, 6)
    [ids], [sure] = answer([prompt], features, weights, config, ops, max_tokens=12)
    assert len(ids) > 5
    scores = logits(prompt, np.array(ids), features, weights, config, ops=ops, tap=closed)
    scores = scores[len(prompt) - 1 : -1].astype(np.float64)
    assert [int(row.argmax()) for row in scores] == ids
    normed = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    uncached = normed[np.arange(len(ids)), ids]
    np.testing.assert_allclose(sure, uncached, atol=2e-5)


def test_packed_sequences_answer_as_each_does_alone(ops, config, weights) -> None:
    lengths = (5, 1, 9, 3)
    prompts = [tiny_prompt(config, n, seed=n) for n in lengths]
    pixels = tiny_pixels(config, len(lengths))
    together = features_of(pixels, weights, config, ops)
    P = config.vision_config.num_patches
    ids, sure = answer(prompts, together, weights, config, ops)
    for i, prompt in enumerate(prompts):
        alone = features_of(pixels[i : i + 1], weights, config, ops)
        np.testing.assert_allclose(together[i * P : (i + 1) * P], alone, atol=1e-5)
        [own_ids], [own_sure] = answer([prompt], alone, weights, config, ops)
        assert ids[i] == own_ids
        np.testing.assert_allclose(sure[i], own_sure, atol=2e-5)


def test_sequences_end_at_their_own_eos_and_the_rest_go_on(ops, config, weights) -> None:
    prompts = [tiny_prompt(config, n, seed=n) for n in (4, 6)]
    features = features_of(tiny_pixels(config, 2), weights, config, ops)
    ids, _ = answer(prompts, features, weights, config, ops, sampling=DRAWN)
    stop = ids[0][2]
    assert stop not in ids[0][:2] and len(ids[1]) > 3
    early = replace(config, eos_token_ids=(stop,))
    stopped, _ = answer(prompts, features, weights, early, ops, sampling=DRAWN)
    assert stopped[0] == ids[0][:3]
    end = ids[1].index(stop) + 1 if stop in ids[1] else len(ids[1])
    assert stopped[1] == ids[1][:end]


def test_the_prefix_sees_itself_and_answers_see_back(ops, config, weights) -> None:
    """Changing a prompt token changes every earlier row; changing an answer token none."""
    features = features_of(tiny_pixels(config, 1), weights, config, ops)
    prompt, reply = tiny_prompt(config, 5), np.array([7, 8, 9])
    base = logits(prompt, reply, features, weights, config, ops=ops, tap=closed)

    other = prompt.copy()
    other[-1] += 1
    changed = logits(other, reply, features, weights, config, ops=ops, tap=closed)
    assert np.all(np.abs(changed - base).max(-1) > 0)

    changed = logits(prompt, np.array([7, 8, 10]), features, weights, config, ops=ops, tap=closed)
    moved = np.abs(changed - base).max(-1) > 0
    assert not moved[:-1].any() and moved[-1]


def test_a_window_hides_old_rows_from_answers_but_not_from_the_prefix() -> None:
    rows = Rows.of(100, 6, range(9)).sliding(4)
    assert rows.first.tolist() == [100] * 6 + [103, 104, 105]
    assert rows.last.tolist() == [106] * 6 + [107, 108, 109]
    assert rows.positions.tolist() == list(range(1, 10))


def test_a_window_longer_than_the_sequence_changes_nothing(ops) -> None:
    results = []
    for window in (1000, 30, 5):
        config = tiny_config("gemma2", sliding_window=window)
        weights = tiny_weights(config)
        features = features_of(tiny_pixels(config, 1), weights, config, ops)
        prompt, reply = tiny_prompt(config, 5), np.array([7, 8, 9])
        results.append(logits(prompt, reply, features, weights, config, ops=ops, tap=closed))
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2])[-1].max() > 1e-3


def test_image_features_replace_image_tokens_and_are_not_scaled(ops, config, weights) -> None:
    prompt = tiny_prompt(config, 3)
    features = features_of(tiny_pixels(config, 1), weights, config, ops)
    x = paligemma.embed(prompt, features, weights, config, ops=ops, tap=closed)
    np.testing.assert_array_equal(x[prompt == IMAGE], features)
    table = weights["language_model.model.embed_tokens.weight"].astype("f8")
    scaled = table[prompt[-3:]] * np.sqrt(config.text_config.hidden_size)
    np.testing.assert_allclose(x[-3:], scaled, rtol=1e-7)


def test_an_untied_head_scores_with_its_own_table(ops, config) -> None:
    weights = tiny_weights(config)
    name = "language_model.model.embed_tokens.weight"
    untied = type(weights)({**weights, "language_model.lm_head.weight": -weights[name]})
    features = features_of(tiny_pixels(config, 1), weights, config, ops)
    prompt = tiny_prompt(config, 3)
    empty = np.array([], int)
    tied = logits(prompt, empty, features, weights, config, ops=ops, tap=closed)
    own = logits(prompt, empty, features, untied, config, ops=ops, tap=closed)
    np.testing.assert_allclose(own, -tied, rtol=1e-6)


def test_float64_goes_through_the_whole_model(ops, config, weights) -> None:
    dtypes = set()

    def note(name, value):
        dtypes.add(value.dtype)
        return value

    features = features_of(tiny_pixels(config, 1, dtype=np.float64), weights, config, ops, note)
    prompt, empty = tiny_prompt(config, 3), np.array([], int)
    wide = logits(prompt, empty, features, weights, config, ops=ops, tap=note)
    assert dtypes == {np.dtype(np.float64)} and wide.dtype == np.float64
    narrow = logits(
        prompt, empty, features.astype(np.float32), weights, config, ops=ops, tap=closed
    )
    np.testing.assert_allclose(narrow, wide, atol=2e-5)


def test_the_cache_has_a_row_for_every_token_that_is_read_and_no_more(
    ops, config, weights, monkeypatch
) -> None:
    """Of an answer all tokens are read but the last."""
    caches = []

    def kept(*arguments):
        caches.append(new_cache(*arguments))
        return caches[-1]

    monkeypatch.setattr(generating, "new_cache", kept)
    prompts = [tiny_prompt(config, n, seed=n) for n in (4, 6)]
    features = features_of(tiny_pixels(config, 2), weights, config, ops)
    answer(prompts, features, weights, config, ops, max_tokens=3)
    [cache] = caches
    rows = sum(len(prompt) + 2 for prompt in prompts)
    assert [layer.keys.shape for layer in cache] == [(rows, 2, 10)] * 4
    assert all(layer.keys.any(axis=(1, 2)).all() for layer in cache)


def test_a_fork_has_the_rows_of_the_first_on_every_layer_and_changes_no_other(config) -> None:
    rng = np.random.default_rng(3)
    cache = new_cache(config.text_config, 40, np.float32)
    for layer in cache:
        for slab in (layer.keys, layer.values):
            slab[:] = rng.standard_normal(slab.shape)
    before = [(layer.keys.copy(), layer.values.copy()) for layer in cache]
    fork(cache, 10, [0, 30], range(2, 7))
    others = [*range(2), *range(7, 32), *range(37, 40)]
    for layer, slabs in zip(cache, before, strict=True):
        for found, old in zip((layer.keys, layer.values), slabs, strict=True):
            np.testing.assert_array_equal(found[2:7], old[12:17])
            np.testing.assert_array_equal(found[32:37], old[12:17])
            np.testing.assert_array_equal(found[others], old[others])


def test_any_of_several_stop_ids_ends_an_answer(ops, config, weights) -> None:
    prompt = tiny_prompt(config, 4)
    features = features_of(tiny_pixels(config, 1), weights, config, ops)
    [ids], _ = answer([prompt], features, weights, config, ops, sampling=DRAWN)
    stops = replace(config, eos_token_ids=(0, ids[2]))
    assert ids[2] not in ids[:2]
    [stopped], _ = answer([prompt], features, weights, stops, ops, sampling=DRAWN)
    assert stopped == ids[:3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_said(ops, config, weights, bad) -> None:
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    weights[name][3, 2] = bad
    features = features_of(tiny_pixels(config, 1), weights, config, ops)
    with np.errstate(all="ignore"), pytest.raises(NpvlmError, match="damaged"):
        answer([tiny_prompt(config, 4)], features, weights, config, ops)


class Poisoned:
    """A namespace that has every op, none of which may be called."""

    def __getattr__(self, name):
        def poison(*args, **kwargs):
            raise AssertionError(f"{name} came from another namespace")

        return poison


def test_the_namespace_given_is_the_one_used(ops, config, weights, monkeypatch) -> None:
    """The model calls nothing but what it was handed: a poisoned module changes nothing."""
    handed = type("Handed", (), {n: staticmethod(f) for n, f in vars(ops).items() if callable(f)})
    from npvlm.model import gemma, siglip

    for module in (gemma, siglip, paligemma):
        assert "ops" not in vars(module)
    features = features_of(tiny_pixels(config, 1), weights, config, handed)
    prompt, empty = tiny_prompt(config, 3), np.array([], int)
    logits(prompt, empty, features, weights, config, ops=handed, tap=closed)
    with pytest.raises(AssertionError, match="came from another namespace"):
        features_of(tiny_pixels(config, 1), weights, config, Poisoned())


def test_a_run_shows_every_stage_once_and_under_its_name(config, weights) -> None:
    shown = []

    def tap(name, value):
        shown.append(name)
        return value

    features = features_of(tiny_pixels(config, 1), weights, config, definitions, tap)
    prompt = tiny_prompt(config, 4)
    logits(prompt, np.array([5]), features, weights, config, ops=definitions, tap=tap)
    before = ("image.", "pixel_values", "input_ids", "positions")
    assert shown == [s.name for s in stages(config) if not s.name.startswith(before)]
