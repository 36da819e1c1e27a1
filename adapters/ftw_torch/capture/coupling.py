"""Layers that couple the samples of a batch, so that a sample has no gradient of its own: refused by name."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["refuse_batch_statistics", "refuse_coupled_layers"]


def refuse_coupled_layers(model: nn.Module) -> None:
    """Raise if a layer makes one sample's loss depend on the others: it has no per-sample gradient."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                f"{type(module).__name__} {name!r} in training mode couples the samples of a batch, so that a "
                "sample has no gradient of its own; call .eval() on it or replace it, by GroupNorm for example"
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
            raise ValueError(
                f"{type(module).__name__} {name!r} has scale_grad_by_freq=True, which divides a sample's gradient by "
                "counts over the whole batch; set it to False"
            )


def refuse_batch_statistics(*args: Any, training: bool = False, **kwargs: Any) -> None:
    """Raise if a call of ``F.batch_norm`` takes its statistics from the batch."""
    if training or (len(args) > 5 and args[5]):
        raise ValueError(
            "F.batch_norm with training=True couples the samples of a batch, so that a sample has no gradient "
            "of its own; use the running statistics, or group_norm"
        )
