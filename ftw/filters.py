"""Filters: which ``k`` of n candidates go on, from their scores b (n,) and, for some, their Gram matrix K (n, n).

Every filter returns ``Filtered(indices, count)``: exactly k distinct indices, best first, ties by index; the first
``count`` of them passed. None depends on the scale of the gradients of the candidates or of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import _array, _loops
from ._array import Array
from .constraints import NonNegative
from .qp import solve_qp

__all__ = ["Filter", "Filtered", "boltzmann", "greedy_utility", "matching", "resample", "threshold", "top_k"]


class Filtered(NamedTuple):
    """What a filter returns.

    Attributes
    ----------
    indices : integer array (k,)
        Distinct, best first.
    count : integer array ()
        How many of them passed; the rest keep the shape and get no weight.
    """

    indices: Any
    count: Any


Filter = Callable[[Any, Any, int], Filtered]
"""``(scores (n,), gram (n, n), k) -> Filtered``: a rule of one's own is any callable of this form."""


def top_k(scores: Array, k: int) -> Filtered:
    """Return the k candidates of the largest scores.

    Parameters
    ----------
    scores : array (n,)
        NaN comes last and does not count.
    k : int
        1 <= k <= n.

    Raises
    ------
    ValueError, TypeError
        If ``scores`` is not a vector of floats, or k is out of range.
    """
    xp = _check(scores, k, what="top_k")
    indices = _array.argsort_descending(xp, scores)[:k]  # (k,)
    count = xp.sum(xp.astype(~xp.isnan(xp.take(scores, indices)), xp.int32), dtype=xp.int32)
    return Filtered(indices, count)


@_array.quiet
def threshold(scores: Array, k: int, *, value: Any = None, quantile: float | None = None) -> Filtered:
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
    """
    xp = _check(scores, k, what="threshold")
    if (value is None) == (quantile is None):
        raise ValueError("threshold: give exactly one of value= and quantile=")
    if quantile is not None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"threshold: quantile {quantile} must lie in [0, 1]")
        ordered = xp.sort(scores)  # (n,)
        place = quantile * (scores.shape[0] - 1)
        low = int(place)
        high = min(low + 1, scores.shape[0] - 1)
        value = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    best = top_k(scores, k)
    passed = xp.take(scores, best.indices) >= _array.scalar_like(value, scores)  # (k,)
    return Filtered(best.indices, xp.sum(xp.astype(passed, xp.int32), dtype=xp.int32))


@_array.untracked
@_array.quiet
def matching(
    scores: Array, gram: Array, k: int, *, ridge: Any = 0.05, solver: Callable[..., Any] = solve_qp
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

    Notes
    -----
    k non-negative QPs of growing size, each started from the one before, and k products with K.
    Pati, Rezaiifar & Krishnaprasad 1993 (orthogonal matching pursuit); Killamsetty et al. 2021 (GRAD-MATCH).
    """
    picks, _ = pursue(_check(scores, k, gram, ridge=ridge, what="matching"), scores, gram, k, ridge, solver)
    return Filtered(picks, full(_array.namespace(scores), k, _array.device(scores)))


def pursue(
    xp: Any, scores: Any, gram: Any, k: int, ridge: Any, solver: Callable[..., Any]
) -> tuple[Any, tuple[Any, Any]]:
    """Return the picks (k,) of `matching`, and their weights (k,) and status () as the last refit has them."""
    place, ridge = _array.device(scores), _array.scalar_like(ridge, scores)
    ranks = xp.arange(k, device=place)  # (k,)

    def add_one(j: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        kept, picks, weights, _ = state  # (n,), (k,), (k,), ()
        residual = scores - xp.take(gram, picks, axis=1) @ weights  # (n,)
        residual = xp.where(kept > 0, -xp.inf * xp.ones_like(residual), residual)
        best = xp.argmax(residual)
        kept, picks = _array.put(xp, kept, best, 1), _array.put(xp, picks, j, best)
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
        part = xp.where(mask, part, mean * xp.eye(picks.shape[0], dtype=part.dtype, device=place))
        linear = xp.where(filled, xp.take(scores, picks), xp.zeros_like(start))  # (s,)
        return solver(part, linear, NonNegative(), ridge=ridge * mean, start=start)

    kept = xp.zeros(scores.shape[0], dtype=xp.int32, device=place)
    picks = xp.zeros(k, dtype=xp.argmax(scores).dtype, device=place)
    weights = xp.zeros(k, dtype=scores.dtype, device=place)
    status = xp.zeros((), dtype=xp.int32, device=place)
    _, picks, weights, status = _loops.fori_loop(k, add_one, (kept, picks, weights, status))
    return picks, (weights, status)


@_array.quiet
def greedy_utility(scores: Array, gram: Array, k: int, *, redundancy: float = 1.0) -> Filtered:
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
    """
    xp = _check(scores, k, gram, what="greedy_utility")
    if isinstance(redundancy, (int, float)) and not redundancy >= 0:
        raise ValueError(f"greedy_utility: redundancy {redundancy} must not be negative")
    top = top_k(scores, k).indices  # (k,)
    gain, cost = xp.sum(xp.take(scores, top)), xp.sum(xp.take(xp.take(gram, top, axis=0), top, axis=1))
    positive = (gain > 0) & (cost > 0)
    eta = redundancy * xp.where(positive, gain, xp.zeros_like(gain)) / xp.where(positive, cost, xp.ones_like(cost))
    start = scores - eta * xp.linalg.diagonal(gram) / 2  # (n,)

    def add_one(j: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        utility, picks = state  # (n,), (k,)
        best = xp.argmax(utility)
        utility = utility - eta * xp.take(gram, xp.reshape(best, (1,)), axis=1)[:, 0]
        return _array.put(xp, utility, best, -xp.inf), _array.put(xp, picks, j, best)

    picks = xp.zeros(k, dtype=xp.argmax(scores).dtype, device=_array.device(scores))
    _, picks = _loops.fori_loop(k, add_one, (start, picks))
    return Filtered(picks, full(xp, k, _array.device(scores)))


@_array.quiet
def boltzmann(scores: Array, k: int, *, temperature: float, uniforms: Array) -> Filtered:
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

    Notes
    -----
    Gumbel top-k (Kool, van Hoof & Welling 2019): adding Gumbel noise and taking the k largest draws without
    replacement, and never forms an exponential that could overflow.
    """
    xp = _check(scores, k, uniforms=uniforms, what="boltzmann")
    if tuple(uniforms.shape) != tuple(scores.shape):
        raise ValueError(f"boltzmann: uniforms {tuple(uniforms.shape)} must be {tuple(scores.shape)}, one a candidate")
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"boltzmann: temperature {temperature} must be positive")
    tiny = xp.finfo(scores.dtype).smallest_normal
    noise = -xp.log(-xp.log(xp.clip(uniforms, tiny, 1 - xp.finfo(scores.dtype).eps)))  # (n,)
    spread = xp.std(scores)
    level = (scores - xp.max(scores)) / xp.where(spread > 0, spread, xp.ones_like(spread)) / temperature  # (n,)
    return top_k(level + noise, k)


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


def _check(scores: Any, k: int, gram: Any = None, *, ridge: Any = 0.0, uniforms: Any = None, what: str) -> Any:
    xp = _array.namespace(scores, gram, uniforms, what=what)
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


def full(xp: Any, k: int, place: Any) -> Any:
    """Return the count () of a filter that lets all k pass."""
    return xp.asarray(k, dtype=xp.int32, device=place)
