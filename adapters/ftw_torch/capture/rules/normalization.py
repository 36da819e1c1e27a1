"""Rules of normalising layers: the gradients of gains and shifts are `Dense` records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftw_torch.capture import batch_axis
from ftw_torch.capture.coupling import refuse_batch_statistics
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import rule

from .common import affine, aten, by_channel, detached, on_leading_axes, quietly, summed, trains

__all__: list[str] = []


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation; its backward gives x's gradient only and delivers those of gain and shift."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        anchor: Tensor,
        use: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        """Normalise in float32 under autocast, as PyTorch does."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.float()
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.use = shape, use
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver (g, normalised x); return x's gradient."""
        x, mean, rstd, weight, bias = ctx.saved_tensors
        dx = None
        with quietly():
            ctx.use(g, (x.detach() - mean.detach()) * rstd.detach())
            if ctx.needs_input_grad[0]:
                mask = [True, False, False]
                dx = aten.native_layer_norm_backward(g, x, ctx.shape, mean, rstd, weight, bias, mask)[0]
        return dx, None, None, None, None, None, None


@rule(F.layer_norm)
def layer_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Rule of ``F.layer_norm``."""
    gain, shift = capture.name(weight), capture.name(bias)
    place, shape = capture.where(input), list(normalized_shape)
    if any(name is None and trains(p) for name, p in ((gain, weight), (shift, bias))):  # one is left to autograd
        with capture:
            return affine(F.layer_norm(input, normalized_shape, None, None, eps), weight, bias)
    if capture.samples == 1:
        place = batch_axis.Layout(1, 0)
    if place is None or not on_leading_axes(capture, input, place, len(shape)):
        return NotImplemented

    def deliver(g: Tensor, normal: Tensor) -> None:
        g = g.to(normal.dtype)
        if gain is not None:
            capture.deliver(gain, summed(capture, g * normal, place, len(shape)))
        if shift is not None:
            capture.deliver(shift, summed(capture, g, place, len(shape)))

    return _LayerNorm.apply(input, shape, detached(weight), detached(bias), eps, capture.anchor, deliver)  # type: ignore[no-untyped-call]


@rule(F.rms_norm)
def rms_norm(
    capture: Capture, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """Rule of ``F.rms_norm``."""
    with capture:
        return affine(F.rms_norm(input, normalized_shape, None, eps), weight, None)


@rule(F.group_norm)
def group_norm(
    capture: Capture,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Rule of ``F.group_norm``."""
    with capture:
        normal = F.group_norm(input, num_groups, None, None, eps)
        return affine(normal, by_channel(weight, input), by_channel(bias, input))


@rule(F.instance_norm)
def instance_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Rule of ``F.instance_norm``."""
    with capture:
        normal = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
        return affine(normal, by_channel(weight, input), by_channel(bias, input))


@rule(F.batch_norm)
def batch_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Rule of ``F.batch_norm`` with fixed statistics; those of the batch couple its samples."""
    refuse_batch_statistics(input, running_mean, running_var, weight, bias, training)
    with capture:
        normal = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
        return affine(normal, by_channel(weight, input), by_channel(bias, input))
