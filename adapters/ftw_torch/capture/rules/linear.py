"""Rules of matrix products with a parameter: ``y = x W' + b`` in its forms.

For x (n, ..., d_in) and the output's gradient B (n, ..., d_out), the gradients of sample i are

    W:  sum_t B_it A_it'      an `OuterProduct`              b:  sum_t B_it      a `Dense`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftw_torch.capture import batch_axis
from ftw_torch.capture.batch_axis import forms
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.internals import unsafe_view
from ftw_torch.capture.registry import rule

from .common import affine, batched, detached, on_leading_axes, outer, quietly, summed, trains

__all__: list[str] = []


class _Linear(torch.autograd.Function):
    """``x W' + b``; its backward gives x's gradient only and delivers the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, use: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """Run the layer as autocast would and keep what the backward needs."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.use = use
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight, bias)
        return unsafe_view(y, y.shape) if y._is_view() else y  # a view could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver (x, g); return g W."""
        x, weight = ctx.saved_tensors
        with quietly():
            ctx.use(x.detach(), g)  # without the history of x, which holds this node: a cycle that is never freed
            return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


@rule(F.linear)
def linear(
    capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Any:
    """Rule of ``F.linear``; ``transposed`` if ``weight`` is that of the parameter transposed."""
    names = capture.name(weight), capture.name(bias)
    if names[0] is None and trains(weight):  # left to autograd; the bias need not be
        if names[1] is None or bias is None:
            return NotImplemented
        with capture:
            return F.linear(input, weight) + bias
    if bias is not None and names[1] is None and trains(bias):
        with capture:
            return F.linear(input, weight) + bias
    place = capture.where(input)
    if weight.ndim != 2 or input.ndim < 2 or names == (None, None):
        return NotImplemented
    result = (
        batch_axis.kept(tuple(input.shape), place, (*input.shape[:-1], weight.shape[0]), capture.samples)
        if place
        else None
    )
    if capture.samples == 1:
        place = result = batch_axis.Layout(1, 0)
    if place is None or result is None or not on_leading_axes(capture, input, place, 1):
        return NotImplemented

    def deliver(x: Tensor, g: Tensor) -> None:
        if names[0] is not None:
            factors = outer(capture, g, result, x, place) if transposed else outer(capture, x, place, g, result)
            capture.deliver(names[0], factors)
        if names[1] is not None:
            capture.deliver(names[1], summed(capture, g, result, 1))

    return _Linear.apply(input, weight.detach(), detached(bias), capture.anchor, deliver)  # type: ignore[no-untyped-call]


@rule(*forms("addmm"))
def addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Rule of ``torch.addmm(bias, x, W)`` with W (d_in, d_out), the layer that GPT-2 calls Conv1D."""
    if beta != 1 or alpha != 1 or input.ndim != 1 or not capture.sampled(mat1):
        return NotImplemented
    return _right(capture, mat1, mat2, input)


@rule(*forms("matmul", "__matmul__", "mm", "bmm"))
def matmul(capture: Capture, input: Tensor, other: Any = None, *, mat2: Any = None) -> Any:
    """Rule of ``x @ W``, ``W @ x`` and ``x @ w``."""
    other = mat2 if other is None else other
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    if capture.name(other) is not None and capture.sampled(input) and other.ndim < 3:
        if other.ndim == 1:
            with capture:
                return (input * other).sum(-1)
        return _right(capture, input, other, None)
    if capture.name(input) is not None and input.ndim == 2 and other.ndim > 1 and capture.sampled(other):
        with capture:
            return F.linear(other.mT, input).mT
    return batched(torch.matmul)(capture, input, other) if min(input.ndim, other.ndim) > 2 else NotImplemented


def _right(capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """Run ``x @ weight + bias`` for a weight (d_in, d_out)."""
    if capture.name(weight) is None and trains(weight):
        return NotImplemented
    if bias is not None and capture.name(bias) is None and trains(bias):
        with capture:
            return x @ weight + bias
    view = weight.detach().T
    key = capture.name(weight)
    if key is not None:
        capture._keys[id(view)] = (key, view)
    try:
        return linear(capture, x, view, bias, transposed=True)
    finally:
        capture._keys.pop(id(view), None)


@rule(F.bilinear)
def bilinear(capture: Capture, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Rule of ``F.bilinear``, ``y_o = x1' W_o x2``."""
    if capture.name(weight) is None:
        return NotImplemented
    with capture:
        z = F.linear(input2, weight.reshape(-1, weight.shape[2]))
        z = z.reshape(*input2.shape[:-1], *weight.shape[:2])  # (..., d_out, d1)
        return affine((z * input1[..., None, :]).sum(-1), None, bias)
