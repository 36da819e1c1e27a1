"""Rules: how each layer kind is run under capture, and which factors its backward hands over.

A rule has the signature of the function it stands for, after the `Capture`, and returns NotImplemented where it does
not apply. For y = x W' + b with x (n, ..., d_in) and the output's gradient B (n, ..., d_out), the gradients of sample
i are

    W:  sum_t B_it A_it'      an `OuterProduct`              b:  sum_t B_it      a `Dense`

What is elementwise in a parameter (gains, shifts, position embeddings) is given a copy of it for each sample, whose
gradient is the per-sample gradient. Layers that are compositions are composed again, under capture (``composed.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftw import Dense, OuterProduct, Rows
from ftw_torch.capture import batch_axis as layout
from ftw_torch.capture.batch_axis import forms
from ftw_torch.capture.discovery import Capture

from . import composed, convolution, experts
from . import elementwise as copies
from .elementwise import batched, on_leading_axes, trains

__all__ = ["RULES"]

aten = torch.ops.aten
quietly: Any = torch._C.DisableTorchFunction  # a backward's own arithmetic is nobody's business

Rule = Callable[..., Any]


# ---------------------------------------------------------------------------------------------------------------------
# Linear


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
        return aten._unsafe_view(y, y.shape) if y._is_view() else y  # a view could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver (x, g); return g W."""
        x, weight = ctx.saved_tensors
        with quietly():
            ctx.use(x.detach(), g)  # without the history of x, which holds this node: a cycle that is never freed
            return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


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
        layout.kept(tuple(input.shape), place, (*input.shape[:-1], weight.shape[0]), capture.samples) if place else None
    )
    if capture.samples == 1:
        place = result = layout.Layout(1, 0)
    if place is None or result is None or not on_leading_axes(capture, input, place, 1):
        return NotImplemented

    def deliver(x: Tensor, g: Tensor) -> None:
        a, b = capture.group(x, place, 1), capture.group(g, result, 1)  # (n, t, d_in), (n, t, d_out)
        assert a is not None
        assert b is not None
        if names[0] is not None:
            capture.deliver(names[0], OuterProduct(b, a) if transposed else OuterProduct(a, b))
        if names[1] is not None:
            capture.deliver(names[1], Dense(_sum(b)))

    return _Linear.apply(input, weight.detach(), _detached(bias), capture.anchor, deliver)  # type: ignore[no-untyped-call]


def addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Rule of ``torch.addmm(bias, x, W)`` with W (d_in, d_out), the layer that GPT-2 calls Conv1D."""
    if beta != 1 or alpha != 1 or input.ndim != 1 or not capture.sampled(mat1):
        return NotImplemented
    return _right(capture, mat1, mat2, input)


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


# ---------------------------------------------------------------------------------------------------------------------
# Embedding


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
    result = place if isinstance(place, layout.Scattered) else layout.Layout(place.outer, place.inner * weight.shape[1])

    def deliver(rows: Tensor, g: Tensor) -> None:
        b, at = capture.group(g, result, 1), capture.group(rows, place, 0)  # (n, t, d), (n, t)
        assert b is not None
        assert at is not None
        if padding is not None:
            b = b.masked_fill((at == padding)[:, :, None], 0.0)
        capture.deliver(name, Rows(at, b, size))

    return _Embedding.apply(input, weight.detach(), capture.anchor, deliver)  # type: ignore[no-untyped-call]


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


# ---------------------------------------------------------------------------------------------------------------------
# Normalising layers


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
            return composed.affine(F.layer_norm(input, normalized_shape, None, None, eps), weight, bias)
    if capture.samples == 1:
        place = layout.Layout(1, 0)
    if place is None or not on_leading_axes(capture, input, place, len(shape)):
        return NotImplemented

    def deliver(g: Tensor, normal: Tensor) -> None:
        g = g.to(normal.dtype)
        if gain is not None:
            capture.deliver(gain, Dense(_sum(capture.group(g * normal, place, len(shape)))))
        if shift is not None:
            capture.deliver(shift, Dense(_sum(capture.group(g, place, len(shape)))))

    return _LayerNorm.apply(input, shape, _detached(weight), _detached(bias), eps, capture.anchor, deliver)  # type: ignore[no-untyped-call]


def _sum(x: Tensor | None) -> Tensor:
    """Return the sum over the tokens of (n, t, *shape), of 16-bit floats in float32."""
    assert x is not None
    return x.sum(1, dtype=torch.float32 if x.dtype.itemsize < 4 else x.dtype)


def _detached(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.detach()


RULES: dict[Any, Rule] = {
    F.linear: linear,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: composed.rms_norm,
    F.group_norm: composed.group_norm,
    F.instance_norm: composed.instance_norm,
    F.batch_norm: composed.batch_norm,
    F.prelu: composed.prelu,
    F.scaled_dot_product_attention: batched(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: composed.multi_head_attention,
    F.bilinear: composed.bilinear,
    torch.rnn_tanh_cell: composed.rnn_cell(torch.tanh),
    torch.rnn_relu_cell: composed.rnn_cell(torch.relu),
    torch.gru_cell: composed.gru_cell,
    torch.lstm_cell: composed.lstm_cell,
    torch.einsum: composed.einsum,
    **dict.fromkeys(forms("addmm"), addmm),
    **dict.fromkeys(forms("matmul", "__matmul__", "mm", "bmm"), matmul),
    **dict.fromkeys(forms("__getitem__"), getitem),
    **copies.RULES,
    **convolution.RULES,
    **experts.RULES,
}
