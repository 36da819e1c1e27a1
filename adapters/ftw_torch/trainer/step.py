"""One pool of a trainer's step: among the pools of all processes, and its gradient among those accumulated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ftw import Selection, Status
from ftw_torch import batches
from ftw_torch.distributed import DistributedFilterThenWeight
from ftw_torch.distributed.collectives import Exchange
from ftw_torch.distributed.sharding import free
from ftw_torch.errors import SelectionError
from ftw_torch.selector import FilterThenWeight

__all__ = ["Ranks", "Selector", "backward", "train_on"]

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

    def sum(self, number: int) -> int:
        """Return the sum of a number over the processes."""
        return sum(int(text) for text in self.texts(str(number)))

    def add(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over the processes."""
        return tensors if self.exchange is None else self.exchange.add(tensors, "uniform")


def backward(
    selector: Selector,
    ranks: Ranks,
    pool: Any,
    choose: Callable[[], Selection],
    *,
    steps: int,
    policy: str,
    autocast: Callable[[], AbstractContextManager[Any]],
    shared: Callable[[], Callable[[Any], Tensor | None] | None] = lambda: None,
) -> tuple[Selection, Tensor | None]:
    """Add the gradient of a pool's choice to ``.grad``, as one of ``steps`` pools; after an error it is as it was.

    Parameters
    ----------
    choose : callable
        Makes the choice, and adds its gradient to ``.grad``.
    steps : int
        Pools whose mean gradient is the step's.
    policy : str
        For a pool without anything useful.
    autocast : callable
        Gives the context of a pass.
    shared : callable, optional
        Asked after the pool's pass for a function that returns the term of a batch's loss that belongs to no single
        sample. That of the samples trained on is added; None: there is none.

    Returns
    -------
    Selection, and the value of that term () or None
    """
    free(selector.model)
    parameters = [p for p in selector.model.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    done = False
    try:
        for p in parameters:
            p.grad = None
        with autocast():
            selection = choose()
        if policy != "best" and int(selection.status) == Status.NOTHING_USEFUL:
            selection = _useless(parameters, selector, ranks, pool, selection, policy)
        term, value = shared(), None
        if term is not None:
            if any(hasattr(p, "placements") for p in parameters):
                raise ValueError(
                    "the loss has a term that belongs to the whole batch (a router's balance loss), whose gradient is "
                    "not taken over shards: turn it off (output_router_logits=False), or train without fsdp"
                )
            with autocast():
                value = _add_shared(parameters, selector, ranks, pool, selection, term)
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
    return selection, value


def train_on(selector: FilterThenWeight, pool: Any, target: Any, selection: Selection) -> Selection:
    """Add the gradient of a selection made before to ``.grad``, by a plain backward; return it with the losses now."""
    options, model, loss = selector.options, selector.model, selector.per_sample_loss
    share = options.train_on_target
    used = torch.nonzero(selection.weights != 0)[:, 0]  # (k',)
    losses, done = selection.losses.clone(), 0
    if len(used) and share < 1:
        chosen = batches.take(pool, selection.indices[used])
        for piece in batches.split(chosen, len(used), options.micro_batch):
            found = loss(model, piece)  # (m,)
            some = used[done : done + len(found)]
            weights = selection.weights[some].to(found.device, torch.promote_types(found.dtype, torch.float32))
            torch.autograd.backward((found * weights).sum() * (1 - share))
            losses[selection.indices[some]] = found.detach().to(losses)
            done += len(found)
    if share and len(used):
        n = batches.size(target, "target")
        for piece in batches.split(target, n, options.micro_batch):
            torch.autograd.backward(loss(model, piece).sum() * (share / n))
    return selection._replace(losses=losses)


def _add_shared(
    parameters: list[nn.Parameter],
    selector: Selector,
    ranks: Ranks,
    pool: Any,
    selection: Selection,
    term: Callable[[Any], Tensor | None],
) -> Tensor:
    """Add the gradient of the term that belongs to the batch of the samples trained on, times their weights' sum.

    Returns its value.

    As in data-parallel training, a process has a term of its own samples, and a micro-batch one of its own.
    """
    used = selection.weights > 0
    indices, weights = selection.indices[used], selection.weights[used]
    here = (indices >= ranks.start) & (indices < ranks.start + ranks.n)
    mine, share = indices[here] - ranks.start, float(weights[here].sum())
    total: list[Tensor | None] = [None] * len(parameters)
    value = parameters[0].new_zeros(())
    if len(mine):
        for piece in batches.split(batches.take(pool, mine), len(mine), selector.options.micro_batch):
            found = term(piece)
            if found is None:
                continue
            part = share * batches.size(piece, "pool") / len(mine)
            value = value + found.detach().to(value.dtype) * part
            if not found.requires_grad:
                continue
            grads = torch.autograd.grad(found * part, parameters, allow_unused=True)
            total = [x if g is None else g if x is None else x + g for x, g in zip(total, grads, strict=True)]
    if ranks.exchange is not None:
        full = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, total, strict=True)]
        *added, value = ranks.add([*full, value])
        total = list(added)
    for p, g in zip(parameters, total, strict=True):
        if g is not None:
            p.grad = g.to(p.dtype) if p.grad is None else p.grad.add_(g.to(p.grad.dtype))
    return value


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
