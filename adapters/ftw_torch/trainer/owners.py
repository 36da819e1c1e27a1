"""Which sample each term of a batch's loss belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .documents import Documents

__all__ = ["ByRow", "ByToken", "Owners"]


class Owners(Protocol):
    """Takes the terms of a loss apart by sample."""

    n: int
    in_rows: bool  # whether the samples are the slowest axis

    def may_compare(self, entries: int) -> bool:
        """Return whether a target of so many entries can be taken apart."""
        ...

    def holds(self, x: Tensor) -> bool:
        """Return whether terms can."""
        ...

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum (n,) of each sample's terms."""
        ...

    def means(self, x: Tensor) -> Tensor:
        """Return their mean (n,)."""
        ...

    def cut(self, values: Any) -> list[Any] | None:
        """Return nested values for each sample: its tensors are cut, all else is passed whole; None if none is."""
        ...


class ByRow:
    """Samples are the slowest axis of terms, (n, ...) or (n * k, ...).

    Parameters
    ----------
    n : int
    sizes : frozenset of int, optional
        How many labels a sample may have. A number that is none of them says that entries were left out, and which
        samples the others belong to is not known.
    """

    in_rows = True

    def __init__(self, n: int, sizes: frozenset[int] | None = None) -> None:
        self.n, self.sizes = n, sizes

    def may_compare(self, entries: int) -> bool:
        """Return whether a target of so many entries can be taken apart."""
        return entries % self.n == 0 and (self.sizes is None or entries // self.n in self.sizes)

    def holds(self, x: Tensor) -> bool:
        """Return whether terms can."""
        return x.numel() % self.n == 0 and (not x.ndim or x.shape[0] % self.n == 0)

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum (n,) of each sample's terms."""
        return x.reshape(self.n, -1).sum(1)

    def means(self, x: Tensor) -> Tensor:
        """Return their mean (n,)."""
        return x.reshape(self.n, -1).mean(1)

    def cut(self, values: Any) -> list[Any] | None:
        """Return nested values for each sample; None if no tensor is cut."""
        return _cut(values, self.n, lambda x: list(torch.split(x, 1)) if x.ndim and x.shape[0] == self.n else None)


class ByToken:
    """Terms are those of the T tokens of a row of documents, or of all but its last, each by the token that predicts.

    Parameters
    ----------
    batch : Documents
    """

    in_rows = False

    def __init__(self, batch: Documents) -> None:
        self.n, self._batch = batch.n, batch
        self._tokens = batch.samples.shape[1]

    def may_compare(self, entries: int) -> bool:
        """Return whether a target of so many entries can be taken apart."""
        return entries > 0 and (entries % self._tokens == 0 or entries == self._tokens - 1)

    def holds(self, x: Tensor) -> bool:
        """Return whether terms can."""
        return self._length(x) in (self._tokens, self._tokens - 1)

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum (n,) of each document's terms."""
        each = x.reshape(self._length(x), -1).sum(1)  # (t,)
        return each.new_zeros(self.n).index_add(0, self._batch.samples[0, : len(each)], each)

    def means(self, x: Tensor) -> Tensor:
        """Return their mean (n,)."""
        return self.sums(x) / self.sums(torch.ones_like(x)).clamp(min=1)

    def cut(self, values: Any) -> list[Any] | None:
        """Return nested values for each document; None if no tensor is cut."""

        def rows(x: Tensor) -> list[Tensor] | None:
            return [part[None] for part in self._batch.rows(x)] if self._batch.is_of_tokens(x) else None

        return _cut(values, self.n, rows)

    def _length(self, x: Tensor) -> int:
        shape = x.shape[1:] if x.ndim > 1 and x.shape[0] == 1 else x.shape
        return shape[0] if shape else 0


def _cut(values: Any, n: int, rows: Callable[[Tensor], list[Tensor] | None]) -> list[Any] | None:
    if isinstance(values, Tensor):
        return rows(values)
    if isinstance(values, Mapping):
        cut = {key: _cut(x, n, rows) for key, x in values.items()}
        if all(x is None for x in cut.values()):
            return None
        mapping: Any = type(values)
        return [mapping(**{k: values[k] if x is None else x[i] for k, x in cut.items()}) for i in range(n)]
    if isinstance(values, (tuple, list)) and not hasattr(values, "_fields"):
        pieces = [_cut(x, n, rows) for x in values]
        if all(x is None for x in pieces):
            return None
        sequence: Any = type(values)
        return [sequence(v if x is None else x[i] for v, x in zip(values, pieces, strict=True)) for i in range(n)]
    return None
