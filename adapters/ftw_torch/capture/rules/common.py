"""Parts that rules of several layer families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftw_torch.capture import batch_axis
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import Rule

__all__ = [
    "affine",
    "aten",
    "batched",
    "by_channel",
    "detached",
    "on_leading_axes",
    "quietly",
    "token_sum",
    "trains",
    "with_copies",
]

aten = torch.ops.aten
quietly: Callable[[], Any] = torch._C.DisableTorchFunction  # a backward's own arithmetic needs no capture


def trains(p: Any) -> bool:
    """Tell whether something is a tensor that requires a gradient."""
    return isinstance(p, Tensor) and p.requires_grad


def on_leading_axes(capture: Capture, x: Tensor, place: Any, trailing: int) -> bool:
    """Tell whether the last ``trailing`` axes are free of samples."""
    if capture.samples == 1 or isinstance(place, batch_axis.Scattered):
        return True
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


def detached(p: Tensor | None) -> Tensor | None:
    """Return a parameter, if there is one, without its history."""
    return None if p is None else p.detach()
