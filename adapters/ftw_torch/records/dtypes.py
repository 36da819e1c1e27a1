"""Promotion of dtypes, remembered: torch dispatches each question like an operation on tensors."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["promoted"]


@cache
def promoted(x: torch.dtype, y: torch.dtype = torch.float32) -> torch.dtype:
    """Return the dtype to which two are promoted; with one, at least float32."""
    return torch.promote_types(x, y)
