"""The records of a pool, in the pieces in which it was walked: Gram matrix, scores, lengths, update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftw import Dense, OuterProduct, Rows, Sum
from ftw.geometry import Diagonal, Operator, Scale
from ftw.gradients import Record

from .blocks import add_gram, add_sketches, lengths, product
from .records import empty, seen, some
from .stream import score_by

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
        order = None
        if indices is not None and len(self.pieces) > 1:  # pieces come in order
            indices, order = indices.sort()
        total: Any = 0.0
        for name, K in self.grams.items():
            del name
            total = total + (K if indices is None else K[indices][:, indices])
        for name in self.parameters:
            if name in self.used and name not in self.grams:
                total = total + add_gram(self._some(name, indices), operators[name])
        if order is not None:
            back = order.argsort()
            total = total[back][:, back]
        out: Tensor = total
        return out

    def sketches(self, operators: Mapping[str, Operator], size: int, indices: Tensor | None = None) -> Tensor:
        """Return count sketches (s, m) of ``P^1/2 g_i`` of some samples, or of all."""
        order = None
        if indices is not None and len(self.pieces) > 1:  # pieces come in order
            indices, order = indices.sort()
        total: Any = 0.0
        for name in self.parameters:
            if name in self.used:
                total = total + add_sketches(name, self._some(name, indices), operators[name], size)
        out: Tensor = total if order is None else total[order.argsort()]
        return out

    def lengths(self, operators: Mapping[str, Operator]) -> Tensor:
        """Return ``<g_i, P g_i>`` (n,)."""
        found = [lengths(self._some(name, None), operators[name]) for name in self.parameters if name in self.used]
        total: Any = found[0]
        for x in found[1:]:
            total = total + x
        out: Tensor = total
        return out

    def scores(self, direction: Mapping[str, Tensor], indices: Tensor | None = None) -> Tensor:
        """Return ``<g_i, M>`` (s,) of some samples in the order of the pool, or of all."""
        total: Any = 0.0
        for name, m in direction.items():
            if name in self.used:
                total = total + torch.cat([score_by(part, m, None) for part in self._some(name, indices)])
        out: Tensor = total
        return out

    def combine(self, indices: Sequence[int], weights: Sequence[float]) -> dict[str, Tensor]:
        """Return ``{name: sum_i w_i G_i}`` for parameters that were used; samples of zero weight do not enter."""
        chosen = [(i, w) for i, w in zip(indices, weights, strict=True) if w != 0]
        out = {}
        for name, p in self.parameters.items():
            if name not in self.used:
                continue
            total, start = None, 0
            for piece, size in zip(self.pieces, self.sizes, strict=True):
                here = [(i - start, w) for i, w in chosen if start <= i < start + size]
                start += size
                if here and name in piece:
                    total = _add(total, piece[name], here)
            out[name] = p.new_zeros(seen(p.shape)) if total is None else total
        return out

    def _some(self, name: str, indices: Tensor | None) -> list[Record]:
        """Return the records of some samples (sorted, if there are several pieces), piece by piece."""
        found, start = [], 0
        limits = None if indices is None or len(self.pieces) == 1 else indices.tolist()
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            record = piece.get(name)
            record = empty(self.parameters[name], size) if record is None else record
            if limits is not None and indices is not None:
                local = [i - start for i in limits if start <= i < start + size]
                record = some(record, torch.tensor(local, dtype=indices.dtype, device=indices.device))
            elif indices is not None:
                record = some(record, indices)
            found.append(record)
            start += size
        return [record for record in found if record.samples] or found[:1]


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


def _add(total: Tensor | None, record: Record, chosen: list[tuple[int, float]]) -> Tensor:
    """Add ``sum_i w_i G_i`` of a record to a total."""
    if isinstance(record, Sum):
        for part in record.parts:
            total = _add(total, part, chosen)
        assert total is not None
        return total
    b: Any = record.grads if isinstance(record, Dense) else record.output_grads
    wide = torch.promote_types(b.dtype, torch.float32)
    total = torch.zeros(record.shape, dtype=wide, device=b.device) if total is None else total
    if isinstance(record, Dense):
        for i, w in chosen:
            total.add_(b[i], alpha=w)
        return total
    if isinstance(record, OuterProduct) and record.inputs.shape[1] < 16:  # few tokens: all samples in one product
        a: Any = record.inputs
        which = torch.tensor([i for i, _ in chosen], device=b.device)
        weights = torch.tensor([w for _, w in chosen], dtype=wide, device=b.device)
        scaled = b.index_select(0, which).to(wide) * weights[:, None, None]  # (k, t, d_out)
        picked = a.index_select(0, which).to(wide)  # (k, t, d_in)
        return total.addmm_(scaled.flatten(0, 1).T, picked.flatten(0, 1))
    for i, w in chosen:
        if isinstance(record, Rows):
            indices: Any = record.indices
            total.index_add_(0, indices[i], b[i].to(wide), alpha=w)
        else:
            a = record.inputs
            if a.dtype == b.dtype == wide:
                total.addmm_(b[i].T, a[i], alpha=w)
            else:
                total.add_(product(b[i : i + 1].mT, a[i : i + 1])[0], alpha=w)
    return total
