"""Records put together: the uses of one parameter, the pieces of one batch, parameters that were not used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ftw import Dense, OuterProduct, Packed, PackedRows, Rows, Sum
from ftw.gradients import Record

__all__ = ["empty", "is_empty", "join", "merge", "seen", "some"]


def seen(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape under which a parameter's records come: that of a matrix where it has more than two axes.

    Three axes (experts, d_out, d_in) are a stack of matrices; with more, (d_out, d_in, kernel ...), all but the first
    are one.
    """
    shape = tuple(shape)
    if len(shape) < 3:
        return shape
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))


def merge(parts: Sequence[Record]) -> Record:
    """Return one record of several uses of a parameter: written-out parts are added, factors kept side by side."""
    dense = [part for part in parts if isinstance(part, Dense)]
    rest: list[Record] = [part for part in parts if not isinstance(part, Dense)]
    if dense:
        total: Any = dense[0].grads
        for part in dense[1:]:
            total = total + part.grads
        rest.append(Dense(total))
    return rest[0] if len(rest) == 1 else Sum(tuple(rest))


def join(
    pieces: Sequence[Mapping[str, Record]], sizes: Sequence[int], parameters: Mapping[str, Tensor]
) -> dict[str, Record]:
    """Return the records of all samples from those of consecutive pieces of a batch.

    A parameter that no sample used gets an empty record.
    """
    out = {}
    for name, p in parameters.items():
        found = [piece.get(name) for piece in pieces]
        if all(record is None for record in found):
            out[name] = empty(p, sum(sizes))
        elif len({_structure(record) for record in found}) == 1:
            out[name] = _concatenate([record for record in found if record is not None])
        else:  # used differently from piece to piece: each record padded with zeros for the samples of the others
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            out[name] = Sum(
                tuple(
                    _pad(record, start, sum(sizes) - start - size)
                    for record, start, size in zip(found, starts, sizes, strict=True)
                    if record is not None
                )
            )
    return out


def empty(p: Tensor, n: int) -> Record:
    """Return the record of n samples that do not use a parameter: no tokens where it is a matrix."""
    shape = seen(p.shape)
    if len(shape) == 2:
        return OuterProduct(p.new_zeros(n, 0, shape[1]), p.new_zeros(n, 0, shape[0]))
    return Dense(p.new_zeros(()).expand(n, *shape))


def is_empty(record: Record) -> bool:
    """Return whether a record was made by `empty`."""
    if isinstance(record, OuterProduct):
        return record.inputs.shape[1] == 0
    grads: Any = getattr(record, "grads", None)
    return isinstance(grads, Tensor) and not any(grads.stride())


def some(record: Record, indices: Tensor) -> Record:
    """Return the records of some samples, each taken once."""
    if isinstance(record, Sum):
        return Sum(tuple(some(part, indices) for part in record.parts))
    if isinstance(record, (Packed, PackedRows)):
        return _some_documents(record, indices)
    return _rebuild(record, lambda field: getattr(record, field).index_select(0, indices))


def _some_documents(record: Any, indices: Tensor) -> Record:
    """Return the records of some documents, each once, without other tokens where counting them is free."""
    table = record.samples.new_full((record.size + 1,), -1)  # the last, at -1, is that of tokens of no document
    table[indices] = torch.arange(len(indices), device=table.device, dtype=table.dtype)
    parts: Any = {field: getattr(record, field) for field in _fields_of_tokens(record)}
    parts["samples"] = table[record.samples]
    if table.device.type == "cpu":
        kept = torch.nonzero(parts["samples"] >= 0)[:, 0]
        parts = {field: x.index_select(0, kept) for field, x in parts.items()}
    out: Record = replace(record, **parts, size=len(indices))
    return out


def _fields_of_tokens(record: Packed | PackedRows) -> tuple[str, ...]:
    return ("inputs" if isinstance(record, Packed) else "indices", "output_grads", "samples")


def _structure(record: Record | None) -> Any:
    return tuple(map(_structure, record.parts)) if isinstance(record, Sum) else type(record)


def _concatenate(pieces: Sequence[Record]) -> Record:
    """Concatenate records of one structure; factors of different length are padded with tokens of zero gradient."""
    first: Any = pieces[0]
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(first, Sum):
        uses: Any = [piece.parts for piece in pieces if isinstance(piece, Sum)]
        return Sum(tuple(_concatenate(part) for part in zip(*uses, strict=True)))
    if isinstance(first, (Packed, PackedRows)):
        return _lined_up(pieces)
    return _rebuild(first, lambda field: _cat([getattr(piece, field) for piece in pieces]))


def _lined_up(pieces: Sequence[Any]) -> Record:
    """Concatenate packed records: the documents of each piece follow those of the pieces before it."""
    sizes = [piece.n for piece in pieces]
    lined = [_renumbered(piece, sum(sizes[:i]), sum(sizes)) for i, piece in enumerate(pieces)]
    parts: Any = {
        field: torch.cat([getattr(piece, field) for piece in lined]) for field in _fields_of_tokens(pieces[0])
    }
    out: Record = replace(lined[0], **parts)
    return out


def _renumbered(record: Any, before: int, n: int) -> Any:
    """Return a record of documents among n, with ``before`` others in front of its own."""
    samples = torch.where(record.samples < 0, -1, record.samples + before)
    return replace(record, samples=samples, size=n)


def _pad(record: Record, before: int, after: int) -> Record:
    """Add samples without gradient in front of and behind a record."""
    if isinstance(record, Sum):
        return Sum(tuple(_pad(part, before, after) for part in record.parts))
    if isinstance(record, (Packed, PackedRows)):
        return _renumbered(record, before, before + record.n + after)  # type: ignore[no-any-return]

    def extend(field: str) -> Tensor:
        x: Tensor = getattr(record, field)
        return torch.cat([x.new_zeros(before, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:])])

    return _rebuild(record, extend)


def _rebuild(record: Any, field: Any) -> Record:
    if isinstance(record, Dense):
        return Dense(field("grads"))
    if isinstance(record, Rows):
        return Rows(field("indices"), field("output_grads"), record.size)
    return OuterProduct(field("inputs"), field("output_grads"))


def _cat(pieces: list[Tensor]) -> Any:
    """Concatenate (n, t, ...) tensors along n, padding t with zeros."""
    if pieces[0].ndim < 2 or len({x.shape[1] for x in pieces}) == 1:
        return torch.cat(pieces)
    longest = max(x.shape[1] for x in pieces)
    return torch.cat([torch.cat([x, x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])], 1) for x in pieces])


def bytes_of(record: Record) -> int:
    """Return the bytes of a record's tensors."""
    if isinstance(record, Sum):
        return sum(map(bytes_of, record.parts))
    tensors: Any = record.floats
    if isinstance(record, (Rows, PackedRows)):
        tensors = [record.indices, *tensors]
    return sum(x.numel() * x.element_size() for x in tensors)


def join_same(pieces: Sequence[Record]) -> Record:
    """Return one record from those of consecutive samples, padded where they are not of one structure."""
    if len({_structure(record) for record in pieces}) == 1:
        return _concatenate(pieces)
    return Sum(
        tuple(
            _pad(record, sum(p.n for p in pieces[:i]), sum(p.n for p in pieces[i + 1 :]))
            for i, record in enumerate(pieces)
        )
    )
