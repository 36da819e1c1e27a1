r"""Quotas: at least, and at most, so many of the kept samples from each source.

With floors f_s and caps u_s, and c_s picks of source s so far, a whole choice of k can still be completed after one
more pick of source s exactly when

    c_s < u_s   and   (c_s < f_s   or   sum_r max(c_r, f_r) < k):

there is room under the cap, and either a floor asks for the pick or a place is left that no floor needs. (That there
are candidates enough is checked once, beforehand.) A filter that takes the best of the candidates for which this holds
obeys the quota. For scores alone this greedy choice is the best of all: the choices that obey are the bases of a
matroid.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Places", "Quota", "count_places", "fills", "may_pick", "pick_each", "reachable", "shorten"]

Array = Any


class Quota(NamedTuple):
    """How many of the kept samples come from each source: ints are counts, floats fractions of their number."""

    sources: Array  # (n,) ints, -1 for none
    at_least: Any = None  # (m,)
    at_most: Any = None  # (m,)


class Places(NamedTuple):
    """A quota in numbers; the last source holds the candidates that have none."""

    sources: Array  # (n,) ints, 0 .. m
    floors: Array  # (m + 1,) ints
    caps: Array  # (m + 1,) ints


def count_places(quota: Any, n: int, k: int) -> Places:
    """Return a quota over n candidates in places among k picks; a floor is rounded up, a cap down."""
    if isinstance(quota, Places):
        return quota
    sources = np.asarray(quota.sources)  # (n,)
    given = [b for b in (quota.at_least, quota.at_most) if b is not None]
    if sources.shape != (n,) or not given or len({len(b) for b in given}) > 1:
        raise ValueError(f"a quota needs {n} sources, and bounds of one length")
    m = len(given[0])
    if np.any((sources < -1) | (sources >= m)):
        raise ValueError(f"sources must lie in -1 .. {m - 1}")
    floors, caps = np.zeros(m + 1, dtype=np.int64), np.full(m + 1, k, dtype=np.int64)  # (m + 1,)
    for s in range(m):
        low = None if quota.at_least is None else quota.at_least[s]
        high = None if quota.at_most is None else quota.at_most[s]
        if low is not None:
            floors[s] = math.ceil(low * k - 1e-9) if is_fraction(low) else low
        if high is not None:
            caps[s] = math.floor(high * k + 1e-9) if is_fraction(high) else high
    return Places(np.where(sources < 0, m, sources), floors, caps)


def is_fraction(bound: Any) -> bool:
    """Tell a fraction from a count."""
    return np.asarray(bound).dtype.kind == "f"


def fills(p: Places, k: int) -> bool:
    """Return whether k candidates can be picked so that every bound holds."""
    there = np.bincount(p.sources, minlength=len(p.floors))  # (m + 1,)
    if np.any(p.floors > p.caps) or np.any(p.floors > there) or np.sum(p.floors) > k:
        return False
    return bool(np.sum(np.minimum(p.caps, there)) >= k)


def reachable(p: Places) -> Places:
    """Return floors that there are candidates for, and caps that do not contradict them."""
    floors = np.minimum(p.floors, np.bincount(p.sources, minlength=len(p.floors)))
    return p._replace(floors=floors, caps=np.maximum(p.caps, floors))


def may_pick(p: Places, picks: Array, k: int) -> Array:
    """Return which candidates (n,) may be picked next, after the picks (j,)."""
    n = len(p.sources)
    kept = np.zeros(n, dtype=bool)
    kept[np.asarray(picks, dtype=np.int64)] = True
    counts = np.bincount(p.sources[kept], minlength=len(p.floors))  # (m + 1,)
    spare = np.sum(np.maximum(counts, p.floors)) < k
    some = np.zeros(n, dtype=bool)
    for i in range(n):
        s = p.sources[i]
        some[i] = not kept[i] and counts[s] < p.caps[s] and (counts[s] < p.floors[s] or spare)
    return some if some.any() else ~kept  # where the quota cannot be filled, anyone may


def pick_each(p: Places, value: Any, k: int) -> tuple[Array, Array]:
    """Pick k times the largest of ``value(picks)`` (n,) that may be picked.

    Returns the picks (k,), and the candidates (n,) that were once better than the pick and barred by the quota.
    """
    picks: list[int] = []
    beaten = np.zeros(len(p.sources), dtype=bool)
    for _ in range(k):
        v, some = value(picks), may_pick(p, picks, k)
        best = int(np.argmax(np.where(some, v, -np.inf)))
        if not some[best]:
            best = int(np.nonzero(some)[0][0])
        barred = ~some
        barred[picks] = False
        beaten |= barred & (v > v[best])
        picks.append(best)
    return np.array(picks), beaten


def shorten(p: Places, order: Array, k: int, size: int) -> Array:
    """Return the shortlist (size,) of candidates in this order: the quota's proportions, as far as the pool allows."""
    seen = np.zeros(len(p.floors), dtype=np.int64)
    due, room, rest = [], [], []
    for i in order:
        s = p.sources[i]
        seen[s] += 1
        if seen[s] <= p.floors[s] * size // k:
            due.append(i)
        elif seen[s] <= p.caps[s] * size // k:
            room.append(i)
        else:
            rest.append(i)
    return np.array((due + room + rest)[:size])
