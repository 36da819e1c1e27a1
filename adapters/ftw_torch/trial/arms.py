"""The arms of a trial: ways to fill ``.grad`` for one step, from the same samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftw_torch import FilterThenWeight, batches

__all__ = ["ARMS", "MEANING", "RANDOM", "Arm", "Learner", "add_mean_gradient"]

RANDOM = "random"
TARGET_SHARE = 1 / 3  # of the gradient, where target samples are mixed into the batch


@dataclass(frozen=True)
class Learner:
    """One run's model and optimizer, and where its samples come from.

    Attributes
    ----------
    model, optimizer, per_sample_loss
        As `ftw_torch.FilterThenWeight` takes them.
    pool, target : callable
        ``pool(n)`` returns the batch of the next n samples.
    keep, pool_size, target_size : int
        Samples to train on in a step; samples that a selecting arm picks them from; target samples in a step.
    micro_batch : int or None
        Samples that go through the model at once.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    per_sample_loss: Callable[[nn.Module, Any], Tensor]
    pool: Callable[[int], Any]
    target: Callable[[int], Any]
    keep: int
    pool_size: int
    target_size: int
    micro_batch: int | None


Arm = Callable[[Learner], Callable[[], object]]  # made once a run; the result fills .grad, once a step


def add_mean_gradient(learner: Learner, batch: Any, share: float = 1.0) -> None:
    """Add ``share`` times the gradient of the batch's mean loss to ``.grad``."""
    n = batches.size(batch, "batch")
    for part in batches.split(batch, n, learner.micro_batch):
        loss = learner.per_sample_loss(learner.model, part).sum() * (share / n)
        torch.autograd.backward(loss)


def random_batch(learner: Learner) -> Callable[[], None]:
    """Train on the next ``keep`` samples."""
    return lambda: add_mean_gradient(learner, learner.pool(learner.keep))


def random_with_target(learner: Learner) -> Callable[[], None]:
    """Train on the next ``keep`` samples and half as many target samples, a third of the gradient."""

    def step() -> None:
        add_mean_gradient(learner, learner.pool(learner.keep), 1 - TARGET_SHARE)
        add_mean_gradient(learner, learner.target(max(1, learner.keep // 2)), TARGET_SHARE)

    return step


def whole_pool(learner: Learner) -> Callable[[], None]:
    """Train on all samples that a selecting arm picks from."""
    return lambda: add_mean_gradient(learner, learner.pool(learner.pool_size))


def forward_top_k(learner: Learner) -> Callable[[], object]:
    """Train on the ``keep`` samples with the best scores from forward passes, all weighted alike."""
    selector = FilterThenWeight(
        learner.model,
        learner.optimizer,
        learner.per_sample_loss,
        keep=learner.keep,
        micro_batch=learner.micro_batch,
        score="forward",
        filter="top_k",
        weight="uniform",
    )
    return lambda: selector.backward(learner.pool(learner.pool_size), learner.target(learner.target_size))


def filter_then_weight(learner: Learner) -> Callable[[], object]:
    """Train on what Filter-then-Weight picks and weighs, with its defaults."""
    selector = FilterThenWeight(
        learner.model, learner.optimizer, learner.per_sample_loss, keep=learner.keep, micro_batch=learner.micro_batch
    )
    return lambda: selector.backward(learner.pool(learner.pool_size), learner.target(learner.target_size))


ARMS: dict[str, Arm] = {  # from the simplest on: of arms that are equally good, the verdict takes the first
    RANDOM: random_batch,
    "rand+T": random_with_target,
    "whole pool": whole_pool,
    "forward top-k": forward_top_k,
    "Filter-then-Weight": filter_then_weight,
}
MEANING = {  # for a reader who has not seen the names before
    "rand+T": "random batches with target samples mixed in; no selection",
    "whole pool": "everything that arrives; no selection",
    "forward top-k": 'FilterThenWeight(score="forward", filter="top_k", weight="uniform")',
    "Filter-then-Weight": "FilterThenWeight with its defaults",
}
