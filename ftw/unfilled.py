"""Why no choice obeys the bounds of a quota or of shares: in words that name the sources, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _array, quotas
from .constraints import SourceShares, share_bounds
from .quotas import Quota

__all__ = ["unfilled"]


def unfilled(
    scores: Any, keep: int, quota: Quota | None, constraint: Any, names: Sequence[str] | None = None
) -> list[str]:
    """Return what makes the bounds impossible to obey, one phrase a cause; none if they can be.

    Parameters
    ----------
    scores : array (n,)
        Eager; only its length, dtype and device count.
    keep : int
    quota : Quota or None
    constraint : a constraint set
        One without sources says nothing.
    names : sequence of str, optional
        What the sources are called; their numbers by default.
    """
    n = scores.shape[0]
    causes: list[str] = []
    if quota is not None:
        xp = _array.namespace(quota.sources)
        p = quotas.places(xp, quota, n, keep, what="unfilled")
        there, floors, caps = (
            [int(x) for x in y] for y in (quotas.available(xp, p.sources, p.floors.shape[0]), *p[1:3])
        )
        for s, (some, low, high) in enumerate(zip(there, floors, caps, strict=True)):
            if low > high:
                causes.append(f"at_least={low} of source {_name(names, s)} exceeds at_most={high}")
            if low > some:
                causes.append(f"at_least={low} of source {_name(names, s)}, of which the pool holds {some}")
        if sum(floors) > keep:
            causes.append(f"at_least asks for {sum(floors)} of {keep} places")
        room = sum(min(high, some) for high, some in zip(caps, there, strict=True))
        if room < keep:
            causes.append(f"at_most and the pool leave {room} of {keep} places")
    if isinstance(constraint, SourceShares):
        causes += _of_shares(scores, keep, constraint, names)
    return causes


def _of_shares(scores: Any, keep: int, shares: SourceShares, names: Sequence[str] | None) -> list[str]:
    xp = _array.namespace(scores)
    m = quotas.length("lower", "upper", shares.lower, shares.upper, what="SourceShares")
    numbers, _ = quotas.numbered(xp, shares.sources, m, what="SourceShares.sources")
    there = [int(x) for x in quotas.available(xp, numbers, m + 1)]
    low = [float(x) for x in share_bounds(xp, "lower", shares.lower, 0.0, m, scores)]
    high = [float(x) for x in share_bounds(xp, "upper", shares.upper, float("inf"), m, scores)]
    total, causes = float(shares.total), []
    for s in range(m):
        if low[s] > high[s]:
            causes.append(f"lower={low[s]:g} of source {_name(names, s)} exceeds upper={high[s]:g}")
        if low[s] > 0 and not there[s]:
            causes.append(f"lower={low[s]:g} of source {_name(names, s)}, of which the pool holds no sample")
    least = sum(max(x, 0.0) for x in low)
    most = sum(min(high[s], total) for s in range(m) if there[s]) + (total if there[m] else 0.0)
    if least > total * (1 + 1e-6):
        causes.append(f"lower adds up to {least:g}, more than the total {total:g}")
    if most < total * (1 - 1e-6):
        causes.append(f"upper of the sources in the pool adds up to {most:g}, less than the total {total:g}")
    if not causes and sum(x > 0 for x in low) > keep:
        causes.append(f"lower asks for samples of {sum(x > 0 for x in low)} sources, and keep={keep}")
    return causes


def _name(names: Sequence[str] | None, s: int) -> str:
    return str(s) if names is None or s >= len(names) else repr(names[s])
