"""The weights of the kept samples: the QP over a constraint set, scaled to the set's total, or equal weights.

Over a set with a fixed total the target is first scaled so that the non-negative solution has that total; the set then
changes it in the natural way. Samples that did not pass the filter stay in the arrays with weight zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array
from .constraints import (
    Box,
    CappedSimplex,
    Constraint,
    NonNegative,
    SourceShares,
    as_limits,
    feasible,
    finite,
    narrowed,
    project_scaled,
    share_bounds,
)
from .quotas import length
from .status import Status

__all__ = ["Weighed", "at", "weigh"]


class Weighed(NamedTuple):
    """The weights of the kept samples."""

    weights: Any  # (k,)
    status: Any  # () int32
    fitted: Any  # (k,): of the last refit, before any scaling to a total
    relaxed: Any  # () int32: sources whose bounds gave way, None for a set without sources


def weigh(
    xp: Any,
    K: Any,
    c: Any,
    passed: Any,
    weight: str,
    constraint: Constraint,
    ridge: Any,
    solver: Any,
    refit: Any,
    *,
    relax: bool = False,
) -> Weighed:
    """Return the weights (k,) of the kept samples; those that did not pass get zero.

    K (k, k) may be None where the weights are equal. ``refit`` are weights (k,) and status of the non-negative
    solution, or None. ``relax`` lets the bounds on sources give way as far as the kept samples ask for it.
    """
    relaxed = None
    constraint = _only(xp, constraint, passed, c)
    if relax and isinstance(constraint, SourceShares):
        constraint, relaxed = _within_reach(xp, constraint, c)
    ones = xp.astype(passed, c.dtype)  # (k,)
    count = xp.sum(ones)
    divisor = xp.where(count > 0, count, 1.0)
    total = _array.scalar_like(getattr(constraint, "total", 1.0), c) * xp.ones_like(count)  # ()
    limits = as_limits(xp, constraint, c)
    uniform = total * ones / divisor  # (k,)
    possible = feasible(xp, limits) | (count == 0)  # nothing passed: no weights, whatever the total
    if isinstance(constraint, (CappedSimplex, Box, SourceShares)):
        nearest = project_scaled(xp, uniform, narrowed(xp, limits), xp.ones_like(c))
        uniform = xp.where(possible, nearest, uniform)
        uniform = xp.where(passed, uniform, 0.0)
    useful = xp.any(passed & (c > 0))
    if weight == "uniform":
        weights, status = uniform, xp.zeros_like(xp.argmax(c), dtype=xp.int32)
        fitted = (
            None if refit is None and K is None else _at_best_length(xp, K, c, uniform) if refit is None else refit[0]
        )
    else:
        weights, status, useful, fitted = _fit(
            xp, K, c, passed, divisor, total, constraint, ridge, solver, useful, refit
        )
    bad = (status == int(Status.NOT_FINITE)) | (status == int(Status.NOT_PSD))
    status = xp.where(~bad & ~useful, int(Status.NOTHING_USEFUL), status)
    status = xp.where(possible, status, int(Status.INFEASIBLE))
    status = xp.where(finite(xp, limits), status, int(Status.NOT_FINITE))
    weights = xp.where(status == int(Status.NOTHING_USEFUL), uniform, weights)
    return Weighed(weights, xp.astype(status, xp.int32), fitted, relaxed)


def _at_best_length(xp: Any, K: Any, c: Any, weights: Any) -> Any:
    """Return the weights (k,) times the number that matches the target best."""
    gain, length = xp.sum(c * weights), xp.sum(weights * (K @ weights))
    good = (gain > 0) & (length > 0)
    return weights * xp.where(good, gain, 0.0) / xp.where(good, length, 1.0)


def _fit(
    xp: Any,
    K: Any,
    c: Any,
    passed: Any,
    divisor: Any,
    total: Any,
    constraint: Constraint,
    ridge: Any,
    solver: Any,
    useful: Any,
    refit: Any,
) -> tuple[Any, Any, Any, Any]:
    """Return the QP's weights (k,), its status, whether any is positive where one must be, and those of the refit."""
    diagonal = xp.where(passed, xp.linalg.diagonal(K), 0.0)  # (k,)
    mean = xp.sum(diagonal) / divisor
    mean = xp.where(mean < 0, 0.0, mean)  # of an indefinite K: the solver is to say so
    both = passed[:, None] & passed[None, :]  # (k, k)
    K = xp.where(both, K, mean * xp.eye(c.shape[0], dtype=c.dtype, device=_array.device(c)))  # (k, k)
    c = xp.where(passed, c, 0.0)
    ridge = _array.scalar_like(ridge, c) * mean
    if isinstance(constraint, Box):
        solution = solver(K, c, constraint, ridge=ridge)
        return solution.weights, solution.status, useful, solution.weights
    if refit is None:
        solution = solver(K, c, NonNegative(), ridge=ridge)
        refit = solution.weights, solution.status
    weights, status = refit
    if isinstance(constraint, NonNegative):
        return weights, status, useful, weights
    amount = xp.sum(weights)  # the non-negative solution sets the target's length
    scale = total / xp.where(amount > 0, amount, 1.0)
    fitted, weights = weights, weights * scale
    if isinstance(constraint, (CappedSimplex, SourceShares)):
        solution = solver(K, c * scale, constraint, ridge=ridge, start=weights)
        weights = solution.weights
        status = xp.where(status == int(Status.OK), solution.status, status)
    return weights, status, useful & (amount > 0), fitted


