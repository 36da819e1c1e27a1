"""The five constraint sets of the weights, and the nearest point of each.

Four of them are one shape, a box cut by at most one hyperplane,

    C = { w : lower <= w <= upper  [, sum_i w_i = total] }

so that one projection and one solver serve them all. The nearest point to ``v`` in the metric ``diag(metric)`` is

    w_i(t) = clip(v_i - t / metric_i, lower_i, upper_i)

with t = 0 for a plain box, and otherwise the root of the decreasing piecewise-linear function ``sum_i w_i(t) -
total``. Its 2n breakpoints are sorted, the segment that holds the root is read off from running sums, and the root
is then recomputed from the free coordinates of that segment (Held, Wolfe & Crowder 1974; Condat 2016 reviews the
alternatives).

`SourceShares` bounds the sum of each source besides. Its nearest point has the same form. With the multiplier t of the
total, and u_s of a source whose bound holds, ``w_i = max(v_i - (t + u_s) / metric_i, 0)``: over t, a source's sum
falls until it meets its lower bound and stays there, and the weights with it. So its weights never leave the range
between the nearest points to v whose sum is the source's lower bound and its upper bound, and within that range they
follow t alone. Two projections a source give the ranges, and one projection onto them gives the answer: the
decomposition of nested resource allocation (Hochbaum & Hong 1995; Vidal, Jaillet & Maculan 2016).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array, _kinds, _loops, quotas

__all__ = ["Box", "CappedSimplex", "Constraint", "NonNegative", "Simplex", "SourceShares", "feasible", "project"]


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


class SourceShares(NamedTuple):
    """Weights ``w >= 0`` that sum to ``total``, and within each of m sources to between ``lower`` and ``upper``.

    Attributes
    ----------
    sources : integer array (..., n)
        The source of each weight, 0 .. m - 1, or -1 for one without bounds.
    lower, upper : sequence or array (..., m), or None
        Bounds on each source's sum of weights, in the units of ``total``; None, as a whole or for one source, is no
        bound. The number m of sources is static.
    total : float or array (...)

    Examples
    --------
    >>> import numpy as np
    >>> import ftw
    >>> shares = ftw.SourceShares(np.array([0, 0, 1]), lower=(0.0, 0.25), upper=(None, 0.5))
    >>> ftw.solve_qp(np.eye(3), np.array([2.0, 1.0, 0.0]), shares).weights
    array([0.75, 0.  , 0.25])
    """

    sources: Any
    lower: Any = None
    upper: Any = None
    total: Any = 1.0


Constraint = NonNegative | Simplex | CappedSimplex | Box | SourceShares
SETS = (NonNegative, Simplex, CappedSimplex, Box, SourceShares)


class Limits(NamedTuple):
    """A set as arrays; where there are sources the last of the m + 1 is that of the weights without one."""

    lower: Any  # (..., n)
    upper: Any  # (..., n), None for no upper bounds
    total: Any  # (...), None for no sum
    member: Any = None  # (..., m + 1, n): 1 where a weight is of a source; None for no sources
    low: Any = None  # (..., m + 1): bounds on each source's sum
    high: Any = None  # (..., m + 1)


@_array.quiet
def project(constraint: Constraint, v: Any, *, metric: Any = None) -> Any:
    """Return the point of ``constraint`` nearest to ``v``.

    Parameters
    ----------
    constraint
        One of the five sets.
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
        If ``constraint`` is none of the five sets, or an array is not floating.
    ValueError
        If a shape does not fit.

    Notes
    -----
    Costs one sort of 2n numbers for the sets with a total, 2 (m + 1) more for the shares of m sources, O(n) for the
    others.
    """
    fields = _array.leaves(constraint) if isinstance(constraint, SETS) else ()
    for name, x in (("v", v), ("metric", metric)):
        _kinds.require(x, f"project: {name}")
    require_fields(constraint, "project")
    xp = _array.namespace(v, metric, *fields, what="project")
    if v.ndim < 1 or not _array.is_floating(xp, v):
        raise TypeError(f"project: v must be a float array (..., n), got shape {v.shape} of {v.dtype}")
    v = _array.widen(xp, v)
    limits = as_limits(xp, constraint, v)
    normal = xp.ones_like(v) if metric is None else 1 / xp.sqrt(xp.astype(metric, v.dtype))  # (..., n)
    # in z = sqrt(metric) w the metric is the identity, and the sum becomes sum_i normal_i z_i
    scaled = limits._replace(lower=limits.lower / normal, upper=None if limits.upper is None else limits.upper / normal)
    good = feasible(xp, limits) & xp.all(xp.isfinite(v), axis=-1)
    v = xp.where(good[..., None], v, 0.0)
    w = clip(xp, project_scaled(xp, v / normal, narrowed(xp, scaled), normal) * normal, limits)
    return xp.where(good[..., None], w, xp.nan)


def require_fields(constraint: Any, what: str) -> None:
    """Raise where a bound is no array that can be computed with; `as_limits` says which numbers it may be."""
    if not isinstance(constraint, SETS):
        return
    for name, x in zip(constraint._fields, constraint, strict=True):
        if not (isinstance(x, str) or (isinstance(constraint, SourceShares) and isinstance(x, (tuple, list)))):
            _kinds.require(x, f"{what}: {name} of {type(constraint).__name__}")


def as_limits(xp: Any, constraint: Any, like: Any) -> Limits:
    """Return the set as arrays that fit ``like`` (..., n): bounds (..., n), total (...) or None.

    Raises
    ------
    TypeError
        If ``constraint`` is none of the five sets, or one of its fields is neither a number nor an array.
    ValueError
        If a field's shape does not broadcast to that of ``like``.
    """
    if isinstance(constraint, type) or not isinstance(constraint, SETS):
        hint = f"; write {constraint.__name__}(...)" if isinstance(constraint, type) else ""
        raise TypeError(
            "constraint must be NonNegative(), Simplex(total), CappedSimplex(cap, total), Box(lower, upper) or "
            f"SourceShares(sources, lower, upper, total), got {constraint!r}{hint}"
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
    total = field(xp, f"{name}.total", constraint.total, like, like.shape[:-1])
    if isinstance(constraint, SourceShares):
        return Limits(zero, None, total, *_shares(xp, constraint, total, like))
    return Limits(zero, upper, total)


def _shares(xp: Any, shares: SourceShares, total: Any, like: Any) -> tuple[Any, Any, Any]:
    """Return the members (..., m + 1, n) of each source and the bounds (..., m + 1) of their sums."""
    sources, what, device = shares.sources, "SourceShares.sources", _array.device(like)
    if not hasattr(sources, "dtype") or not xp.isdtype(sources.dtype, "integral"):
        raise TypeError(f"{what} must be an integer array (..., n), got {getattr(sources, 'dtype', type(sources))}")
    m = quotas.length("lower", "upper", shares.lower, shares.upper, what="SourceShares")
    numbers, known = quotas.numbered(xp, sources, m, what=what)
    try:
        numbers = xp.broadcast_to(numbers, like.shape)  # (..., n)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{what}: shape {tuple(sources.shape)} does not broadcast to {tuple(like.shape)}") from error
    numbers = numbers[..., None, :]  # (..., 1, n)
    line = xp.arange(m + 1, dtype=numbers.dtype, device=device)[:, None]  # (m + 1, 1)
    member = numbers == _array.over(line, numbers)  # (..., m + 1, n)
    rest = xp.zeros_like(total)[..., None]  # (..., 1)
    low = share_bounds(xp, "SourceShares.lower", shares.lower, 0.0, m, like)  # (..., m)
    high = share_bounds(xp, "SourceShares.upper", shares.upper, float("inf"), m, like)
    low = xp.concat([low, xp.where(known, rest, rest + xp.inf)], axis=-1)  # an unknown source: no point
    return xp.astype(member, like.dtype), low, xp.concat([high, rest + xp.inf], axis=-1)


def share_bounds(xp: Any, name: str, bounds: Any, free: float, m: int, like: Any) -> Any:
    """Return bounds on the sums of m sources as an array (..., m) that fits ``like`` (..., n); None is ``free``."""
    shape = (*like.shape[:-1], m)
    if bounds is None:
        return field(xp, name, free, like, shape)
    if hasattr(bounds, "dtype"):
        return field(xp, name, bounds, like, shape)
    each = [field(xp, f"{name}[{s}]", free if x is None else x, like, ()) for s, x in enumerate(bounds)]
    return xp.broadcast_to(xp.stack(each), shape)


def narrowed(xp: Any, limits: Limits) -> Limits:
    """Return the same set with the tightest bounds on the sums of its sources; a set without sources as it is."""
    lower, upper, total, member, low, high = limits
    if member is None:
        return limits
    there = xp.any(member > 0, axis=-1)  # (..., m + 1)
    total_ = total[..., None]
    low = xp.where(there & (low > 0), low, 0.0)
    high = xp.where(there, xp.minimum(high, total_ * xp.ones_like(high)), 0.0)
    slack = _slack(xp, lower, total)[..., None]  # bounds that add up to the total leave one point for each sum
    low, high = (
        xp.where(xp.sum(high, axis=-1)[..., None] <= total_ + slack, high, low),
        xp.where(xp.sum(low, axis=-1)[..., None] >= total_ - slack, low, high),
    )
    return Limits(lower, upper, total, member, low, high)


def _slack(xp: Any, like: Any, total: Any) -> Any:
    return 4 * like.shape[-1] * float(xp.finfo(like.dtype).eps) * xp.abs(total)


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
    """Return whether the set is made of numbers: no NaN among the bounds, a finite total; booleans (...)."""
    good = (
        limits.lower[..., 0] == 0
        if limits.upper is None
        else ~xp.any(xp.isnan(limits.lower) | xp.isnan(limits.upper), axis=-1)
    )
    if limits.member is not None:
        good = good & ~xp.any(xp.isnan(limits.low) | xp.isnan(limits.high), axis=-1)
    return good if limits.total is None else good & xp.isfinite(limits.total)


def feasible(xp: Any, limits: Limits) -> Any:
    """Return whether the set has a point, up to the rounding of the sums; booleans (...)."""
    lower, upper, total, member, low, high = limits
    if member is not None:
        there = xp.any(member > 0, axis=-1)  # (..., m + 1)
        total = xp.where(xp.isfinite(total), total, 0.0)
        least, most = xp.where(low > 0, low, 0.0), xp.where(there, xp.minimum(high, total[..., None]), 0.0)
        slack = _slack(xp, lower, total)
        good = xp.all((low <= high) & (high >= 0) & (there | (low <= 0)), axis=-1) & (total >= 0)
        return good & (xp.sum(least, axis=-1) <= total + slack) & (xp.sum(most, axis=-1) >= total - slack)
    if upper is None:  # the lower bound is zero
        return lower[..., 0] == 0 if total is None else total >= 0
    good = xp.all((lower <= upper) & (lower < xp.inf) & (upper > -xp.inf), axis=-1)
    if total is None:
        return good
    return good & (total >= 0) & (total <= xp.sum(upper, axis=-1) + _slack(xp, upper, total))


def clip(xp: Any, z: Any, limits: Limits) -> Any:
    """Return z (..., n) moved into its bounds."""
    z = xp.maximum(z, limits.lower)
    return z if limits.upper is None else xp.minimum(z, limits.upper)


def project_scaled(xp: Any, v: Any, limits: Limits, normal: Any) -> Any:
    """Return the nearest point to ``v`` (..., n) of ``lower <= z <= upper`` [and ``sum_i normal_i z_i = total``].

    ``normal`` (..., n) is positive; sources have been `narrowed`. The set must not be empty; nothing is checked.
    """
    if limits.total is None:
        return clip(xp, v, limits)
    if limits.member is not None:
        return project_scaled(xp, v, _ranges(xp, v, limits, normal), normal)
    # once more from nearby: the sum is then exact to rounding, however far v was
    return _loops.fori_loop(2, lambda _, z: _cut(xp, z, limits, normal), v)


def _ranges(xp: Any, v: Any, limits: Limits, normal: Any) -> Limits:
    """Return bounds (..., n) on each weight: the nearest points to v at which each source has its least or most."""
    member = limits.member[..., None, :, :]  # (..., 1, m + 1, n)
    sums = xp.stack([limits.low, limits.high], axis=-2)  # (..., 2, m + 1)
    each, normals = (
        xp.broadcast_to(x[..., None, None, :], (*sums.shape, x.shape[-1])) for x in (v, normal)
    )  # (..., 2, m + 1, n)
    zero = xp.zeros_like(each)
    ends = project_scaled(xp, each, Limits(zero, xp.where(member > 0, xp.inf, zero), sums), normals)
    ends = xp.sum(ends, axis=-2)  # (..., 2, n)
    least, most = ends[..., 0, :], ends[..., 1, :]
    return Limits(least, xp.maximum(least, most), limits.total)


def _cut(xp: Any, v: Any, limits: Limits, normal: Any) -> Any:
    lower, upper, total = limits[:3]
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
    last = xp.sum(xp.astype(below, xp.int32), axis=-1)[..., None] - 1  # (..., 1)
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
