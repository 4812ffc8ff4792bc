"""The mask decoder, its convolutions written out once more as loops."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from golden import ours
from npvlm import kernels
from npvlm.files.masks import open_mask_decoder
from npvlm.model import ops, vqvae
from npvlm.model.weights import Array, Weights
from npvlm.opening import BUNDLED
from tests.test_shape_lines import checked

GOLDEN = Path(ours.__file__).parent
CHANNELS = {"4": (128, 128), "6": (128, 64), "8": (64, 32), "10": (32, 16)}


@pytest.fixture(params=[ops, kernels], ids=["definitions", "kernels"])
def namespace(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def random_layer(rng: np.random.Generator, shape: tuple[int, ...], outs: int) -> Weights:
    weight = rng.standard_normal(shape).astype(np.float32)
    return Weights({"0.weight": weight, "0.bias": rng.standard_normal(outs).astype(np.float32)})


@pytest.mark.parametrize("k", [1, 3])
def test_a_convolution_sees_zeros_beyond_the_edge(namespace: ModuleType, k: int) -> None:
    rng = np.random.default_rng(k)
    x, w = rng.standard_normal((2, 4, 5, 3)).astype(np.float32), random_layer(rng, (7, 3, k, k), 7)
    y = checked(vqvae.conv, set())(x, w, "0", ops=namespace)
    expected = np.zeros((2, 4, 5, 7))
    for n, i, j, o in np.ndindex(2, 4, 5, 7):
        expected[n, i, j, o] = w["0.bias"][o]
        for c, a, b in np.ndindex(3, k, k):
            at, beside = i + a - k // 2, j + b - k // 2
            if 0 <= at < 4 and 0 <= beside < 5:
                expected[n, i, j, o] += x[n, at, beside, c] * w["0.weight"][o, c, a, b]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_a_transposed_convolution_doubles_the_picture(namespace: ModuleType) -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((2, 3, 4, 6)).astype(np.float32), random_layer(rng, (6, 5, 4, 4), 5)
    y = checked(vqvae.conv_transpose, set())(x, w, "0", ops=namespace)
    expected = np.zeros((2, 6, 8, 5)) + w["0.bias"]
    for n, i, j, c, o, a, b in np.ndindex(2, 3, 4, 6, 5, 4, 4):
        at, beside = 2 * i + a - 1, 2 * j + b - 1
        if 0 <= at < 6 and 0 <= beside < 8:
            expected[n, at, beside, o] += x[n, i, j, c] * w["0.weight"][c, o, a, b]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=1e-5)


def published_weights(seed: int) -> Weights:
    """Random ones in the published layout, of a size that keeps every layer lively."""
    rng = np.random.default_rng(seed)

    def layer(name: str, shape: tuple[int, ...], outs: int) -> dict[str, Array]:
        size = (2 / np.prod(shape[1:])) ** 0.5
        weight = (rng.standard_normal(shape) * size).astype(np.float16)
        bias = (rng.standard_normal(outs) * 0.1).astype(np.float16)
        return {f"decoder.{name}.weight": weight, f"decoder.{name}.bias": bias}

    found = {vqvae.CODEBOOK: rng.standard_normal((128, 512)).astype(np.float16)}
    found |= layer("0", (128, 512, 1, 1), 128)
    for block in ("2", "3"):
        for place, k in (("0", 3), ("2", 3), ("4", 1)):
            found |= layer(f"{block}.net.{place}", (128, 128, k, k), 128)
    for name, (ins, outs) in CHANNELS.items():
        found |= layer(name, (ins, outs, 4, 4), outs)
    return Weights(found | layer("12", (1, 16, 1, 1), 1))


def test_masks_alone_are_those_of_several_to_the_bit_with_kernels() -> None:
    w, codes = published_weights(0), np.random.default_rng(1).integers(0, 128, (5, 16))
    together = checked(vqvae.decode_masks, set())(codes, w, np.float32, ops=kernels)
    alone = [vqvae.decode_masks(codes[n : n + 1], w, np.float32, ops=kernels) for n in range(5)]
    assert together.shape == (5, 64, 64) and together.std() > 0.01
    assert np.array_equal(together, np.concatenate(alone))


def test_the_definition_is_the_same_in_float64_and_float32() -> None:
    w, codes = published_weights(2), np.random.default_rng(2).integers(0, 128, (3, 16))
    truth = vqvae.decode_masks(codes, w, np.float64, ops=ops)
    assert truth.dtype == np.float64
    for namespace in (ops, kernels):
        found = vqvae.decode_masks(codes, w, np.float32, ops=namespace)
        error = np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2))
        assert error < 1e-6  # measured: 2e-7


@pytest.mark.parametrize("namespace", [ops, kernels])
def test_masks_are_those_of_torch(namespace: ModuleType) -> None:
    golden = load_file(GOLDEN / "masks.safetensors")
    torchs = json.loads((GOLDEN / "masks.json").read_text())["torch_float32_error"]
    w = open_mask_decoder(BUNDLED / "vae.safetensors")
    for dtype, limit in ((np.float64, 1e-13), (np.float32, 2 * torchs)):
        if dtype == np.float64 and namespace is kernels:
            continue  # which compute in float32
        found = vqvae.decode_masks(golden["codes"], w, dtype, ops=namespace)
        truth = golden["truth"]
        assert np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)) < limit


def test_codes_lie_row_by_row() -> None:
    w = published_weights(3)
    codes = np.zeros((2, 16), np.int64)
    codes[1, 3] = 9  # the right end of the first row
    plain, changed = vqvae.decode_masks(codes, w, np.float32, ops=ops)
    rows, columns = np.nonzero(np.abs(changed - plain) > np.abs(plain).max() * 0.05)
    assert rows.mean() < 28 and columns.mean() > 36


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masks_come_in_the_type_asked_for(dtype: type) -> None:
    masks = vqvae.decode_masks(np.zeros((1, 16), np.int64), published_weights(4), dtype, ops=ops)
    assert masks.dtype == dtype
