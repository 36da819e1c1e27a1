"""Filter-then-Weight, the stages composed (Wang et al. 2026).

    scores       b_i  = <g_i, P g_T>                       all n candidates
    shortlist    the best of them by score                 so that the Gram matrix stays small
    Gram         K_ij = <g_i, P g_j>                       of the shortlist
    guard        b' = (1 - a) b + a mean_j K_ij            if the target looks memorised
    filter       ``keep`` of the shortlist
    weights      min 1/2 w'Kw - s b'w  over a constraint set, s such that the non-negative solution has the set's total

The target's length has no say in the weights of a set with a fixed total: matching it with one fixed step length would
make the filter pick tiny gradients, whose own noise K_ii costs least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import _array, _loops, filters, gradients, guard
from ._array import Array
from ._check import check_model
from .constraints import (
    Box,
    CappedSimplex,
    Constraint,
    NonNegative,
    Simplex,
    as_limits,
    feasible,
    finite,
    project_scaled,
)
from .filters import Filter
from .geometry import Operator
from .gradients import Record, combine, take
from .gram import gram, squared_norms
from .gram import scores as all_scores
from .qp import solve_qp
from .status import Status

__all__ = ["Selection", "filter_then_weight"]


class Selection(NamedTuple):
    """What was chosen, and what is expected of it.

    Attributes
    ----------
    indices : integer array (keep,)
        Distinct candidates in the order they were picked.
    weights : array (keep,)
        Their weights; one may be zero. NaN if the status says that there is no answer.
    scores : array (n,)
        ``<g_i, P g_T>`` of all candidates, for the target as it was given.
    match : array ()
        Cosine, in the P metric, between the chosen update and the target's.
    predicted_decrease : array ()
        Second-order decrease of the target loss by the chosen update, ``b'w - 1/2 w'Kw``.
    effective_size : array ()
        Effective number of samples, ``(sum w)^2 / sum w^2``.
    shrinkage : array ()
        How far the guard moved the target toward the pool's mean, in [0, cap].
    count : integer array ()
        How many of the indices the filter let pass; the rest have weight zero.
    status : int32 array ()
        A `Status`.
    signal : array ()
        The guard's F, infinite if it had nothing to judge by.
    losses : array (n,) or None
        Losses of all candidates, where an adapter computed them.
    target_loss : array () or None
        Mean loss of the target samples, likewise.
    """

    indices: Any
    weights: Any
    scores: Any
    match: Any
    predicted_decrease: Any
    effective_size: Any
    shrinkage: Any
    count: Any
    status: Any
    signal: Any
    losses: Any = None
    target_loss: Any = None


class Linear(NamedTuple):
    """The linear term of the problem, and what the guard did to it."""

    values: Any  # (s,) b' of the shortlist
    shrinkage: Any  # ()
    signal: Any  # ()


_NO_GRAM: dict[str, Callable[[Any, int], filters.Filtered]] = {"top_k": filters.top_k}
_WITH_GRAM = ("matching", "greedy_utility")


def filter_then_weight(
    candidates: Mapping[str, Record],
    target: Mapping[str, Array] | None,
    geometry: Mapping[str, Operator],
    *,
    keep: int,
    filter: str | Filter = "matching",
    weight: str = "qp",
    constraint: Constraint = Simplex(1.0),  # noqa: B008
    ridge: Any = 0.05,
    shortlist: int | float | None = None,
    solver: Callable[..., Any] | None = None,
    target_samples: Mapping[str, Record] | None = None,
    guard: float = 0.3,
    scores: Array | None = None,
) -> Selection:
    """Choose ``keep`` of n candidates, and weights for them, so that their update matches the target's.

    Parameters
    ----------
    candidates : mapping of str to record
        Gradients of n candidates, one record a parameter.
    target : mapping of str to array, or None
        Mean gradient g_T of the target samples; None takes the pool's own mean.
    geometry : mapping of str to operator
        The optimizer's linearised response P, one operator a parameter.
    keep : int
        How many to choose, 1 <= keep <= n.
    filter : {"matching", "top_k", "greedy_utility"} or callable
        Who goes on: a name, or ``(scores, gram, k) -> Filtered`` over the shortlist.
    weight : {"qp", "uniform"}
        The QP, or equal weights; with "uniform" after "top_k" no Gram matrix is formed for the choice.
    constraint : NonNegative, Simplex, CappedSimplex or Box
        Where the weights live; bounds are numbers, or arrays (n,) with one a candidate. For sets with a fixed total the
        target is scaled first, see the module's docstring.
    ridge : float
        Added to the diagonal of K, as a multiple of the mean diagonal of the samples kept.
    shortlist : int, float or None
        How many go on to the Gram matrix by score: a count, a fraction of n, or all. Never fewer than ``keep``.
    solver : callable, optional
        Like `ftw.solve_qp`, which is the default.
    target_samples : mapping of str to record, optional
        Gradients of the m target samples; with them the guard may act.
    guard : float
        Largest shrinkage of the target toward the pool's mean, in [0, 1]; 0 turns the guard off.
    scores : array (n,), optional
        `ftw.scores` of the same arguments, if they are there already (an adapter sums them up while it captures).

    Returns
    -------
    Selection

    Raises
    ------
    ValueError, TypeError
        If names, shapes, dtypes, namespaces, devices or ranges are wrong. Values (NaN, an empty set, an indefinite
        matrix) give a status and NaN weights instead, since a trace cannot raise.

    Notes
    -----
    Scores cost 2 n t d_out d_in FLOPs a matrix parameter, the Gram matrix of a shortlist of s 2 (s t + s^2) d_out d_in.
    """
    xp, n = check_model(candidates, geometry, target, what="filter_then_weight")
    go_on = _check_options(n, keep, filter, weight, constraint, ridge, shortlist, guard)
    solver = solver or solve_qp
    if target is None:
        first = _array.leaves(candidates)[0]
        dtype = xp.result_type(*(gradients.dtype(xp, record) for record in candidates.values()))
        target = combine(candidates, xp.full((n,), 1 / n, dtype=dtype, device=_array.device(first)))

    b_all = all_scores(candidates, target, geometry) if scores is None else scores  # (n,)
    if tuple(b_all.shape) != (n,):
        raise ValueError(f"filter_then_weight: scores {tuple(b_all.shape)} must be ({n},), one a candidate")
    order = _array.argsort_descending(xp, b_all)  # (n,)
    short = xp.sort(order[:go_on])  # (s,): in the order of the candidates, so that ties go by index
    members = take(candidates, short) if go_on < n else candidates
    b = xp.take(b_all, short)  # (s,)
    linear = _guarded(xp, b_all, b, order, go_on, candidates, members, target, geometry, target_samples, guard)

    safe = _finite(xp, linear.values)
    if filter in _NO_GRAM:
        filtered = _NO_GRAM[str(filter)](safe, keep)
        picked = take(members, filtered.indices)
        K = gram(picked, geometry)  # (k, k)
        intact = xp.all(xp.isfinite(K))
    else:
        every = gram(members, geometry)  # (s, s)
        intact = xp.all(xp.isfinite(every))
        filtered = _run_filter(filter, safe, _finite(xp, every), keep, ridge, solver)
        K = xp.take(xp.take(every, filtered.indices, axis=0), filtered.indices, axis=1)  # (k, k)
    intact = intact & xp.all(xp.isfinite(b_all)) & xp.all(xp.isfinite(linear.values)) & ~xp.isnan(linear.signal)
    K = _finite(xp, K)

    passed = xp.arange(keep, device=_array.device(b)) < filtered.count  # (k,)
    c = xp.take(safe, filtered.indices)  # (k,)
    constraint = _at(xp, constraint, xp.take(short, filtered.indices), n)
    weights, status = _weigh(xp, K, c, passed, weight, constraint, ridge, solver)
    status = xp.where(intact, status, xp.full_like(status, int(Status.NOT_FINITE)))
    unusable = (status == int(Status.NOT_FINITE)) | (status == int(Status.INFEASIBLE)) | (status == int(Status.NOT_PSD))
    weights = xp.where(unusable, xp.full_like(weights, xp.nan), weights)

    gained = xp.sum(weights * xp.take(_finite(xp, b), filtered.indices))  # b'w, for the target as it was given
    length = xp.sum(weights * (K @ weights))  # w'Kw
    square = _inner(target, geometry)  # g_T' P g_T
    usable = (length > 0) & (square > 0)
    lengths = [xp.sqrt(xp.where(usable, x, 1.0)) for x in (length, square)]  # two roots: the product could overflow
    match = xp.where(usable, gained, 0.0) / lengths[0] / lengths[1]
    return Selection(
        indices=xp.take(short, filtered.indices),
        weights=weights,
        scores=b_all,
        match=xp.where(unusable, xp.full_like(match, xp.nan), match),
        predicted_decrease=gained - length / 2,
        effective_size=_effective_size(xp, weights),
        shrinkage=linear.shrinkage,
        count=filtered.count,
        status=status,
        signal=linear.signal,
    )


def _run_filter(filter: str | Filter, b: Any, K: Any, keep: int, ridge: Any, solver: Any) -> filters.Filtered:
    if filter == "matching":
        return filters.matching(b, K, keep, ridge=ridge, solver=solver)
    if filter == "greedy_utility":
        return filters.greedy_utility(b, K, keep)
    assert callable(filter)
    filtered = filter(b, K, keep)
    if not isinstance(filtered, filters.Filtered) or tuple(filtered.indices.shape) != (keep,):
        raise ValueError(
            f"filter_then_weight: the filter must return Filtered(indices ({keep},), count); got "
            f"{type(filtered).__name__}"
        )
    return filtered


def _weigh(
    xp: Any, K: Any, c: Any, passed: Any, weight: str, constraint: Constraint, ridge: Any, solver: Any
) -> tuple[Any, Any]:
    """Return weights (k,) and status for the kept samples; those that did not pass get zero."""
    ones = xp.astype(passed, c.dtype)  # (k,)
    count = xp.sum(ones)
    divisor = xp.where(count > 0, count, 1.0)
    total = _array.scalar_like(getattr(constraint, "total", 1.0), c) * xp.ones_like(count)  # ()
    limits = as_limits(xp, _only(xp, constraint, passed, c), c)
    uniform = total * ones / divisor  # (k,)
    possible = feasible(xp, limits) | (count == 0)  # nothing passed: no weights, whatever the total
    if isinstance(constraint, (CappedSimplex, Box)):
        uniform = xp.where(possible, project_scaled(xp, uniform, limits, xp.ones_like(c)), uniform)
        uniform = xp.where(passed, uniform, 0.0)
    useful = xp.any(passed & (c > 0))
    if weight == "uniform":
        weights, status = uniform, xp.zeros_like(xp.argmax(c), dtype=xp.int32)
    else:
        weights, status, useful = _solve(xp, K, c, passed, divisor, total, constraint, ridge, solver, useful)
    bad = (status == int(Status.NOT_FINITE)) | (status == int(Status.NOT_PSD))
    status = xp.where(~bad & ~useful, int(Status.NOTHING_USEFUL), status)
    status = xp.where(possible, status, int(Status.INFEASIBLE))
    status = xp.where(finite(xp, limits), status, int(Status.NOT_FINITE))
    weights = xp.where(status == int(Status.NOTHING_USEFUL), uniform, weights)
    return weights, xp.astype(status, xp.int32)


def _solve(
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
) -> tuple[Any, Any, Any]:
    """Return the QP's weights (k,), its status, and whether any weight came out positive where that is asked for."""
    diagonal = xp.where(passed, xp.linalg.diagonal(K), 0.0)  # (k,)
    mean = xp.sum(diagonal) / divisor
    both = passed[:, None] & passed[None, :]  # (k, k)
    K = xp.where(both, K, mean * xp.eye(c.shape[0], dtype=c.dtype, device=_array.device(c)))  # (k, k)
    c = xp.where(passed, c, 0.0)
    ridge = _array.scalar_like(ridge, c) * mean
    if isinstance(constraint, (NonNegative, Box)):
        solution = solver(K, c, _only(xp, constraint, passed, c), ridge=ridge)
        return solution.weights, solution.status, useful
    free = solver(K, c, NonNegative(), ridge=ridge)  # the non-negative solution sets the target's length
    amount = xp.sum(free.weights)
    scale = total / xp.where(amount > 0, amount, 1.0)
    weights, status = free.weights * scale, free.status
    if isinstance(constraint, CappedSimplex):
        solution = solver(K, c * scale, _only(xp, constraint, passed, c), ridge=ridge, start=weights)
        weights = solution.weights
        status = xp.where(status == int(Status.OK), solution.status, status)
    return weights, status, useful & (amount > 0)


