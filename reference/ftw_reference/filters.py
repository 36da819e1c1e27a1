r"""Filters: which k of n candidates go on.

**top_k** takes the k best scores b_i. It is blind to repetition: three copies of the best sample take three places.

**matching** fills the places one at a time. Suppose the samples S are kept, with the non-negative weights w that
match the target best,

    w = argmin over w >= 0 on S of  1/2 w'(K + r I)w - b'w.

What they leave unmatched is the residual update  P (g_T - sum_(j in S) w_j g_j).  Candidate i's share of it is

    <g_i, P (g_T - sum_j w_j g_j)>  =  b_i - (K w)_i,

so that the candidate with the largest (b - K w)_i is added, and w is refitted. A copy of a kept sample has its share
already taken and waits. This is orthogonal matching pursuit with non-negative weights. The ridge r is ``ridge`` times
the mean of K_ii over S; the residual is not divided by sqrt(K_ii). At the start w = 0, and the first pick is the best
score.

**greedy_utility** also goes one at a time, but with a fixed step instead of fitted weights. A step eta with the
samples S lowers the target's loss by  eta sum_S b_i - eta^2/2 sum_(i, j in S) K_ij.  Adding i to S brings, divided by
eta,

    b_i - redundancy * eta * (K_ii / 2 + sum_(j in S) K_ij),

and the largest is taken. eta is the best step for the top k together, sum_T b / sum_TT K, so that multiplying all
gradients by a number changes no choice.

**threshold** keeps what reaches a value, **boltzmann** draws at random with probability ~ exp(b_i / (temperature std
b)): k draws without replacement are the k largest of  b_i / (temperature std b) - log(-log u_i),  u_i uniform
(Gumbel).

Every filter returns ``k`` distinct indices, best first, ties by index, and how many of them passed. Each takes a quota
of the candidates' sources (``quotas.py``): the choice is then the best of those that obey it, and where none does the
nearest one, of which none passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import quotas
from ._jit import jit
from .projections import NonNegative
from .qp import QPSolution, solve_qp

__all__ = ["NAMED", "Filtered", "Named", "boltzmann", "greedy_utility", "matching", "threshold", "top_k"]

Array = Any


class Filtered(NamedTuple):
    """The choice of a filter: ``indices`` (k,), of which the first ``count`` passed."""

    indices: Array  # (k,)
    count: int  # type: ignore[assignment]  # as in the contract; hides tuple.count


class Named(NamedTuple):
    """A filter that ``filter=`` takes by name."""

    run: Any  # (b (n,), [K (n, n)], k, [ridge=], quota=) -> Filtered
    needs_gram: bool  # takes K
    refits: bool  # takes the ridge
    value: Any  # (b, K, k, ridge) -> the value (n,) of each candidate given the picks; None unless it picks one by one


NAMED: dict[str, Named] = {}
F = TypeVar("F", bound=Callable[..., Any])


def named(*, needs_gram: bool, refits: bool = False, value: Any = None) -> Callable[[F], F]:
    """Return a decorator that enters a filter in the table, under the name of the function."""

    def enter(function: F) -> F:
        NAMED[function.__name__] = Named(function, needs_gram, refits, value)
        return function

    return enter


def needs_gram(filter: Any) -> bool:
    """Return whether a filter takes the Gram matrix; a callable always does."""
    return callable(filter) or bool(NAMED[filter].needs_gram)


def scores_left(b: Array, K: Array, k: int, ridge: float) -> Any:
    """Return the value of the candidates to `top_k`: the scores, whatever is picked."""
    return lambda picks: b


@named(needs_gram=False, value=scores_left)
def top_k(b: Array, k: int, *, quota: Any = None) -> Filtered:
    """Return the k largest scores of b (n,).

    Examples
    --------
    >>> top_k([1.0, 3.0, 3.0, 2.0], 2).indices
    array([1, 2])
    """
    scores = checked_scores(b, k)
    if quota is not None:
        best = by_value(lambda picks: scores, len(scores), k, quota)
        return best._replace(indices=np.array(sorted(best.indices, key=lambda i: (-scores[i], i))))
    return Filtered(largest_first(scores, k), k)


def by_value(value: Any, n: int, k: int, quota: Any) -> Filtered:
    """Return k picks, each the largest of ``value(picks)`` (n,) with which the quota can still be obeyed."""
    places = quotas.count_places(quota, n, k)
    picks, _ = quotas.pick_each(quotas.reachable(places), value, k)
    return Filtered(picks, k if quotas.fills(places, k) else 0)


def threshold(
    b: Array, k: int, *, value: float | None = None, quantile: float | None = None, quota: Any = None
) -> Filtered:
    """Return the k largest scores of b (n,); those that reach ``value``, or the ``quantile`` of all scores, pass."""
    scores = checked_scores(b, k)
    if (value is None) == (quantile is None):
        raise ValueError("threshold takes either value= or quantile=, and exactly one of them")
    level: float = value if value is not None else float(np.quantile(scores, quantile or 0.0))
    if quota is not None:
        best = top_k(scores, k, quota=quota)
        return pass_floors(best, scores >= level, quotas.count_places(quota, len(scores), k))
    indices = largest_first(scores, k)  # (k,)
    return Filtered(indices, int(np.sum(scores[indices] >= level)))


def pass_floors(best: Filtered, passes: Array, places: Any) -> Filtered:
    """Return a choice with those in front that pass (n,), or that a floor asks for."""
    seen = np.zeros(len(places.floors), dtype=np.int64)
    front: list[int] = []
    rest: list[int] = []
    for i in best.indices:
        s = places.sources[i]
        seen[s] += 1
        (front if passes[i] or seen[s] <= places.floors[s] else rest).append(i)
    return Filtered(np.array(front + rest), len(front) if best.count else 0)


def residual_left(b: Array, K: Array, k: int, ridge: float) -> Any:
    """Return the value of the candidates to `matching`: (b - K w)_i, with the weights of the picks refitted."""

    def value(picks: list[int]) -> Array:
        if not picks:
            return b
        chosen = np.array(picks)  # (j,)
        return b - K[:, chosen] @ refit(b, K, chosen, ridge).weights

    return value


@named(needs_gram=True, refits=True, value=residual_left)
def matching(b: Array, K: Array, k: int, ridge: float = 0.05, *, quota: Any = None) -> Filtered:
    """Pick k candidates one at a time by what the kept ones leave unmatched.

    Parameters
    ----------
    b : array (n,)
        Scores.
    K : array (n, n)
        Gram matrix.
    k : int
        How many to pick.
    ridge : float
        Added to the diagonal in the refits, relative to the mean diagonal of the samples kept so far.
    quota : Quota, optional
        How many of each source.

    Returns
    -------
    Filtered
        ``indices`` (k,) in the order of the picks.

    Examples
    --------
    A copy of the best sample waits; the best of what is left goes first.

    >>> matching([2.0, 2.0, 1.0], [[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]], 2).indices
    array([0, 2])
    """
    scores, gram = checked_scores(b, k), checked_gram(K, b)
    if quota is not None:
        return by_value(residual_left(scores, gram, k, ridge), len(scores), k, quota)
    picks = np.empty(0, dtype=np.int64)  # (j,)
    weights = np.empty(0)  # (j,)
    for _ in range(k):
        best = best_residual(scores, gram, picks, weights)
        picks = np.append(picks, best)
        weights = refit(scores, gram, picks, ridge).weights
    return Filtered(picks, k)


def refit(b: Array, K: Array, picks: Array, ridge: float) -> QPSolution:
    """Return the non-negative weights (j,) of the picked samples that match the target best."""
    part = K[np.ix_(picks, picks)]  # (j, j)
    return solve_qp(part, b[picks], NonNegative(), ridge=ridge * max(float(np.mean(np.diag(part))), 0.0))


@jit
def best_residual(b: Array, K: Array, picks: Array, weights: Array) -> int:
    """Return argmax_i (b - K w)_i over the candidates not yet picked: (n,), (n, n), (j,), (j,) -> index."""
    kept = np.zeros(b.shape[0], dtype=np.bool_)  # (n,)
    for j in picks:
        kept[j] = True
    best = -1
    most = -np.inf
    for i in range(b.shape[0]):
        residual = b[i]
        for j in range(picks.shape[0]):
            residual -= K[i, picks[j]] * weights[j]
        if not kept[i] and (best < 0 or residual > most):
            best = i
            most = residual
    return best


def utility_left(b: Array, K: Array, k: int, ridge: float, eta: float | None = None) -> Any:
    """Return the value of the candidates to `greedy_utility`: the utility of one more step with each."""
    eta = best_step(b, K, k) if eta is None else eta
    return lambda picks: b - eta * (np.diag(K) / 2 + np.sum(K[:, picks], axis=1))


def best_step(b: Array, K: Array, k: int) -> float:
    """Return the best step for the k top scores together, 0 if they help nothing: (n,), (n, n) -> eta."""
    top = largest_first(b, k)  # (k,)
    gain, cost = float(np.sum(b[top])), float(np.sum(K[np.ix_(top, top)]))
    return gain / cost if gain > 0 and cost > 0 else 0.0


@named(needs_gram=True, value=utility_left)
def greedy_utility(b: Array, K: Array, k: int, *, redundancy: float = 1.0, quota: Any = None) -> Filtered:
    """Pick k candidates one at a time by score less redundancy; b (n,), K (n, n)."""
    scores, gram = checked_scores(b, k), checked_gram(K, b)
    if redundancy < 0:
        raise ValueError(f"redundancy is {redundancy}: give a number >= 0")
    eta = redundancy * best_step(scores, gram, k)
    if quota is not None:
        return by_value(utility_left(scores, gram, k, 0.0, eta), len(scores), k, quota)
    return Filtered(greedy_picks(scores, gram, k, eta), k)


@jit
def greedy_picks(b: Array, K: Array, k: int, eta: float) -> Array:
    """Return the picks (k,) of the greedy utility with the step eta."""
    n = b.shape[0]
    picks = np.empty(k, dtype=np.int64)  # (k,)
    kept = np.zeros(n, dtype=np.bool_)  # (n,)
    for place in range(k):
        best = -1
        most = -np.inf
        for i in range(n):
            if kept[i]:
                continue
            utility = b[i] - eta * K[i, i] / 2
            for j in picks[:place]:
                utility -= eta * K[i, j]
            if best < 0 or utility > most:
                best = i
                most = utility
        kept[best] = True
        picks[place] = best
    return picks


def boltzmann(b: Array, k: int, *, temperature: float, uniforms: Array, quota: Any = None) -> Filtered:
    """Draw k of the scores b (n,) without replacement; ``uniforms`` (n,) are independent draws from (0, 1)."""
    scores = checked_scores(b, k)
    u = np.asarray(uniforms, dtype=np.float64)  # (n,)
    if u.shape != scores.shape:
        raise ValueError(f"uniforms has shape {u.shape} and the scores {scores.shape}: they must be the same")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a number > 0")
    spread = np.std(scores)
    level = (scores - np.max(scores)) / (spread if spread > 0 else 1.0) / temperature  # (n,)
    u = np.clip(u, np.finfo(np.float64).smallest_normal, 1 - np.finfo(np.float64).eps)
    return top_k(level - np.log(-np.log(u)), k, quota=quota)


@jit
def largest_first(scores: Array, k: int) -> Array:
    """Return the indices (k,) of the k largest of the scores (n,), ties by index."""
    kept = np.zeros(scores.shape[0], dtype=np.bool_)  # (n,)
    picks = np.empty(k, dtype=np.int64)  # (k,)
    for place in range(k):
        best = -1
        for i in range(scores.shape[0]):
            if not kept[i] and (best < 0 or scores[i] > scores[best]):
                best = i
        kept[best] = True
        picks[place] = best
    return picks


def checked_scores(b: Array, k: int) -> Array:
    """Return b as an array (n,) of float64, and refuse what is not a choice of k of them."""
    scores = np.ascontiguousarray(b, dtype=np.float64)  # (n,)
    if scores.ndim != 1:
        raise ValueError(f"the scores have shape {scores.shape}: give one per sample, shape (n,)")
    if not 1 <= k <= scores.shape[0]:
        raise ValueError(f"k is {k} with {scores.shape[0]} candidates: give 1 <= k <= {scores.shape[0]}")
    return scores


def checked_gram(K: Array, b: Array) -> Array:
    """Return K as an array (n, n) of float64 that fits b (n,)."""
    gram, n = np.ascontiguousarray(K, dtype=np.float64), len(b)  # (n, n)
    if gram.shape != (n, n):
        raise ValueError(f"the Gram matrix has shape {gram.shape} and the scores ({n},): it must be ({n}, {n})")
    return gram
