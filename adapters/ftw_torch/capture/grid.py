"""Where the documents of a packed batch are in a tensor.

A packed batch is a grid of ``rows`` times T tokens, and each token belongs to one document or to none. Two layouts are
followed through the functions of a model, as one is for samples of equal length: that of the rows, as if they were the
samples, and that of the places within a row, as if these were. Together they say to which token an element belongs, so
that heads may be split off, axes transposed, and both axes flattened into one. Rules get the numbers of the documents
along the leading axes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import batching
from .batch_axis import Layout, Scattered, axis, kept

__all__ = ["TokenGrid", "Tokens"]


class Tokens(NamedTuple):
    """Where rows, and places within a row, are in one tensor."""

    row: Layout | Scattered
    place: Layout | Scattered


class TokenGrid:
    """The documents of a packed batch.

    Parameters
    ----------
    samples : integer tensor (rows, T)
        Number of each token's document, -1 for tokens of none.
    n : int
        Number of documents.
    """

    def __init__(self, samples: Tensor, n: int) -> None:
        self.samples, self.n = samples.to(torch.int64), n
        self._found: dict[Any, Scattered | None] = {}

    def find(self, x: Tensor) -> Tokens | None:
        """Return where the tokens are in a tensor of the batch, or out of an untracked function, by its shape."""
        rows, t = self.samples.shape
        if not x.numel() or not (tuple(x.shape[:2]) == (rows, t) or x.shape[:1] == (rows * t,)):
            return None
        inner = x.numel() // (rows * t)
        return Tokens(Layout(1, t * inner), Layout(rows, inner))

    def move(self, func: Any, x: Tensor, tokens: Tokens, args: Any, kwargs: Any, out: Tensor) -> Tokens | None:
        """Return where the tokens are in a function's result, given where they are in one of its arguments."""
        rows, t = self.samples.shape
        row, place = (
            Layout(1, out.numel()) if size == 1 else _moved(func, x, layout, size, args, kwargs, out)
            for layout, size in zip(tokens, (rows, t), strict=True)
        )
        return None if row is None or place is None else Tokens(row, place)

    def numbers(self, tokens: Tokens, shape: torch.Size) -> Scattered | None:
        """Return the numbers of the documents along a tensor's leading axes; None if tokens run over several axes."""
        key = (tokens, tuple(shape))
        if key not in self._found:
            self._found[key] = self._numbers(tokens, tuple(shape))
        return self._found[key]

    def _numbers(self, tokens: Tokens, shape: tuple[int, ...]) -> Scattered | None:
        lines = [self._line(layout, size, shape) for layout, size in zip(tokens, self.samples.shape, strict=True)]
        lead = max((0 if line is None else line.ndim) for line in lines)
        if lead == 0 or any(line is None for line in lines):
            return None
        row, place = (line.reshape(*line.shape, *[1] * (lead - line.ndim)) for line in lines if line is not None)
        return Scattered(self.samples[row, place].expand(shape[:lead]), self.n)

    def _line(self, layout: Layout | Scattered, size: int, shape: tuple[int, ...]) -> Tensor | None:
        """Return the number of the row, or of the place, along the leading axes, which it broadcasts to."""
        device = self.samples.device
        if size == 1:
            return torch.zeros((), dtype=torch.int64, device=device)
        if isinstance(layout, Scattered):
            return layout.rows
        where = axis(shape, layout, size)
        if where is None:
            return None
        line = torch.arange(shape[where.number], device=device) // where.inner % size
        return line.reshape(*[1] * where.number, -1)


def _moved(func: Any, x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    if isinstance(layout, Scattered) and func in batching.OF_MANY:
        return kept(tuple(x.shape), layout, tuple(out.shape), n)
    return batching.place(func, x, layout, n, args, kwargs, out)
