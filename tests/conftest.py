"""The random numbers of every test; the backends belong to the core's (``core/conftest.py``)."""

import numpy as np
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--route", choices=["learned", "discover"], help="of tests/torch: see its conftest.py")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
