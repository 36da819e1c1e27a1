"""A planned pass: pool and target held in stacks, answering what `pool_products` asks of a `PoolPass`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from ftw.geometry import Operator
from ftw_torch.records.dtypes import promoted
from ftw_torch.records.stacks import Held, Selected

__all__ = ["Lengths", "PlannedPass"]


class PlannedPass:
    """What `PoolProducts` asks of a pool, answered from gradients held together.

    Parameters
    ----------
    parameters : mapping of str to Parameter
    held : sequence of Held
    losses : tensor (n,)
    target, operators : mapping by parameter name
        g_T and P.
    """

    kept = True

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        held: Sequence[Held],
        losses: Tensor,
        target: Mapping[str, Tensor],
        operators: Mapping[str, Operator],
    ) -> None:
        self.parameters, self.held, self.losses = parameters, held, losses
        self.target, self.operators = target, operators
        self.scores = added([part.scores() for part in held])  # (n,)

    def unscaled(self, x: Tensor, power: int = 1) -> Tensor:
        """Return a product of gradients: no scale is at work."""
        del power
        return x

    @property
    def square(self) -> Tensor:
        """``|g_T|^2`` ()."""
        return added([part.square() for part in self.held])

    def gram(self, indices: Tensor | None) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s)."""
        every = torch.arange(len(self.losses), device=self.losses.device) if indices is None else indices
        return added([part.gram(every) for part in self.held])

    def combine(self, indices: Sequence[int], weights: Sequence[float]) -> dict[str, Tensor]:
        """Return ``{name: sum_i w_i g_i}`` of parameters that were used; samples of zero weight do not enter."""
        pairs = [(i, w) for i, w in zip(indices, weights, strict=True) if w != 0]
        update: dict[str, Tensor] = {}
        if not pairs:
            return {name: p.detach().new_zeros(p.shape) for name, p in self.parameters.items()}
        like, device = self.scores.dtype, self.losses.device  # losses may be narrower than gradients
        chosen = torch.tensor([i for i, _ in pairs]).to(device, non_blocking=True)
        shares = torch.tensor([w for _, w in pairs], dtype=like).to(device, non_blocking=True)
        for part in self.held:
            update |= part.combine(Selected(chosen, shares, pairs))
        return update

    def length(self, update: Mapping[str, Tensor]) -> Tensor:
        """Return ``|u|^2`` () of what `combine` returned last."""
        return added([part.length(update) for part in self.held])

    def against_mean(self, short: Tensor, which: Sequence[int], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return ``|g_T - g_P|^2`` () and ``<g_i, P g_P>`` (s,) of some, for ``g_P`` a sum of kept records."""
        mean = self.combine(which, shares)
        means = added([part.scores(mean) for part in self.held])  # (n,)
        sigma = torch.tensor(shares, dtype=self.scores.dtype).to(means.device, non_blocking=True)
        across = self.scores[torch.tensor(which, device=means.device)] @ sigma  # <g_T, P g_P>
        return self.square - 2 * across + self.length(mean), means[short]


class Lengths:
    """The target's samples as `Target` holds them, asked for their lengths alone."""

    def __init__(self, held: Sequence[Held], operators: Mapping[str, Operator], m: int) -> None:
        self.held, self.operators, self.samples = held, operators, m

    def lengths(self, operators: Mapping[str, Operator]) -> Tensor:
        """Return ``<g_j, P g_j>`` (m,)."""
        other = None if operators is self.operators else operators
        return added([part.lengths(other) for part in self.held])


def added(terms: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, in the widest of their dtypes."""
    wide = reduce(promoted, (x.dtype for x in terms))
    return torch.stack([x.to(wide) for x in terms]).sum(0) if len(terms) > 1 else terms[0]
