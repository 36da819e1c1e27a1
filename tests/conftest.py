"""The random numbers of every test; the backends belong to the core's (``core/conftest.py``)."""

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
