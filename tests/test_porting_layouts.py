"""Layouts: every right way to hold a stage is undone exactly, and no mistake is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npvlm.model import ops
from npvlm.model.weights import Array
from npvlm.porting.layouts import FROM_ZERO, PAIRS, layouts
from npvlm.porting.stages import TEXT, TOWER
from tests.tiny import tiny_config

CONFIG = tiny_config("gemma2")  # D = 38, F = 53, H = 6, K = 2, d = 10; tower D = 33, H = 3, d = 11
LAYER, TOWER_LAYER = f"{TEXT}.layers.1", f"{TOWER}.encoder.layers.1"
Q, K, V = (f"{LAYER}.self_attn.{word}" for word in ("q_proj", "k_proj", "v_proj"))
Q_ROPE, K_ROPE, ATTEND = (f"{LAYER}.self_attn.{word}" for word in ("q_rope", "k_rope", "attend"))
LOGITS, PATCHES = "language_model.logits", f"{TOWER}.embeddings.patch_embedding"
QKV = ("q_proj", "k_proj", "v_proj")
T = 7
SCALE = CONFIG.text_config.attention_scale


def drawn(*shape: int, dtype: type = np.float32) -> Array:
    """Random numbers, no two alike."""
    return np.random.default_rng(math.prod(shape)).standard_normal(shape).astype(dtype)


def ways(value: Array, truth: Array, stage: str, part: tuple[str, ...] | None = None) -> list[str]:
    """In which ways an array can be read as exactly the stage."""
    found = layouts(value, stage, truth.shape, CONFIG, part)
    return [one.how for one in found if np.array_equal(one.value, truth)]


def nearest(value: Array, truth: Array, stage: str) -> tuple[float, str]:
    """The least error of all readings, and which it is."""
    found = layouts(value, stage, truth.shape, CONFIG)
    return min((float(np.abs(one.value - truth).max()), one.how) for one in found)


# The axes


def test_an_array_in_the_stages_own_shape_comes_first_and_is_not_copied() -> None:
    value = drawn(T, 38)
    first = next(layouts(value, LAYER, value.shape, CONFIG))
    assert first.how == "" and np.shares_memory(first.value, value)


@pytest.mark.parametrize(
    ("stage", "shape", "change", "how"),
    [
        (LAYER, (T, 38), lambda x: x[None], "with a batch axis"),
        (LAYER, (T, 38), lambda x: x.T, "transposed"),
        (LAYER, (T, 38), lambda x: x.ravel(), "flat"),
        (LAYER, (T, 38), np.asfortranarray, ""),
        (LAYER, (T, 38), lambda x: x.ravel("F").reshape(x.shape), "by columns"),
        ("inputs_embeds", (T, 38), lambda x: x[None], "with a batch axis"),
        (f"{LAYER}.mlp.gated", (T, 53), lambda x: x.T, "transposed"),
        (ATTEND, (T, 6, 10), lambda x: x.reshape(T, 60), "heads side by side"),
        (ATTEND, (T, 6, 10), lambda x: x.transpose(1, 0, 2)[None], "heads first"),
        (ATTEND, (T, 6, 10), lambda x: x.transpose(2, 1, 0), "axes reversed"),
        (ATTEND, (T, 6, 10), lambda x: x.reshape(10, 6, T), "as ggml does"),
        (Q, (T, 60), lambda x: x.reshape(T, 6, 10), "heads apart"),
        (Q, (T, 60), lambda x: x.reshape(T, 6, 10).transpose(1, 2, 0), "tokens last"),
        (K_ROPE, (T, 2, 10), lambda x: x.transpose(1, 0, 2), "heads first"),
        (K_ROPE, (T, 2, 10), lambda x: x.repeat(3, axis=1), "repeated for every query head"),
        (K, (T, 20), lambda x: x.reshape(T, 2, 10).repeat(3, 1).reshape(T, 60), "repeated"),
        ("pixel_values", (1, 3, 20, 20), lambda x: x[0].transpose(1, 2, 0), "channels last"),
        ("image.resized", (20, 20, 3), lambda x: x.transpose(2, 0, 1)[None], "channels first"),
        (PATCHES, (1, 9, 33), lambda x: x.reshape(3, 3, 33), "axes apart"),
        (PATCHES, (1, 9, 33), lambda x: x[0].T.reshape(1, 33, 3, 3), "channels first"),
        (f"{TOWER}.embeddings", (1, 9, 33), lambda x: x[0], "without an axis of 1"),
        (f"{TOWER_LAYER}.self_attn.attend", (9, 3, 11), lambda x: x.reshape(1, 9, 33), "heads"),
        (LOGITS, (1, 97), lambda x: np.concatenate([x + 1, x])[None], "the last row"),
        (LOGITS, (1, 97), lambda x: np.append(x[0], [0, 0]), "the first 97 of 99 columns"),
        (LOGITS, (1, 97), lambda x: np.concatenate([x + 1, x]).T, "transposed"),
        ("positions", (T,), lambda x: x[None], "with a batch axis"),
    ],
)
def test_another_arrangement_is_found_and_named(
    stage: str, shape: tuple[int, ...], change: Callable[[Array], Array], how: str
) -> None:
    truth = drawn(*shape)
    found = ways(change(truth), truth, stage)
    assert any(how in way for way in found) and bool(how) == ("" not in found)


@pytest.mark.parametrize("behind", [True, False])
def test_padding_before_or_behind_the_tokens_is_cut_off(behind: bool) -> None:
    truth, more = drawn(T, 2, 10), np.zeros((4, 2, 10), np.float32)
    padded = np.concatenate([truth, more] if behind else [more, truth])
    which = "first" if behind else "last"
    assert f"the {which} 7 of 11 tokens" in ways(padded, truth, K_ROPE)[0]
    heads_first = padded.transpose(1, 0, 2)[None]
    assert f"heads first, the {which} 7 of 11 tokens" in ways(heads_first, truth, K_ROPE)


def test_only_padding_is_cut_off_from_ids() -> None:
    ids = np.arange(3, 3 + T)
    assert ways(np.append(ids, [0, 0]), ids, "input_ids") == ["the first 7 of 9 tokens"]
    assert ways(np.append([0], ids), ids, "input_ids") == ["the last 7 of 8 tokens"]
    assert ways(np.append(ids, 108), ids, "input_ids") == []


# Fused arrays


def heads_of(word: str) -> Array:
    """A projection of its own for each word."""
    size = {"q_proj": 60, "k_proj": 20, "v_proj": 20, "gate_proj": 53, "up_proj": 53}[word]
    return drawn(T, size) + len(word)


FUSED = {
    "side by side": (QKV, lambda parts: np.concatenate(parts, 1)),
    "heads first": (QKV, lambda parts: np.concatenate(parts, 1).reshape(T, 10, 10).swapaxes(0, 1)),
    "transposed": (QKV, lambda parts: np.concatenate(parts, 1).T),
    "group by group": (
        QKV,
        lambda parts: np.concatenate(
            [part.reshape(T, 2, -1, 10) for part in parts], axis=2
        ).reshape(1, T, 100),
    ),
    "padded": (QKV, lambda parts: np.pad(np.concatenate(parts, 1), ((0, 2), (0, 0)))),
    "keys and values stacked": (
        ("k_proj", "v_proj"),
        lambda parts: np.stack(parts).reshape(2, 1, T, 2, 10),
    ),
    "gate and up stacked": (("gate_proj", "up_proj"), np.stack),
    "up and gate": (("up_proj", "gate_proj"), lambda parts: np.concatenate(parts, 1)),
    "gate and up woven": (("gate_proj", "up_proj"), lambda parts: np.stack(parts, -1)),
}


@pytest.mark.parametrize("case", FUSED)
def test_every_stage_is_found_in_a_fused_array(case: str) -> None:
    part, fuse = FUSED[case]
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal(heads_of(word).shape).astype(np.float32) for word in part]
    module = "mlp" if "up_proj" in part else "self_attn"
    for word, truth in zip(part, parts, strict=True):
        found = ways(fuse(parts), truth, f"{LAYER}.{module}.{word}", part)
        assert len(found) == 1 and found[0].startswith(f"{word} out of a fused ")


def test_the_towers_heads_may_each_have_their_three_side_by_side() -> None:
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((3, 9, 3, 11))
    woven = np.stack([q, k, v], axis=2).reshape(9, 99)
    for word, truth in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        stage = f"{TOWER_LAYER}.self_attn.{word}"
        (how,) = ways(woven, truth.reshape(9, 33), stage, QKV)
        assert how.endswith("head by head")


# Conventions

POSITIONS = np.arange(1, T + 1)
# Turning back in float64: an angle of up to T radians and a sum of two products round by some
# eps each, and no number is over 5.
TURNED = 5 * 4 * T * float(np.finfo(np.float64).eps)


def paired(x: Array) -> Array:
    """[left half, right half] of each head -> neighbours."""
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


@pytest.mark.parametrize(("stage", "heads"), [(Q_ROPE, 6), (K_ROPE, 2)])
def test_rope_may_turn_neighbours_and_count_from_zero(stage: str, heads: int) -> None:
    x, theta = drawn(T, heads, 10, dtype=np.float64), CONFIG.text_config.rope_theta
    truth = ops.rope(x, POSITIONS, theta)
    assert PAIRS in ways(paired(truth), truth, stage)
    from_zero = ops.rope(x, POSITIONS - 1, theta)
    for value, how in ((from_zero, FROM_ZERO), (paired(from_zero), f"{PAIRS}, {FROM_ZERO}")):
        error, said = nearest(value, truth, stage)
        assert error < TURNED and said == how


def test_keys_dumped_after_rope_are_turned_back() -> None:
    truth, theta = drawn(T, 20, dtype=np.float64), CONFIG.text_config.rope_theta
    for start, how in ((1, "taken after RoPE"), (0, f"taken after RoPE, {FROM_ZERO}")):
        turned = ops.rope(truth.reshape(T, 2, 10), np.arange(T) + start, theta)
        error, said = nearest(turned, truth, K)
        assert error < TURNED and said == f"heads apart, {how}"


def test_queries_may_have_their_scale_and_keys_may_not() -> None:
    for stage, shape in ((Q, (T, 60)), (Q_ROPE, (T, 6, 10))):
        truth = drawn(*shape, dtype=np.float64)
        error, how = nearest(truth * SCALE, truth, stage)
        eps = float(np.finfo(np.float64).eps)
        assert error <= 2 * eps * np.abs(truth).max() and "attend must agree" in how
    keys = drawn(T, 2, 10)
    assert nearest(keys * SCALE, keys, K_ROPE)[0] > 0.1


def test_the_towers_queries_may_have_their_own_scale() -> None:
    truth = drawn(9, 33, dtype=np.float64)
    error, _ = nearest(truth * 11**-0.5, truth, f"{TOWER_LAYER}.self_attn.q_proj")
    assert error <= 2 * float(np.finfo(np.float64).eps) * np.abs(truth).max()


def test_positions_may_be_counted_from_zero() -> None:
    assert ways(POSITIONS - 1, POSITIONS, "positions") == ["counted from 0"]


def test_sixteen_bits_are_turned_in_thirty_two() -> None:
    value = drawn(T, 2, 10).astype(np.float16)
    found = list(layouts(value, K_ROPE, value.shape, CONFIG))
    other = [one.value.dtype for one in found if PAIRS in one.how or FROM_ZERO in one.how]
    assert found[0].value.dtype == np.float16 and set(other) == {np.dtype(np.float32)}


# What is no layout

MISTAKES = {
    "heads split as [d, H]": (ATTEND, (T, 6, 10), lambda x: x.transpose(0, 2, 1).reshape(T, 60)),
    "heads split as [d, H], transposed": (
        ATTEND,
        (T, 6, 10),
        lambda x: x.transpose(2, 1, 0).reshape(60, T),
    ),
    "heads not brought behind tokens": (
        ATTEND,
        (T, 6, 10),
        lambda x: x.transpose(1, 0, 2).reshape(T, 60),
    ),
    "channels last, called channels first": (
        "pixel_values",
        (1, 3, 20, 20),
        lambda x: x.transpose(0, 2, 3, 1).reshape(1, 3, 20, 20),
    ),
    "picture transposed": ("pixel_values", (1, 3, 20, 20), lambda x: x.swapaxes(2, 3)),
    "colours reversed": ("pixel_values", (1, 3, 20, 20), lambda x: x[:, ::-1]),
    "patches in columns": (
        PATCHES,
        (1, 9, 33),
        lambda x: x.reshape(1, 3, 3, 33).swapaxes(1, 2).reshape(1, 9, 33),
    ),
    "channels not brought behind patches": (
        PATCHES,
        (1, 9, 33),
        lambda x: x.transpose(0, 2, 1).reshape(1, 9, 33),
    ),
    "keys tiled": (K_ROPE, (T, 2, 10), lambda x: np.tile(x, (1, 3, 1))),
    "scores of the first token": (LOGITS, (1, 97), lambda x: np.concatenate([x, x + 1])),
    "columns shifted": (LOGITS, (1, 97), lambda x: np.concatenate([x[:, :1], x], 1)),
    "tokens missing": (LAYER, (T, 38), lambda x: x[1:]),
    "tokens reversed": (LAYER, (T, 38), lambda x: x[::-1]),
    "tokens doubled": (LAYER, (T, 38), lambda x: np.repeat(x, 2, 0)),
    "positions from two": ("positions", (T,), lambda x: x + 1),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_no_layout_undoes_a_mistake(case: str) -> None:
    stage, shape, spoil = MISTAKES[case]
    truth = drawn(*shape)
    assert ways(spoil(truth), truth, stage) == []


# Properties

SIZES = st.integers(1, 6)
HEADED = st.sampled_from([(Q, 6), (K, 2), (V, 2), (Q_ROPE, 6), (K_ROPE, 2), (ATTEND, 6)])


@settings(max_examples=200, deadline=None)
@given(HEADED, SIZES, st.integers(0, 3), st.data())
def test_any_arrangement_of_heads_and_tokens_is_undone(
    what: tuple[str, int], tokens: int, padding: int, data: st.DataObject
) -> None:
    stage, heads = what
    x = drawn(tokens + padding, heads, 10)
    truth = x[:tokens] if data.draw(st.booleans()) else x[padding:]
    truth = truth if stage.endswith(("rope", "attend")) else truth.reshape(tokens, -1)
    value = x.transpose(data.draw(st.sampled_from([(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0)])))
    for _ in range(data.draw(st.integers(0, 2))):
        value = np.expand_dims(value, data.draw(st.integers(0, value.ndim)))
    assert ways(value, truth, stage)


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 7))
def test_no_layout_changes_the_order_of_tokens(order: list[int], width: int) -> None:
    text = drawn(6, width)
    found = ways(text[order], text, LAYER)
    assert bool(found) == (order == sorted(order))


@settings(max_examples=100, deadline=None)
@given(HEADED, SIZES, st.booleans())
def test_no_two_layouts_are_the_same_and_all_have_the_stages_shape(
    what: tuple[str, int], tokens: int, zero: bool
) -> None:
    stage, heads = what
    shape = (tokens, heads, 10) if stage.endswith(("rope", "attend")) else (tokens, heads * 10)
    value = np.zeros(shape, np.float32) if zero else drawn(*shape)
    found = list(layouts(value, stage, shape, CONFIG))
    assert all(one.value.shape == shape for one in found)
    pairs = itertools.combinations(found, 2)
    assert not any(np.array_equal(one.value, other.value) for one, other in pairs)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([LAYER, K_ROPE, PATCHES, LOGITS, "pixel_values", "input_ids"]), st.data())
def test_an_array_of_any_shape_is_read_or_left_without_a_traceback(
    stage: str, data: st.DataObject
) -> None:
    shapes = {
        LAYER: (T, 38),
        K_ROPE: (T, 2, 10),
        PATCHES: (1, 9, 33),
        LOGITS: (1, 97),
        "pixel_values": (1, 3, 20, 20),
        "input_ids": (T,),
    }
    sides = st.sampled_from([0, 1, 2, 3, T, 9, 10, 20, 33, 38, 97])
    value = np.ones(data.draw(st.lists(sides, max_size=4)), np.float32)
    for one in layouts(value, stage, shapes[stage], CONFIG):
        assert one.value.shape == shapes[stage]


def test_numbers_that_are_none_are_turned_without_a_warning() -> None:
    value = np.array([np.inf, np.nan, np.finfo(np.float32).max] * 20, np.float32).reshape(1, 60)
    found = list(layouts(value, Q, value.shape, CONFIG))
    assert len(found) > 4 and all(one.value.shape == value.shape for one in found)
