"""One ``xp`` fixture: every backend on which the core runs."""

import pytest
from backends import BACKENDS, Backend


@pytest.fixture(params=list(BACKENDS))
def xp(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]
