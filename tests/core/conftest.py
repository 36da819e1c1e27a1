"""One ``xp`` fixture: every backend on which the core runs."""

import pytest
from backends import BACKENDS, Backend

# JAX compiles every operation of an eager call, or the whole call: minutes for the largest tables.
HEAVY = ("test_packed", "test_integers", "test_units", "test_quotas", "test_reasons", "test_shares", "test_wear")


@pytest.fixture(params=list(BACKENDS))
def xp(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the heaviest files under eager JAX to ``make test-slow``; jit stays."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        backend = None if callspec is None else callspec.params.get("xp")
        if backend == "jax" and item.path.stem in HEAVY:
            item.add_marker(pytest.mark.slow)
