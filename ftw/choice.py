"""The choice itself, from inner products alone: whom to keep, and how much each counts.

It never sees a gradient. ``selection.py`` answers its questions from records; an adapter may answer from sums
that it took while it captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import _array, _loops, _units, filters
from . import guard as guard_
from ._array import Array
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
from .qp import solve_qp
from .status import Status

__all__ = ["Products", "Selection", "check_options", "choose", "strata"]


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


class Products(NamedTuple):
    """The inner products in the P metric that a choice asks for.

    Attributes
    ----------
    gram : callable
        ``gram(indices (s,)) -> (s, s)``, ``<g_i, P g_j>`` of those candidates; of all n, in their order, for None.
    length : callable
        ``length(indices (k,), weights (k,)) -> ()``, ``|sum_i w_i g_i|^2``, asked for where no Gram matrix is.
    target : array ()
        ``|g_T|^2``.
    samples : array () or None
        ``mean_j |g_Tj|^2`` over the target samples; None where the guard is off.
    pool : callable or None
        ``pool(order (n,), short (s,)) -> (|g_T - g_P|^2 (), <g_i, P g_P> (s,))`` with the candidates by falling score,
        and the shortlist (None: all n); asked for while the guard's gate is open. See `strata`.
    """

    gram: Callable[[Any], Any]
    length: Callable[[Any, Any], Any]
    target: Any
    samples: Any = None
    pool: Callable[[Any, Any], tuple[Any, Any]] | None = None


@_array.quiet
def choose(
    scores: Array,
    products: Products,
    *,
    keep: int,
    filter: str | Filter = "matching",
    weight: str = "qp",
    constraint: Constraint = Simplex(1.0),  # noqa: B008
    ridge: Any = 0.05,
    shortlist: int | float | None = None,
    solver: Callable[..., Any] | None = None,
    targets: int = 0,
    guard: float = 0.3,
) -> Selection:
    """Choose and weigh by inner products alone: `filter_then_weight` without gradients.

    Parameters
    ----------
    scores : array (n,)
        ``<g_i, P g_T>``.
    products : Products
        The other inner products; arrays of the namespace, dtype and device of the scores.
    keep, filter, weight, constraint, ridge, shortlist, solver, guard
        As in `filter_then_weight`.
    targets : int
        Number m of target samples behind ``products.samples``.
    """
    xp, n = _array.namespace(scores, what="choose"), scores.shape[0]
    go_on = check_options(n, keep, filter, weight, constraint, ridge, shortlist, guard)
    solver = solver or solve_qp
    order = _array.argsort_descending(xp, scores)  # (n,)
    short = xp.sort(order[:go_on])  # (s,): in the order of the candidates, so that ties go by index
    b = xp.take(scores, short)  # (s,)
    asked = short if go_on < n else None
    every = None
    if filter not in _NO_GRAM:
        every = products.gram(asked)  # (s, s)
    linear = _guarded(xp, b, order, asked, every, products, targets, guard)

    safe = _finite(xp, linear.values)
    K = refit = sound = None
    intact = xp.all(xp.isfinite(scores)) & xp.all(xp.isfinite(linear.values)) & ~xp.isnan(linear.signal)
    intact = intact & xp.isfinite(products.target)  # a NaN where no candidate looks
    if every is None:
        filtered = _NO_GRAM[str(filter)](safe, keep)
        if weight == "qp":
            K = products.gram(xp.take(short, filtered.indices))  # (k, k)
            intact = intact & xp.all(xp.isfinite(K))
            K = _finite(xp, K)
    else:
        intact = intact & xp.all(xp.isfinite(every))
        every = _finite(xp, every)
        filtered, refit = _run_filter(xp, filter, safe, every, keep, ridge, solver)
        if callable(filter):
            sound = _are_picks(xp, filtered.indices, short.shape[0])
            first = xp.arange(keep, dtype=filtered.indices.dtype, device=_array.device(b))
            filtered = filtered._replace(indices=xp.where(sound, filtered.indices, first))
        K = xp.take(xp.take(every, filtered.indices, axis=0), filtered.indices, axis=1)  # (k, k)
    indices = xp.take(short, filtered.indices)  # (k,)
    intact = intact & ~_vanishes(xp, products.target)
    if K is not None:
        intact = intact & ~_vanishes(xp, xp.max(xp.linalg.diagonal(K)))

    passed = xp.arange(keep, device=_array.device(b)) < filtered.count  # (k,)
    c = xp.take(safe, filtered.indices)  # (k,)
    constraint = _at(xp, constraint, indices)
    weights, status = _weigh(xp, K, c, passed, weight, constraint, ridge, solver, refit)
    if sound is not None:
        status = xp.where(sound, status, xp.full_like(status, int(Status.INFEASIBLE)))
    status = xp.where(intact, status, xp.full_like(status, int(Status.NOT_FINITE)))
    unusable = (status == int(Status.NOT_FINITE)) | (status == int(Status.INFEASIBLE)) | (status == int(Status.NOT_PSD))
    weights = xp.where(unusable, xp.full_like(weights, xp.nan), weights)

    gained = xp.sum(weights * xp.take(_finite(xp, b), filtered.indices))  # b'w, for the target as it was given
    length = products.length(indices, weights) if K is None else xp.sum(weights * (K @ weights))  # w'Kw
    square = products.target
    usable = (length > 0) & (square > 0)
    lengths = [xp.sqrt(xp.where(usable, x, 1.0)) for x in (length, square)]  # two roots: the product could overflow
    match = xp.where(usable, gained, 0.0) / lengths[0] / lengths[1]
    match = xp.where(match > 1, xp.ones_like(match), xp.where(match < -1, -xp.ones_like(match), match))  # of rounding
    return Selection(
        indices=indices,
        weights=weights,
        scores=scores,
        match=xp.where(unusable, xp.full_like(match, xp.nan), match),
        predicted_decrease=gained - length / 2,
        effective_size=_effective_size(xp, weights),
        shrinkage=linear.shrinkage,
        count=filtered.count,
        status=status,
        signal=linear.signal,
    )


def strata(n: int, go_on: int) -> tuple[list[int], list[float]]:
    """Return places in the score order, and weights, by which the pool's mean is estimated.

    Two strata: the shortlist itself, and from the rest a systematic sample of an eighth as many as the pool.
    """
    if go_on >= n:
        return list(range(n)), [1 / n] * n
    rest = n - go_on
    q = min(rest, max(1, n // 8))
    places = [go_on + int((i + 0.5) * rest / q) for i in range(q)]
    return [*range(go_on), *places], [1 / n] * go_on + [rest / q / n] * q


def _run_filter(
    xp: Any, filter: str | Filter, b: Any, K: Any, keep: int, ridge: Any, solver: Any
) -> tuple[filters.Filtered, tuple[Any, Any] | None]:
    """Return what the filter kept, and their non-negative weights (k,) and status () if it has them already."""
    if filter == "matching":
        picks, refit = filters.pursue(xp, b, K, keep, ridge, solver)
        return filters.Filtered(picks, filters.full(xp, keep, _array.device(b))), refit
    if filter == "greedy_utility":
        return filters.greedy_utility(b, K, keep), None
    assert callable(filter)
    filtered = filter(b, K, keep)
    got = type(filtered).__name__
    if isinstance(filtered, filters.Filtered):
        got += f"(indices {tuple(filtered.indices.shape)} {filtered.indices.dtype})"
        if tuple(filtered.indices.shape) == (keep,) and "int" in str(filtered.indices.dtype):
            return filtered._replace(indices=_array.integers(filtered.indices)), None
    raise ValueError(
        f"filter_then_weight: the filter must return Filtered(indices ({keep},) of integers, count); got {got}"
    )


def _vanishes(xp: Any, square: Any) -> Any:
    """Tell whether a squared length is so small that the products it adds up have lost their digits."""
    return (square > 0) & (square < _units.smallest_square(xp, square.dtype))


def _are_picks(xp: Any, indices: Any, s: int) -> Any:
    """Tell whether a filter's indices (k,) are distinct places in the shortlist of s."""
    x = xp.sort(indices)
    return xp.all(x[1:] > x[:-1]) & (x[0] >= 0) & (x[-1] < s)


