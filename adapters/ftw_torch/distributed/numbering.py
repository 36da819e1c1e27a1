"""Candidates numbered through the ranks, of which a choice may see only the good ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import rank_names

__all__ = ["Numbered"]


class Numbered:
    """What the candidates of all ranks have in common, however their scores are made.

    Attributes
    ----------
    good : tensor (g,) or None
        The numbers that a choice sees; None for all.
    measured : bool
        Whether an update is composed for its length.
    """

    def __init__(self, sizes: Sequence[int], scores: Tensor) -> None:
        self.sizes, self.scores, self.n = list(sizes), scores, sum(sizes)
        self.good: Tensor | None = None
        self.measured = True

    def named(self, bad: Tensor) -> str:
        """Return words for some candidates, by rank."""
        return rank_names(bad, self.sizes)

    def length(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Return ``|sum_i w_i g_i|^2`` (), NaN where it is not measured."""
        if not self.measured:
            return torch.full((), torch.nan, dtype=self.scores.dtype)
        return self._composed_length(self._number(indices), weights)

    def _composed_length(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Return ``|sum_i w_i g_i|^2`` () of candidates by number among all."""
        raise NotImplementedError

    def _number(self, indices: Tensor | None) -> Tensor:
        """Return numbers among all candidates, from numbers among the good ones; None stands for all of these."""
        if indices is None:
            return torch.arange(self.n) if self.good is None else self.good
        return indices if self.good is None else self.good[indices]
