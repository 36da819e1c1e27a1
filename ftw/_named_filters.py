"""The table of the filters that ``filter=`` takes by name, and how a choice runs one of them or a callable.

A built-in filter is one function `Shortlist` -> `Picked` under `named`, in ``filters.py``. Whatever asks which names
there are, or whether a filter needs the Gram matrix, reads the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import _array, quotas
from .quotas import Places

__all__ = ["NAMED", "Filter", "Filtered", "Picked", "Shortlist", "count_of_all", "named", "needs_gram", "run"]


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


class Shortlist(NamedTuple):
    """What a named filter picks from."""

    scores: Any  # (s,) finite
    gram: Any  # (s, s), None for a filter that does not need it
    k: int
    ridge: Any  # relative, for filters that refit
    solver: Any  # like solve_qp
    places: Places | None  # the quota to obey, attainable


class Picked(NamedTuple):
    """What a filter keeps of the shortlist."""

    filtered: Filtered
    refit: tuple[Any, Any] | None = None  # non-negative weights (k,) and their status (), where the filter has them
    over: Any = None  # (s,) booleans: refused by the quota alone
    distinct: Any = True  # (): the picks are distinct positions in the shortlist


Run = Callable[[Any, Shortlist], Picked]  # (xp, shortlist)


class Named(NamedTuple):
    """A filter of the table."""

    run: Run
    needs_gram: bool


NAMED: dict[str, Named] = {}


def named(name: str, *, needs_gram: bool) -> Callable[[Run], Run]:
    """Return a decorator that enters a function in the table."""

    def enter(run: Run) -> Run:
        if name in NAMED:
            raise ValueError(f"a filter named {name!r} is in the table already")
        NAMED[name] = Named(run, needs_gram)
        return run

    return enter


def needs_gram(filter: str | Filter) -> bool:
    """Return whether the filter takes the Gram matrix of the shortlist; a callable always does."""
    return True if callable(filter) else NAMED[filter].needs_gram


def count_of_all(xp: Any, k: int, device: Any) -> Any:
    """Return the count () of a filter that lets all k pass."""
    return xp.asarray(k, dtype=xp.int32, device=device)


def run(xp: Any, filter: str | Filter, shortlist: Shortlist) -> Picked:
    """Return the picks of a named filter or of a callable."""
    return _run_callable(xp, filter, shortlist) if callable(filter) else NAMED[filter].run(xp, shortlist)


def _run_callable(xp: Any, filter: Filter, shortlist: Shortlist) -> Picked:
    """Return the picks of a filter of the user's own; under a quota its picks come first, then the others by score."""
    scores, keep = shortlist.scores, shortlist.k
    filtered = filter(scores, shortlist.gram, keep)
    got = type(filtered).__name__
    fits = False
    if isinstance(filtered, Filtered):
        got += f"(indices {tuple(filtered.indices.shape)} {filtered.indices.dtype})"
        fits = tuple(filtered.indices.shape) == (keep,) and "int" in str(filtered.indices.dtype)
    if not fits:
        raise ValueError(
            f"filter_then_weight: the filter must return Filtered(indices ({keep},) of integers, count); got {got}"
        )
    filtered = filtered._replace(indices=_array.integers(filtered.indices))
    x, device = xp.sort(filtered.indices), _array.device(scores)
    distinct = xp.all(x[1:] > x[:-1]) & (x[0] >= 0) & (x[-1] < scores.shape[0])
    first = xp.arange(keep, dtype=filtered.indices.dtype, device=device)
    filtered = filtered._replace(indices=xp.where(distinct, filtered.indices, first))
    if shortlist.places is None:
        return Picked(filtered, distinct=distinct)
    order = quotas.preferred(xp, scores, filtered.indices)  # (s,)
    passed = (xp.arange(scores.shape[0], device=device) < filtered.count) | (filtered.count >= keep)  # (s,)
    order, count, over = quotas.front(xp, shortlist.places, order, keep, passed)
    return Picked(Filtered(order[:keep], count), over=over, distinct=distinct)
