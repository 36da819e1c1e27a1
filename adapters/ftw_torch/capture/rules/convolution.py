"""The rules of convolutions: outer products of unfolded inputs, or written out where that is smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftw import Dense, OuterProduct
from ftw_torch.capture import batch_axis
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import rule

__all__: list[str] = []

aten = torch.ops.aten


class _Convolution(torch.autograd.Function):
    """A convolution; its backward gives x's gradient only and delivers (x, g)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        setting: tuple[Any, ...],
        use: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        """Convolve, as autocast would."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.setting, ctx.use = setting, use
        ctx.save_for_backward(x, weight)
        return torch.convolution(x, weight, bias, *setting)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver (x, g); return x's gradient."""
        x, weight = ctx.saved_tensors
        ctx.use(x.detach(), g)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = aten.convolution_backward(g, x, weight, None, *ctx.setting, [True, False, False])[0]
        return dx, None, None, None, None, None


def _rule(dims: int, transposed: bool) -> Callable[..., Any]:
    def plain(
        capture: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        kernel, stride, dilation = weight.shape[2:], _tuple(stride, dims), _tuple(dilation, dims)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            with capture:
                input = F.pad(input, pads)
            padding = 0
        elif padding == "valid":
            padding = 0
        setting = (stride, _tuple(padding, dims), dilation, False, (0,) * dims, groups)
        return _convolve(capture, input, weight, bias, setting)

    def inverse(
        capture: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        stride, padding, dilation, more = (_tuple(x, dims) for x in (stride, padding, dilation, output_padding))
        return _convolve(capture, input, weight, bias, (stride, padding, dilation, True, more, groups))

    return inverse if transposed else plain


def _convolve(capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None, setting: tuple[Any, ...]) -> Any:
    names, n = (capture.name(weight), capture.name(bias)), capture.samples
    place = batch_axis.Layout(1, x.numel()) if n == 1 else capture.where(x)
    if x.ndim != weight.ndim or not isinstance(place, batch_axis.Layout) or names == (None, None):
        return NotImplemented
    if any(name is None and p is not None and p.requires_grad for name, p in zip(names, (weight, bias), strict=True)):
        return NotImplemented
    where = batch_axis.axis(x.shape, place, n)
    if where is None or where.number != 0 or where.outer != 1:
        return NotImplemented

    def deliver(a: Tensor, g: Tensor) -> None:
        if names[1] is not None:
            dtype = torch.float32 if g.dtype.itemsize < 4 else g.dtype
            capture.deliver(
                names[1], Dense(g.reshape(n, -1, *g.shape[1:]).transpose(1, 2).flatten(2).sum(2, dtype=dtype))
            )
        if names[0] is not None:
            capture.deliver(names[0], _record(a, g, weight.detach(), setting, n))

    parameter = None if bias is None else bias.detach()
    return _Convolution.apply(x, weight.detach(), parameter, capture.anchor, setting, deliver)  # type: ignore[no-untyped-call]


def _record(x: Tensor, g: Tensor, weight: Tensor, setting: tuple[Any, ...], n: int) -> Any:
    """Return the record of the weight (o, i, *kernel), from inputs (n t, i, ...) and output gradients (n t, o, ...)."""
    stride, padding, dilation, transposed, _, groups = setting
    patch, places = weight[0].numel(), g.shape[2:].numel() * (len(x) // n)
    smaller = places * (patch + weight.shape[0]) < weight.numel()
    if weight.ndim == 4 and groups == 1 and not transposed and smaller:
        a = F.unfold(x, weight.shape[2:], dilation, padding, stride)  # (n t, i kernel, places)
        b = g.flatten(2)  # (n t, o, places)
        return OuterProduct(*(y.mT.reshape(n, -1, y.shape[1]) for y in (a, b)))
    grads = []
    for xi, gi in zip(x.reshape(n, -1, *x.shape[1:]), g.reshape(n, -1, *g.shape[1:]), strict=True):
        grads.append(aten.convolution_backward(gi, xi, weight.to(xi.dtype), None, *setting, [False, True, False])[1])
    return Dense(torch.stack(grads))


def _tuple(x: Any, dims: int) -> tuple[int, ...]:
    return (x,) * dims if isinstance(x, int) else tuple(x)


for _dims, _transposed, _convolution in (
    (1, False, F.conv1d),
    (2, False, F.conv2d),
    (3, False, F.conv3d),
    (1, True, F.conv_transpose1d),
    (2, True, F.conv_transpose2d),
    (3, True, F.conv_transpose3d),
):
    rule(_convolution)(_rule(_dims, _transposed))
