"""With the kernels, how a computation is cut up never shows: the same bits, not nearly the same.

Where tokens are decoded one by one, sequences packed, threads shared out, or only some rows of the
last layer computed, `np.array_equal` holds. In float32, int8 and int4 the bits are also the same on
every CPU with fused multiply-add, so checksums of logits are stored here. (Without it the library
of C computes the same, slowly.)
"""

from __future__ import annotations

import pkgutil
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import isfunction

import numba
import numpy as np
import pytest

import npvlm
from npvlm import kernels
from npvlm.config import Config
from npvlm.decoding.generate import generate, logits
from npvlm.files.names import EMBED_TOKENS, expected_shapes, multiplies
from npvlm.files.packed import at_precision
from npvlm.kernels.packing import PACKERS
from npvlm.kernels.vectors import features as cpu_features
from npvlm.model import gemma, paligemma
from npvlm.model import ops as definitions
from npvlm.model.cache import Rows, new_cache
from npvlm.model.tap import closed
from npvlm.model.weights import Adapted, Array, Weight, Weights, round_to_bfloat16
from npvlm.work.checks.bundled import LOGITS, checksum, golden_logits
from tests.tiny import EOS, tiny_config

# Of a decoder with a window, one bites in every block of keys and one only beyond the first.
FAMILIES = {
    "gemma": tiny_config("gemma"),
    "gemma2": tiny_config("gemma2"),
    "gemma2, wide window": tiny_config("gemma2", sliding_window=70),
}
# How weights are stored, and the precision they are used at.
KINDS = [
    ("F32", "float32"),
    ("F16", "float32"),
    ("BF16", "float32"),
    ("BF16", "bfloat16"),
    ("F32", "int8"),
    ("F32", "int4"),
]
CASES = [(family, *kind) for family in FAMILIES for kind in KINDS]
# With a correction beside every weight that multiplies, the embedding table's included.
CASES += [("gemma", "F32, adapted", "float32"), ("gemma2", "BF16, adapted", "int8")]
CASES += [
    (name, "as stored", precision)
    for name in LOGITS
    for precision in dict(KINDS[3:], F16="float32").values()
]

# sha256 of the logits, as little-endian float32, that any CPU with fused multiply-add computes. A
# change that rounds differently changes them; nothing else may.
CHECKSUMS = {
    ("gemma", "float32"): "cd7d31d9d5b841bb221d5763ae488fe77ce8cd90fe4fbf765ba4254f6a0e9509",
    ("gemma", "int8"): "82d9abc325aed916514da1a5f88dbb99688a13d5a6e6a5b5104490d18d5fc9e4",
    ("gemma", "int4"): "266d592f3fd109878023195385e6c25629880084504656e64285d76d0aaac1da",
    ("gemma2", "float32"): "9868b83a7361ac1a1948b8cdd3aa73ab52a5384ed5871962b487c98c5e649293",
    ("gemma2", "int8"): "3a5f5dd4b4f0459c8128f610168d95cff12d9bd4aa0bbe5f7f300284c9a46cdb",
    ("gemma2", "int4"): "4c0a55d25fdf46fb4d5827d0be61992be171d95eed67934c67f4acfc362ecd66",
    **{(name, p): digest for name, own in LOGITS.items() for p, digest in own.items()},
}


