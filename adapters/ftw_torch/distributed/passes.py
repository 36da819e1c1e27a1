"""Passes that all ranks make together: losses without gradients, and weighted gradients by an ordinary backward.

Where a forward has collectives, every rank runs as many micro-batches as the rank with most of them; one that has run
out takes a sample that it has, at weight zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftw_torch import batches
from ftw_torch.capture.backward import gradients, has_reentrant
from ftw_torch.capture.passes import Passes
from ftw_torch.packing import PackedBatch
from ftw_torch.step.target import refuse_nonfinite

from .collectives import Exchange
from .sharding import Sharding, local_part, redistributed, undivided

__all__ = ["RankPasses", "Weighted", "cut"]

Weighted = tuple[Any, int, Tensor]  # a micro-batch, its size n and the weights (n,) of its samples


class RankPasses:
    """The passes of one step.

    Parameters
    ----------
    exchange : Exchange
    sharding : Sharding
    passes : Passes
    parameters : mapping of str to Parameter
    spare : batch or None
        One sample, for passes in which this rank has nothing to do.
    """

    def __init__(
        self,
        exchange: Exchange,
        sharding: Sharding,
        passes: Passes,
        parameters: Mapping[str, nn.Parameter],
        spare: Any,
    ) -> None:
        self.exchange, self.sharding, self.passes = exchange, sharding, passes
        self.parameters, self.spare = parameters, spare

    def losses(self, pieces: Sequence[tuple[Any, int]], rounds: int) -> Tensor:
        """Return this rank's losses (n,) at the present parameters; ``rounds`` is the most micro-batches of a rank."""
        found: list[Tensor] = []
        for i in range(max(len(pieces), rounds if self.sharding.hooked else 0)):
            batch, n = pieces[i] if i < len(pieces) else (self.spare, 1)

            def forward(batch: Any = batch, n: int = n) -> Tensor:
                return undivided(self.passes.values(batch, n, "pool"))

            losses = self._forward(forward, "a forward of its pool")
            self.sharding.settle()
            found.append(losses[: n if i < len(pieces) else 0])
        if not self.sharding.hooked:
            self.exchange.together("a forward of its pool", lambda: None)
        return torch.cat(found) if found else torch.zeros(0)

    def gradient(
        self, pieces: Sequence[Weighted], rounds: int, what: str, *, finite: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], set[str]]:
        """Return this rank's losses (n,), ``sum_i w_i g_i`` over all ranks, and the parameters that any of them used.

        ``finite``: a loss that is not raises, naming the sample.
        """
        sharding, names = self.sharding, list(self.parameters)
        found: list[Tensor] = []
        total: dict[str, Tensor] = {}
        with sharding.collected():
            for i in range(max(len(pieces), rounds if sharding.hooked else 0)):
                batch, n, weights = pieces[i] if i < len(pieces) else (self.spare, 1, None)

                def forward(batch: Any = batch, n: int = n, weights: Tensor | None = weights) -> tuple[Tensor, Tensor]:
                    with torch.enable_grad():
                        losses = undivided(self.passes.losses(batch, n, what))
                        share = losses.sum() * 0 if weights is None else (losses * weights.to(losses)).sum()
                    if finite and weights is not None:
                        refuse_nonfinite(losses.detach(), None, what)
                    return losses.detach(), share

                losses, share = self._forward(forward, f"a forward of its {what}")
                found.append(losses[: n if weights is not None else 0])
                if sharding.hooked:
                    sharding.backward(share, what)
                else:
                    grads = gradients(share, list(self.parameters.values()), reentrant=has_reentrant([share]))
                    for name, g in zip(names, grads, strict=True):
                        if g is not None:
                            total[name] = total[name] + g if name in total else g
            if sharding.hooked:
                total = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
                sharding.settle()
        if not sharding.hooked:
            self.exchange.together(f"a forward of its {what}", lambda: None)
        losses = torch.cat(found) if found else torch.zeros(0)
        total = {name: redistributed(g.detach(), self.parameters[name]) for name, g in total.items()}
        return losses, *self._reduced(total, what)

    def _reduced(self, total: dict[str, Tensor], what: str) -> tuple[dict[str, Tensor], set[str]]:
        """Return the sums over the ranks, and which parameters any rank used."""
        factors = self.sharding.factors
        out = {
            name: redistributed(g * factors[name], self.parameters[name])
            for name, g in total.items()
            if name in factors
        }
        apart = [name for name in self.parameters if name not in factors]
        used = set(out)
        if apart and self.exchange.world > 1:
            own = [local_part(total.get(name, torch.zeros_like(self.parameters[name].detach()))) for name in apart]
            flags = torch.tensor([float(name in total) for name in apart]).to(own[0].device)
            *sums, flags = self.exchange.add([*own, flags], what)
            for name, g, mine, flag in zip(apart, sums, own, flags.tolist(), strict=True):
                if flag:
                    used.add(name)
                    out[name] = _as(g.to(mine.dtype), self.parameters[name])
        else:
            out |= {name: total[name] for name in apart if name in total}
            used = set(out)
        return out, used

    def _forward(self, work: Any, what: str) -> Any:
        """Return a forward's result; where ranks wait for each other in it, one that fails makes all raise."""
        if not self.sharding.hooked:
            return self._apart(work, what)
        try:
            return self.exchange.together(what, lambda: self.sharding.forward(work))
        except Exception:
            self.sharding.settle()
            raise

    def _apart(self, work: Any, what: str) -> Any:
        """Return ``work()``; a failure is raised, on the ranks that wait at the end of their pass too."""
        try:
            return work()
        except Exception as caught:
            error = caught
        self.exchange.together(what, lambda: _raise(error))
        raise AssertionError  # together raises


def cut(batch: Any, what: str, micro_batch: int | None) -> list[tuple[Any, int]]:
    """Return the micro-batches of a batch with their sizes; none of None."""
    if batch is None:
        return []
    if isinstance(batch, PackedBatch):
        raise TypeError(f"the {what} is a PackedBatch, which several processes do not share yet; use FilterThenWeight")
    pieces = batches.split(batch, batches.size(batch, what), micro_batch)
    return [(piece, batches.size(piece, what)) for piece in pieces]


def _as(local: Tensor, p: Any) -> Tensor:
    """Return this rank's part of a gradient in the form of its parameter."""
    if not hasattr(p, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _raise(error: Exception) -> None:
    raise error
