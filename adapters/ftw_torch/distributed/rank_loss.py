"""One rank's share of a selection's weighted loss, for a plain backward of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftw_torch import batches

from .collectives import Exchange
from .sharding import undivided

__all__ = ["weighted_loss_of_rank"]


def weighted_loss_of_rank(
    exchange: Exchange,
    model: nn.Module,
    per_sample_loss: Callable[[nn.Module, Any], Tensor],
    pool: Any,
    rows: Tensor,
    weights: Tensor,
    target: Any,
    share: float,
) -> Tensor:
    """Return ``W ((1 - a) sum_i w_i loss_i + a / M sum_j loss_Tj)`` () over this rank's samples.

    W ranks, M target samples on all of them. A rank without samples returns zero times a loss of one.

    Parameters
    ----------
    rows, weights : tensor (k,)
        The selected samples of this rank's pool, and their weights.
    share : float
        a, the target's share of the update.
    """
    if share and target is None:
        raise ValueError("train_on_target is on: weighted_loss(pool, selection, target) requires the target")
    used = torch.nonzero(weights != 0)[:, 0]
    total: Any = 0.0
    if len(used) and share < 1:
        losses = undivided(per_sample_loss(model, batches.take(pool, rows[used])))  # (k',)
        wide = torch.promote_types(losses.dtype, torch.float32)
        total = (losses * weights[used].to(losses.device, wide)).sum() * (1 - share)
    elif share < 1:
        spare = target if pool is None else pool
        if spare is None:
            raise ValueError("this rank has no pool, and the others wait for it in the backward: give it the target")
        total = undivided(per_sample_loss(model, batches.take(spare, torch.zeros(1, dtype=torch.int64)))).sum() * 0
    if share:
        m = sum(count for (count,) in exchange.counts([batches.size(target, "target")]))
        total = total + undivided(per_sample_loss(model, target)).sum() * (share / m)
    out: Tensor = total * exchange.world
    return out
