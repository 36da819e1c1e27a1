"""Rules of functions in which a parameter meets samples entry by entry: a copy of it for each sample takes its place.

The gradient of the copies is the per-sample gradient. Such are products and sums (gains, shifts, position embeddings),
concatenation (class tokens, prompts), and the axes of a matrix product that are not the matrices'. In a packed batch a
copy for each document would be one for each token: there the gradients of gains and shifts are added up by document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftw import Dense
from ftw_torch.capture import batch_axis
from ftw_torch.capture.batch_axis import forms
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import Rule, rule

from .common import by_channel, quietly, summed, trains, with_copies

__all__: list[str] = []


class _Token(torch.autograd.Function):
    """``x * p`` or ``x + p``; its backward gives x's gradient only and delivers that of p for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, times: bool, anchor: Tensor, use: Callable[[Tensor], None]) -> Tensor:
        """Multiply or add."""
        ctx.use, ctx.times, ctx.shape, ctx.dtype = use, times, x.shape, x.dtype
        ctx.save_for_backward(*((x, p) if times else ()))
        return x * p if times else x + p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver g, times x in a product; return x's gradient."""
        with quietly():
            x, p = ctx.saved_tensors if ctx.times else (None, None)
            ctx.use(g if x is None else g * x.detach())
            if ctx.needs_input_grad[0]:
                g = (g if p is None else g * p).sum_to_size(ctx.shape).to(ctx.dtype)
        return (g if ctx.needs_input_grad[0] else None), None, None, None, None


def by_token(capture: Capture, args: tuple[Any, ...], times: bool) -> Any:
    """Run ``x * p`` or ``x + p`` for a parameter without axes of tokens; NotImplemented for all else."""
    keys = [capture.name(a) for a in args]
    if len(args) != 2 or (keys[0] is None) == (keys[1] is None):
        return NotImplemented
    x, p, key = (args[0], args[1], keys[1]) if keys[0] is None else (args[1], args[0], keys[0])
    place = capture.where(x)
    if key is None or not isinstance(place, batch_axis.Scattered) or p.ndim > x.ndim:
        return NotImplemented
    lead = place.rows.ndim
    aligned = (1,) * (x.ndim - p.ndim) + tuple(p.shape)
    if any(size != 1 for size in aligned[:lead]):
        return NotImplemented
    name, rows, shared = key, place, [k + 1 - lead for k in range(lead, x.ndim) if aligned[k] == 1]

    def deliver(g: Tensor) -> None:
        sums: Any = summed(capture, g, rows, g.ndim - lead).grads  # (n, *trail)
        sums = sums.sum(shared, keepdim=True) if shared else sums
        capture.deliver(name, Dense(sums.reshape(-1, *p.shape)))

    return _Token.apply(x, p.detach(), times, capture.anchor, deliver)  # type: ignore[no-untyped-call]


def elementwise(function: Rule) -> Rule:
    """Return the rule of a function that aligns its tensors from the right."""
    times = function in _PRODUCTS

    def handler(capture: Capture, *args: Any, **kwargs: Any) -> Any:
        if capture.grid and not kwargs and (times or function in _SUMS):
            out = by_token(capture, args, times)
            if out is not NotImplemented:
                return out
        return with_copies(capture, function, args, kwargs)

    return handler


def in_place(function: Rule) -> Rule:
    """Return the rule of a function that writes into its first argument."""

    def handler(capture: Capture, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return with_copies(capture, function, (input, *args), kwargs) if capture.sampled(input) else NotImplemented

    return handler


@rule(*forms("cat", "concat", "concatenate"))
def cat(capture: Capture, tensors: Any, dim: int = 0, **options: Any) -> Any:
    """Rule of ``torch.cat`` along an axis that is not the samples': class tokens, prompts."""
    dim = options.pop("axis", dim)
    samples = [x for x in tensors if capture.sampled(x)]
    if options or not samples:
        return NotImplemented
    x, place, n = samples[0], capture.where(samples[0]), capture.samples
    where = batch_axis.axis(x.shape, place, n) if isinstance(place, batch_axis.Layout) and n > 1 else None
    if n > 1 and (where is None or not where.pure or where.number == dim % x.ndim):
        return NotImplemented
    parts = []
    for p in tensors:
        name = capture.name(p)
        if name is None:
            if trains(p) and not capture.sampled(p):
                return NotImplemented
            parts.append(p)
            continue
        copies = capture.copies(name, p, x)
        if copies is None:
            return NotImplemented
        parts.append(copies)
    return torch.cat(parts, dim)


@rule(F.prelu)
def prelu(capture: Capture, input: Tensor, weight: Tensor) -> Any:
    """Rule of ``F.prelu``."""
    with capture:
        slope: Any = weight if weight.numel() == 1 else by_channel(weight, input)
        return torch.where(input > 0, input, input * slope)


_PRODUCTS = frozenset(forms("mul multiply __mul__ __rmul__"))
_SUMS = frozenset(forms("add __add__ __radd__"))
_POINTWISE = "add sub mul multiply div divide true_divide subtract where maximum minimum lerp addcmul pow"
_OPERATORS = "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __pow__ __rpow__"
_ASSIGNED = "add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__"

for _function in forms(_POINTWISE, _OPERATORS):
    rule(_function)(elementwise(_function))
for _function in forms(_ASSIGNED):
    rule(_function)(in_place(_function))
