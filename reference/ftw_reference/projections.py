r"""Where weights may live, and the nearest allowed point.

The weights of the kept samples obey one of four sets::

    NonNegative()             w >= 0
    Simplex(total)            w >= 0,          sum w = total
    CappedSimplex(cap, total) 0 <= w <= cap,   sum w = total
    Box(lower, upper)         lower <= w <= upper

All four are *bounds*, with or without *one equation*:  ``l <= w <= u`` and perhaps ``sum w = t``. Everything below, and
the quadratic program of ``qp.py``, treats this one form. A fifth set, bounds on the sums of sources, has a file of its
own, ``shares.py``.

Projection. The nearest allowed point to v minimises 1/2 |w - v|^2. Without the equation the coordinates do not see each
other, and each is clipped: ``w_i = clip(v_i, l_i, u_i)``. With it, give the equation a multiplier tau. The Lagrangian
1/2 |w - v|^2 + tau (sum w - t) separates again, and

    w_i(tau) = clip(v_i - tau, l_i, u_i).

What is left is one number. ``S(tau) = sum_i w_i(tau)`` never increases, is piecewise linear, and bends only at the
breakpoints ``v_i - u_i`` and ``v_i - l_i``: sort these 2n numbers, find the two neighbours between which S crosses t,
and interpolate.  S runs from sum u (far left) to sum l (far right), so that a solution exists exactly when
sum l <= t <= sum u: this is the test of feasibility.

What a projection is good for: a point w minimises a convex function f over the set exactly when a small step downhill,
projected back, does not move it. The *natural residual*  |w - Proj(w - grad f(w) / L)|  therefore measures how far w is
from optimal; ``qp.py`` reports it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import shares
from ._jit import jit
from .status import Status

__all__ = ["Box", "CappedSimplex", "NonNegative", "Simplex", "project"]

Array = Any


class NonNegative(NamedTuple):
    """Weights ``w >= 0``."""


class Simplex(NamedTuple):
    """Weights ``w >= 0`` that sum to ``total``."""

    total: Any = 1.0


class CappedSimplex(NamedTuple):
    """Weights ``0 <= w <= cap`` that sum to ``total``; ``cap`` is a number or ``(n,)``."""

    cap: Any
    total: Any = 1.0


class Box(NamedTuple):
    """Weights ``lower <= w <= upper``; each a number or ``(n,)``."""

    lower: Any
    upper: Any


class Bounds(NamedTuple):
    """The common form ``lower <= w <= upper``, and ``sum w = total`` where ``has_total``."""

    lower: Array  # (n,)
    upper: Array  # (n,)
    total: float
    has_total: bool


def bounds(constraint: Any, n: int) -> Bounds:
    """Return the common form of a constraint on n weights, recognised by the names of its fields.

    Parameters
    ----------
    constraint : a NamedTuple
        One of the four above, or any other with the same fields.
    n : int
        How many weights there are.

    Returns
    -------
    Bounds
        ``lower`` (n,), ``upper`` (n,), ``total`` and ``has_total``.
    """
    fields = getattr(constraint, "_fields", None)
    zeros = np.zeros(n)  # (n,)
    unbounded = np.full(n, np.inf)  # (n,)
    if fields == ():
        return Bounds(zeros, unbounded, 0.0, False)
    if fields == ("total",):
        return Bounds(zeros, unbounded, _number(constraint.total, "total"), True)
    if fields == ("cap", "total"):
        return Bounds(zeros, _vector(constraint.cap, n, "cap"), _number(constraint.total, "total"), True)
    if fields == ("lower", "upper"):
        return Bounds(_vector(constraint.lower, n, "lower"), _vector(constraint.upper, n, "upper"), 0.0, False)
    raise TypeError(
        f"constraint is {constraint!r}: give NonNegative(), Simplex(total), CappedSimplex(cap, total) or "
        "Box(lower, upper), or a NamedTuple with the same fields"
    )


def _number(value: Any, name: str) -> float:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 0:
        raise ValueError(f"{name} has shape {array.shape}: give one number")
    return float(array)


def _vector(value: Any, n: int, name: str) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in ((), (n,)):
        raise ValueError(f"{name} has shape {array.shape} for {n} weights: give a number or an array ({n},)")
    return np.ascontiguousarray(np.broadcast_to(array, (n,)))  # (n,)


def check_bounds(box: Bounds) -> Status:
    """Say whether the set holds a point: OK, NOT_FINITE (a NaN, an infinite total) or INFEASIBLE."""
    lower, upper, total, has_total = box
    if np.isnan(lower).any() or np.isnan(upper).any() or not np.isfinite(total):
        return Status.NOT_FINITE
    if (lower > upper).any() or (lower == np.inf).any() or (upper == -np.inf).any():
        return Status.INFEASIBLE
    slack = 1e-12 * abs(total)  # n equal caps that sum to the total, up to rounding, are a set of one point
    if has_total and not (np.sum(lower) <= total + slack and np.sum(upper) >= total - slack):
        return Status.INFEASIBLE
    return Status.OK


def project(point: Array, constraint: Any) -> Array:
    """Return the point of the set that is nearest to ``point``.

    Parameters
    ----------
    point : array (n,)
        Any point.
    constraint : a NamedTuple
        One of the four sets.

    Returns
    -------
    array (n,)
        The projection; NaN where the set is empty.

    Examples
    --------
    >>> project([0.9, 0.5, -1.0], Simplex(1.0))
    array([0.7, 0.3, 0. ])
    """
    v = np.ascontiguousarray(point, dtype=np.float64)  # (n,)
    if v.ndim != 1:
        raise ValueError(f"point has shape {v.shape}: give one of shape (n,)")
    if getattr(constraint, "_fields", ())[:1] == ("sources",):
        groups = shares.read_shares(constraint, v.shape[0])
        if shares.check_shares(groups) != Status.OK or not np.isfinite(v).all():
            return np.full(v.shape, np.nan)
        return shares.project_shares(v, groups)
    box = bounds(constraint, v.shape[0])
    if check_bounds(box) != Status.OK or not np.isfinite(v).all():
        return np.full(v.shape, np.nan)
    return project_onto(v, box)


def project_onto(v: Array, box: Bounds) -> Array:
    """Project ``v`` (n,) onto a set in the common form, which must not be empty."""
    if box.has_total:
        return clip_to_sum(v, box.lower, box.upper, box.total)
    return clip_each(v, box.lower, box.upper)


@jit
def clip_each(v: Array, lower: Array, upper: Array) -> Array:
    """Return clip(v_i, l_i, u_i) for each i: arrays (n,)."""
    w = np.empty_like(v)  # (n,)
    for i in range(v.shape[0]):
        w[i] = min(max(v[i], lower[i]), upper[i])
    return w


@jit
def clip_to_sum(v: Array, lower: Array, upper: Array, total: float) -> Array:
    """Return clip(v_i - tau, l_i, u_i) with the tau that makes the sum ``total``: arrays (n,)."""
    n = v.shape[0]
    bends = np.sort(np.concatenate((v - upper, v - lower)))  # (2n,): where S changes slope; -inf where there is no cap
    # Bisection over the sorted bends: S(bends[low]) >= total > S(bends[high]).
    low, high = -1, 2 * n
    while high - low > 1:
        middle = (low + high) // 2
        if np.sum(clip_each(v - bends[middle], lower, upper)) >= total:
            low = middle
        else:
            high = middle
    # Between those two bends the set of coordinates strictly inside their bounds does not change: S is a line there.
    if low < 0:  # every weight at its upper bound, up to rounding
        return clip_each(upper, lower, upper)
    if high == 2 * n:  # every weight at its lower bound
        return clip_each(lower, lower, upper)
    inside = 0
    fixed, moving = 0.0, 0.0
    for i in range(n):
        if v[i] - upper[i] >= bends[high]:
            fixed += upper[i]
        elif v[i] - lower[i] <= bends[low]:
            fixed += lower[i]
        else:
            inside += 1
            moving += v[i]
    tau = (moving + fixed - total) / inside
    return clip_each(v - tau, lower, upper)
