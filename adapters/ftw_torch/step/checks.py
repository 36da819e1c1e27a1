"""What is wrong with the arguments of a selector and of a step, said before anything is computed."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ftw_torch import batches
from ftw_torch.capture.coupling import refuse_coupled_layers
from ftw_torch.capture.discovery import trainable
from ftw_torch.capture.fsdp import refuse_sharded
from ftw_torch.errors import TargetWarning
from ftw_torch.options import Options, check_count

from .memory import Memory

__all__ = ["check_keep", "check_parts", "is_guarded", "refuse_other_device", "trained"]


def check_parts(model: Any, per_sample_loss: Any) -> None:
    """Raise if the model or the loss is something else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    if not callable(per_sample_loss):
        raise TypeError(f"per_sample_loss is a {type(per_sample_loss).__name__}; expected (model, batch) -> (n,)")


def check_keep(keep: Any, n: int | None = None, steps: int = 1) -> int:
    """Return how many of n samples to keep, or raise if that is no number of them."""
    check_count(keep, "keep")
    if n is not None and keep > n:
        raise ValueError(f"keep={keep} exceeds the pool of {n} samples; offer more candidates or keep fewer")
    if n is not None and keep * steps > n:
        raise ValueError(f"{steps} selections of keep={keep} exceed the pool of {n} samples; offer more candidates")
    return int(keep)


def refuse_other_device(pool: Any, target: Any) -> None:
    """Raise if the pool and the target live on different devices."""
    devices = [sorted(map(str, batches.devices(batch))) for batch in (pool, target)]
    if devices[0] != devices[1]:
        raise ValueError(f"the pool lives on {devices[0]}, the target on {devices[1]}; move one to the other")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, or raise why these, or the model, cannot be."""
    parameters = trainable(model)
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    refuse_sharded(parameters, "use ftw_torch.distributed.DistributedFilterThenWeight")
    refuse_coupled_layers(model)
    return parameters


def is_guarded(options: Options, memory: Memory, target: Any) -> bool:
    """Return whether the guard needs the target's samples; warn once if there is one sample only."""
    if options.guard == 0:
        return False
    if batches.size(target, "target") > 1:
        return True
    if not memory.warned_of_one_target:
        memory.warned_of_one_target = True
        words = "the guard cannot judge one target sample: give two or more, or guard=0"
        warnings.warn(words, TargetWarning, stacklevel=5)
    return False
