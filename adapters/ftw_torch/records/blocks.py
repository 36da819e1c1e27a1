"""Gram matrices and squared lengths of records in several pieces, block by block, each small enough for a cache."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import ftw
from ftw import Dense, OuterProduct, PackedRows, Rows, sketch
from ftw.geometry import Diagonal, Operator, Scale
from ftw.gradients import Record, matrix_shape
from ftw.spi import leaves, namespace, squared_norms

from .dtypes import promoted
from .join import join_same

__all__ = ["add_gram", "add_sketches", "block_bytes", "gram_of", "lengths", "product", "root_of"]


def block_bytes(x: Tensor) -> int:
    """Return how large a block should be: a share of a processor's cache, or enough to keep a GPU busy."""
    return 2**28 if x.is_cuda else 2**23


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y`` with sums and result in float32 or wider."""
    dtype = promoted(x.dtype, y.dtype)
    if dtype.itemsize >= 4:
        return x.to(dtype) @ y.to(dtype)
    if x.is_cuda and x.dtype == y.dtype and x.ndim == y.ndim:
        multiply = torch.bmm if x.ndim == 3 else torch.mm
        return multiply(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()


def root_of(operator: Operator, rows: slice) -> Any:
    """Return rows of P^1/2 as elementwise factors."""
    if isinstance(operator, Scale):
        return operator.value**0.5
    assert isinstance(operator, Diagonal)
    values: Any = operator.values
    return values.reshape(matrix_shape(operator.shape))[rows].sqrt()


def add_gram(pieces: Sequence[Record], operator: Operator) -> Tensor:
    """Return ``<g_i, P g_j>`` (n, n) of one parameter for the samples of all pieces."""
    if not isinstance(operator, (Diagonal, Scale)):
        out: Tensor = ftw.gram({"": join_same(pieces)}, {"": operator}, max_bytes=block_bytes(_leaf(pieces[0])))
        return out
    total: Any = None
    for x in _blocks(pieces, operator):
        part = gram_of(x)
        total = part if total is None else total.add_(part)
    found: Tensor = total
    return found


def add_sketches(name: str, pieces: Sequence[Record], operator: Operator, size: int) -> Tensor:
    """Return count sketches (n, m) of ``P^1/2 G_i`` of one parameter, hashed by its name, for the samples of pieces."""
    seed, most = zlib.crc32(name.encode()), block_bytes(_leaf(pieces[0]))
    out: Tensor = sketch.count_sketch({"": join_same(pieces)}, {"": operator}, size, seed=seed, max_bytes=most)
    return out


def gram_of(x: Tensor) -> Tensor:
    """Return ``x x'`` (n, n) of few long rows (n, e)."""
    n, e = x.shape
    parts = min(256, e // 1024) if x.is_cuda else 1  # so many products side by side fill a GPU, one does not
    if parts < 2:
        return x @ x.T
    size = e // parts
    split = x[:, : parts * size].view(n, parts, size).movedim(1, 0)  # (parts, n, size)
    total: Tensor = torch.bmm(split, split.mT).sum(0)  # (n, n)
    rest = x[:, parts * size :]
    return total.addmm_(rest, rest.T)


def lengths(pieces: Sequence[Record], operator: Operator) -> Tensor:
    """Return ``<g_i, P g_i>`` (n,) of one parameter for the samples of all pieces."""
    if not isinstance(operator, (Diagonal, Scale)):
        out: Tensor = squared_norms({"": join_same(pieces)}, {"": operator})
        return out
    total: Any = None
    for x in _blocks(pieces, operator):
        part = (x * x).sum(1)
        total = part if total is None else total + part
    found: Tensor = total
    return found


def _blocks(pieces: Sequence[Record], operator: Operator) -> Iterator[Tensor]:
    """Yield ``P^1/2 G_i`` (n, e), a block of elements at a time."""
    n = sum(piece.n for piece in pieces)
    height, width = matrix_shape(pieces[0].shape)
    size = max(_item(piece) for piece in pieces)
    if all(isinstance(piece, (Rows, PackedRows)) for piece in pieces):
        yield from _looked_up(pieces, operator, n, max(1, block_bytes(_leaf(pieces[0])) // (n * height * size)))
        return
    simple = all(isinstance(piece, (OuterProduct, Dense)) for piece in pieces)
    if simple and isinstance(operator, Scale) and all(isinstance(piece, Dense) for piece in pieces):
        rows = height
    else:
        rows = max(1, block_bytes(_leaf(pieces[0])) // (n * width * size))
    for start in range(0, height, rows):
        part = slice(start, min(start + rows, height))
        blocks = [_block(piece, part, width) for piece in pieces]
        x = blocks[0] if len(blocks) == 1 else torch.cat(blocks)  # (n, r, c)
        fresh = len(blocks) > 1 or isinstance(pieces[0], OuterProduct)
        root = root_of(operator, part)
        yield (x.mul_(root) if fresh else x * root).reshape(n, -1)


def _block(record: Record, rows: slice, width: int) -> Tensor:
    """Return rows of every G_i, (n, r, width)."""
    if isinstance(record, OuterProduct):
        a: Any = record.inputs
        b: Any = record.output_grads
        return product(b[:, :, rows].mT, a)
    if isinstance(record, Dense):
        g: Any = record.grads
        g = g.reshape(g.shape[0], *matrix_shape(record.shape))[:, rows]
        out: Tensor = g.float() if g.dtype.itemsize < 4 else g
        return out
    xp = namespace(*leaves(record))
    found: Tensor = record.block(xp, rows, slice(0, width))
    return found


def _looked_up(pieces: Sequence[Any], operator: Operator, n: int, columns: int) -> Iterator[Tensor]:
    """Yield blocks of columns of embedding gradients, of the rows that occur if these are few."""
    size, width = pieces[0].shape
    rows = torch.cat([piece.indices.reshape(-1) for piece in pieces])
    numbers, which, used = _compact(rows, size)
    starts = [sum(p.n for p in pieces[:i]) for i in range(len(pieces))]
    sample = torch.cat([_samples_of(piece, start, n) for piece, start in zip(pieces, starts, strict=True)])
    place = torch.where(sample < n, sample * used + numbers, n * used)  # (sum of n t,)
    columns = max(1, columns * size // used)
    for start in range(0, width, columns):
        part = slice(start, min(start + columns, width))
        b = torch.cat([piece.output_grads[..., part].reshape(piece.indices.numel(), -1) for piece in pieces])
        b = b.float() if b.dtype.itemsize < 4 else b
        x = b.new_zeros(n * used + 1, b.shape[1]).index_add_(0, place, b)[:-1]  # (n used, c)
        if isinstance(operator, Diagonal):
            values: Any = operator.values
            root = values[:, part].sqrt() if which is None else values[:, part].index_select(0, which).sqrt()
            yield (x.view(n, used, -1) * root).view(n, -1)
        else:
            assert isinstance(operator, Scale)
            yield (x * operator.value**0.5).view(n, -1)


def _samples_of(piece: Any, start: int, n: int) -> Tensor:
    """Return the number of each token's sample, n for tokens of none."""
    if isinstance(piece, Rows):
        samples: Any = torch.arange(piece.n, device=_leaf(piece).device).repeat_interleave(piece.indices.shape[1])
        return samples + start  # type: ignore[no-any-return]
    return torch.where(piece.samples < 0, n, piece.samples + start)


def _compact(rows: Tensor, size: int) -> tuple[Tensor, Tensor | None, int]:
    """Return row numbers among those that occur, these rows (padded), and how many there may be, unread."""
    count = rows.numel()
    if count >= size:
        return rows, None, size
    ordered, order = rows.sort()  # (count,)
    first = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).to(ordered.dtype)])
    rank = first.cumsum(0)  # (count,)
    numbers = torch.empty_like(rank).scatter_(0, order, rank)
    which = ordered[-1].expand(count).clone().scatter_(0, rank, ordered)
    return numbers, which, count


def _leaf(record: Record) -> Tensor:
    out: Tensor = leaves(record)[0]
    return out


def _item(record: Record) -> int:
    out: int = max(max(x.dtype.itemsize for x in leaves(record) if x.is_floating_point()), 4)
    return out