@dataclass
class Case:
    """A model, and pictures and prompts to run it on."""

    config: Config
    weights: Weights

    def pixels(self, pictures: int) -> Array:
        side = self.config.vision_config.image_size
        rng = np.random.default_rng(1)
        return rng.random((pictures, 3, side, side), np.float32) * 2 - 1

    def features(self, pixels: Array) -> Array:
        found = paligemma.image_features(pixels, self.weights, self.config, ops=kernels, tap=closed)
        return found.reshape(-1, found.shape[-1])

    def prompt(self, length: int, pictures: int = 1) -> Array:
        images = np.full(
            pictures * self.config.vision_config.num_patches, self.config.image_token_index
        )
        return np.concatenate([images, np.random.default_rng(length).integers(4, 90, length)])

    def decode(
        self, prompts: list[Array], features: Array, steps: list[int]
    ) -> tuple[list[list[int]], list[Array]]:
        """The ids of every sequence, and the scores [steps, V] that each was chosen from."""
        choosers = [Chooser(n, self.config.eos_token_ids) for n in steps]
        run = generate(
            prompts, features, self.weights, self.config, choosers,
            [max(steps) + 1] * len(prompts), ops=kernels, tap=closed,
        )  # fmt: skip
        for _ in run:
            pass
        return [c.ids for c in choosers], [np.stack(c.rows) for c in choosers]

    def logits(self, prompt: Array, answer: list[int], features: Array) -> Array:
        return logits(
            prompt, np.array(answer, int), features, self.weights, self.config,
            ops=kernels, tap=closed,
        )  # fmt: skip


class Chooser:
    """Takes the likeliest token that ends nothing, an end at the last step; keeps what it saw."""

    def __init__(self, steps: int, ends: tuple[int, ...]) -> None:
        self.steps, self.ends = steps, ends
        self.ids: list[int] = []
        self.rows: list[Array] = []

    def __call__(self, row: Array) -> int:
        self.rows.append(row.copy())
        going_on = row.copy()
        going_on[list(self.ends)] = -np.inf
        ended = len(self.rows) == self.steps
        self.ids.append(self.ends[0] if ended else int(going_on.argmax()))
        return self.ids[-1]


def tiny_weights(config: Config, stored: str, precision: str) -> Weights:
    """Random tensors that any generator of whole numbers gives: none is rounded."""
    rng = np.random.default_rng(3)
    tensors = {
        name: rng.integers(-128, 128, shape).astype(np.float32) / 256
        for name, shape in expected_shapes(config).items()
    }
    stored, _, adapted = stored.partition(", ")
    if stored == "F16":
        tensors = {name: values.astype(np.float16) for name, values in tensors.items()}
    if stored == "BF16":
        tensors = {name: round_to_bfloat16(values) for name, values in tensors.items()}
    weights = at_precision(tensors, precision, PACKERS)
    return Weights(corrected(weights, rng) if adapted else weights)


def corrected(weights: dict[str, Weight], rng: np.random.Generator) -> dict[str, Weight]:
    """The weights of layers with a correction beside each; of one in three its rows have gains."""
    found = dict(weights)
    for count, name in enumerate(n for n, w in weights.items() if multiplies(n, w.shape)):
        rows, width = weights[name].shape
        gain = rng.random(rows) + 0.5 if count % 3 and name != EMBED_TOKENS else None
        up, down = rng.standard_normal((rows, 16)), rng.standard_normal((16, width))
        factors = down.astype(np.float32), up.astype(np.float32) / 16
        found[name] = Adapted(weights[name], *factors, 0.3, gain)
    return found


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def case(request: pytest.FixtureRequest) -> Case:
    name, stored, precision = request.param
    if name in LOGITS:
        model = npvlm.load(name, precision)
        return Case(model.config, model.weights)
    return Case(FAMILIES[name], tiny_weights(FAMILIES[name], stored, precision))


