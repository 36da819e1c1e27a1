"""The records of a pool, one a micro-batch: Gram matrix, scores, lengths, update."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ftw.geometry import Diagonal, Operator, Scale
from ftw.gradients import Record
from ftw_torch.step.stream import score_by

from .blocks import add_gram, add_sketches, lengths
from .buckets import fits, joined, side_by_side
from .join import empty, seen, some
from .weighted_sum import Picks, weighted_sum

__all__ = ["Pool", "inner"]


class Pool:
    """Records of n samples, in pieces of consecutive samples.

    Parameters
    ----------
    parameters : mapping of str to Parameter
    pieces : sequence of {str: record}
        A parameter that no sample of a piece used may be missing.
    sizes : sequence of int
        Samples of each piece.
    grams : mapping of str to tensor (n, n), optional
        Gram matrices that are there already.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        pieces: Sequence[Mapping[str, Record]],
        sizes: Sequence[int],
        grams: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parameters, self.pieces, self.sizes = parameters, pieces, list(sizes)
        self.grams = {} if grams is None else grams
        self.used = {name for piece in pieces for name in piece} | set(self.grams)

    @property
    def samples(self) -> int:
        """Number n of samples."""
        return sum(self.sizes)

    def gram(self, operators: Mapping[str, Operator], indices: Tensor | None = None) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s) of some samples, or of all."""
        places, back = self._places(indices)
        total: Any = 0.0
        for K in self.grams.values():
            total = total + (K if indices is None else K[indices][:, indices])
        for records, operator in self._parts(operators, places, without=self.grams):
            total = total + add_gram(records, operator)
        out: Tensor = total if back is None else total[back][:, back]
        return out

    def sketches(self, operators: Mapping[str, Operator], size: int, indices: Tensor | None = None) -> Tensor:
        """Return count sketches (s, m) of ``P^1/2 g_i`` of some samples, or of all."""
        places, back = self._places(indices)
        total: Any = 0.0
        for name in self._used():
            total = total + add_sketches(name, self._some(name, places), operators[name], size)
        out: Tensor = total if back is None else total[back]
        return out

    def lengths(self, operators: Mapping[str, Operator]) -> Tensor:
        """Return ``<g_i, P g_i>`` (n,)."""
        out: Tensor = sum(lengths(*part) for part in self._parts(operators, None))  # type: ignore[assignment]
        return out

    def scores(self, direction: Mapping[str, Tensor], indices: Tensor | None = None) -> Tensor:
        """Return ``<g_i, M>`` (s,) of some samples, or of all."""
        places, back = self._places(indices)
        total: Any = 0.0
        for name in self._used():
            if name in direction:
                parts = [score_by(part, direction[name]) for part in self._some(name, places)]
                total = total + torch.cat(parts)
        out: Tensor = total if back is None else total[back]
        return out

    def combine(self, indices: Sequence[int], weights: Sequence[float]) -> dict[str, Tensor]:
        """Return ``{name: sum_i w_i G_i}`` for parameters that were used; samples of zero weight do not enter."""
        chosen = [(i, w) for i, w in zip(indices, weights, strict=True) if w != 0]
        parts, start = [], 0
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            here = [(i - start, w) for i, w in chosen if start <= i < start + size]
            start += size
            if here and piece:
                parts.append((piece, Picks(here, size)))
        out = {}
        for name, p in self.parameters.items():
            if name in self.used:
                found = [weighted_sum(piece[name], picks) for piece, picks in parts if name in piece]
                out[name] = reduce(Tensor.add_, found) if found else p.new_zeros(seen(p.shape))
        return out

    def _used(self) -> list[str]:
        return [name for name in self.parameters if name in self.used]

    def _places(self, indices: Tensor | None) -> tuple[list[Tensor] | None, Tensor | None]:
        """Return the numbers of some samples within each piece, and the way back to their order; None for all."""
        if indices is None or len(self.pieces) == 1:
            return None if indices is None else [indices], None
        found, start = [], 0
        ordered, order = indices.sort()  # pieces come in order
        numbers = ordered.tolist()
        for size in self.sizes:
            here = [i - start for i in numbers if start <= i < start + size]
            found.append(torch.tensor(here, dtype=indices.dtype).to(indices.device, non_blocking=True))
            start += size
        return found, order.argsort()

    def _parts(
        self, operators: Mapping[str, Operator], places: list[Tensor] | None, without: Container[str] = ()
    ) -> Iterator[tuple[list[Record], Operator]]:
        """Yield the records of each parameter, piece by piece, and its operator; the small ones bundled."""
        names = [name for name in self._used() if name not in without]
        small = [name for name in names if all(fits(piece.get(name), operators[name]) for piece in self.pieces)]
        if len(small) > 1:
            bundled: list[Record] = [side_by_side([piece[name] for name in small]) for piece in self.pieces]
            shapes = [self.parameters[name] for name in small]
            yield _picked(bundled, places), joined([operators[name] for name in small], shapes)
            names = [name for name in names if name not in set(small)]
        for name in names:
            yield self._some(name, places), operators[name]

    def _some(self, name: str, places: list[Tensor] | None) -> list[Record]:
        """Return the records of a parameter, piece by piece."""
        found = [
            empty(self.parameters[name], size) if name not in piece else piece[name]
            for piece, size in zip(self.pieces, self.sizes, strict=True)
        ]
        return _picked(found, places)


def _picked(records: list[Record], places: list[Tensor] | None) -> list[Record]:
    """Return the records of some samples, without those pieces that have none."""
    if places is not None:
        records = [some(record, here) for record, here in zip(records, places, strict=True)]
    return [record for record in records if record.n] or records[:1]


def inner(g: Tensor, operator: Operator, h: Tensor) -> Tensor:
    """Return ``<g, P h>`` ()."""
    if isinstance(operator, Diagonal):
        values: Any = operator.values
        return torch.dot((values * h).reshape(-1), g.to(values.dtype).reshape(-1))
    if isinstance(operator, Scale):
        out: Tensor = torch.dot(h.reshape(-1), g.reshape(-1)) * operator.value
        return out
    found: Tensor = operator.inner(g, h)
    return found
