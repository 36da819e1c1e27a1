"""Sources of the candidates: read from a column of the pool, with names, for quotas and bounds on shares.

A quota or a `ftw.SourceShares` of a selector names the column in place of the core's array, and may give its bounds by
name::

    FilterThenWeight(..., quota=ftw.Quota("domain", at_least={"wiki": 0.25}, at_most={"code": 8}))

The column holds one source a sample: a tensor of integers, or a list or array of texts or integers. Bounds that are
sequences belong to the sources 0, 1, ...; where they are mappings, sources without a bound go by none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftw import Quota, SourceShares
from ftw.spi import shortlist_order

__all__ = ["Grouped", "check_grouped", "grouped"]


class Grouped(NamedTuple):
    """The quota and the constraint of one step, with the sources of its pool in numbers, on the host."""

    quota: Quota | None
    constraint: Any
    names: tuple[str, ...]  # of the m sources

    def order(self, keep: int, scores: Tensor, size: int) -> Tensor:
        """Return the candidates (n,) with the shortlist of ``size`` in front, where ``scores`` (n,) are."""
        on_host = scores.detach().cpu()
        order: Tensor = shortlist_order(on_host, keep, size, self.quota, self.constraint).to(scores.device)
        return order

    def among(self, good: Tensor | None) -> Grouped:
        """Return the same of some candidates, None for all."""
        return self if good is None else self.with_sources(lambda x: x[good])

    def with_sources(self, function: Callable[[Tensor], Tensor]) -> Grouped:
        """Return the same with ``function`` of the sources; a quota and shares on one column stay on one."""
        done: dict[int, Tensor] = {}

        def new(x: Any) -> Any:
            if id(x.sources) not in done:
                done[id(x.sources)] = function(x.sources)
            return x._replace(sources=done[id(x.sources)])

        quota = None if self.quota is None else new(self.quota)
        constraint = new(self.constraint) if isinstance(self.constraint, SourceShares) else self.constraint
        return Grouped(quota, constraint, self.names)


def check_grouped(quota: Any, constraint: Any, column: Any) -> None:
    """Raise if a quota or shares do not say where the sources of a pool are."""
    if quota is not None and not isinstance(quota, Quota):
        raise TypeError(f"quota is a {type(quota).__name__}; expected ftw.Quota('column', at_least, at_most), or None")
    if column is not None and not isinstance(column, str):
        raise TypeError(f"sources={column!r} must be the name of a column of the batch, or None")
    for what, x in (("quota", quota), ("constraint", constraint)):
        if not isinstance(x, (Quota, SourceShares)):
            continue
        if x.sources is None and column is None:
            raise ValueError(f"{what}: its sources are None; name a column of the batch there, or in sources=")
        if x.sources is not None and not isinstance(x.sources, (str, Tensor)):
            raise TypeError(
                f"{what}: its sources are a {type(x.sources).__name__}; expected the name of a column of the batch, or "
                "a tensor (n,) of integers"
            )
        bounds = [bound for bound in x[1:3] if bound is not None]
        if not bounds:
            raise ValueError(f"{what} has no bounds: give {' or '.join(f'{name}=' for name in x._fields[1:3])}")
        if len({isinstance(bound, Mapping) for bound in bounds}) > 1:
            raise TypeError(f"{what}: give both of its bounds by name, or both as sequences")


def grouped(quota: Quota | None, constraint: Any, column: str | None, pool: Any, n: int) -> Grouped | None:
    """Return the quota and the constraint for a pool of n (None for an empty one), None if neither knows sources."""
    shares = constraint if isinstance(constraint, SourceShares) else None
    if quota is None and shares is None:
        return None
    where: dict[Any, Any] = {}  # the same column gives the same tensor, so that a quota and shares on it join
    names = _names(quota, shares)
    read = [None if x is None else _read(x, column, names, pool, n, where) for x in (quota, shares)]
    return Grouped(read[0], constraint if shares is None else read[1], tuple(map(str, names)))


def _names(*bounded: Any) -> tuple[Hashable, ...]:
    """Return the names of the sources in bounds given by name; their numbers where bounds are sequences."""
    names: dict[Hashable, None] = {}
    size = 0
    for x in bounded:
        for bound in () if x is None else x[1:3]:
            if isinstance(bound, Mapping):
                names.update(dict.fromkeys(bound))
            elif bound is not None:
                size = max(size, len(bound))
    return tuple(names) or tuple(range(size))


def _read(x: Any, column: str | None, names: Sequence[Hashable], pool: Any, n: int, where: dict[Any, Any]) -> Any:
    own = x.sources if x.sources is not None else column
    by_name = any(isinstance(bound, Mapping) for bound in x[1:3])
    key = (own if isinstance(own, str) else id(own), by_name)
    if key not in where:
        where[key] = _numbers(own, names if by_name else None, pool, n)
    bounds = {name: _bounds(bound, names) for name, bound in zip(x._fields[1:3], x[1:3], strict=True)}
    return x._replace(sources=where[key], **bounds)


def _bounds(bound: Any, names: Sequence[Hashable]) -> Any:
    return tuple(bound.get(name) for name in names) if isinstance(bound, Mapping) else bound


def _numbers(own: Any, names: Sequence[Hashable] | None, pool: Any, n: int) -> Tensor:
    """Return the number of each candidate's source (n,) on the host; -1 for one without a name among ``names``."""
    if pool is None:
        return torch.zeros(0, dtype=torch.int64)
    values = _column(pool, own) if isinstance(own, str) else own
    if len(values) != n:
        raise ValueError(f"the sources {own!r} are {len(values)} for a pool of {n} samples; give one a sample")
    if isinstance(values, Tensor) and (values.ndim != 1 or values.is_floating_point()):
        raise ValueError(f"the sources {own!r} are {values.dtype} {tuple(values.shape)}; give integers ({n},)")
    if names is None and isinstance(values, Tensor):
        return values.cpu().long()
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if names is None:
        if not all(isinstance(value, int) for value in listed):
            raise TypeError(f"the sources {own!r} are not integers: give the bounds by name, as in {{'wiki': 0.25}}")
        return torch.tensor(listed)
    number = {name: s for s, name in enumerate(names)}
    return torch.tensor([number.get(value, -1) for value in listed])


def _column(pool: Any, name: str) -> Any:
    tensors = getattr(pool, "tensors", pool)
    if not isinstance(tensors, Mapping) or name not in tensors:
        there = sorted(map(str, tensors)) if isinstance(tensors, Mapping) else f"a {type(pool).__name__}"
        raise ValueError(f"the pool has no column {name!r} to read sources from; it is or has {there}")
    return tensors[name]