def at(xp: Any, constraint: Constraint, indices: Any) -> Constraint:
    """Return the set of the picked candidates, from bounds that are numbers or one a candidate (n,)."""

    def pick(bound: Any) -> Any:
        return xp.take(bound, indices) if getattr(bound, "ndim", 0) else bound

    if isinstance(constraint, CappedSimplex):
        return CappedSimplex(pick(constraint.cap), constraint.total)
    if isinstance(constraint, Box):
        return Box(pick(constraint.lower), pick(constraint.upper))
    if isinstance(constraint, SourceShares):
        return constraint._replace(sources=xp.take(constraint.sources, indices))
    return constraint


def _only(xp: Any, constraint: Constraint, passed: Any, like: Any) -> Constraint:
    """Return the set in which samples that did not pass have weight zero."""

    def masked(bound: Any) -> Any:
        return xp.where(passed, xp.zeros_like(like) + _array.scalar_like(bound, like), 0.0)  # (k,)

    if isinstance(constraint, CappedSimplex):
        return CappedSimplex(masked(constraint.cap), constraint.total)
    if isinstance(constraint, Box):
        return Box(masked(constraint.lower), masked(constraint.upper))
    if isinstance(constraint, SourceShares):  # one more source, of those that did not pass, without weight
        m = length("lower", "upper", constraint.lower, constraint.upper, what="SourceShares")
        low = share_bounds(xp, "SourceShares.lower", constraint.lower, 0.0, m, like)  # (m,)
        high = share_bounds(xp, "SourceShares.upper", constraint.upper, float("inf"), m, like)
        zero = xp.zeros_like(low[:1])
        sources = xp.where(constraint.sources >= m, m + 1, constraint.sources)  # (k,): an unknown one stays unknown
        return SourceShares(
            xp.where(passed, sources, m), xp.concat([low, zero]), xp.concat([high, zero]), constraint.total
        )
    return constraint


def _within_reach(xp: Any, shares: SourceShares, like: Any) -> tuple[SourceShares, Any]:
    """Return bounds that some weights obey, floors before caps, and how many sources they differ for."""
    limits = as_limits(xp, shares, like)
    there = xp.any(limits.member > 0, axis=-1)  # (m + 2,)
    low = xp.where(there & (limits.low > 0), limits.low, 0.0)
    high = xp.where(limits.high > low, limits.high, low)
    least, total = xp.sum(low), limits.total
    low = low * xp.where(least > total, total / xp.where(least > 0, least, 1.0), 1.0)
    most = xp.sum(xp.where(there, xp.minimum(high, total * xp.ones_like(high)), 0.0))
    wider = xp.where(most > 0, high * (total / xp.where(most > 0, most, 1.0)), total)
    high = xp.where(there & (most < total), wider, high)
    high = xp.where(high > low, high, low)
    keep = xp.isnan(limits.low) | xp.isnan(limits.high)
    low, high = xp.where(keep, limits.low, low), xp.where(keep, limits.high, high)
    slack = 1e-6 * xp.abs(total)
    changed = (xp.where(limits.low > 0, limits.low, 0.0) - low > slack) | (high - limits.high > slack)
    relaxed = xp.count_nonzero(changed[:-1])
    return shares._replace(lower=low[:-1], upper=high[:-1]), xp.astype(relaxed, xp.int32)
