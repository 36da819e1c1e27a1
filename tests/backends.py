"""The backends on which the core's tests run: those that are installed, each with the few helpers a test needs."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import pytest


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
            import torch

            return torch.from_numpy(np.array(x))
        return self.xp.asarray(x)

    def tree(self, tree: Any) -> Any:
        """Convert every NumPy array in records, operators, mappings and tuples."""
        return map_arrays(self.array, tree)

    def numpy(self, x: Any) -> np.ndarray:
        if self.name == "strict" and hasattr(x, "to_device"):
            x = x.to_device(self.xp.Device("CPU_DEVICE"))
        return np.asarray(x)

    def call(self, function: Any, *trees: Any) -> Any:
        """Return ``function(*trees)`` with every array converted; compiled whole on the jit backend."""
        trees = tuple(self.tree(t) for t in trees)
        if self.jit:
            import jax

            return jax.jit(function)(*trees)
        return function(*trees)


def map_arrays(convert: Any, tree: Any) -> Any:
    """Return a nested structure with every NumPy array converted."""
    if isinstance(tree, (np.ndarray, np.generic)):
        return convert(tree)
    if isinstance(tree, dict):
        return {name: map_arrays(convert, x) for name, x in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_arrays(convert, x) for x in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_arrays(convert, x) for x in tree)
    if hasattr(tree, "__dataclass_fields__"):
        fields = {name: map_arrays(convert, getattr(tree, name)) for name in tree.__dataclass_fields__}
        return type(tree)(**fields)
    return tree


def is_installed(name: str) -> bool:
    """Tell whether a package is installed; a folder of tests of the same name is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _installed() -> dict[str, Backend]:
    there = {"numpy": Backend("numpy", array_api_compat.array_namespace(np.zeros(1)))}
    if is_installed("array_api_strict"):
        import array_api_strict

        array_api_strict.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
        there["strict"] = Backend("strict", array_api_strict)
    if is_installed("torch"):
        import torch

        there["torch"] = Backend("torch", array_api_compat.array_namespace(torch.zeros(1)))
    if is_installed("jax"):
        import jax

        jax.config.update("jax_enable_x64", True)
        there |= {"jax": Backend("jax", jax.numpy), "jit": Backend("jit", jax.numpy, jit=True)}
    return there


class _Missing:
    """A package that is not installed: the test that asks it for anything is skipped."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        pytest.skip(f"{self._name} is not installed")


def optional(name: str) -> Any:
    """Return a module, or where it is not installed one that skips the test that uses it."""
    return importlib.import_module(name) if is_installed(name.partition(".")[0]) else _Missing(name)


class _Backends(dict[str, Backend]):
    """The backends that are installed; asking for another one skips the test."""

    def __missing__(self, name: str) -> Backend:
        pytest.skip(f"{name} is not installed")


BACKENDS = _Backends(_installed())
