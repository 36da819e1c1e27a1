r"""One step of Filter-then-Weight, from explicit per-sample gradients to indices and weights.

The lecture so far, in order: ``preconditioning.py`` (what the optimizer will do with a gradient: P),
``similarity.py`` (the scores b and the Gram matrix K), ``guard.py`` (how far to trust the target), ``filters.py``
(who is kept), ``projections.py`` and ``qp.py`` (how much each counts). Put together:

1. b_i = <g_i, P g_T> for all candidates. The best of them by score form the shortlist.
2. With target samples at hand the guard may shrink the target:  b' = (1 - a) b + a mean_j K_ij,  j over all candidates.
3. The filter picks ``keep`` candidates of the shortlist from b' and K.
4. On those, with r = ridge * mean K_ii over them, the weights minimise  1/2 w'(K + r I)w - s b''w  over the set.

**The scale s.** With the equation sum w = t and s = 1 the target would be matched at one fixed length of step. Then
the noise of a single sample, K_ii, swamps b_i, and tiny gradients win. So the length is set free first: w0 is the
minimum over w >= 0 alone, and the target is scaled by s = t / sum w0. On the simplex the answer is then exactly s w0,
the non-negative solution divided by its sum; a cap changes it from there. Sets without a total have s = 1.

**When nothing helps.** If no kept candidate has a positive score, w0 = 0 and there is no scale. The weights are then
equal over the best scores, and the status says NOTHING_USEFUL.

**What is reported**, with the target as it was given, not shrunk:

    match               b'w / sqrt(w'Kw g_T'P g_T)     the cosine between the chosen update and the target's
    predicted_decrease  b'w - 1/2 w'Kw                 of the target's loss, to second order
    effective_size      (sum w)^2 / sum w^2            how many samples the update really rests on
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import filters, quotas, shares, similarity
from .filters import Filtered
from .guard import doubt, shrinkage
from .projections import Bounds, NonNegative, Simplex, bounds, check_bounds, project_onto
from .qp import solve_qp
from .status import Status

__all__ = ["Selection", "filter_then_weight"]

Array = Any


class Selection(NamedTuple):
    """What was chosen, and what it promises; the module's docstring has the formulas.

    ``indices`` (keep,) in pick order, ``weights`` (keep,), ``scores`` (n,) of the unshrunk target, ``match``,
    ``predicted_decrease``, ``effective_size``, ``shrinkage`` (the guard's a), ``count`` (how many of the indices
    passed the filter), ``status``, ``f_ratio`` (the guard's F, infinite where it had nothing to judge by).
    """

    indices: Array  # (keep,)
    weights: Array  # (keep,)
    scores: Array  # (n,)
    match: float
    predicted_decrease: float
    effective_size: float
    shrinkage: float
    count: int  # type: ignore[assignment]  # as in the contract; hides tuple.count
    status: Status
    f_ratio: float


def filter_then_weight(
    grads: Array,
    target: Array | None,
    metric: Array,
    *,
    keep: int,
    filter: str | Callable[[Array, Array, int], Any] = "matching",
    weight: str = "qp",
    constraint: Any = None,
    ridge: float = 0.05,
    shortlist: int | float | None = None,
    target_samples: Array | None = None,
    guard: float = 0.3,
    quota: Any = None,
    fill: str = "raise",
) -> Selection:
    """Choose ``keep`` of n candidates and weigh them.

    Parameters
    ----------
    grads : array (n, p)
        Gradients of the candidates' own losses.
    target : array (p,) or None
        Mean gradient of the target samples; None stands for the candidates' mean.
    metric : array (p,) or (p, p)
        P, or its diagonal.
    keep : int
        How many to choose.
    filter : str or callable
        A name of ``filters.NAMED``, or ``(scores, gram, k) -> (indices, count)`` on the shortlist.
    weight : {"qp", "uniform"}
        Fitted or equal weights.
    constraint : a NamedTuple, optional
        One of the five sets, Simplex(1.0) by default. Caps and bounds are numbers or arrays (keep,) in pick order;
        sources are those of the candidates (n,).
    ridge : float
        Relative to the mean diagonal of the kept samples' Gram matrix.
    shortlist : int, float or None
        How many, or which fraction, go on by score; never fewer than ``keep``.
    target_samples : array (m, p), optional
        The target's samples; without them the guard cannot act.
    guard : float
        The guard's cap; 0 turns it off.
    quota : Quota, optional
        How many of each source are kept, in the filter and, in proportion, on the shortlist.
    fill : {"raise", "relax"}
        Whether a quota that cannot be filled ends as INFEASIBLE, or gives the nearest choice.

    Returns
    -------
    Selection

    Examples
    --------
    >>> s = filter_then_weight([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [1.0, 1.0], [1.0, 1.0], keep=2, ridge=0.0)
    >>> s.indices, s.weights
    (array([0, 2]), array([0.33333333, 0.66666667]))
    """
    G = np.ascontiguousarray(grads, dtype=np.float64)  # (n, p)
    P = np.ascontiguousarray(metric, dtype=np.float64)  # (p,) or (p, p)
    if target is None:
        with np.errstate(invalid="ignore", over="ignore"):
            target = np.mean(G, axis=0)
    t = np.ascontiguousarray(target, dtype=np.float64)  # (p,)
    if weight not in ("qp", "uniform"):
        raise ValueError(f"weight is {weight!r}: give 'qp' or 'uniform'")
    if ridge < 0:
        raise ValueError(f"ridge is {ridge}: give a number >= 0")
    if not 0.0 <= guard <= 1.0:
        raise ValueError(f"guard is {guard}: give a number between 0 and 1")
    if not callable(filter) and filter not in filters.NAMED:
        raise ValueError(f"filter is {filter!r}: give {', '.join(map(repr, filters.NAMED))} or a callable")
    constraint = Simplex(1.0) if constraint is None else constraint
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite gets a status below
        b = similarity.scores(G, t, P)  # (n,)
        K = similarity.gram(G, P)  # (n, n)
    n = b.shape[0]
    if not 1 <= keep <= n:
        raise ValueError(f"keep is {keep} with {n} candidates: give 1 <= keep <= {n}")
    by_source = constraint._fields[:1] == ("sources",)
    box = bounds(Simplex(constraint.total) if by_source else constraint, keep)
    places = wanted_places(quota, constraint if by_source else None, b, keep)
    samples = None if target_samples is None else np.ascontiguousarray(target_samples, dtype=np.float64)  # (m, p)
    status = check_bounds(box)
    if not (np.isfinite(b).all() and np.isfinite(K).all() and (samples is None or np.isfinite(samples).all())):
        status = Status.NOT_FINITE
    if status != Status.OK:
        nothing = np.full(keep, np.nan)  # (keep,)
        finite = np.where(np.isnan(b), -np.inf, b)  # (n,)
        return Selection(
            filters.top_k(finite, keep).indices, nothing, b, np.nan, np.nan, np.nan, 0.0, keep, status, np.inf
        )
    size = shortlist_length(shortlist, keep, n)
    short = filters.top_k(b, size).indices  # (s,)
    near = None if places is None else quotas.reachable(places)
    if near is not None:
        short = quotas.shorten(near, filters.top_k(b, n).indices, keep, size)
    short = np.sort(short)  # in the candidates' order, so that ties go by index
    judges = short if filters.needs_gram(filter) else None  # without a Gram matrix the guard has no doubt to weigh
    pull, a, ratio = guarded_scores(b, K, G, t, P, samples, guard, judges)  # (n,)
    near = None if near is None else near._replace(sources=near.sources[short])
    chosen = run_filter(filter, pull[short], K[np.ix_(short, short)], keep, ridge, near)
    picks = short[chosen.indices]  # (keep,)
    if by_source:
        constraint = constraint._replace(sources=np.asarray(constraint.sources)[picks])
    weights, status = weigh(pull[picks], K[np.ix_(picks, picks)], chosen.count, weight, constraint, box, ridge)
    if places is not None and fill == "raise" and not quotas.fills(places, keep):
        weights, status = np.full(keep, np.nan), Status.INFEASIBLE

    part = K[np.ix_(picks, picks)]  # (keep, keep)
    linear, quadratic = weights @ b[picks], weights @ part @ weights
    length = similarity.scores(t.reshape(1, -1), t, P)[0]  # g_T' P g_T
    both, squares = quadratic * length, weights @ weights
    match = linear / math.sqrt(both) if both > 0 else (math.nan if math.isnan(both) else 0.0)
    effective = np.sum(weights) ** 2 / squares if squares != 0 else 0.0
    decrease = linear - 0.5 * quadratic
    return Selection(picks, weights, b, float(match), float(decrease), float(effective), a, chosen.count, status, ratio)


def wanted_places(quota: Any, constraint: Any, b: Array, keep: int) -> quotas.Places | None:
    """Return how many places each source has among the kept, None for any.

    Bounds on each source's weights need places too: one for each source with a floor, and one for those of the best
    scores until the upper bounds of all that have one reach the total; of the largest upper bounds, if that takes fewer
    than ``keep`` allows.
    """
    places = None if quota is None else quotas.count_places(quota, len(b), keep)
    if constraint is None or not (quota is None or quota.sources is constraint.sources):
        return places
    box = shares.read_shares(constraint, len(b))
    there = [s for s in range(len(box.lower)) if np.any(box.sources == s)]
    best = {s: float(np.max(b[box.sources == s])) for s in there}

    def serve(value: dict[int, float]) -> Array:
        floors = (box.lower > 0).astype(np.int64)  # (m + 1,)
        reach = sum(min(box.upper[s], box.total) for s in there if floors[s])
        for s in sorted(there, key=lambda s: (-value[s], s)):
            if not floors[s] and box.upper[s] > 0 and reach < box.total * (1 - 1e-9):
                floors[s] = 1
                reach += min(box.upper[s], box.total)
        return floors

    floors = serve(best)
    if np.sum(floors) > keep:
        floors = serve({s: min(box.upper[s], box.total) for s in there})
    if places is None:
        return quotas.Places(box.sources, floors, np.full(len(floors), keep, dtype=np.int64))
    return places._replace(floors=np.maximum(places.floors, floors))


def guarded_scores(
    b: Array, K: Array, G: Array, t: Array, P: Array, samples: Array | None, cap: float, judges: Array | None
) -> tuple[Array, float, float]:
    """Return the scores (n,) of the shrunk target, a and F; b (n,), K (n, n), samples (m, p), judges (s,) of n."""
    if samples is None or cap == 0.0:
        return b, 0.0, math.inf
    mean = np.mean(G, axis=0)  # (p,)
    square = similarity.scores(t.reshape(1, -1), t, P)[0]
    apart = (t - mean).reshape(1, -1)  # (1, p)
    distance = similarity.scores(apart, apart[0], P)[0]
    norms = float(np.mean([similarity.scores(s.reshape(1, -1), s, P)[0] for s in samples]))
    D, slope = None, 2.0
    if judges is not None:
        D, slope = doubt(b[judges], K[np.ix_(judges, judges)], square, norms), 4.0
    a, ratio = shrinkage(square, norms, distance, samples.shape[0], cap=cap, slope=slope, doubt=D)
    return (1 - a) * b + a * np.mean(K, axis=1), a, ratio


def shortlist_length(shortlist: int | float | None, keep: int, n: int) -> int:
    """Return how many candidates go on by score."""
    if shortlist is None:
        return n
    if isinstance(shortlist, float):
        if not 0.0 < shortlist <= 1.0:
            raise ValueError(f"shortlist is {shortlist}: give a fraction in (0, 1], a number of samples, or None")
        shortlist = math.ceil(shortlist * n)
    if shortlist < 1:
        raise ValueError(f"shortlist is {shortlist}: give a number of samples >= 1, a fraction, or None")
    return min(n, max(keep, shortlist))


def run_filter(
    chooser: Any, b: Array, K: Array, keep: int, ridge: float, places: quotas.Places | None = None
) -> Filtered:
    """Return the choice (keep,) of the named filter, or of a callable, on scores (s,) and Gram matrix (s, s).

    Under a quota a callable's picks come first, in its order, then the others by score; the best choice from that order
    is taken. A floor's samples pass.
    """
    if not callable(chooser):
        rule = filters.NAMED[chooser]
        given = (b, K) if rule.needs_gram else (b,)
        options = {"ridge": ridge} if rule.refits else {}
        found: Filtered = rule.run(*given, keep, quota=places, **options)
        return found._replace(count=keep)
    if places is not None:
        own = run_filter(chooser, b, K, keep, ridge)
        order = [*own.indices, *(i for i in filters.top_k(b, len(b)).indices if i not in own.indices)]
        value = np.empty(len(b))  # (s,)
        value[order] = -np.arange(len(b))
        passes = np.zeros(len(b), dtype=bool)
        passes[order[: len(b) if own.count == keep else own.count]] = True
        best = filters.top_k(value, keep, quota=places)._replace(count=keep)
        return filters.pass_floors(best, passes, places)
    chosen: Any = chooser(b, K, keep)
    indices, count = chosen
    picks = np.asarray(indices)  # (keep,)
    if picks.shape != (keep,) or np.unique(picks).shape != (keep,):
        raise ValueError(f"the filter returned indices of shape {picks.shape}: give {keep} distinct ones")
    return Filtered(picks, int(count))


def weigh(
    b: Array, K: Array, count: int, weight: str, constraint: Any, box: Bounds, ridge: float
) -> tuple[Array, Status]:
    """Return the weights (keep,) and the status; only the first ``count`` of b (keep,) and K (keep, keep) take part."""
    keep = b.shape[0]
    weights = np.zeros(keep)  # (keep,)
    if count == 0:
        return weights, Status.NOTHING_USEFUL
    part = Bounds(box.lower[:count], box.upper[:count], box.total, box.has_total)
    status, groups = check_bounds(part), None
    if constraint._fields[:1] == ("sources",):
        constraint = constraint._replace(sources=constraint.sources[:count])
        groups = shares.read_shares(constraint, count)
        status = status if status != Status.OK else shares.check_shares(groups)
    if status != Status.OK:
        return np.full(keep, np.nan), status
    b, K = b[:count], K[:count, :count]
    total = box.total if box.has_total else 1.0
    equal = np.full(count, total / count)  # (count,)
    equal = project_onto(equal, part) if groups is None else shares.project_shares(equal, groups)
    useful = bool(np.any(b > 0))
    if weight == "uniform" or (box.has_total and not useful):
        weights[:count] = equal
        return weights, Status.OK if useful else Status.NOTHING_USEFUL
    r = ridge * max(float(np.mean(np.diag(K))), 0.0)
    if not box.has_total:
        solution = solve_qp(K, b, _cut(constraint, part), ridge=r)
    else:
        solution = solve_qp(K, b, NonNegative(), ridge=r)
        free = np.sum(solution.weights)  # the length of the step, set free
        if solution.status == Status.OK and free > 0:
            scale = total / free
            if groups is None and np.isinf(part.upper).all():
                solution = solution._replace(weights=solution.weights * scale)
            else:
                solution = solve_qp(K, scale * b, _cut(constraint, part), ridge=r)
    if not useful and solution.status == Status.OK:
        weights[:count] = equal
        return weights, Status.NOTHING_USEFUL
    weights[:count] = solution.weights
    return weights, solution.status


def _cut(constraint: Any, part: Bounds) -> Any:
    """Return the constraint on the first weights, whose bounds are ``part``."""
    if constraint._fields == ("lower", "upper"):
        return type(constraint)(part.lower, part.upper)
    if constraint._fields == ("cap", "total"):
        return type(constraint)(part.upper, part.total)
    return constraint
