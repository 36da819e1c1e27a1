"""Rules of functions in which a parameter meets samples entry by entry: a copy of it for each sample takes its place.

The gradient of the copies is the per-sample gradient. Such are products and sums (gains, shifts, position embeddings),
concatenation (class tokens, prompts), and the axes of a matrix product that are not the matrices'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftw_torch.capture import batch_axis as layout
from ftw_torch.capture.batch_axis import forms

if TYPE_CHECKING:
    from ftw_torch.capture.discovery import Capture

__all__ = ["RULES", "batched", "on_leading_axes", "trains"]

Rule = Callable[..., Any]


def trains(p: Any) -> bool:
    """Tell whether something is a tensor that requires a gradient."""
    return isinstance(p, Tensor) and p.requires_grad


def on_leading_axes(capture: Capture, x: Tensor, place: Any, trailing: int) -> bool:
    """Tell whether the last ``trailing`` axes are free of samples."""
    if capture.samples == 1 or isinstance(place, layout.Scattered):
        return True
    where = layout.axis(x.shape, place, capture.samples)
    return where is not None and where.number < x.ndim - trailing


def elementwise(function: Rule) -> Rule:
    """Return the rule of a function that aligns its tensors from the right."""

    def rule(capture: Capture, *args: Any, **kwargs: Any) -> Any:
        return _with_copies(capture, function, args, kwargs)

    return rule


def _with_copies(capture: Capture, function: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        return _with_copies(capture, function, args, kwargs)

    return rule


def in_place(function: Rule) -> Rule:
    def rule(capture: Capture, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _with_copies(capture, function, (input, *args), kwargs) if capture.sampled(input) else NotImplemented

    return rule


def cat(capture: Capture, tensors: Any, dim: int = 0, **options: Any) -> Any:
    """Rule of ``torch.cat`` along an axis that is not the samples': class tokens, prompts."""
    dim = options.pop("axis", dim)
    samples = [x for x in tensors if capture.sampled(x)]
    if options or not samples:
        return NotImplemented
    x, place, n = samples[0], capture.where(samples[0]), capture.samples
    where = layout.axis(x.shape, place, n) if isinstance(place, layout.Layout) and n > 1 else None
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


_POINTWISE = "add sub mul multiply div divide true_divide subtract where maximum minimum lerp addcmul pow"
_OPERATORS = "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __pow__ __rpow__"
_ASSIGNED = "add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__"

RULES: dict[Any, Rule] = {
    **{f: elementwise(f) for f in forms(_POINTWISE, _OPERATORS)},
    **{f: in_place(f) for f in forms(_ASSIGNED)},
    **dict.fromkeys(forms("cat", "concat", "concatenate"), cat),
}
