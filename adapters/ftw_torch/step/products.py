"""The inner products that a choice asks for, answered on the host after a pool pass.

What is nearly always asked for comes in one transfer: losses, scores, lengths, and the Gram matrix of the shortlist.
The rest (a Gram matrix of other candidates after some were dropped, the pool's mean when the guard opens
unexpectedly) costs one more each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftw import guard
from ftw.geometry import Operator
from ftw.spi import Products, strata

from .planned import PlannedPass
from .pool_pass import PoolPass
from .target import Target, named_samples, refuse_target

__all__ = ["PoolProducts", "fetch", "pool_products"]


class PoolProducts:
    """Losses, scores and inner products of a pool, on the host; `pool_products` makes one.

    Parameters
    ----------
    pool_pass : PoolPass or PlannedPass
    target : Target
    operators : mapping of str to operator
    fetched : sequence
        Losses (n,), scores (n,), target losses (m,), ``|g_T|^2`` (), the mean of the target samples' squared lengths ()
        or None, a Gram matrix (s, s) or None, and the candidates (s,) it is of.

    Attributes
    ----------
    losses, scores : tensor (n,)
    target_losses : tensor (m,)
    targets : int
        Number of target samples that the guard may judge by.
    good : tensor (n',) or None
        The candidates that take part; None for all. Indices in questions and answers count among them.
    """

    def __init__(
        self, pool_pass: PoolPass | PlannedPass, target: Target, operators: dict[str, Operator], fetched: Sequence[Any]
    ) -> None:
        self.pool_pass, self.target, self.operators = pool_pass, target, operators
        self.losses, self.scores, self.target_losses, self.square, self.lengths, self._gram, self._known = fetched
        self.targets = 0 if target.samples is None else target.samples.samples
        self.good: Tensor | None = None
        self.measured = True  # whether an update is composed for its length
        self._composed: dict[tuple[Any, ...], dict[str, Tensor]] = {}

    def named(self, bad: Tensor) -> str:
        """Return words for some candidates."""
        return named_samples(bad, "pool")

    def refuse_target(self) -> None:
        """Raise if the target's gradient is not finite, naming the samples."""
        refuse_target(self.target)

    def products(self) -> Products:
        """Return them in the form in which `ftw.choice.choose` asks."""
        return Products(self.gram, self.length, self.square, self.lengths, self.against_mean)

    def gram(self, indices: Tensor | None) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s)."""
        where = self._place(indices)
        known = self._among(where)
        if known is not None:
            return known
        found: Tensor = fetch([self.pool_pass.gram(where.to(self.pool_pass.losses.device))])[0]
        return found

    def length(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Return ``|sum_i w_i g_i|^2`` (), NaN where it is not measured."""
        if not self.measured:
            return torch.full((), torch.nan, dtype=self.scores.dtype)
        update = self.update(self._place(indices), weights)
        return self.pool_pass.unscaled(self.pool_pass.length(update), 2).to(self.scores.device)

    def update(self, indices: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return ``{name: sum_i w_i g_i}`` of candidates by their numbers in the pool, on the parameters' device."""
        key = tuple(indices.tolist()), tuple(weights.tolist())
        if key not in self._composed:
            self._composed = {key: self.pool_pass.combine(*key)}
        return self._composed[key]

    def against_mean(self, order: Tensor, short: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``|g_T - g_P|^2`` () and ``<g_i, P g_P>`` (s,), g_P the pool's mean as estimated by `strata`."""
        places, shares = strata(len(order), len(order) if short is None else len(short))
        own, which = self._place(short), self._place(order[torch.tensor(places, device=order.device)])
        K = self._among(torch.cat([own, which]))
        if K is not None or not self.pool_pass.kept:
            K = self.gram(torch.cat([own, which])) if K is None else K
            sigma = torch.tensor(shares, dtype=K.dtype)  # (q,)
            s = len(own)
            b = self.scores[which].to(K.dtype)  # (q,)
            distance = self.square - 2 * (b @ sigma) + sigma @ K[s:, s:] @ sigma
            found = [distance, K[:s, s:] @ sigma]
        else:
            device = self.pool_pass.losses.device
            found = fetch(list(self.pool_pass.against_mean(own.to(device), which.tolist(), shares)))
        return found[0].to(self.scores.dtype), found[1].to(self.scores.dtype)

    def _place(self, indices: Tensor | None) -> Tensor:
        """From numbers among those that take part to numbers in the pool."""
        if indices is None:
            return torch.arange(len(self.scores)) if self.good is None else self.good
        return indices if self.good is None else self.good[indices]

    def _among(self, where: Tensor) -> Tensor | None:
        """Return the part of the Gram matrix that is here, None if some of it is not."""
        if self._known is None or not bool(torch.isin(where, self._known).all()):
            return None
        at = torch.searchsorted(self._known, where)
        found: Tensor = self._gram[at][:, at]
        return found


def pool_products(
    pool_pass: PoolPass | PlannedPass,
    target: Target,
    operators: dict[str, Operator],
    asked: int,
    order: Callable[[Tensor, int], Tensor] | None = None,
) -> PoolProducts:
    """Return the inner products after a pool pass; the Gram matrix of the ``asked`` best by score comes along.

    ``order(scores (n,), asked) -> (n,)`` says who these are where it is not the scores alone.
    """
    n = len(pool_pass.losses)
    square = pool_pass.square
    lengths = None if target.samples is None else pool_pass.unscaled(target.samples.lengths(operators).mean(), 2)
    known = None
    if asked:
        rest = strata(n, asked)[0][asked:] if _may_ask_for_mean(square, lengths, target) else []
        places = [*range(asked), *rest]  # from whose Gram matrix the pool's mean can be read off
        # NaN first or last: dropped in any case
        ranked = (
            pool_pass.scores.argsort(descending=True, stable=True) if order is None else order(pool_pass.scores, asked)
        )
        chosen = torch.tensor(places).to(ranked.device, non_blocking=True)
        known = ranked[chosen].sort().values
    gram = None if known is None else pool_pass.gram(None if len(known) == n else known)
    found = [pool_pass.losses, pool_pass.scores, target.losses, square, lengths, gram, known]
    return PoolProducts(pool_pass, target, operators, fetch(found))


def _may_ask_for_mean(square: Tensor, lengths: Tensor | None, target: Target) -> bool:
    """Return whether the guard will ask for the pool's mean; on a device, where looking would wait, that it may."""
    if lengths is None or target.samples is None:
        return False
    return square.device.type != "cpu" or bool(guard.signal(square, lengths, target.samples.samples)[0] < 1)


def fetch(tensors: list[Any]) -> list[Any]:
    """Return the tensors on the host, at the cost of one wait for the device; None stays None."""
    found = [x for x in tensors if x is not None]
    if all(x.device.type == "cpu" for x in found):
        return tensors
    wide = torch.float64 if any(x.dtype in (torch.float64, torch.int64) for x in found) else torch.float32
    flat = torch.cat([x.reshape(-1).to(wide) for x in found]).cpu()
    parts = iter(torch.split_with_sizes(flat, [x.numel() for x in found]))
    return [None if x is None else next(parts).to(x.dtype).view(x.shape) for x in tensors]
