"""``--route learned`` runs the whole suite by the learned plan, where a model has one; the default is discovery."""

import pytest
from ftw_torch import FilterThenWeight


@pytest.fixture(autouse=True, scope="session")
def route(request):
    """Make the route of the command line the default."""
    wanted = request.config.getoption("--route")
    defaults = FilterThenWeight.__init__.__kwdefaults__
    before = defaults["capture"]
    defaults["capture"] = wanted or before
    yield
    defaults["capture"] = before
