"""Batches of preferences, as TRL lays them: all chosen, then all rejected; a pair is one sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["PAIRED", "laid_out", "pairs", "takes_pairs"]

PAIRED = "_ftw_pairs"  # names of a batch's entries (n, 2, ...), with a comma between


def takes_pairs(trainer: Any) -> bool:
    """Return whether a trainer's batches are pairs: those of TRL's DPOTrainer and RewardTrainer."""
    homes = ("trl.trainer.dpo_trainer", "trl.trainer.reward_trainer")
    return any(kind.__module__ in homes for kind in type(trainer).__mro__)


def pairs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with entries (n, 2, ...) where it has 2 n rows."""
    rows = len(inputs["input_ids"])
    two = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim and len(x) == rows]
    batch = {name: torch.stack(x.chunk(2), 1) if name in two else x for name, x in inputs.items()}
    return {**batch, PAIRED: ",".join(two)}


def laid_out(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch as the trainer had it."""
    batch = dict(inputs)
    for name in filter(None, batch.pop(PAIRED, "").split(",")):
        batch[name] = torch.cat([batch[name][:, 0], batch[name][:, 1]])
    return batch
