"""The four constraint sets of the weights, and the nearest point of each.

All four are one shape, a box cut by at most one hyperplane,

    C = { w : lower <= w <= upper  [, sum_i w_i = total] }

so that one projection and one solver serve them all. The nearest point to ``v`` in the metric ``diag(metric)`` is

    w_i(t) = clip(v_i - t / metric_i, lower_i, upper_i)

with t = 0 for a plain box, and otherwise the root of the decreasing piecewise-linear function ``sum_i w_i(t) -
total``. Its 2n breakpoints are sorted, the segment that holds the root is read off from running sums, and the root
is then recomputed from the free coordinates of that segment (Held, Wolfe & Crowder 1974; Condat 2016 reviews the
alternatives).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array

__all__ = ["Box", "CappedSimplex", "Constraint", "NonNegative", "Simplex", "feasible", "project"]


class NonNegative(NamedTuple):
    """Weights ``w >= 0``."""


class Simplex(NamedTuple):
    """Weights ``w >= 0`` that sum to ``total``."""

    total: Any = 1.0


class CappedSimplex(NamedTuple):
    """Weights ``0 <= w <= cap`` that sum to ``total``; ``cap`` is a number or an array (..., n)."""

    cap: Any
    total: Any = 1.0


class Box(NamedTuple):
    """Weights ``lower <= w <= upper``; both are numbers or arrays (..., n), infinite where there is no bound."""

    lower: Any
    upper: Any


Constraint = NonNegative | Simplex | CappedSimplex | Box


class Limits(NamedTuple):
    """A set as arrays: ``lower`` (..., n); ``upper`` (..., n) or None for none; ``total`` (...) or None for no sum."""

    lower: Any
    upper: Any
    total: Any


def project(constraint: Constraint, v: Any, *, metric: Any = None) -> Any:
    """Return the point of ``constraint`` nearest to ``v``.

    Parameters
    ----------
    constraint
        One of the four sets.
    v
        Array (..., n), float.
    metric
        Positive array (..., n): distances are ``sum_i metric_i (w_i - v_i)^2``. None for all ones.

    Returns
    -------
    Array (..., n) of the dtype of ``v`` (16-bit floats widened to float32); NaN where the set is empty or the input not
    finite.

    Raises
    ------
    TypeError
        If ``constraint`` is none of the four sets, or an array is not floating.
    ValueError
        If a shape does not fit.

    Notes
    -----
    Costs one sort of 2n numbers for the sets with a total, O(n) for the others.
    """
    fields = tuple(constraint) if isinstance(constraint, (NonNegative, Simplex, CappedSimplex, Box)) else ()
    xp = _array.namespace(v, metric, *fields, what="project")
    if v.ndim < 1 or not _array.is_floating(xp, v):
        raise TypeError(f"project: v must be a float array (..., n), got shape {v.shape} of {v.dtype}")
    v = _array.widen(xp, v)
    limits = as_limits(xp, constraint, v)
    normal = xp.ones_like(v) if metric is None else 1 / xp.sqrt(xp.astype(metric, v.dtype))  # (..., n)
    # in z = sqrt(metric) w the metric is the identity, and the sum becomes sum_i normal_i z_i
    scaled = Limits(limits.lower / normal, None if limits.upper is None else limits.upper / normal, limits.total)
    good = feasible(xp, limits) & xp.all(xp.isfinite(v), axis=-1)
    v = xp.where(good[..., None], v, 0.0)
    w = clip(xp, project_scaled(xp, v / normal, scaled, normal) * normal, limits)
    return xp.where(good[..., None], w, xp.nan)


def as_limits(xp: Any, constraint: Any, like: Any) -> Limits:
    """Return the set as arrays that fit ``like`` (..., n): bounds (..., n), total (...) or None.

    Raises
    ------
    TypeError
        If ``constraint`` is none of the four sets, or one of its fields is neither a number nor an array.
    ValueError
        If a field's shape does not broadcast to that of ``like``.
    """
    if isinstance(constraint, type) or not isinstance(constraint, (NonNegative, Simplex, CappedSimplex, Box)):
        hint = f"; write {constraint.__name__}(...)" if isinstance(constraint, type) else ""
        raise TypeError(
            f"constraint must be NonNegative(), Simplex(total), CappedSimplex(cap, total) or Box(lower, upper), "
            f"got {constraint!r}{hint}"
        )
    zero = xp.zeros_like(like)
    name = type(constraint).__name__
    if isinstance(constraint, Box):
        lower = field(xp, f"{name}.lower", constraint.lower, like, like.shape)
        return Limits(lower, field(xp, f"{name}.upper", constraint.upper, like, like.shape), None)
    upper = None
    if isinstance(constraint, NonNegative):
        return Limits(zero, None, None)
    if isinstance(constraint, CappedSimplex):
        upper = field(xp, f"{name}.cap", constraint.cap, like, like.shape)
    return Limits(zero, upper, field(xp, f"{name}.total", constraint.total, like, like.shape[:-1]))


def field(xp: Any, name: str, value: Any, like: Any, shape: tuple[int, ...]) -> Any:
    """Return ``value``, a number or an array, as an array of ``shape`` with the dtype and the device of ``like``."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return xp.full(shape, float(value), dtype=like.dtype, device=_array.device(like))
    if (
        isinstance(value, bool)
        or not (hasattr(value, "shape") and hasattr(value, "dtype"))
        or xp.isdtype(value.dtype, "complex floating")
    ):
        raise TypeError(f"{name} must be a real number or a real array, got {value!r}")
    try:
        return xp.broadcast_to(xp.astype(value, like.dtype), shape)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: shape {tuple(value.shape)} does not broadcast to {tuple(shape)}") from error


