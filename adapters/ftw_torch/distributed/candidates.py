"""The candidates of all ranks in one step: what every rank knows of them, and the collectives behind each answer.

Every rank asks the same questions in the same order, since all make the same choice from the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ftw
from ftw.geometry import Operator
from ftw.gradients import Record
from ftw.spi import Products, squared_norms, strata
from ftw_torch.capture.fsdp import part_bytes
from ftw_torch.capture.internals import tree_leaves
from ftw_torch.optim.geometry import geometry, unwrapped

from .collectives import Exchange, Layouts
from .gram import by_rank, gram_of_ranks
from .numbering import Numbered

__all__ = ["AllCandidates", "Local", "gather_candidates"]


class Local(NamedTuple):
    """The losses and records of one rank."""

    candidates: dict[str, Record]
    losses: Tensor  # (n,)
    samples: dict[str, Record] | None  # of the target
    total: dict[str, Tensor]  # sum of the target's gradients
    target_losses: Tensor  # (m,)


class Scored(NamedTuple):
    """The target and the scores, the same on every rank."""

    mean: dict[str, Tensor]  # g_T
    loss: Tensor  # (), of the target
    operators: dict[str, Operator]
    lengths: Tensor | None  # (), mean squared length of the target samples
    targets: int  # target samples that the guard may judge by
    losses: Tensor  # (N,)
    scores: Tensor  # (N,)


def gather_candidates(
    exchange: Exchange,
    parameters: dict[str, torch.nn.Parameter],
    local: Local,
    *,
    keep: int,
    optimizer: Any,
    damping: float,
    sketch: int | None,
    max_bytes: int,
) -> AllCandidates:
    """Return the candidates of all ranks, from one all-reduce of g_T and one all-gather of losses and scores."""
    n, m = len(local.losses), len(local.target_losses)
    counts = exchange.counts([n, m])
    sizes, targets = [size for size, _ in counts], sum(size for _, size in counts)
    if not 1 <= keep <= sum(sizes) or targets == 0:
        raise ValueError(
            f"keep={keep} of {sum(sizes)} candidates on all ranks, with {targets} target samples; offer more"
        )
    layouts = Layouts(exchange, local.candidates, parameters)
    *found, loss = exchange.add([*local.total.values(), local.target_losses.sum()], "target")
    mean = {name: g / targets for name, g in zip(local.total, found, strict=True)}
    operators = _geometry(exchange, optimizer, parameters, mean, damping)
    own, norms = exchange.together("scoring its pool", lambda: _scored(local, mean, operators))
    norms = exchange.add([norms], "target")[0]
    judged = targets if local.samples is not None else 0
    lengths = norms / targets if judged > 1 else None
    both = exchange.rows(torch.stack([local.losses.to(own.dtype), own], 1), sizes, "scores")  # (N, 2)
    scored = Scored(mean, loss / targets, operators, lengths, judged, both[:, 0], both[:, 1])
    return AllCandidates(exchange, parameters, layouts, local, sizes, scored, sketch=sketch, max_bytes=max_bytes)


def _geometry(
    exchange: Exchange,
    optimizer: Any,
    parameters: dict[str, torch.nn.Parameter],
    mean: dict[str, Tensor],
    damping: float,
) -> dict[str, Operator]:
    """Return P, the same on every rank: from the same state, or from that of all where it is sharded."""
    optimizers = unwrapped(optimizer)
    for p in parameters.values():
        if hasattr(p, "placements"):
            state = [one.state.get(p, {}) for one in optimizers]
            exchange.count("state", sum(map(part_bytes, tree_leaves([p, state]))))
    return geometry(optimizers, parameters, mean, damping=damping)


def _scored(local: Local, mean: dict[str, Tensor], operators: dict[str, Operator]) -> tuple[Tensor, Tensor]:
    """Return the scores (n,) of this rank's candidates, and the sum of its target samples' squared lengths ()."""
    own = ftw.scores(local.candidates, mean, operators) if len(local.losses) else local.losses
    norms = own.new_zeros(())
    if local.samples is not None and len(local.target_losses):
        norms = squared_norms(local.samples, operators).sum()
    return own, norms


class AllCandidates(Numbered):
    """The candidates of all ranks, numbered through the ranks; `gather_candidates` makes one.

    Losses, scores and Gram matrices are on the host, where the choice is made; records stay on their rank.
    """

    def __init__(
        self,
        exchange: Exchange,
        parameters: dict[str, torch.nn.Parameter],
        layouts: Layouts,
        local: Local,
        sizes: list[int],
        scored: Scored,
        *,
        sketch: int | None,
        max_bytes: int,
    ) -> None:
        super().__init__(sizes, scored.scores.cpu())  # (N,)
        self.exchange, self.parameters, self.layouts, self.local = exchange, parameters, layouts, local
        self.scored, self.sketch, self.max_bytes = scored, sketch, max_bytes
        self.start = sum(sizes[: exchange.rank])
        self.operators, self.device = scored.operators, scored.scores.device
        self.losses = scored.losses.cpu()  # (N,)
        self.target_losses, self.targets = scored.loss.cpu(), scored.targets

    def products(self) -> Products:
        """Return the inner products that a choice asks for."""
        lengths = self.scored.lengths
        return Products(
            lambda indices: self.gram(self._number(indices)),
            self.length,
            self._inner(self.scored.mean),
            None if lengths is None else lengths.to(self.scores),
            self._against_mean,
        )

    def refuse_target(self) -> None:
        """Do nothing: every rank has looked at the losses of its own target samples."""

    def _composed_length(self, indices: Tensor, weights: Tensor) -> Tensor:
        return self._inner(self.reduced(indices, weights, "length"))

    def _against_mean(self, order: Tensor, short: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``|g_T - g_P|^2`` () and ``<g_i, P g_P>`` (s,), g_P the pool's mean as estimated by `strata`."""
        places, shares = strata(len(order), len(order) if short is None else len(short))
        weights = torch.tensor(shares, dtype=self.scores.dtype)
        mean = self.reduced(self._number(order[torch.tensor(places)]), weights, "guard")
        local = self.local
        own = ftw.scores(local.candidates, mean, self.operators) if len(local.losses) else self.scored.scores[:0]
        every = self.exchange.rows(own.to(self.scores.dtype)[:, None], self.sizes, "guard")[:, 0].cpu()  # (N,)
        apart = {name: g - mean[name] for name, g in self.scored.mean.items()}
        return self._inner(apart), every[self._number(short)]

    def gram(self, indices: Tensor) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s) of candidates of all ranks, exactly or from sketches."""
        mine, counts, places = by_rank(indices.tolist(), self.sizes, self.exchange.rank)
        here = torch.tensor(mine, dtype=torch.int64, device=self.device)
        return gram_of_ranks(
            self.exchange,
            self.layouts,
            ftw.take(self.local.candidates, here) if mine else {},
            counts,
            places,
            self.operators,
            like=self.scored.scores,
            sketch=self.sketch,
            max_bytes=self.max_bytes,
        )

    def reduced(self, indices: Tensor, weights: Tensor, what: str) -> dict[str, Tensor]:
        """Return ``{name: sum_i w_i g_i}`` over candidates of all ranks."""
        here = (indices >= self.start) & (indices < self.start + len(self.local.losses)) & (weights != 0)
        own = {name: torch.zeros_like(g) for name, g in self.scored.mean.items()}
        if bool(here.any()):
            selected = ftw.take(self.local.candidates, (indices[here] - self.start).to(self.device))
            own |= ftw.combine(selected, weights[here].to(self.device))
        return dict(zip(own, self.exchange.add(list(own.values()), what), strict=True))

    def _inner(self, g: Mapping[str, Tensor]) -> Tensor:
        total: Any = sum(operator.inner(g[name], g[name]) for name, operator in self.operators.items())
        return torch.as_tensor(total, dtype=self.scores.dtype, device="cpu")
