"""One ``xp`` fixture: every backend on which the core runs."""

import pytest
from backends import BACKENDS, Backend

# JAX compiles every operation of an eager call, or the whole call: minutes for the largest tables.
HEAVY_JIT = ("test_units", "test_shares")
HEAVY = ("test_packed", "test_integers", "test_units", "test_quotas", "test_reasons", "test_shares")


@pytest.fixture(params=list(BACKENDS))
def xp(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the heaviest files under JAX to ``make test-slow``; of most of them jit stays."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        backend = None if callspec is None else callspec.params.get("xp")
        if (backend == "jax" and item.path.stem in HEAVY) or (backend == "jit" and item.path.stem in HEAVY_JIT):
            item.add_marker(pytest.mark.slow)