def _at(xp: Any, constraint: Constraint, indices: Any, n: int) -> Constraint:
    """Return the set of the picked candidates, from bounds that are numbers or one a candidate (n,)."""

    def pick(bound: Any, what: str) -> Any:
        shape = tuple(getattr(bound, "shape", ()))
        if shape == ():
            return bound
        if shape != (n,):
            raise ValueError(f"filter_then_weight: {what} {shape} must be a number or ({n},), one a candidate")
        return xp.take(bound, indices)

    if isinstance(constraint, CappedSimplex):
        return CappedSimplex(pick(constraint.cap, "cap"), constraint.total)
    if isinstance(constraint, Box):
        return Box(pick(constraint.lower, "lower"), pick(constraint.upper, "upper"))
    return constraint


def _only(xp: Any, constraint: Constraint, passed: Any, like: Any) -> Constraint:
    """Return the set in which samples that did not pass have weight zero."""

    def masked(bound: Any) -> Any:
        return xp.where(passed, xp.zeros_like(like) + _array.scalar_like(bound, like), 0.0)  # (k,)

    if isinstance(constraint, CappedSimplex):
        return CappedSimplex(masked(constraint.cap), constraint.total)
    if isinstance(constraint, Box):
        return Box(masked(constraint.lower), masked(constraint.upper))
    return constraint


