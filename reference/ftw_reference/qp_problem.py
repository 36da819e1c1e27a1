"""The problem of ``qp.py`` as it is read, and its solution as it is judged; ``qp.py`` has the mathematics."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .projections import Bounds, bounds, check_bounds, project_onto
from .status import Status

__all__ = ["QPSolution", "certificate", "diagonal_scale", "first_point", "no_solution", "read_problem", "tidy"]

Array = Any


class QPSolution(NamedTuple):
    """The weights and how good they are; the module's docstring defines ``kkt`` and ``gap``."""

    weights: Array  # (n,)
    objective: float
    kkt: float
    gap: float
    steps: int
    status: Status


def read_problem(gram: Array, linear: Array, constraint: Any, ridge: float) -> tuple[Array, Array, Bounds, Status]:
    """Return K (n, n), c (n,), the bounds, and the status that the values alone decide; wrong shapes raise."""
    K = np.asarray(gram, dtype=np.float64)  # (n, n)
    c = np.asarray(linear, dtype=np.float64)  # (n,)
    if K.ndim != 2 or K.shape[0] != K.shape[1] or K.shape[0] == 0:
        raise ValueError(f"K has shape {K.shape}: give a square matrix (n, n) with n >= 1")
    n = K.shape[0]
    if c.shape != (n,):
        raise ValueError(f"c has shape {c.shape} and K {K.shape}: c must be ({n},)")
    if ridge < 0:
        raise ValueError(f"ridge is {ridge}: give a number >= 0")
    box = bounds(constraint, n)
    status = check_bounds(box)
    if not (np.isfinite(K).all() and np.isfinite(c).all() and np.isfinite(ridge)):
        status = Status.NOT_FINITE
    return 0.5 * (K + K.T), c, box, status


def no_solution(n: int, status: Status) -> QPSolution:
    """Return NaN weights (n,) under a status."""
    return QPSolution(np.full(n, np.nan), np.nan, np.nan, np.nan, 0, status)


def diagonal_scale(H: Array) -> Array:
    """Return d_i = sqrt(H_ii), kept away from zero: (n, n) -> (n,)."""
    diagonal = np.diag(H)  # (n,)
    largest = np.max(diagonal)
    if largest <= 0.0:
        return np.ones(H.shape[0])
    return np.sqrt(np.maximum(diagonal, 1e-20 * largest))


def first_point(c: Array, box: Bounds) -> Array:
    """Return a feasible point (n,): the bound nearest to zero or, with a total, the best c filled first."""
    w = np.minimum(np.maximum(0.0, box.lower), box.upper)  # (n,)
    if box.has_total:
        left = box.total - np.sum(w)
        for i in np.argsort(-c, kind="stable"):
            w[i] += min(left, box.upper[i] - w[i])
            left = box.total - np.sum(w)
            if left <= 0.0:
                break
    return w


def tidy(w: Array, box: Bounds) -> Array:
    """Return w (n,) inside its bounds to the last bit, the rounding error of the sum moved where there is room."""
    w = np.minimum(np.maximum(w, box.lower), box.upper)  # (n,)
    if box.has_total:
        for _ in range(3):
            left = box.total - np.sum(w)
            room = np.where(left > 0, box.upper - w, w - box.lower)  # (n,)
            room = np.minimum(room, np.abs(w))
            if left == 0.0 or not np.any(room > 0.0):
                break
            w = np.minimum(np.maximum(w + left * (room / np.sum(room)), box.lower), box.upper)
    return w


def certificate(H: Array, c: Array, w: Array, box: Bounds) -> tuple[float, float, float]:
    """Return the objective, the natural residual and the duality gap of w (n,): see the module's docstring."""
    g = H @ w - c  # (n,)
    quadratic, linear = 0.5 * (w @ H @ w), c @ w
    size = np.max(np.abs(w))
    L = np.max(np.sum(np.abs(H), axis=1))
    if L == 0.0:  # any step length will do: one that moves by the size of the weights
        L = max(np.max(np.abs(c)), 1e-300) / max(size, 1e-300)
    kkt = (
        np.max(np.abs(w - project_onto(w - g / L, box))) / size
        if size > 0.0
        else np.max(np.abs(w - project_onto(-g / L, box)))
    )
    # The smallest g'v over the set, infinite bounds replaced by a reach that is the same for all x_i.
    d = diagonal_scale(H)  # (n,)
    reach = np.max(np.abs(d * w)) / d  # (n,)
    low = np.where(np.isfinite(box.lower), box.lower, w - reach)  # (n,)
    high = np.where(np.isfinite(box.upper), box.upper, w + reach)  # (n,)
    if box.has_total:
        v = low.copy()  # (n,): a linear function over capped weights is smallest when the cheapest are filled first
        high = np.minimum(box.upper, box.total)
        for i in np.argsort(g, kind="stable"):
            v[i] += max(min(box.total - np.sum(v), high[i] - v[i]), 0.0)
    else:
        v = np.where(g > 0, low, high)  # (n,)
    scale = np.sum(np.abs(w * (g + c))) + np.sum(np.abs(w * c))
    gap = max(g @ (w - v), 0.0) / scale if scale > 0.0 else max(g @ (w - v), 0.0)
    return float(quadratic - linear), float(kkt), float(gap)
