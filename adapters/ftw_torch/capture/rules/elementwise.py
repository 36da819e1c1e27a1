"""Rules of functions in which a parameter meets samples entry by entry: a copy of it for each sample takes its place.

The gradient of the copies is the per-sample gradient. Such are products and sums (gains, shifts, position embeddings),
concatenation (class tokens, prompts), and the axes of a matrix product that are not the matrices'.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftw_torch.capture import batch_axis
from ftw_torch.capture.batch_axis import forms
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import Rule, rule

from .common import by_channel, trains, with_copies

__all__: list[str] = []


def elementwise(function: Rule) -> Rule:
    """Return the rule of a function that aligns its tensors from the right."""

    def handler(capture: Capture, *args: Any, **kwargs: Any) -> Any:
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


_POINTWISE = "add sub mul multiply div divide true_divide subtract where maximum minimum lerp addcmul pow"
_OPERATORS = "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __pow__ __rpow__"
_ASSIGNED = "add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__"

for _function in forms(_POINTWISE, _OPERATORS):
    rule(_function)(elementwise(_function))
for _function in forms(_ASSIGNED):
    rule(_function)(in_place(_function))