def finite(xp: Any, limits: Limits) -> Any:
    """Tell whether the set is made of numbers: no NaN among the bounds, a finite total; booleans (...)."""
    good = (
        limits.lower[..., 0] == 0
        if limits.upper is None
        else ~xp.any(xp.isnan(limits.lower) | xp.isnan(limits.upper), axis=-1)
    )
    return good if limits.total is None else good & xp.isfinite(limits.total)


def feasible(xp: Any, limits: Limits) -> Any:
    """Tell whether the set has a point, up to the rounding of the sums; booleans (...)."""
    lower, upper, total = limits
    if upper is None:  # the lower bound is zero
        return lower[..., 0] == 0 if total is None else total >= 0
    good = xp.all((lower <= upper) & (lower < xp.inf) & (upper > -xp.inf), axis=-1)
    if total is None:
        return good
    slack = 4 * upper.shape[-1] * float(xp.finfo(upper.dtype).eps) * xp.abs(total)
    return good & (total >= 0) & (total <= xp.sum(upper, axis=-1) + slack)


def clip(xp: Any, z: Any, limits: Limits) -> Any:
    """Return z (..., n) moved into its bounds."""
    z = xp.maximum(z, limits.lower)
    return z if limits.upper is None else xp.minimum(z, limits.upper)


def project_scaled(xp: Any, v: Any, limits: Limits, normal: Any) -> Any:
    """Return the nearest point to ``v`` (..., n) of ``lower <= z <= upper`` [and ``sum_i normal_i z_i = total``].

    ``normal`` (..., n) is positive. The set must not be empty; nothing is checked.
    """
    if limits.total is None:
        return clip(xp, v, limits)
    z = _cut(xp, v, limits, normal)
    return _cut(xp, z, limits, normal)  # once more from nearby: the sum is then exact to rounding, however far v was


def _cut(xp: Any, v: Any, limits: Limits, normal: Any) -> Any:
    lower, upper, total = limits
    total = total if isinstance(total, float) else total[..., None]  # (..., 1)
    square = normal * normal  # (..., n)
    points = (v - lower) / normal  # (..., n): from here on z_i = lower_i
    slopes = square
    if upper is not None:
        bounded = upper < xp.inf  # (..., n)
        at_upper = xp.where(bounded, v - xp.where(bounded, upper, 0.0), 0.0) / normal  # up to here z_i = upper_i
        points = xp.concat([points, at_upper], axis=-1)  # (..., 2n)
        slopes = xp.concat([slopes, xp.where(bounded, -square, 0.0)], axis=-1)
    order = xp.argsort(-points, axis=-1)
    points = xp.take_along_axis(points, order, axis=-1)  # (..., 2n), descending
    slopes = xp.take_along_axis(slopes, order, axis=-1)
    S = xp.cumulative_sum(slopes, axis=-1)  # (..., 2n)
    T = xp.cumulative_sum(slopes * points, axis=-1)
    base = xp.sum(normal * lower, axis=-1)[..., None]  # (..., 1)
    # left of points[k] the sum is base + T[k] - S[k] t; it passes the total in the last segment that starts below it
    below = base + T - S * points < total  # (..., 2n)
    last = xp.sum(xp.astype(below, xp.int64), axis=-1)[..., None] - 1  # (..., 1)
    last = xp.where(last > 0, last, 0)
    slope = xp.take_along_axis(S, last, axis=-1)
    root = (base + xp.take_along_axis(T, last, axis=-1) - total) / xp.where(slope > 0, slope, 1.0)
    root = xp.where(slope > 0, root, xp.take_along_axis(points, last, axis=-1))  # (..., 1)
    for _ in range(2):  # the running sums cancel: recompute from the coordinates that are free at the root
        z = v - root * normal  # (..., n)
        free = z > lower if upper is None else (z > lower) & (z < upper)
        z = clip(xp, z, limits)
        slope = xp.sum(xp.where(free, square, 0.0), axis=-1)[..., None]
        excess = xp.sum(normal * z, axis=-1)[..., None] - total
        root = root + xp.where(slope > 0, excess / xp.where(slope > 0, slope, 1.0), 0.0)
    return clip(xp, v - root * normal, limits)
