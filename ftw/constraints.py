"""The four constraint sets of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Box", "CappedSimplex", "Constraint", "NonNegative", "Simplex"]


class NonNegative(NamedTuple):
    """Weights ``w >= 0``."""


class Simplex(NamedTuple):
    """Weights ``w >= 0`` that sum to ``total``."""

    total: Any = 1.0


class CappedSimplex(NamedTuple):
    """Weights ``0 <= w <= cap`` that sum to ``total``."""

    cap: Any
    total: Any = 1.0


class Box(NamedTuple):
    """Weights ``lower <= w <= upper``."""

    lower: Any
    upper: Any


Constraint = NonNegative | Simplex | CappedSimplex | Box
