"""What all tests share: the op namespaces and the two families of models."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from npvlm import kernels
from npvlm.config import Config
from npvlm.model import ops as definitions
from npvlm.model.weights import Weights
from tests.tiny import tiny_config, tiny_weights

# The same inputs at each run, so that no run fails by chance; `--hypothesis-profile thorough`
# tries others, and more of them.
busy = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # as machines may be
settings.register_profile("steady", busy, derandomize=True)
settings.register_profile("thorough", busy, max_examples=1000)
settings.load_profile("steady")

NAMESPACES = {"definitions": definitions, "kernels": kernels}


@pytest.fixture(params=list(NAMESPACES))
def ops(request: pytest.FixtureRequest) -> ModuleType:
    """Every namespace of operations: model tests run under each."""
    return NAMESPACES[request.param]


@pytest.fixture(params=["gemma", "gemma2"])
def config(request: pytest.FixtureRequest) -> Config:
    return tiny_config(request.param)


@pytest.fixture
def weights(config: Config) -> Weights:
    return tiny_weights(config)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
