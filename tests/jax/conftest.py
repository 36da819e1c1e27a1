"""The JAX adapter's tests run in float64."""

import pytest

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
