"""What a case is: a call, its inputs, and an independent account of its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Case", "Expect", "Refusal", "exactly", "map_arrays", "most", "rounded", "solved", "summed"]

Array = Any


class Expect(NamedTuple):
    """What an output should be, and how its error is measured (``tolerances.py``)."""

    value: Any
    rule: str = "rounded"
    scale: Any = None  # None: the largest |value|
    condition: float = 1.0
    got: Any = None  # None: the output of the same name


def exactly(value: Any, got: Any = None) -> Expect:
    """Expect the same integers, flags or copies."""
    return Expect(np.asarray(value), "exact", got=got)


def rounded(value: Any, scale: Any = None, condition: float = 1.0, rule: str = "rounded") -> Expect:
    """Expect a formula's value up to the rounding of a few operations."""
    return Expect(np.asarray(value), rule, scale, condition)


def summed(value: Any, scale: Any, terms: float) -> Expect:
    """Expect a sum of ``terms`` products whose magnitudes add up to ``scale``."""
    return Expect(np.asarray(value), "summed", scale, float(np.sqrt(max(terms, 1))))


def solved(value: Any, condition: float, scale: Any = None) -> Expect:
    """Expect the solution of a system of this condition number."""
    return Expect(np.asarray(value), "solved", scale, condition)


def most(limit: float, got: Any, rule: str = "exact", scale: float = 1.0, condition: float = 1.0) -> Expect:
    """Expect a number no larger than ``limit``, by more than the rule allows."""
    excess = np.asarray(got, dtype=float) - limit
    return Expect(
        np.zeros(()), rule, scale, condition, np.max(np.where(np.isnan(excess), np.inf, np.maximum(excess, 0)))
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    name : str
        ``function/kind/situation``.
    call : callable
        ``call(*inputs) -> {output name: array}``, in arrays of the backend. A compiling backend compiles each call
        once for all cases that share it, so calls are made once and their static options bound to them.
    inputs : tuple
        Trees of float64 NumPy arrays; the backend's dtype is put in on the way.
    account : callable
        ``account(got, *inputs) -> {output name: Expect}``: what should come out, from the inputs as the backend held
        them (in float64), by the reference or plain NumPy. It may look at ``got`` where several answers are right.
    dtypes : tuple of str
        Dtypes in which the case makes sense.
    loops : bool
        Whether the call runs a loop.
    heavy : bool
        Whether it is left out on backends that compile, for the time this takes.
    eager : bool
        Whether it is a Python-level promise that a trace cannot make.
    narrow : bool
        Whether it runs in other dtypes than float64 on backends that compile.
    """

    name: str
    call: Callable[..., Mapping[str, Any]]
    inputs: tuple[Any, ...]
    account: Callable[..., Mapping[str, Expect]]
    dtypes: tuple[str, ...] = ("float64", "float32")
    loops: bool = False
    heavy: bool = False
    eager: bool = False
    narrow: bool = False


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A row of the table for a call that must raise: the error's kind, and what its message must say."""

    name: str
    call: Callable[..., Any]
    inputs: tuple[Any, ...]
    error: type[Exception] | tuple[type[Exception], ...]
    says: str
    eager: bool = False


def map_arrays(tree: Any, function: Callable[[Any, str], Any], *, inside: str = "") -> Any:
    """Return the tree with ``function(array, inside)`` in place of every array; ``inside`` names what holds it."""
    if isinstance(tree, (np.ndarray, np.generic)):
        return function(tree, inside)
    if isinstance(tree, Mapping):
        return {k: map_arrays(v, function, inside=inside) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_arrays(v, function, inside=inside) for v in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_arrays(v, function, inside=inside) for v in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        inside = type(tree).__name__
        fields = {f.name: map_arrays(getattr(tree, f.name), function, inside=inside) for f in dataclasses.fields(tree)}
        return type(tree)(**fields)
    return tree