def _weigh(
    xp: Any, K: Any, c: Any, passed: Any, weight: str, constraint: Constraint, ridge: Any, solver: Any, refit: Any
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
        weights, status, useful = _solve(xp, K, c, passed, divisor, total, constraint, ridge, solver, useful, refit)
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
    refit: Any,
) -> tuple[Any, Any, Any]:
    """Return the QP's weights (k,), its status, and whether any weight came out positive where that is asked for.

    ``refit`` are weights (k,) and status of the non-negative solution, or None.
    """
    diagonal = xp.where(passed, xp.linalg.diagonal(K), 0.0)  # (k,)
    mean = xp.sum(diagonal) / divisor
    mean = xp.where(mean < 0, 0.0, mean)  # of an indefinite K: the solver is to say so
    both = passed[:, None] & passed[None, :]  # (k, k)
    K = xp.where(both, K, mean * xp.eye(c.shape[0], dtype=c.dtype, device=_array.device(c)))  # (k, k)
    c = xp.where(passed, c, 0.0)
    ridge = _array.scalar_like(ridge, c) * mean
    if isinstance(constraint, Box):
        solution = solver(K, c, _only(xp, constraint, passed, c), ridge=ridge)
        return solution.weights, solution.status, useful
    if refit is None:
        solution = solver(K, c, NonNegative(), ridge=ridge)
        refit = solution.weights, solution.status
    weights, status = refit
    if isinstance(constraint, NonNegative):
        return weights, status, useful
    amount = xp.sum(weights)  # the non-negative solution sets the target's length
    scale = total / xp.where(amount > 0, amount, 1.0)
    weights = weights * scale
    if isinstance(constraint, CappedSimplex):
        solution = solver(K, c * scale, _only(xp, constraint, passed, c), ridge=ridge, start=weights)
        weights = solution.weights
        status = xp.where(status == int(Status.OK), solution.status, status)
    return weights, status, useful & (amount > 0)


