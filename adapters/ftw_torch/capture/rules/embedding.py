"""Rules of look-ups in a parameter: embeddings, rows and single entries by computed indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftw import PackedRows, Rows
from ftw_torch.capture import batch_axis
from ftw_torch.capture.batch_axis import forms
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import rule

from .common import of_tokens, quietly

__all__: list[str] = []


class _Embedding(torch.autograd.Function):
    """``W[indices]``; its backward delivers the output's gradient by row."""

    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weight: Tensor, anchor: Tensor, use: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """Look up."""
        ctx.use = use
        ctx.save_for_backward(indices)
        return F.embedding(indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver (indices, g)."""
        saved = ctx.saved_tensors
        with quietly():
            ctx.use(*saved, g)
        return None, None, None, None


@rule(F.embedding)
def embedding(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rule of ``F.embedding``; rows of ``padding_idx`` have no gradient. Renormalised tables have no rule."""
    name, place = capture.name(weight), capture.where(input)
    if name is None or place is None or max_norm is not None or scale_grad_by_freq or weight.ndim != 2:
        return NotImplemented
    size = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % size
    result = (
        place
        if isinstance(place, batch_axis.Scattered)
        else batch_axis.Layout(place.outer, place.inner * weight.shape[1])
    )

    def deliver(rows: Tensor, g: Tensor) -> None:
        if capture.grid and isinstance(place, batch_axis.Scattered):
            (flat, numbers), (line, _) = of_tokens(g, place, 1), of_tokens(rows, place, 0)  # (t, d), (t,)
            flat = flat if padding is None else flat.masked_fill((line == padding)[:, None], 0.0)
            capture.deliver(name, PackedRows(line, flat, numbers, capture.samples, size))
            return
        b, at = capture.group(g, result, 1), capture.group(rows, place, 0)  # (n, t, d), (n, t)
        assert b is not None
        assert at is not None
        if padding is not None:
            b = b.masked_fill((at == padding)[:, :, None], 0.0)
        capture.deliver(name, Rows(at, b, size))

    return _Embedding.apply(input, weight.detach(), capture.anchor, deliver)  # type: ignore[no-untyped-call]


@rule(*forms("__getitem__"))
def getitem(capture: Capture, input: Tensor, index: Any) -> Any:
    """Rule of ``W[indices]`` with indices of samples, and of ``W[expert]`` with a number computed from them."""
    if isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point() and index.dtype != torch.bool:
        with capture:
            return input[int(index)]
    whole = (torch.int64, torch.int32)
    if isinstance(index, tuple) and len(index) == input.ndim > 1:  # single entries, as of a table of transitions
        if not all(isinstance(i, Tensor) and i.dtype in whole for i in index):
            return NotImplemented
        with quietly():
            input.detach()[index]  # raises for what is out of range on one axis
        with capture:
            flat = sum(i % size * step for i, size, step in zip(index, input.shape, _steps(input.shape), strict=True))
            return input.reshape(-1)[flat]
    if isinstance(index, Tensor) and index.dtype in whole and input.ndim in (1, 2):
        with capture:
            rows = torch.where(index < 0, index + input.shape[0], index)
            return F.embedding(rows, input) if input.ndim == 2 else F.embedding(rows, input[:, None])[..., 0]
    return NotImplemented


def _steps(shape: Sequence[int]) -> list[int]:
    """Return how far apart neighbours on each axis are in row-major order."""
    return [math.prod(shape[k + 1 :]) for k in range(len(shape))]
