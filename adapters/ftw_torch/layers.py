"""Rules: how each layer kind is run under capture, and which factors its backward hands over.

A rule has the signature of the function it stands for, after the `Capture`, and returns NotImplemented where it does not apply.
For y = x W' + b with x (n, ..., d_in) and the output's gradient B (n, ..., d_out), the gradients of sample i are

    W:  sum_t B_it A_it'      an `OuterProduct`              b:  sum_t B_it      a `Dense`

The normalising layers end in an elementwise product and sum with their parameters, whose gradients are small and written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ftw import Dense, OuterProduct, Rows
from torch import Tensor
from torch.autograd.function import once_differentiable

from .capture import Capture

__all__ = ["RULES"]

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------------------------------
# Linear


class _Linear(torch.autograd.Function):
    """``x W' + b``; its backward gives x's gradient only and delivers the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, use: _LinearUse) -> Tensor:
        """Run the layer as autocast would and keep what the backward needs."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.use = use
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Deliver (x, g); return g W."""
        x, weight = ctx.saved_tensors
        ctx.use.deliver(x.detach(), g)  # without the history of x, which holds this node: a cycle that is never freed
        return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class _LinearUse:
    """One call of a linear function: where its factors go."""

    def __init__(self, capture: Capture, weight: str | None, bias: str | None, *, transposed: bool = False) -> None:
        self.capture, self.weight, self.bias, self.transposed = capture, weight, bias, transposed

    def deliver(self, x: Tensor, g: Tensor) -> None:
        """Hand over the record of the weight, and of the bias."""
        n = self.capture.samples
        b = g.reshape(n, -1, g.shape[-1])  # (n, t, d_out)
        if self.weight is not None:
            a = x.reshape(n, -1, x.shape[-1])  # (n, t, d_in)
            self.capture.deliver(self.weight, OuterProduct(b, a) if self.transposed else OuterProduct(a, b))
        if self.bias is not None:
            self.capture.deliver(self.bias, Dense(b.sum(1)))


def linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Rule of ``F.linear``."""
    names = capture.name(weight), capture.name(bias)
    if names == (None, None):
        return NotImplemented
    x = _tokens(capture, input)
    if x is None or weight.ndim != 2:
        return NotImplemented
    if any(name is None and _trains(p) for name, p in zip(names, (weight, bias), strict=True)):
        return NotImplemented  # one of the two is left to autograd: so is the other
    use = _LinearUse(capture, *names)
    return _Linear.apply(x, weight.detach(), _detached(bias), capture.anchor, use)


def addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Rule of ``torch.addmm(bias, x, W)`` with W (d_in, d_out), the layer that GPT-2 calls Conv1D."""
    names = capture.name(mat2), capture.name(input)
    if names == (None, None) or beta != 1 or alpha != 1 or input.ndim != 1:
        return NotImplemented
    x = _tokens(capture, mat1)
    if x is None or any(name is None and _trains(p) for name, p in zip(names, (mat2, input), strict=True)):
        return NotImplemented
    use = _LinearUse(capture, *names, transposed=True)
    return _Linear.apply(x, mat2.detach().T, input.detach(), capture.anchor, use)


def _tokens(capture: Capture, x: Tensor) -> Tensor | None:
    """Return the input with samples first; one that folds them with tokens, (n t, d) in sample order, stays as it is."""
    if x.ndim < 2:
        return None
    known = capture.per_sample(x)
    if known is not None:
        return known
    return x if x.ndim == 2 and x.shape[0] % capture.samples == 0 else None


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
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        """Deliver (indices, g)."""
        ctx.use(*ctx.saved_tensors, g)
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
    """Rule of ``F.embedding``; rows of ``padding_idx`` have no gradient. Renormalised or rescaled tables have no rule."""
    name = capture.name(weight)
    if name is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    indices = capture.per_sample(input)
    if indices is None:
        if input.ndim != 1 or input.shape[0] % capture.samples:
            return NotImplemented
        indices = input  # (n t,) in sample order
    n, size = capture.samples, weight.shape[0]
    padding = None if padding_idx is None else padding_idx % size

    def deliver(rows: Tensor, g: Tensor) -> None:
        b = g.reshape(n, -1, g.shape[-1])  # (n, t, d)
        at = rows.reshape(n, -1)  # (n, t)
        if padding is not None:
            b = b.masked_fill((at == padding)[:, :, None], 0.0)
        capture.deliver(name, Rows(at, b, size))

    return _Embedding.apply(indices, weight.detach(), capture.anchor, deliver)


# ---------------------------------------------------------------------------------------------------------------------
# Normalising layers, scales and shifts


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
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.use = shape, use
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Deliver (g, normalised x); return x's gradient."""
        x, mean, rstd, weight, bias = ctx.saved_tensors
        ctx.use(g, (x.detach() - mean.detach()) * rstd.detach())
        dx = None
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
    if gain is None and shift is None:
        return NotImplemented
    x = capture.per_sample(input)
    if x is None or any(name is None and _trains(p) for name, p in ((gain, weight), (shift, bias))):
        return NotImplemented
    shape = list(normalized_shape)

    def deliver(g: Tensor, normal: Tensor) -> None:
        flat = (capture.samples, -1, *shape)  # (n, t, *shape)
        g = g.to(normal.dtype)
        if gain is not None:
            capture.deliver(gain, Dense((g * normal).reshape(flat).sum(1)))
        if shift is not None:
            capture.deliver(shift, Dense(g.reshape(flat).sum(1)))

    return _LayerNorm.apply(x, shape, _detached(weight), _detached(bias), eps, capture.anchor, deliver)


def rms_norm(
    capture: Capture, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """Rule of ``F.rms_norm``: normalise, then the elementwise rule for the gain."""
    if capture.name(weight) is None:
        return NotImplemented
    return _elementwise(torch.mul)(capture, F.rms_norm(input, normalized_shape, None, eps), weight)


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the rule of a product or sum in which a parameter is broadcast over samples: a copy of it for each sample."""

    def rule(capture: Capture, input: Any, other: Any, **options: Any) -> Any:
        names = capture.name(input), capture.name(other)
        if names == (None, None):
            return NotImplemented
        if None not in names or options or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return NotImplemented
        swapped = names[0] is not None
        x, p = (other, input) if swapped else (input, other)
        name = names[0] or names[1]
        x = capture.per_sample(x) if capture.sampled(x) else None
        if x is None or p.ndim >= x.ndim or name is None:
            return NotImplemented
        copies = capture.expand(name, p, x.ndim)
        return function(copies, x) if swapped else function(x, copies)

    return rule


def _trains(p: Any) -> bool:
    return isinstance(p, Tensor) and p.requires_grad


def _detached(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.detach()


def _forms(*names: str) -> list[Any]:
    """Return the functions of these names in torch and in torch.Tensor, with the operators that call them."""
    found = [getattr(torch, name) for name in names if hasattr(torch, name)]
    return found + [getattr(Tensor, name) for name in names if hasattr(Tensor, name)]


RULES: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.addmm: addmm,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    **dict.fromkeys(_forms("mul", "multiply", "__mul__", "__rmul__"), _elementwise(torch.mul)),
    **dict.fromkeys(_forms("add", "__add__", "__radd__"), _elementwise(torch.add)),
    **dict.fromkeys(_forms("sub", "__sub__"), _elementwise(torch.sub)),
}
