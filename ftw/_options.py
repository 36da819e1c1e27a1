"""The options of a choice: what is wrong with them is an error before anything is computed."""

from __future__ import annotations

from typing import Any

from . import _array, quotas
from ._named_filters import NAMED
from .constraints import SETS, SourceShares

__all__ = ["check_options"]


def check_options(
    n: int,
    keep: Any,
    filter: Any,
    weight: Any,
    constraint: Any,
    ridge: Any,
    shortlist: Any,
    cap: Any,
    quota: Any = None,
    fill: Any = "raise",
) -> int:
    """Return the length of the shortlist, or raise what is wrong with the options."""
    what = "filter_then_weight"
    if not isinstance(keep, int) or isinstance(keep, bool):
        raise TypeError(f"{what}: keep must be an int, got {type(keep).__name__}")
    if not 1 <= keep <= n:
        raise ValueError(f"{what}: keep={keep} must lie in 1 .. {n}, the number of candidates")
    if not callable(filter) and filter not in list(NAMED):
        raise ValueError(
            f"{what}: filter={filter!r} is not one of {', '.join(NAMED)}; threshold and boltzmann have "
            "options of their own: pass a callable (scores, gram, k) -> Filtered"
        )
    if weight not in ("qp", "uniform"):
        raise ValueError(f"{what}: weight={weight!r} must be 'qp' or 'uniform'")
    if not isinstance(constraint, SETS):
        raise TypeError(
            f"{what}: constraint is a {type(constraint).__name__}; expected NonNegative, Simplex, CappedSimplex, Box "
            "or SourceShares"
        )
    if fill not in ("raise", "relax"):
        raise ValueError(f"{what}: fill={fill!r} must be 'raise' or 'relax'")
    if quota is not None and not isinstance(quota, quotas.Quota):
        raise TypeError(f"{what}: quota must be ftw.Quota(sources, at_least, at_most), got {type(quota).__name__}")
    for name, grouped in (("quota", quota), ("constraint", constraint)):
        if isinstance(grouped, (quotas.Quota, SourceShares)):
            xp = _array.namespace(*_array.leaves(grouped), what=f"{what}: {name}")
            quotas.checked_sources(xp, grouped.sources, n, what=f"{what}: {type(grouped).__name__}.sources")
            low, high = grouped._fields[1:3]
            quotas.length(low, high, grouped[1], grouped[2], what=f"{what}: {type(grouped).__name__}")
    for name in () if isinstance(constraint, SourceShares) else ("cap", "lower", "upper"):
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
