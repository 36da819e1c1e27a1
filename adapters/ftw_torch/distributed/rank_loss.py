"""One rank's share of a selection's weighted loss, for a plain backward of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftw import Selection
from ftw_torch import batches

from .sharding import fsdp_modules, undivided

if TYPE_CHECKING:
    from .selector import DistributedFilterThenWeight

__all__ = ["weighted_loss_of_rank"]


def weighted_loss_of_rank(
    selector: DistributedFilterThenWeight, pool: Any, selection: Selection, target: Any, model: nn.Module | None
) -> Tensor:
    """Return ``W ((1 - a) sum_i w_i loss_i + a / M sum_j loss_Tj)`` () over this rank's samples.

    W ranks, M target samples on all of them. A rank without samples returns zero times a loss of one.
    """
    share = selector.options.train_on_target
    if model is None and not fsdp_modules(selector.model) and selector.ranks().world > 1:
        raise ValueError(
            "nothing averages the gradients of the plain model over the ranks: give the DistributedDataParallel "
            "wrapper, weighted_loss(..., model=ddp)"
        )
    if share and target is None:
        raise ValueError("train_on_target is on: weighted_loss(pool, selection, target) requires the target")
    model = selector.model if model is None else model
    exchange, loss = selector.ranks(), selector.per_sample_loss
    rows, weights = selector.mine(selection)
    used = torch.nonzero(weights != 0)[:, 0]
    total: Any = 0.0
    if len(used) and share < 1:
        losses = undivided(loss(model, batches.take(pool, rows[used])))  # (k',)
        wide = torch.promote_types(losses.dtype, torch.float32)
        total = (losses * weights[used].to(losses.device, wide)).sum() * (1 - share)
    elif share < 1:
        spare = target if pool is None else pool
        if spare is None:
            raise ValueError("this rank has no pool, and the others wait for it in the backward: give it the target")
        total = undivided(loss(model, batches.take(spare, torch.zeros(1, dtype=torch.int64)))).sum() * 0
    if share:
        m = sum(count for (count,) in exchange.counts([batches.size(target, "target")]))
        total = total + undivided(loss(model, target)).sum() * (share / m)
    out: Tensor = total * exchange.world
    return out