def _guarded(
    xp: Any,
    b_all: Any,
    b: Any,
    order: Any,
    go_on: int,
    candidates: Mapping[str, Record],
    members: Mapping[str, Record],
    target: Mapping[str, Array],
    geometry: Mapping[str, Operator],
    target_samples: Mapping[str, Record] | None,
    cap: float,
) -> Linear:
    """Return b' of the shortlist; the pool's mean is formed only if the gate is open.

    With a shortlist the mean is estimated in two strata: the shortlist itself, and from the rest a systematic sample,
    in score order, of an eighth as many as the pool.
    """
    zero = xp.zeros_like(b_all[0])
    if target_samples is None or cap == 0:
        return Linear(b, zero, xp.full_like(zero, xp.inf))
    _, m = check_model(target_samples, geometry, what="filter_then_weight: target_samples")
    square = _inner(target, geometry)  # |g_T|^2
    lengths = squared_norms(target_samples, geometry)  # (m,)
    ratio, _ = guard.signal(square, xp.mean(lengths), m)

    def closed() -> tuple[Any, Any]:
        return b, zero

    def opened() -> tuple[Any, Any]:
        n = b_all.shape[0]
        if go_on < n:
            rest = n - go_on
            q = min(rest, max(1, n // 8))
            places = [go_on + int((i + 0.5) * rest / q) for i in range(q)]
            others = xp.take(order, xp.asarray(places, dtype=order.dtype, device=_array.device(order)))  # (q,)
            sampled = take(candidates, xp.concat([order[:go_on], others]))
            shares = [1 / n] * go_on + [rest / q / n] * q
        else:
            sampled, shares = dict(candidates), [1 / n] * n
        pool = combine(sampled, xp.asarray(shares, dtype=b.dtype, device=_array.device(b)))  # g_P
        distance = _inner({name: target[name] - pool[name] for name in pool}, geometry)  # |g_T - g_P|^2
        a, _ = guard.shrinkage(square, xp.mean(lengths), distance, m, cap=cap)
        return (1 - a) * b + a * all_scores(members, pool, geometry), a

    values, a = _loops.cond(ratio < 1, opened, closed)
    return Linear(values, a, ratio)


def _inner(target: Mapping[str, Array], geometry: Mapping[str, Operator]) -> Any:
    """Return ``<g, P g>`` over all parameters."""
    return sum(operator.inner(target[name], target[name]) for name, operator in geometry.items())


def _effective_size(xp: Any, weights: Any) -> Any:
    largest = xp.max(xp.abs(weights))
    w = weights / xp.where(largest > 0, largest, xp.ones_like(largest))  # squares of tiny weights would vanish
    squares = xp.sum(w * w)
    return xp.sum(w) ** 2 / xp.where(squares == 0, xp.ones_like(squares), squares)


def _finite(xp: Any, x: Any) -> Any:
    return xp.where(xp.isfinite(x), x, 0.0)


def _check_options(
    n: int,
    keep: Any,
    filter: Any,
    weight: Any,
    constraint: Any,
    ridge: Any,
    shortlist: Any,
    cap: Any,
) -> int:
    """Return the length of the shortlist, or raise what is wrong with the options."""
    what = "filter_then_weight"
    if not isinstance(keep, int) or isinstance(keep, bool):
        raise TypeError(f"{what}: keep must be an int, got {type(keep).__name__}")
    if not 1 <= keep <= n:
        raise ValueError(f"{what}: keep={keep} must lie in 1 .. {n}, the number of candidates")
    if not callable(filter) and filter not in (*_NO_GRAM, *_WITH_GRAM):
        names = ", ".join((*_WITH_GRAM, *_NO_GRAM))
        raise ValueError(
            f"{what}: filter={filter!r} is not one of {names}; threshold and boltzmann have options of their own: pass "
            "a callable (scores, gram, k) -> Filtered"
        )
    if weight not in ("qp", "uniform"):
        raise ValueError(f"{what}: weight={weight!r} must be 'qp' or 'uniform'")
    if not isinstance(constraint, (NonNegative, Simplex, CappedSimplex, Box)):
        raise TypeError(
            f"{what}: constraint is a {type(constraint).__name__}; expected NonNegative, Simplex, CappedSimplex or Box"
        )
    if isinstance(ridge, (int, float)) and not 0 <= ridge < float("inf"):
        raise ValueError(f"{what}: ridge={ridge} must be finite and not negative")
    if not isinstance(cap, (int, float)) or not 0 <= cap <= 1:
        raise ValueError(f"{what}: guard={cap} must be a number in [0, 1]")
    if shortlist is None:
        return n
    if isinstance(shortlist, float):
        if not 0 < shortlist <= 1:
            raise ValueError(f"{what}: shortlist={shortlist} as a fraction must lie in (0, 1]")
        shortlist = -int(-n * shortlist // 1)
    if not isinstance(shortlist, int) or isinstance(shortlist, bool) or shortlist < 1:
        raise ValueError(f"{what}: shortlist={shortlist!r} must be a count >= 1, a fraction in (0, 1], or None")
    return min(n, max(keep, shortlist))
