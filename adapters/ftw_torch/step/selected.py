"""The weighted loss of selected samples, for a plain backward of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftw import Selection
from ftw_torch import batches

__all__ = ["weighted_loss"]


def weighted_loss(
    model: nn.Module,
    per_sample_loss: Callable[[nn.Module, Any], Tensor],
    pool: Any,
    selection: Selection,
    target: Any = None,
    train_on_target: float = 0.0,
) -> Tensor:
    """Return ``(1 - a) sum_i w_i loss_i + a mean_j loss_Tj`` (); a sample of zero weight is not in the forward."""
    used = torch.nonzero(selection.weights != 0)[:, 0]  # (k',)
    chosen = selection.indices[used]
    total: Any = 0.0
    if len(chosen) and train_on_target < 1:
        losses = per_sample_loss(model, batches.take(pool, chosen))  # (k',)
        weights = selection.weights[used].to(losses.device, torch.promote_types(losses.dtype, torch.float32))
        total = (losses * weights).sum() * (1 - train_on_target)
    if train_on_target:
        if target is None:
            raise ValueError("train_on_target is on: weighted_loss(pool, selection, target) requires the target")
        total = total + per_sample_loss(model, target).mean() * train_on_target
    if not isinstance(total, Tensor):
        raise ValueError("no sample of the selection has a weight other than zero: there is nothing to train on")
    return total
