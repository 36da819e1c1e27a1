"""Quotas: at least, and at most, so many of the kept samples from each source.

The choices of k that obey a quota are the bases of a matroid (a generalised partition matroid), so that greedy picking
stays right: the best k by score under a quota are found by one sort, and a filter that picks one sample at a time obeys
it by looking only at the candidates with which the picks so far can still be completed. With ``c_s`` picks of source s
so far, that is every candidate of a source below its cap for which

    c_s < floor_s    or    sum_s max(c_s, floor_s) < k,

since the second sum is what the picks and the floors still open will take up together.

Where no choice obeys the bounds, the same rules give the nearest one: floors before caps, each as far as there are
candidates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from . import _array

__all__ = [
    "Places",
    "Quota",
    "as_count",
    "available",
    "fills",
    "front",
    "open_sources",
    "places",
    "preferred",
    "scaled",
    "unmet",
]

_EDGE = 1e-9  # a fraction of k that is a whole number up to rounding is that number
_ARRAY_EDGE = 1e-5  # likewise, of fractions in float32


class Quota(NamedTuple):
    """How many of the kept samples come from each of m sources.

    Attributes
    ----------
    sources : integer array (n,)
        The source of each candidate, 0 .. m - 1, or -1 for a candidate without one, to which no bound applies.
    at_least, at_most : sequence or array (m,), or None
        Floors and caps: ints are counts, floats in [0, 1] are fractions of the number kept. A fraction is obeyed
        exactly: a floor is rounded up, a cap down. None, as a whole or for one source, is no bound. The number m of
        sources is the length of the bounds, and static.

    Examples
    --------
    >>> import numpy as np
    >>> import ftw
    >>> quota = ftw.Quota(np.array([0, 0, 0, 1, 1]), at_least=(0, 1), at_most=(0.5, None))
    >>> ftw.filters.top_k(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), 4, quota=quota).indices
    array([0, 1, 3, 4])
    """

    sources: Any
    at_least: Any = None
    at_most: Any = None


class Places(NamedTuple):
    """A quota for k picks among some candidates, in numbers of places; the last of the m + 1 sources is "none"."""

    sources: Any  # (n,) int32, 0 .. m
    floors: Any  # (m + 1,) int32
    caps: Any  # (m + 1,) int32
    known: Any  # () bool: every source number is within -1 .. m - 1


def places(xp: Any, quota: Quota, n: int, k: int, *, what: str) -> Places:
    """Return a quota over n candidates as numbers of places among k picks.

    Raises
    ------
    TypeError, ValueError
        If a shape, dtype or range is wrong. Source numbers that cannot be read (in a trace, or on a GPU) make the quota
        one that cannot be filled.
    """
    if not isinstance(quota, Quota):
        raise TypeError(f"{what}: quota must be ftw.Quota(sources, at_least, at_most), got {type(quota).__name__}")
    sources = checked_sources(xp, quota.sources, n, what=f"{what}: Quota.sources")
    m = length("at_least", "at_most", quota.at_least, quota.at_most, what=f"{what}: Quota")
    device = _array.device(sources)
    last = xp.full((1,), 0, dtype=xp.int32, device=device)
    floors = _counts(xp, quota.at_least, m, k, device, up=True, what=f"{what}: Quota.at_least")  # (m,)
    caps = _counts(xp, quota.at_most, m, k, device, up=False, what=f"{what}: Quota.at_most")  # (m,)
    numbers, known = numbered(xp, sources, m, what=f"{what}: Quota.sources")
    return Places(numbers, xp.concat([floors, last]), xp.concat([caps, last + k]), known)


def checked_sources(xp: Any, sources: Any, n: int, *, what: str) -> Any:
    """Return the sources (n,), or raise where they are not n integers."""
    if not hasattr(sources, "dtype") or not xp.isdtype(sources.dtype, "integral"):
        raise TypeError(f"{what} must be an integer array ({n},), got {getattr(sources, 'dtype', type(sources))}")
    if tuple(sources.shape) != (n,):
        raise ValueError(f"{what} {tuple(sources.shape)} must be ({n},), one a candidate")
    return sources


def numbered(xp: Any, sources: Any, m: int, *, what: str) -> tuple[Any, Any]:
    """Return source numbers as int32 with m for "none", and whether all of them are within -1 .. m - 1."""
    known = xp.all((sources >= -1) & (sources < m))
    if _array.known(known) is False:
        raise ValueError(
            f"{what} must lie in 0 .. {m - 1} for bounds of {m} sources, or be -1 for a candidate without a source; "
            f"got {int(xp.min(sources))} .. {int(xp.max(sources))}"
        )
    return xp.where((sources >= 0) & (sources < m), xp.astype(sources, xp.int32), m), known


def length(first: str, second: str, lower: Any, upper: Any, *, what: str) -> int:
    """Return the number m of sources, the length of the bounds, or raise where they disagree."""
    sizes = []
    for name, bound in ((first, lower), (second, upper)):
        if bound is None:
            continue
        shape = tuple(bound.shape) if hasattr(bound, "shape") else None
        if (shape is None and not isinstance(bound, (tuple, list))) or shape == ():
            raise TypeError(f"{what}.{name} must hold one bound a source, got {type(bound).__name__}")
        sizes.append(shape[-1] if shape else len(bound))
    if not sizes:
        raise ValueError(f"{what} has no bounds: give {first}= or {second}=, one number a source")
    if len(set(sizes)) > 1:
        raise ValueError(f"{what}: {first} and {second} are of {sizes[0]} and {sizes[1]} sources; give as many of both")
    return int(sizes[0])


def _counts(xp: Any, bounds: Any, m: int, k: int, device: Any, *, up: bool, what: str) -> Any:
    """Return bounds of m sources as counts (m,) int32: fractions times k, rounded ``up`` or down; None is no bound."""
    free = 0 if up else k
    if bounds is None:
        return xp.full((m,), free, dtype=xp.int32, device=device)
    if hasattr(bounds, "dtype"):
        if tuple(bounds.shape) != (m,):
            raise ValueError(f"{what} {tuple(bounds.shape)} must be ({m},), one a source")
        return _array_counts(xp, bounds, k, up=up, what=what)
    each = [_count(xp, bound, k, free, device, up=up, what=f"{what}[{s}]") for s, bound in enumerate(bounds)]
    return xp.stack(each)  # (m,)


def as_count(bound: Any, k: int, *, up: bool) -> int:
    """Return a bound of a source, a count or a fraction of k rounded ``up`` or down, as a count.

    Parameters
    ----------
    bound : int, float, 0-d array or None
        A count where it is an integer; None is a floor of nothing, or a cap of k.
    k : int
        How many samples are kept.
    """
    if bound is None:
        return 0 if up else k
    value, edge = (bound, _EDGE) if isinstance(bound, (int, float)) else (bound.item(), _ARRAY_EDGE)
    if isinstance(value, int):
        return value
    return math.ceil(value * k - edge) if up else math.floor(value * k + edge)


def _count(xp: Any, bound: Any, k: int, free: int, device: Any, *, up: bool, what: str) -> Any:
    if hasattr(bound, "dtype") and not isinstance(bound, (int, float)):
        return xp.reshape(_array_counts(xp, xp.asarray(bound, device=device), k, up=up, what=what), ())
    if isinstance(bound, bool) or not (bound is None or isinstance(bound, (int, float))):
        raise TypeError(f"{what} must be an int, a float or None, got {bound!r}")
    if isinstance(bound, float):
        if not 0 <= bound <= 1:
            raise ValueError(f"{what} = {bound} as a fraction must lie in [0, 1]; a count is an int")
        bound = as_count(bound, k, up=up)
    elif bound is not None and bound < 0:
        raise ValueError(f"{what} = {bound} must not be negative")
    return xp.asarray(free if bound is None else min(bound, k + 1), dtype=xp.int32, device=device)


def _array_counts(xp: Any, bounds: Any, k: int, *, up: bool, what: str) -> Any:
    if xp.isdtype(bounds.dtype, "integral"):
        counts = xp.where(bounds > k + 1, xp.asarray(k + 1, dtype=bounds.dtype, device=_array.device(bounds)), bounds)
        return xp.astype(counts, xp.int32)
    if not _array.is_floating(xp, bounds):
        raise TypeError(f"{what} must be integers (counts) or floats (fractions), got {bounds.dtype}")
    whole = xp.astype(bounds, xp.float32) * k
    whole = xp.ceil(whole - _ARRAY_EDGE) if up else xp.floor(whole + _ARRAY_EDGE)
    return xp.astype(xp.clip(whole, 0, k + 1), xp.int32)


def available(xp: Any, sources: Any, m: int) -> Any:
    """Return how many of the sources (n,) are each of 0 .. m - 1: (m,) int32."""
    ordered = xp.sort(sources)  # (n,)
    numbers = xp.arange(m, dtype=ordered.dtype, device=_array.device(sources))  # (m,)
    right, left = (xp.searchsorted(ordered, numbers, side=side) for side in ("right", "left"))
    return xp.astype(right - left, xp.int32)


def fills(xp: Any, p: Places, k: int) -> Any:
    """Return whether k of the candidates can be picked so that every bound holds; a boolean ()."""
    there = available(xp, p.sources, p.floors.shape[0])  # (m + 1,)
    each = xp.all((p.floors <= p.caps) & (p.floors <= there))
    most = xp.sum(xp.minimum(p.caps, there), dtype=xp.int32)
    return p.known & each & (xp.sum(p.floors, dtype=xp.int32) <= k) & (most >= k)


def unmet(xp: Any, p: Places, picks: Any) -> Any:
    """Return by how much the picks (k,) miss each bound: places short of a floor, or less than 0 beyond a cap, (m,)."""
    m = p.floors.shape[0]
    got = available(xp, xp.take(p.sources, picks), m)  # (m + 1,)
    zero = xp.zeros_like(got)
    return (xp.maximum(p.floors - got, zero) - xp.maximum(got - p.caps, zero))[: m - 1]


def some(xp: Any, p: Places, indices: Any) -> Places:
    """Return the places over some of the candidates, for as many picks."""
    return p._replace(sources=xp.take(p.sources, indices))


def scaled(p: Places, k: int, size: int) -> Places:
    """Return a quota of k places for a shortlist of ``size``, in the same proportions.

    Rounded down, so that the shortlist holds the floors and lets the caps be obeyed wherever the pool does.
    """
    return p._replace(floors=p.floors * size // k, caps=p.caps * size // k)


def front(xp: Any, p: Places, order: Any, k: int, passed: Any = None) -> tuple[Any, Any, Any]:
    """Return the candidates with the best choice of k under the quota in front.

    Parameters
    ----------
    p : Places
    order : integer array (n,)
        All candidates, the best first.
    k : int
    passed : boolean array (n,), optional
        In the same order: who passes, where a filter refuses some of its picks; None for all. A sample that a floor
        asks for passes as well.

    Returns
    -------
    order : integer array (n,)
        First the chosen ones that pass, then the chosen ones that do not, then the rest; each best first.
    count : int32 ()
        How many of the chosen ones pass.
    over : boolean array (n,)
        Per candidate: not chosen, and better than the worst choice, so that the quota alone refuses it.
    """
    sources = xp.take(p.sources, order)  # (n,)
    rank = _rank(xp, sources)
    due = rank < xp.take(p.floors, sources)  # (n,): a floor asks for it
    room = rank < xp.take(p.caps, sources)
    group = xp.where(due, 0, 2 - xp.astype(room, xp.int32))
    chosen = _inverse(xp, xp.argsort(group, stable=True)) < k  # (n,)
    passes = chosen if passed is None else chosen & (passed | due)
    group = xp.where(passes, 0, 2 - xp.astype(chosen, xp.int32))
    last = xp.max(xp.where(chosen, xp.arange(order.shape[0], device=_array.device(order)), 0))
    over = ~chosen & (xp.arange(order.shape[0], device=_array.device(order)) < last)
    count = xp.sum(xp.astype(passes, xp.int32), dtype=xp.int32)
    return xp.take(order, xp.argsort(group, stable=True)), count, xp.take(over, _inverse(xp, order))


def preferred(xp: Any, scores: Any, picks: Any) -> Any:
    """Return all candidates (n,) with the picks (k,) of a filter in front, as picked, and the others by score."""
    k = picks.shape[0]
    by_score = _array.argsort_descending(xp, scores)  # (n,)
    hit = by_score[:, None] == xp.astype(picks, by_score.dtype)[None, :]  # (n, k)
    position = xp.where(xp.any(hit, axis=1), xp.argmax(xp.astype(hit, xp.int32), axis=1), k)  # (n,)
    return xp.take(by_score, xp.argsort(position, stable=True))


def open_sources(xp: Any, p: Places, counts: Any, k: int) -> Any:
    """Return of which sources (m + 1,) a next pick can be, given the counts (m + 1,) of the picks so far."""
    taken = xp.sum(xp.maximum(counts, p.floors), dtype=xp.int32)
    return (counts < p.caps) & ((counts < p.floors) | (taken < k))


def attainable(xp: Any, p: Places) -> Places:
    """Return the places with floors that there are candidates for, and caps that do not contradict them."""
    floors = xp.minimum(p.floors, available(xp, p.sources, p.floors.shape[0]))
    return p._replace(floors=floors, caps=xp.maximum(p.caps, floors))


def _rank(xp: Any, sources: Any) -> Any:
    """Return for each of the sources (n,), in their order, how many of the same source come before it."""
    grouped = xp.argsort(sources, stable=True)  # (n,)
    starts = xp.searchsorted(xp.take(sources, grouped), sources)  # (n,)
    return _inverse(xp, grouped) - starts


def _inverse(xp: Any, order: Any) -> Any:
    return xp.argsort(order, stable=True)


def served(xp: Any, sources: Any, low: Any, high: Any, total: Any, scores: Any, k: int) -> Any:
    """Return the floors (m + 1,) that leave bounds on each source's sum of weights a point.

    A source with a positive lower bound keeps one place. So do those of the best scores, until the upper bounds of all
    that keep one reach the total; if that takes more than k places, those of the largest upper bounds do instead.

    Parameters
    ----------
    sources : integer array (n,)
        0 .. m, m for no source.
    low, high : array (m + 1,)
    total : array ()
    scores : array (n,)
    k : int
    """
    m = low.shape[0]
    members = sources[None, :] == xp.arange(m, dtype=sources.dtype, device=_array.device(scores))[:, None]  # (m + 1, n)
    best = xp.max(xp.where(members, scores[None, :], -xp.inf), axis=1)  # (m + 1,)
    high = xp.where(xp.any(members, axis=1), xp.minimum(high, total * xp.ones_like(high)), 0.0)
    must = low > 0

    def first(value: Any) -> Any:
        order = _array.argsort_descending(xp, value)
        order = xp.take(order, xp.argsort(xp.astype(~xp.take(must, order), xp.int32), stable=True))
        reach = xp.take(high, order)  # (m + 1,)
        short = xp.cumulative_sum(reach) - reach < total * (1 - _EDGE)
        return must | xp.take(short & (reach > 0), _inverse(xp, order))

    by_score, by_bound = first(best), first(high)
    floors = xp.where(xp.count_nonzero(by_score) <= k, by_score, by_bound)
    return xp.astype(floors, xp.int32)
