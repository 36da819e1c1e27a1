"""Parts that rules of several layer families share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw import Dense, OuterProduct, Packed
from ftw_torch.capture import batch_axis
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.internals import quietly
from ftw_torch.capture.registry import Rule

__all__ = [
    "affine",
    "aten",
    "batched",
    "by_channel",
    "detached",
    "of_tokens",
    "on_leading_axes",
    "outer",
    "quietly",
    "summed",
    "token_sum",
    "trains",
    "with_copies",
]

aten = torch.ops.aten


def trains(p: Any) -> bool:
    """Return whether something is a tensor that requires a gradient."""
    return isinstance(p, Tensor) and p.requires_grad


def on_leading_axes(capture: Capture, x: Tensor, place: Any, trailing: int) -> bool:
    """Return whether the last ``trailing`` axes are free of samples."""
    if capture.samples == 1:
        return True
    if isinstance(place, batch_axis.Scattered):
        return place.rows.ndim + trailing <= x.ndim
    where = batch_axis.axis(x.shape, place, capture.samples)
    return where is not None and where.number < x.ndim - trailing


def with_copies(capture: Capture, function: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function with a copy of each parameter for each sample; NotImplemented if they do not align."""
    sampled = [
        x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and capture.sampled(x) and capture.where(x)
    ]
    if capture.samples == 1:
        sampled = sampled or [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and capture.sampled(x)]
    if not sampled:
        return NotImplemented
    beside = max(sampled, key=lambda x: x.ndim)
    changed = []
    for p in (*args, *kwargs.values()):
        name = capture.name(p)
        if name is None and trains(p) and not capture.sampled(p):
            return NotImplemented
        other = p if name is None else capture.copies(name, p, beside)
        if name is not None and other is None:
            return NotImplemented
        changed.append(other)
    return function(*changed[: len(args)], **dict(zip(kwargs, changed[len(args) :], strict=True)))


def batched(function: Rule) -> Rule:
    """Return the rule of a function of matrices whose other axes are aligned from the right (attention)."""

    def rule(capture: Capture, *args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and capture.sampled(x) and capture.samples > 1:
                place = capture.where(x)
                if place is None or not on_leading_axes(capture, x, place, 2):
                    return NotImplemented
        return with_copies(capture, function, args, kwargs)

    return rule


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``x * weight + bias``, whatever of the two there is."""
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def by_channel(p: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a parameter (c,) in a shape that aligns with x (n, c, ...)."""
    return p if p is None or x.ndim == 2 else p.view(-1, *[1] * (x.ndim - 2))


def token_sum(x: Tensor | None) -> Tensor:
    """Return the sum over the tokens of (n, t, *shape), of 16-bit floats in float32."""
    assert x is not None
    return x.sum(1, dtype=torch.float32 if x.dtype.itemsize < 4 else x.dtype)


def outer(capture: Capture, x: Tensor, place: Any, g: Tensor, result: Any) -> OuterProduct | Packed:
    """Return the record of a layer's inputs (..., d_in) and output gradients (..., d_out)."""
    if capture.grid and isinstance(place, batch_axis.Scattered):
        inputs, numbers = of_tokens(x, place, 1)  # (t, d_in), (t,)
        return Packed(inputs, of_tokens(g, result, 1)[0], numbers, capture.samples)
    a, b = (capture.group(y, at, 1) for y, at in ((x, place), (g, result)))  # (n, t, d_in), (n, t, d_out)
    assert a is not None
    assert b is not None
    return OuterProduct(a, b)


def of_tokens(x: Tensor, place: batch_axis.Scattered, trailing: int) -> tuple[Tensor, Tensor]:
    """Return ``x`` (..., *trail) as (t, *trail), with the number of each token's document (t,)."""
    lead, trail = place.rows.ndim, x.shape[x.ndim - trailing :]
    between = x.shape[lead : x.ndim - trailing].numel()
    numbers = place.rows.reshape(-1)
    return x.reshape(-1, *trail), numbers if between == 1 else numbers.repeat_interleave(between)


def summed(capture: Capture, x: Tensor, place: Any, trailing: int) -> Dense:
    """Return the record of the sums (n, *trail) of ``x`` (..., *trail) over each sample's tokens."""
    if capture.grid and isinstance(place, batch_axis.Scattered):
        flat, numbers = of_tokens(x, place, trailing)  # (t, *trail), (t,)
        flat = flat.float() if flat.dtype.itemsize < 4 else flat
        out = flat.new_zeros(capture.samples + 1, *flat.shape[1:])  # the last is that of tokens of no document
        return Dense(out.index_add_(0, torch.where(numbers < 0, capture.samples, numbers), flat)[:-1])
    return Dense(token_sum(capture.group(x, place, trailing)))


def detached(p: Tensor | None) -> Tensor | None:
    """Return a parameter, if there is one, without its history."""
    return None if p is None else p.detach()
