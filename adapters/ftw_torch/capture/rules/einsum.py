"""Rule of ``einsum`` with a parameter, written as matrix products that have rules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftw_torch.capture.batch_axis import Layout, axis
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import rule

__all__: list[str] = []


@rule(torch.einsum)
def einsum(capture: Capture, equation: Any, *operands: Any) -> Any:
    """Rule of ``einsum("...,...->...", x, W)`` where it is a matrix product, or one for each entry of common axes."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return NotImplemented
    terms, out = equation.replace(" ", "").split("->")
    letters = terms.split(",")
    k = next((i for i in (0, 1) if capture.name(operands[i]) is not None and capture.sampled(operands[1 - i])), None)
    if k is None or len(letters) != 2 or any(len(set(term)) < len(term) for term in (*letters, out)):
        return NotImplemented
    own, other = letters[k], letters[1 - k]
    both = [c for c in own if c in other]
    each, summed = [c for c in both if c in out], [c for c in both if c not in out]
    new, rest = [c for c in own if c not in other], [c for c in other if c not in own]
    weight, x = operands[k], operands[1 - k]
    alike = all(weight.shape[own.index(c)] == x.shape[other.index(c)] for c in both)  # einsum repeats what is 1 long
    if not summed or not alike or set(out) != {*new, *rest, *each}:
        return NotImplemented  # sums over what one of them has alone
    sizes = {**dict(zip(own, weight.shape, strict=True)), **dict(zip(other, x.shape, strict=True))}
    columns = math.prod(sizes[c] for c in summed)
    if each:
        rest = _samples_first(capture, x, other, rest)
        if not rest:
            return NotImplemented
    with capture:
        if each:  # a product for each of these
            order = [*rest[:1], *each, *rest[1:]]
            X = x.permute([other.index(c) for c in order + summed])
            X = X.reshape(*(sizes[c] for c in [*rest[:1], *each]), -1, columns)  # (n, *each, t, columns)
            form = each + summed + new
            W = weight if own == "".join(form) else weight.permute([own.index(c) for c in form])
            y = X @ W.reshape(*(sizes[c] for c in each), columns, -1)
            y = y.reshape([sizes[c] for c in order + new])
            return y.permute([(order + new).index(c) for c in out])
        rows = x.permute([other.index(c) for c in rest + summed]).reshape(*(sizes[c] for c in rest), columns)
        if own == "".join(summed + new):
            y = rows @ weight.reshape(columns, -1)
        else:
            weight = weight if own == "".join(new + summed) else weight.permute([own.index(c) for c in new + summed])
            y = F.linear(rows, weight.reshape(-1, columns))
        y = y.reshape([sizes[c] for c in rest + new])
        return y.permute([(rest + new).index(c) for c in out])


def _samples_first(capture: Capture, x: Tensor, letters: str, rest: list[str]) -> list[str]:
    """Return the letters with that of the samples' axis first; nothing if it is not among them."""
    if capture.samples == 1:
        return rest
    place = capture.where(x)
    where = axis(x.shape, place, capture.samples) if isinstance(place, Layout) else None
    letter = "" if where is None else letters[where.number]
    return [letter, *(c for c in rest if c != letter)] if letter in rest else []