def _at(xp: Any, constraint: Constraint, indices: Any) -> Constraint:
    """Return the set of the picked candidates, from bounds that are numbers or one a candidate (n,)."""

    def pick(bound: Any) -> Any:
        return xp.take(bound, indices) if getattr(bound, "ndim", 0) else bound

    if isinstance(constraint, CappedSimplex):
        return CappedSimplex(pick(constraint.cap), constraint.total)
    if isinstance(constraint, Box):
        return Box(pick(constraint.lower), pick(constraint.upper))
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


def _guarded(xp: Any, b: Any, order: Any, short: Any, K: Any, products: Products, targets: int, cap: float) -> Linear:
    """Return b' of the shortlist; the pool's mean is formed only if the gate is open, D only given K (s, s)."""
    zero = xp.zeros_like(b[0])
    pool = products.pool
    if products.samples is None or pool is None or cap == 0:
        return Linear(b, zero, xp.full_like(zero, xp.inf))
    ratio, _ = guard_.signal(products.target, products.samples, targets)
    ratio = xp.where(xp.isfinite(products.samples), ratio, xp.nan)  # an infinite spread must show too

    def closed() -> tuple[Any, Any]:
        return b, zero

    def opened() -> tuple[Any, Any]:
        distance, means = pool(order, short)
        lengths = products.target, products.samples
        asked = {}
        if K is not None:
            asked = {"doubt": guard_.doubt(_finite(xp, b), _finite(xp, K), *lengths), "slope": guard_.SLOPE}
        a, _ = guard_.shrinkage(*lengths, distance, targets, cap=cap, **asked)
        return (1 - a) * b + a * means, a

    values, a = _loops.cond(ratio < 1, opened, closed)
    return Linear(values, a, ratio)


def _effective_size(xp: Any, weights: Any) -> Any:
    largest = xp.max(xp.abs(weights))
    w = weights / xp.where(largest > 0, largest, xp.ones_like(largest))  # squares of tiny weights would vanish
    squares = xp.sum(w * w)
    return xp.sum(w) ** 2 / xp.where(squares == 0, xp.ones_like(squares), squares)


def _finite(xp: Any, x: Any) -> Any:
    return xp.where(xp.isfinite(x), x, 0.0)


def check_options(
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
    for name in ("cap", "lower", "upper"):
        shape = tuple(getattr(getattr(constraint, name, None), "shape", ()))
        if shape not in ((), (n,)):
            raise ValueError(f"{what}: {name} {shape} must be a number or ({n},), one a candidate")
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
