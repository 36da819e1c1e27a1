"""Filters: which ``k`` of n candidates go on, from their scores b (n,) and, for some, their Gram matrix K (n, n).

Every filter returns ``Filtered(indices, count)``: exactly k distinct indices, best first, ties by index; the first
``count`` of them passed. None depends on the scale of the gradients of the candidates or of the target. Every filter
takes a `Quota` of the candidates' sources and obeys it; where no choice does, it returns the nearest one, with a count
of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from . import _array, _kinds, _loops, quotas
from ._array import Array
from ._named_filters import Filter, Filtered, Picked, Shortlist, count_of_all, named
from .constraints import NonNegative
from .qp import solve_qp
from .quotas import Places, Quota

__all__ = [
    "Filter",
    "FilterName",
    "Filtered",
    "boltzmann",
    "greedy_utility",
    "matching",
    "resample",
    "threshold",
    "top_k",
]


FilterName = Literal["matching", "top_k", "greedy_utility"]
"""The names of the table: those of the functions here under `named`."""


@_array.quiet
def top_k(scores: Array, k: int, *, quota: Quota | None = None) -> Filtered:
    """Return the k candidates of the largest scores; under a quota, those of the largest sum of scores.

    Parameters
    ----------
    scores : array (n,)
        NaN comes last and does not count.
    k : int
        1 <= k <= n.
    quota : Quota, optional
        How many of each source.

    Raises
    ------
    ValueError, TypeError
        If ``scores`` is not a vector of floats, or k is out of range.
    """
    xp = _check(scores, k, quota=quota, what="top_k")
    order = _array.argsort_descending(xp, scores)  # (n,)
    if quota is not None:
        p = quotas.places(xp, quota, scores.shape[0], k, what="top_k")
        return _best(xp, p, order, k, ~xp.isnan(xp.take(scores, order)))
    indices = order[:k]  # (k,)
    count = xp.sum(xp.astype(~xp.isnan(xp.take(scores, indices)), xp.int32), dtype=xp.int32)
    return Filtered(indices, count)


@named("top_k", needs_gram=False)
def _largest(xp: Any, s: Shortlist) -> Picked:
    order, over = _array.argsort_descending(xp, s.scores), None
    if s.places is not None:
        order, _, over = quotas.front(xp, s.places, order, s.k)
    return Picked(Filtered(order[: s.k], count_of_all(xp, s.k, _array.device(order))), over=over)


def _best(xp: Any, p: Places, order: Any, k: int, passed: Any = None) -> Filtered:
    """Return the best choice under the quota from candidates in this order; a count of 0 where none obeys it."""
    order, count, _ = quotas.front(xp, p, order, k, passed)
    return Filtered(order[:k], xp.where(quotas.fills(xp, p, k), count, xp.zeros_like(count)))


@_array.quiet
def threshold(
    scores: Array, k: int, *, value: Any = None, quantile: float | None = None, quota: Quota | None = None
) -> Filtered:
    """Return the k best candidates; those that reach ``value``, or the ``quantile`` of all scores, pass.

    Parameters
    ----------
    scores : array (n,)
    k : int
        1 <= k <= n.
    value : float or 0-d array, optional
        Least score that passes, in units of the scores.
    quantile : float, optional
        In [0, 1], with linear interpolation; free of units. Exactly one of the two must be given.
    quota : Quota, optional
        How many of each source; the samples that a floor asks for pass whatever their scores.
    """
    xp = _check(scores, k, quota=quota, what="threshold")
    if (value is None) == (quantile is None):
        raise ValueError("threshold: give exactly one of value= and quantile=")
    if quantile is not None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"threshold: quantile {quantile} must lie in [0, 1]")
        ordered = xp.sort(scores)  # (n,)
        position = quantile * (scores.shape[0] - 1)
        low = int(position)
        high = min(low + 1, scores.shape[0] - 1)
        value = ordered[low] + (position - low) * (ordered[high] - ordered[low])
    if quota is not None:
        order = _array.argsort_descending(xp, scores)  # (n,)
        reached = xp.take(scores, order) >= _array.scalar_like(value, scores)  # (n,)
        return _best(xp, quotas.places(xp, quota, scores.shape[0], k, what="threshold"), order, k, reached)
    best = top_k(scores, k)
    passed = xp.take(scores, best.indices) >= _array.scalar_like(value, scores)  # (k,)
    return Filtered(best.indices, xp.sum(xp.astype(passed, xp.int32), dtype=xp.int32))


@_array.untracked
@_array.quiet
def matching(
    scores: Array,
    gram: Array,
    k: int,
    *,
    ridge: Any = 0.05,
    solver: Callable[..., Any] = solve_qp,
    quota: Quota | None = None,
) -> Filtered:
    """Return k candidates picked by what the ones before leave unmatched (orthogonal matching pursuit, w >= 0).

    Repeat k times: add ``argmax_i (b - K w)_i`` over those not yet kept; refit ``w >= 0`` on the kept ones. The
    residual is not divided by ``sqrt(K_ii)``.

    Parameters
    ----------
    scores : array (n,)
        b.
    gram : array (n, n)
        K.
    k : int
        1 <= k <= n.
    ridge : float
        Added to the diagonal in each refit, as a multiple of the mean diagonal of K over the samples kept so far.
    solver : callable
        Like `ftw.solve_qp`.
    quota : Quota, optional
        How many of each source: each pick is the best of those with which the quota can still be obeyed.

    Notes
    -----
    k non-negative QPs of growing size, each started from the one before, and k products with K.
    Pati, Rezaiifar & Krishnaprasad 1993 (orthogonal matching pursuit); Killamsetty et al. 2021 (GRAD-MATCH).
    """
    xp = _check(scores, k, gram, ridge=ridge, quota=quota, what="matching")
    p, count = _obeyed(xp, scores, k, quota, what="matching")
    return _pursue(xp, scores, gram, k, ridge, solver, p).filtered._replace(count=count)


@named("matching", needs_gram=True)
def _matched(xp: Any, s: Shortlist) -> Picked:
    return _pursue(xp, s.scores, s.gram, s.k, s.ridge, s.solver, s.places)


def _pursue(
    xp: Any, scores: Any, gram: Any, k: int, ridge: Any, solver: Callable[..., Any], p: Places | None
) -> Picked:
    """Return the picks of `matching`, and their weights as the last refit has them."""
    device, ridge = _array.device(scores), _array.scalar_like(ridge, scores)
    ranks = xp.arange(k, device=device)  # (k,)

    def add_one(j: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        kept, picks, weights, _ = state  # Kept, (k,), (k,), ()
        residual = scores - xp.take(gram, picks, axis=1) @ weights  # (n,)
        kept, best = _pick(xp, p, k, kept, residual)
        picks = _array.put(xp, picks, j, best)
        size = k if _array.is_traced(j) else j + 1  # a trace needs fixed shapes: the places still empty are masked
        old, solution = weights, refit(picks[:size], weights[:size], ranks[:size] <= j)
        weights = solution.weights if size == k else xp.concat([solution.weights, old[size:]])
        return kept, picks, weights, xp.asarray(solution.status, dtype=xp.int32)  # of any solver, an enum too

    def refit(picks: Any, start: Any, filled: Any) -> Any:
        part = xp.take(xp.take(gram, picks, axis=0), picks, axis=1)  # (s, s)
        diagonal = xp.where(filled, xp.linalg.diagonal(part), xp.zeros_like(start))  # (s,)
        mean = xp.sum(diagonal) / xp.sum(xp.astype(filled, start.dtype))
        mean = xp.where(mean < 0, 0.0, mean)  # of an indefinite K: the solver is to say so
        mask = filled[:, None] & filled[None, :]  # (s, s)
        part = xp.where(mask, part, mean * xp.eye(picks.shape[0], dtype=part.dtype, device=device))
        linear = xp.where(filled, xp.take(scores, picks), xp.zeros_like(start))  # (s,)
        return solver(part, linear, NonNegative(), ridge=ridge * mean, start=start)

    picks = xp.zeros(k, dtype=xp.argmax(scores).dtype, device=device)
    weights = xp.zeros(k, dtype=scores.dtype, device=device)
    status = xp.zeros((), dtype=xp.int32, device=device)
    state = (_nothing(xp, p, scores), picks, weights, status)
    kept, picks, weights, status = _loops.fori_loop(k, add_one, state)
    return Picked(Filtered(picks, count_of_all(xp, k, device)), (weights, status), kept.over)


class _Kept(NamedTuple):
    """What a filter that picks one at a time has kept; without a quota the last two are None."""

    each: Any  # (n,) int32: 1 for a pick
    over: Any  # (n,) booleans: better than a pick, and refused by the quota
    counts: Any  # (m + 1,) int32: picks of each source


def _nothing(xp: Any, p: Places | None, scores: Any) -> _Kept:
    each = xp.zeros(scores.shape[0], dtype=xp.int32, device=_array.device(scores))  # (n,)
    return _Kept(each, None, None) if p is None else _Kept(each, each > 0, xp.zeros_like(p.floors))


def _pick(xp: Any, p: Places | None, k: int, kept: _Kept, values: Any) -> tuple[_Kept, Any]:
    """Return the state after one more pick, and the pick: the largest of the values (n,) that may be taken."""
    values = xp.where(kept.each > 0, -xp.inf * xp.ones_like(values), values)
    if p is None:
        best = xp.argmax(values)
        return _Kept(_array.put(xp, kept.each, best, 1), None, None), best
    allowed = xp.take(quotas.open_sources(xp, p, kept.counts, k), p.sources)  # (n,)
    allowed = allowed | ~xp.any(allowed & (kept.each == 0))  # no candidate is left: the caps go
    best = xp.argmax(xp.where(allowed, values, -xp.inf))
    beaten = ~allowed & (values > xp.take(values, xp.reshape(best, (1,))))
    counts = xp.take(p.sources, xp.reshape(best, (1,))) == xp.arange(p.floors.shape[0], device=_array.device(values))
    counts = kept.counts + xp.astype(counts, xp.int32)
    return _Kept(_array.put(xp, kept.each, best, 1), kept.over | beaten, counts), best


def _obeyed(xp: Any, scores: Any, k: int, quota: Quota | None, *, what: str) -> tuple[Places | None, Any]:
    """Return the places to obey, and the count () of a filter that lets all k pass: 0 where no choice obeys."""
    every = count_of_all(xp, k, _array.device(scores))
    if quota is None:
        return None, every
    p = quotas.places(xp, quota, scores.shape[0], k, what=what)
    return quotas.attainable(xp, p), xp.where(quotas.fills(xp, p, k), every, xp.zeros_like(every))


@_array.quiet
def greedy_utility(
    scores: Array, gram: Array, k: int, *, redundancy: float = 1.0, quota: Quota | None = None
) -> Filtered:
    """Return k candidates picked one by one by score less redundancy with those already picked.

    With the step ``eta`` that is best for the k top scores T taken together, ``eta = max(sum_T b, 0) / sum_TT K``, pick

        argmax_i  b_i  -  redundancy * eta * (K_ii / 2 + sum_{j picked} K_ij).

    That is the marginal second-order utility of GREATS (Wang et al. 2024) divided by eta; the step in place of a
    learning rate makes it invariant to the scale of the gradients.

    Parameters
    ----------
    scores : array (n,)
    gram : array (n, n)
    k : int
        1 <= k <= n.
    redundancy : float
        0 gives top_k.
    quota : Quota, optional
        How many of each source: each pick is the best of those with which the quota can still be obeyed.
    """
    xp = _check(scores, k, gram, quota=quota, what="greedy_utility")
    p, count = _obeyed(xp, scores, k, quota, what="greedy_utility")
    return Filtered(_pick_useful(xp, scores, gram, k, redundancy, p)[0], count)


@named("greedy_utility", needs_gram=True)
def _useful(xp: Any, s: Shortlist) -> Picked:
    picks, over = _pick_useful(xp, s.scores, s.gram, s.k, 1.0, s.places)
    return Picked(Filtered(picks, count_of_all(xp, s.k, _array.device(picks))), over=over)


def _pick_useful(xp: Any, scores: Any, gram: Any, k: int, redundancy: float, p: Places | None) -> tuple[Any, Any]:
    """Return the picks (k,) of `greedy_utility`, and who is refused by the quota alone (n,), None without one."""
    if isinstance(redundancy, (int, float)) and not redundancy >= 0:
        raise ValueError(f"greedy_utility: redundancy {redundancy} must not be negative")
    top = top_k(scores, k).indices  # (k,)
    gain, cost = xp.sum(xp.take(scores, top)), xp.sum(xp.take(xp.take(gram, top, axis=0), top, axis=1))
    positive = (gain > 0) & (cost > 0)
    eta = redundancy * xp.where(positive, gain, xp.zeros_like(gain)) / xp.where(positive, cost, xp.ones_like(cost))
    start = scores - eta * xp.linalg.diagonal(gram) / 2  # (n,)

    def add_one(j: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        kept, utility, picks = state  # _Kept, (n,), (k,)
        kept, best = _pick(xp, p, k, kept, utility)
        utility = utility - eta * xp.take(gram, xp.reshape(best, (1,)), axis=1)[:, 0]
        return kept, utility, _array.put(xp, picks, j, best)

    picks = xp.zeros(k, dtype=xp.argmax(scores).dtype, device=_array.device(scores))
    kept, _, picks = _loops.fori_loop(k, add_one, (_nothing(xp, p, scores), start, picks))
    return picks, kept.over


@_array.quiet
def boltzmann(scores: Array, k: int, *, temperature: float, uniforms: Array, quota: Quota | None = None) -> Filtered:
    """Return k candidates drawn without replacement with probability ``~ exp(b_i / (temperature * std(b)))``.

    Parameters
    ----------
    scores : array (n,)
    k : int
        1 <= k <= n.
    temperature : float
        In standard deviations of the scores, positive; small is top_k, large is uniform.
    uniforms : array (n,)
        Independent draws from [0, 1): the randomness is the caller's.
    quota : Quota, optional
        How many of each source.

    Notes
    -----
    Gumbel top-k (Kool, van Hoof & Welling 2019): adding Gumbel noise and taking the k largest draws without
    replacement, and never forms an exponential that could overflow.
    """
    xp = _check(scores, k, uniforms=uniforms, quota=quota, what="boltzmann")
    if tuple(uniforms.shape) != tuple(scores.shape):
        raise ValueError(f"boltzmann: uniforms {tuple(uniforms.shape)} must be {tuple(scores.shape)}, one a candidate")
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"boltzmann: temperature {temperature} must be positive")
    tiny = xp.finfo(scores.dtype).smallest_normal
    noise = -xp.log(-xp.log(xp.clip(uniforms, tiny, 1 - xp.finfo(scores.dtype).eps)))  # (n,)
    spread = xp.std(scores)
    level = (scores - xp.max(scores)) / xp.where(spread > 0, spread, xp.ones_like(spread)) / temperature  # (n,)
    return top_k(level + noise, k, quota=quota)


@_array.quiet
def resample(weights: Array, size: int, uniforms: Array) -> Any:
    """Return ``size`` indices drawn in proportion to the weights, for loops that take no sample weights.

    Parameters
    ----------
    weights : array (n,)
        Not negative, not all zero; a sample of zero weight is never drawn.
    size : int
        Number of draws, with replacement.
    uniforms : array (size,)
        Independent draws from [0, 1).

    Returns
    -------
    integer array (size,)
        Positions in ``weights``.
    """
    xp = _check(weights, 1, uniforms=uniforms, what="resample")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"resample: size={size!r} must be an int >= 1")
    if tuple(uniforms.shape) != (size,):
        raise ValueError(f"resample: uniforms {tuple(uniforms.shape)} must be ({size},), one a draw")
    upper = xp.cumulative_sum(weights)  # (n,)
    drawn = xp.searchsorted(upper, uniforms * upper[-1], side="right")  # (size,)
    last = xp.searchsorted(upper, upper[-1:])[0]  # the last sample of positive weight
    return xp.where(drawn > last, last, drawn)


def _check(
    scores: Any,
    k: int,
    gram: Any = None,
    *,
    ridge: Any = 0.0,
    uniforms: Any = None,
    quota: Quota | None = None,
    what: str,
) -> Any:
    for name, x in (("weights" if what == "resample" else "scores", scores), ("gram", gram), ("uniforms", uniforms)):
        _kinds.require(x, f"{what}: {name}")
    xp = _array.namespace(scores, gram, uniforms, getattr(quota, "sources", None), what=what)
    if scores.ndim != 1 or not _array.is_floating(xp, scores):
        raise ValueError(f"{what}: scores must be a vector of floats, got {scores.dtype} {tuple(scores.shape)}")
    n = scores.shape[0]
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{what}: k must be an int, got {type(k).__name__}")
    if not 1 <= k <= n:
        raise ValueError(f"{what}: k={k} must lie in 1 .. {n}, the number of scores")
    for name, x in (("gram", gram), ("uniforms", uniforms)):
        if x is not None and not _array.is_floating(xp, x):
            raise TypeError(f"{what}: {name} must be floating, got {x.dtype}; cast it first")
    if gram is not None and tuple(gram.shape) != (n, n):
        raise ValueError(f"{what}: gram {tuple(gram.shape)} must be ({n}, {n}) for {n} scores")
    if isinstance(ridge, (int, float)) and not ridge >= 0:
        raise ValueError(f"{what}: ridge={ridge} must not be negative")
    return xp
