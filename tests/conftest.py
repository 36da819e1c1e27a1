"""One ``xp`` fixture: every backend on which the core runs, each with the few helpers a test needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat
import array_api_strict
import jax
import numpy as np
import pytest
import torch

jax.config.update("jax_enable_x64", True)
array_api_strict.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)


@dataclass(frozen=True)
class Backend:
    """A namespace with conversions from and to NumPy, and ``call``, which runs a function (under jit or not)."""

    name: str
    xp: Any
    jit: bool = False

    def array(self, x: Any, dtype: Any = None) -> Any:
        x = np.asarray(x, dtype=dtype)
        if self.name == "strict":
            return self.xp.asarray(x, device=self.xp.Device("device1"))
        if self.name == "torch":
            return torch.from_numpy(np.array(x))
        return self.xp.asarray(x)

    def tree(self, tree: Any) -> Any:
        """Convert every NumPy array in records, operators, mappings and tuples."""
        return jax.tree.map(lambda x: self.array(x) if isinstance(x, (np.ndarray, np.generic)) else x, tree)

    def numpy(self, x: Any) -> np.ndarray:
        if self.name == "strict" and hasattr(x, "to_device"):
            x = x.to_device(self.xp.Device("CPU_DEVICE"))
        return np.asarray(x)

    def call(self, function: Any, *trees: Any) -> Any:
        """Return ``function(*trees)`` with every array converted; compiled whole on the jit backend."""
        trees = tuple(self.tree(t) for t in trees)
        return jax.jit(function)(*trees) if self.jit else function(*trees)


BACKENDS = {
    "numpy": Backend("numpy", array_api_compat.array_namespace(np.zeros(1))),
    "strict": Backend("strict", array_api_strict),
    "torch": Backend("torch", array_api_compat.array_namespace(torch.zeros(1))),
    "jax": Backend("jax", jax.numpy),
    "jit": Backend("jit", jax.numpy, jit=True),
}


@pytest.fixture(params=list(BACKENDS))
def xp(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
