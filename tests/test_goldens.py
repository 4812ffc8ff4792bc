"""npvlm gives what transformers gave: the stored goldens of whole models, without torch.

Every error is relative: its root mean square over that of the truth, transformers in float64.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import npvlm
from golden import ours
from npvlm import kernels
from npvlm.api import Answer, Model
from npvlm.files.pictures import open_picture, pixel_values
from npvlm.model.weights import Array

GOLDEN = Path(ours.__file__).parent
NAMES = sorted(
    {path.stem for path in GOLDEN.glob("*.safetensors")} - {"ops", "masks", "colpali-run"}
)


@dataclass(frozen=True, repr=False)
class Golden:
    """A checkpoint, opened by npvlm, and what transformers made of some prompts on it."""

    model: Model
    prompts: list[dict[str, Any]]
    tensors: dict[str, Array]
    sha256: dict[str, str]

    def pictures(self, number: int) -> list[Image.Image]:
        count = self.prompts[number]["pictures"]
        return [Image.fromarray(self.tensors[f"{number}.picture.{i}"]) for i in range(count)]

    def pixels(self, number: int) -> Array:
        return self.tensors[f"{number}.pixel_values"]

    def stages(self) -> dict[str, Array]:
        """The true stages of the first prompt."""
        others = {"picture.0", "pixel_values", "decode"}
        own = {k.removeprefix("0."): v for k, v in self.tensors.items() if k.startswith("0.")}
        return {name: value for name, value in own.items() if name not in others}


@cache
def open_golden(name: str, ops: str) -> Golden:
    record = json.loads((GOLDEN / f"{name}.json").read_text())
    return Golden(
        npvlm.load(GOLDEN / record["checkpoint"], ops=ops),
        record["prompts"],
        load_file(GOLDEN / f"{name}.safetensors"),
        record["sha256"],
    )


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["numpy", "kernels"])
def golden(name: str, request: pytest.FixtureRequest) -> Golden:
    return open_golden(name, request.param)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> type:
    return request.param


def hold(errors: dict[str, float], torchs: dict[str, float], dtype: type) -> None:
    """Each error is under its limit, which follows from torch's; the worst, not 100 times under."""
    limit = ours.limit_float64 if dtype is np.float64 else ours.limit_float32
    shares = {name: error / limit(torchs[name]) for name, error in errors.items()}
    too_far = {name: share for name, share in shares.items() if not share <= 1}  # a nan is, too
    assert not too_far
    assert max(shares.values()) >= 0.01, shares


def relative(found: Array, truth: Array) -> float:
    return ours.rms(found.reshape(truth.shape) - truth) / ours.rms(truth)


def answers(golden: Golden) -> list[Answer]:
    numbers = range(len(golden.prompts))
    pictures = [golden.pictures(number) for number in numbers]
    prompts = [golden.prompts[number]["prompt"] for number in numbers]
    return golden.model.generate(pictures, prompts, max_tokens=20)


def test_pixel_values_are_equal(golden: Golden) -> None:
    for number in range(len(golden.prompts)):
        for i, picture in enumerate(golden.pictures(number)):
            found = pixel_values(open_picture(picture), golden.model.preprocessor)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, golden.pixels(number)[i])


def test_prompt_ids_are_equal(golden: Golden) -> None:
    for found, prompt in zip(answers(golden), golden.prompts, strict=True):
        assert found.prompt_token_ids == prompt["ids"]


def test_every_stage_is_as_near_to_the_truth_as_torch(golden: Golden, dtype: type) -> None:
    prompt, truth = golden.prompts[0], golden.stages()
    if golden.model.ops is kernels:
        truth = {stage: value for stage, value in truth.items() if not ours.fused(stage)}
    found = ours.run(golden.model, golden.pixels(0).astype(dtype), prompt["ids"], prompt["answer"])
    assert ours.required(golden.model.config) <= {*truth, "language_model.logits"}
    assert {found[name].dtype for name in truth} == {np.dtype(dtype)}
    errors = {name: relative(found[name], value) for name, value in truth.items()}
    hold(errors, prompt["torch_float32_error"], dtype)


def test_logits_without_a_cache_are_as_near_as_torch(golden: Golden) -> None:
    prompt = golden.prompts[0]
    found = golden.model.logits(golden.pictures(0), prompt["prompt"], prompt["answer"])
    steps = found[len(prompt["ids"]) - 1 : -1 : ours.EVERY]
    errors = {"decode": relative(steps, golden.tensors["0.decode"])}
    hold(errors, prompt["torch_float32_error"], np.float32)


def test_packed_decoding_through_the_cache_is_as_near_as_torch(golden: Golden, dtype: type) -> None:
    numbers = range(len(golden.prompts))
    found = ours.decode(
        golden.model,
        [golden.pixels(number).astype(dtype) for number in numbers],
        [prompt["ids"] for prompt in golden.prompts],
        [prompt["answer"] for prompt in golden.prompts],
    )
    for number, prompt in enumerate(golden.prompts):
        errors = {
            "decode": relative(found[number][:: ours.EVERY], golden.tensors[f"{number}.decode"])
        }
        hold(errors, prompt["torch_float32_error"], dtype)


def test_greedy_answers_are_equal_token_for_token_alone_and_packed(golden: Golden) -> None:
    for number, packed in enumerate(answers(golden)):
        prompt = golden.prompts[number]
        alone = golden.model.generate([golden.pictures(number)], prompt["prompt"], max_tokens=20)
        assert packed.token_ids == prompt["answer"]
        assert alone[0].token_ids == prompt["answer"]
        assert packed.text == alone[0].text == (prompt["text"] or packed.text)
        assert len(prompt["answer"]) == 20 or packed.stop == "eos"


def test_the_files_are_those_that_their_provenance_names(golden: Golden) -> None:
    for name, expected in golden.sha256.items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == expected, name


def test_the_goldens_are_of_all_kinds() -> None:
    """Two pictures; both families; queries that share a key head; an answer that ends by itself."""
    goldens = [open_golden(name, "numpy") for name in NAMES]
    prompts = [prompt for golden in goldens for prompt in golden.prompts]
    assert {prompt["pictures"] for prompt in prompts} == {1, 2}
    assert {len(prompt["answer"]) == 20 for prompt in prompts} == {True, False}
    assert sum(prompt["text"] is not None for prompt in prompts) > 2
    texts = [golden.model.config.text_config for golden in goldens]
    heads = {(text.model_type, text.num_key_value_heads) for text in texts}
    assert heads == {("gemma", 1), ("gemma2", 1), ("gemma2", 2)}
