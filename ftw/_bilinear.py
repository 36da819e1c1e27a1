"""What the operators share: the terms of ``<G_i, P H_j>``, an inner product, a sign."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array
from .gradients import Record

__all__ = ["Piece", "inner", "none_negative"]


class Piece(NamedTuple):
    """One term of a bilinear form: two records and elementwise weights (a number, or broadcastable to the matrix)."""

    left: Record
    right: Record
    weights: Any


def inner(g: Any, h: Any) -> Any:
    """Return ``<g, h>`` as a 0-d array."""
    xp = _array.namespace(g, h)
    return xp.sum(g * h)


def none_negative(values: Any) -> Any:
    """Return whether no number is below zero, a 0-d boolean array."""
    return ~_array.namespace(values).any(values < 0)