def test_cached_decode_equals_one_uncached_pass(case: Case) -> None:
    """The answer begins in the first block of keys and ends in the second."""
    room = 60 - case.config.vision_config.num_patches
    for length in (room if room > 0 else 70, 3):
        features, prompt = case.features(case.pixels(1)), case.prompt(length)
        [ids], [rows] = case.decode([prompt], features, [12])
        assert len(ids) == 12
        uncached = case.logits(prompt, ids, features)[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(rows, uncached)


def test_packed_sequences_equal_each_alone(case: Case) -> None:
    prompts, steps = [case.prompt(n) for n in (5, 1, 130, 64, 17)], [3, 9, 6, 1, 7]
    P, features = case.config.vision_config.num_patches, case.features(case.pixels(5))
    ids, rows = case.decode(prompts, features, steps)
    assert list(map(len, ids)) == steps
    for i, prompt in enumerate(prompts):
        own = features[i * P : (i + 1) * P]
        [alone_ids], [alone_rows] = case.decode([prompt], own, [steps[i]])
        assert alone_ids == ids[i]
        np.testing.assert_array_equal(alone_rows, rows[i])


def test_pictures_seen_together_equal_each_alone(case: Case) -> None:
    pixels = case.pixels(5)
    together = case.features(pixels).reshape(5, case.config.vision_config.num_patches, -1)
    for i in range(5):
        np.testing.assert_array_equal(case.features(pixels[i : i + 1]), together[i])


def test_one_thread_equals_two(case: Case) -> None:
    prompts, results = [case.prompt(40, pictures=2), case.prompt(3)], []
    before = numba.get_num_threads()
    try:
        for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(threads)
            features = case.features(case.pixels(3))
            results.append((features, *case.decode(prompts, features, [4, 6])[1]))
    finally:
        numba.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_last_layer_for_wanted_tokens_equals_that_for_all(case: Case) -> None:
    prompt, features = case.prompt(31), case.features(case.pixels(1))
    text, config = case.weights.scope("language_model"), case.config.text_config
    x = paligemma.embed(prompt, features, case.weights, case.config, ops=kernels, tap=closed)
    rows, every = Rows.of(0, len(x), range(len(x))), np.arange(len(x))

    def run(wanted: Array) -> Array:
        cache = new_cache(config, len(x), x.dtype)
        return gemma.hidden_states(x, text, config, cache, rows, wanted, ops=kernels, tap=closed)

    whole = run(every)
    for wanted in (every[-1:], every[3::7]):
        np.testing.assert_array_equal(run(wanted), whole[wanted])


def test_no_definition_of_a_kernel_is_called(case: Case, monkeypatch) -> None:
    """What is float32 is handed to nobody: a definition would sum in an order of its own."""

    def poison(name: str) -> Callable[..., None]:
        def called(*arguments: object, **named: object) -> None:
            raise AssertionError(f"{name} is the definition, expected its kernel")

        return called

    shared = {"embed", "squares"}  # which sum nothing
    for name in {n for n, f in vars(definitions).items() if isfunction(f)} - shared:
        if vars(definitions)[name].__module__ == definitions.__name__:
            monkeypatch.setattr(definitions, name, poison(name))
    features = case.features(case.pixels(2))
    case.decode([case.prompt(3, pictures=2)], features, [3])


@pytest.mark.parametrize(("name", "precision"), CHECKSUMS)
def test_logits_are_the_bits_of_every_cpu(name, precision) -> None:
    if name in LOGITS:
        scores = golden_logits(npvlm.load(name, precision))
    else:
        case = Case(FAMILIES[name], tiny_weights(FAMILIES[name], "F32", precision))
        scores = case.logits(case.prompt(80), [5, 6, EOS], case.features(case.pixels(1)))
    assert checksum(scores) == CHECKSUMS[name, precision]


def assembly() -> dict[str, str]:
    """The code of the kernels that this process has compiled; numba shows none that it has read."""
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__, "npvlm.kernels."):
        for name, kernel in vars(import_module(module.name)).items():
            if hasattr(kernel, "inspect_asm"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    codes = kernel.inspect_asm()
                for signature, code in codes.items():
                    if re.search(r"^\s+ret", code, re.MULTILINE):
                        found[f"{module.name}.{name}{signature}"] = code
    return found


def test_no_code_is_wider_than_the_cpu_that_it_is_for() -> None:
    """Which is the one that numba was told of, by NUMBA_CPU_FEATURES, not the one it runs on."""
    code = assembly()
    if not code:
        pytest.skip("all kernels came from the disk cache")
    wide = [name for name, text in code.items() if "zmm" in text]
    assert bool(wide) == ("avx512f" in cpu_features())
