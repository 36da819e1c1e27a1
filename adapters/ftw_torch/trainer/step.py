"""One pool of a trainer's step: among the pools of all processes, and its gradient among those accumulated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ftw import Selection, Status
from ftw_torch import batches
from ftw_torch.distributed import DistributedFilterThenWeight
from ftw_torch.distributed.collectives import Exchange
from ftw_torch.errors import SelectionError
from ftw_torch.selector import FilterThenWeight

__all__ = ["Ranks", "Selector", "backward"]

Selector = FilterThenWeight | DistributedFilterThenWeight


class Ranks:
    """The pools of all processes in a step, numbered through the ranks; one process alone needs no collectives.

    Parameters
    ----------
    n : int
        Samples of this process's pool.
    several : bool
        Whether there are other processes.
    """

    def __init__(self, n: int, *, several: bool) -> None:
        self.exchange = Exchange() if several else None
        self.sizes = [n] if self.exchange is None else [size for (size,) in self.exchange.counts([n])]
        self.start = 0 if self.exchange is None else sum(self.sizes[: self.exchange.rank])
        self.n, self.total = n, sum(self.sizes)

    def mine(self, indices: Tensor) -> Tensor:
        """Return the places in this process's pool of those samples that stand in it."""
        return indices[(indices >= self.start) & (indices < self.start + self.n)] - self.start

    def rows(self, own: Tensor) -> Tensor:
        """Return the numbers (total,) of all samples from those of this process's (n,)."""
        return own if self.exchange is None else self.exchange.rows(own[:, None], self.sizes, "rows")[:, 0]

    def texts(self, text: str) -> list[str]:
        """Return every process's text."""
        return [text] if self.exchange is None else self.exchange.texts(text)

    def add(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over the processes."""
        return tensors if self.exchange is None else self.exchange.add(tensors, "uniform")


def backward(
    selector: Selector, ranks: Ranks, pool: Any, target: Any, *, keep: int, steps: int, policy: str, autocast: Any
) -> Selection:
    """Add the gradient of a pool's choice to ``.grad``, as one of ``steps`` pools; after an error it is as it was.

    ``policy`` is that for a pool without anything useful; ``autocast`` is the context of the passes.
    """
    parameters = [p for p in selector.model.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    done = False
    try:
        for p in parameters:
            p.grad = None
        with autocast:
            selection = selector.backward(pool, target, keep=keep)
        if policy != "best" and int(selection.status) == Status.NOTHING_USEFUL:
            selection = _useless(parameters, selector, ranks, pool, selection, policy)
        for p, old in zip(parameters, before, strict=True):
            if p.grad is None:
                p.grad = old
            elif steps > 1:
                p.grad.div_(steps)
                p.grad = p.grad if old is None else old.add_(p.grad)
            elif old is not None:
                p.grad = old.add_(p.grad)
        done = True
    finally:
        if not done:
            for p, old in zip(parameters, before, strict=True):
                p.grad = old
    return selection


def _useless(
    parameters: list[nn.Parameter],
    selector: Selector,
    ranks: Ranks,
    pool: Any,
    selection: Selection,
    policy: str,
) -> Selection:
    """Follow the policy for a pool without anything useful."""
    if policy == "raise":
        raise SelectionError(f"{Status.NOTHING_USEFUL.message} (NOTHING_USEFUL)", status=Status.NOTHING_USEFUL)
    for p in parameters:
        p.grad = None
    if policy == "skip":
        return selection._replace(weights=torch.zeros_like(selection.weights))
    good = torch.nonzero(torch.isfinite(selection.scores))[:, 0]  # (n',), of all processes
    share = float(selection.weights.sum()) / len(good)
    mine = ranks.mine(good)
    if len(mine):
        for piece in batches.split(batches.take(pool, mine), len(mine), selector.options.micro_batch):
            torch.autograd.backward(selector.per_sample_loss(selector.model, piece).sum() * share)
    if ranks.exchange is not None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for p, g in zip(parameters, ranks.add(grads), strict=True):
            p.grad = g
    return selection._replace(indices=good, weights=torch.full_like(selection.scores[good], share))
