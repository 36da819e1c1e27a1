"""The gradients of all gains and shifts side by side, as if of one parameter: models have hundreds of them.

Each of them alone costs as many calls as a large matrix, and calls are what bounds a step of a small model on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftw import Dense
from ftw.geometry import Diagonal, Operator, Scale
from ftw.gradients import Record

from .dtypes import promoted

__all__ = ["fits", "joined", "side_by_side"]


def fits(record: Record | None, operator: Operator) -> bool:
    """Return whether a parameter may go into the bucket: a vector or a number, its response elementwise."""
    return isinstance(operator, (Diagonal, Scale)) and isinstance(record, Dense) and len(record.shape) < 2


def side_by_side(records: Sequence[Record]) -> Dense:
    """Return the gradients of several parameters as those of one vector, (n, p)."""
    grads: list[Any] = [record.grads for record in records if isinstance(record, Dense)]
    return Dense(torch.cat([g.reshape(len(g), -1) for g in grads], 1))


def joined(operators: Sequence[Operator], shapes: Sequence[Tensor]) -> Diagonal:
    """Return the response of several parameters as that of one vector, (p,); ``shapes`` are tensors of their shapes."""
    parts: list[Tensor] = []
    for operator, x in zip(operators, shapes, strict=True):
        if isinstance(operator, Diagonal):
            values: Any = operator.values
            parts.append(values.reshape(-1))
        else:
            assert isinstance(operator, Scale)
            one = x.new_ones((), dtype=promoted(x.dtype))
            parts.append((one * operator.value).expand(x.numel()))
    return Diagonal(torch.cat(parts))
