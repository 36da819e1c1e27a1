"""Where the samples are in a tensor: its layout.

In row-major order the elements of a tensor run through the samples ``outer`` times, ``inner`` consecutive elements
belonging to one sample: (n, t, d) has the layout (1, t d), and so has (n t, d), and every other reshape of it; (t, n,
d) has (t, d). A gather of rows (a mixture of experts) has none of these; it carries the sample number of every row
instead.

A layout survives a function that leaves the axes up to the samples' axis as they are, which most do. The others are
below. Where nothing is known, a parameter has no rule, and autograd decides, one sample at a time. A batch of one
sample is easy (every element is its own) and never comes here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Axis", "Layout", "Scattered", "axis", "broadcast", "forms", "getters", "group", "kept"]

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Samples in a regular order: element f, in row-major order, belongs to sample ``f // inner % n``."""

    outer: int
    inner: int


class Scattered:
    """Samples in any order along the leading axes: their numbers, shaped like those axes; -1 for no sample."""

    def __init__(self, rows: Tensor, samples: int) -> None:
        self.rows, self.samples = rows, samples
        self._slots: tuple[Tensor, int] | None = None

    def slots(self) -> tuple[Tensor, int]:
        """Return each row's place among those of its sample (r,), and the largest number of rows a sample has.

        Rows of no sample have the place 0 after the last sample's.
        """
        if self._slots is None:
            rows = torch.where(self.rows < 0, self.samples, self.rows).reshape(-1)  # (r,)
            order = torch.argsort(rows, stable=True)
            counts = torch.bincount(rows, minlength=self.samples + 1)  # (n + 1,)
            start = (counts.cumsum(0) - counts)[rows[order]]  # (r,)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order), device=rows.device) - start
            place = torch.where(rows < self.samples, place, 0)
            self._slots = place, int(counts[:-1].max()) if len(rows) else 0
        return self._slots


class Axis(NamedTuple):
    """The axis of a tensor that holds the samples, of length ``outer * n * inner``."""

    number: int
    outer: int
    inner: int

    @property
    def pure(self) -> bool:
        """Whether the axis holds the samples and nothing else."""
        return self.outer == self.inner == 1


@functools.lru_cache(maxsize=4096)
def axis(shape: Shape, layout: Layout, n: int) -> Axis | None:
    """Return the axis that holds the samples, None if they run over several."""
    before, after = 1, math.prod(shape)
    for k, size in enumerate(shape):
        if after == 0:
            return None
        after //= size
        inner, rest = divmod(layout.inner, after)
        if rest == 0 and inner and layout.outer % before == 0:
            outer = layout.outer // before
            if size == outer * n * inner:
                return Axis(k, outer, inner)
        before *= size
    return None


def at(shape: Sequence[int], where: Axis, index: int) -> Layout:
    """Return the layout of a tensor of this shape whose axis ``index`` holds the samples as ``where`` did."""
    return Layout(where.outer * math.prod(shape[:index]), where.inner * math.prod(shape[index + 1 :]))


def group(x: Tensor, layout: Layout | Scattered, n: int, trailing: int) -> Tensor | None:
    """Return ``x`` (..., *trail) as (n, t, *trail), each sample's tokens together; None if trailing axes mix them."""
    trail = x.shape[x.ndim - trailing :]
    if isinstance(layout, Scattered):
        if layout.rows.ndim + trailing > x.ndim:
            return None
        place, most = layout.slots()
        rows = layout.rows.reshape(-1)
        flat = x.reshape(len(rows), math.prod(x.shape[layout.rows.ndim : x.ndim - trailing]), *trail)  # (r, u, *trail)
        out = flat.new_zeros(n + 1, max(most, 1), *flat.shape[1:])  # the last is that of rows of no sample
        out[rows, place] = flat
        return out[:n, :most].reshape(n, most * flat.shape[1], *trail)
    inner, rest = divmod(layout.inner, max(1, math.prod(trail)))
    if rest:
        return None
    if layout.outer == 1:
        return x.reshape(n, inner, *trail)
    return x.reshape(layout.outer, n, inner, *trail).movedim(1, 0).reshape(n, layout.outer * inner, *trail)


def kept(shape: Shape, layout: Layout | Scattered, out: Shape, n: int) -> Layout | Scattered | None:
    """Return the layout of a result that has the same axes as its argument, up to that of the samples."""
    if isinstance(layout, Scattered):
        return layout if tuple(out[: layout.rows.ndim]) == tuple(layout.rows.shape) else None
    return _same_axes(shape, layout, out, n)


@functools.lru_cache(maxsize=4096)
def _same_axes(shape: Shape, layout: Layout, out: Shape, n: int) -> Layout | None:
    where = axis(shape, layout, n)
    if where is None:
        return layout if shape == out else None
    k = where.number
    return at(out, where, k) if tuple(out[: k + 1]) == tuple(shape[: k + 1]) else None


def broadcast(shape: Shape, layout: Layout | Scattered, out: Shape, n: int) -> Layout | Scattered | None:
    """Return the layout of the result of an elementwise function, its axes aligned from the right."""
    if isinstance(layout, Scattered) or len(shape) == len(out):
        return kept(shape, layout, out, n)
    where = axis(shape, layout, n)
    if where is None:
        return None
    k = where.number + len(out) - len(shape)
    return at(out, where, k) if out[k] == shape[where.number] else None


def forms(*names: str) -> list[Any]:
    """Return the functions of these names, which spaces may separate, in torch and in torch.Tensor."""
    words = [word for name in names for word in name.split()]
    return [getattr(home, word) for word in words for home in (torch, Tensor) if hasattr(home, word)]


def getters(names: str) -> list[Any]:
    """Return the functions that read properties of tensors, as a function mode sees them."""
    found: list[Any] = [getattr(Tensor, word, None) for word in names.split()]
    return [x.__get__ for x in found if hasattr(x, "__get__")]
