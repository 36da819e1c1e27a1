"""Tensors made of parameters alone: ``1 + w``, ``W.T``, ``W[expert]``, ``w.float()``, position embeddings.

A layer that uses such a tensor hands over records of the tensor; they are pulled back to the parameters it was made
of. Where the way back keeps factors (a transpose, a cast, a block of rows, a look-up), it acts on the factors.
Everything else goes back by autograd through the few functions between the parameters and the tensor, one sample at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftw import Dense, OuterProduct, Packed, PackedRows, Rows, combine
from ftw.gradients import Record
from ftw_torch.records.join import seen

from .batch_axis import forms

__all__ = ["Aligned", "Derived", "Key", "pull_of"]


class Aligned(NamedTuple):
    """Gradients of a tensor that holds something for each sample on one axis: (n, *rest), that axis first."""

    grads: Tensor
    axis: int


class Derived:
    """A tensor made of parameters.

    Parameters
    ----------
    tensor : tensor
        With its graph back to the parameters' stand-ins.
    roots : frozenset of str
        Names of the parameters.
    base, pull : Derived or str, and callable
        What it was made of, and how its records become those of that; None if only autograd knows.
    """

    def __init__(self, tensor: Tensor, roots: frozenset[str], base: Key | None, pull: Pull | None) -> None:
        self.tensor, self.roots, self.base, self.pull = tensor, roots, base, pull
        self.pending: list[Record | Aligned] = []


Key = str | Derived
Pull = Callable[[Any], Any]
"""From a record of a tensor to one of its base; NotImplemented where factors would have to be written out."""


def pull_of(func: Any, args: Any, kwargs: Any, base: Tensor, out: Tensor) -> Pull | None:
    """Return the way back from ``out = func(...)`` to the one tensor of parameters among its arguments."""
    if func is F.embedding:
        return _looked_up(
            args[0] if args else kwargs["input"], base, kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
        )
    if (
        func in _LOOKUPS
        and len(args) == 2
        and isinstance(args[1], Tensor)
        and args[1].dtype == torch.int64
        and base.ndim == 2
    ):
        return _looked_up(args[1], base, None)
    if func in _CASTS and out.shape == base.shape:
        return lambda record: record
    if func in _SHIFTS and out.shape == base.shape and args[0] is base and not kwargs:
        return lambda record: record
    if func in _TRANSPOSES and base.ndim == 2 and out.shape == base.shape[::-1] and out.data_ptr() == base.data_ptr():
        return _transposed if out.stride() == base.stride()[::-1] else None
    if func in _TRANSPOSES and base.ndim == 3 and out.shape == base.mT.shape and out.stride() == base.mT.stride():
        return _each_transposed(out.shape)
    if func in _EXPANSIONS:
        return _expanded(tuple(base.shape), tuple(out.shape))
    if out.layout is not torch.strided or base.layout is not torch.strided:
        return None
    shares = out.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    if shares and out.is_contiguous() and base.is_contiguous():
        return _block(base, out, int(out.storage_offset()) - int(base.storage_offset()))
    return None


def _grads(record: Any) -> Any:
    return record.grads


def _grads_of_rows(record: Rows) -> Any:
    return _factor(record.output_grads)[..., 0]


def _factor(x: Any) -> Any:
    return x


def _looked_up(indices: Tensor, base: Tensor, padding: int | None) -> Pull:
    size, d = base.shape

    def pull(record: Any) -> Any:
        if isinstance(record, Aligned) and record.axis < indices.ndim:
            at = indices.movedim(record.axis, 0)  # (n, ...)
        elif isinstance(record, Dense):
            at = indices.expand(record.n, *indices.shape)
        else:
            return NotImplemented
        n = len(_grads(record))
        at, b = at.reshape(n, -1), _grads(record).reshape(n, -1, d)  # (n, t), (n, t, d)
        if padding is not None:
            b = b.masked_fill((at == padding % size)[:, :, None], 0.0)
        return Rows(at, b, size)

    return pull


def _transposed(record: Any) -> Any:
    if isinstance(record, OuterProduct):
        return OuterProduct(record.output_grads, record.inputs)
    if isinstance(record, Packed):
        return Packed(record.output_grads, record.inputs, record.samples, record.size)
    return Dense(_grads(record).mT) if isinstance(record, Dense) else NotImplemented


def _each_transposed(shape: torch.Size) -> Pull:
    """Return the way back from a stack of matrices, each transposed."""

    def pull(record: Any) -> Any:
        return Dense(_grads(record).reshape(-1, *shape).mT) if isinstance(record, Dense) else NotImplemented

    return pull


def _expanded(old: tuple[int, ...], new: tuple[int, ...]) -> Pull:
    padded = (1,) * (len(new) - len(old)) + old
    dims = [k for k, (a, b) in enumerate(zip(padded, new, strict=True)) if a != b]

    def pull(record: Any) -> Any:
        if isinstance(record, Aligned):
            if record.axis not in dims:
                return NotImplemented
            g = _grads(record).unsqueeze(record.axis + 1)  # (n, *new), with 1 in place of the samples' axis
        elif isinstance(record, Dense):
            g = _grads(record).reshape(-1, *new)
        else:
            return NotImplemented
        if dims:
            g = g.sum([d + 1 for d in dims], keepdim=True)
        return Dense(g.reshape(len(g), *seen(old)))

    return pull


def _block(base: Tensor, out: Tensor, start: int) -> Pull:
    """Return the way back from a contiguous block of a parameter, whatever its shape."""
    shape = seen(base.shape)
    width = shape[-1]
    flush = len(shape) == 2 and start % width == 0 and out.numel() % width == 0
    first, rows = start // max(1, width), out.numel() // max(1, width)

    def pull(record: Any) -> Any:
        whole = out.numel() == base.numel()
        if isinstance(record, Dense):
            n = record.n
            if whole:
                return Dense(_grads(record).reshape(n, *shape))
            if flush:
                at = torch.arange(first, first + rows, device=_grads(record).device).expand(n, rows)
                return Rows(at, _grads(record).reshape(n, rows, width), shape[0])
            after = base.numel() - start - out.numel()
            return Dense(F.pad(_grads(record).reshape(n, -1), (start, after)).reshape(n, *shape))
        if isinstance(record, Rows) and whole and record.size == base.numel():  # single entries
            b = _grads_of_rows(record)  # (n, t)
            return Dense(b.new_zeros(len(b), base.numel()).scatter_add_(1, record.indices, b).reshape(-1, *shape))
        if not flush or isinstance(record, Aligned) or seen(out.shape) != (rows, width):
            return NotImplemented
        if isinstance(record, OuterProduct):
            b = F.pad(_factor(record.output_grads), (first, shape[0] - first - rows))  # (n, t, d_out)
            return OuterProduct(record.inputs, b)
        if isinstance(record, Packed):
            b = F.pad(_factor(record.output_grads), (first, shape[0] - first - rows))  # (t, d_out)
            return Packed(record.inputs, b, record.samples, record.size)
        if isinstance(record, PackedRows):
            at = record.indices + first
            return PackedRows(at, record.output_grads, record.samples, record.size, shape[0])
        return (
            Rows(record.indices + first, record.output_grads, shape[0]) if isinstance(record, Rows) else NotImplemented
        )

    return pull


def written_out(record: Any, shape: torch.Size, i: int) -> Any:
    """Return the gradient of sample i of a record, of the given shape."""
    if isinstance(record, Aligned):
        out = _grads(record).new_zeros(shape)
        out.select(record.axis, i).copy_(_grads(record)[i])
        return out
    if isinstance(record, OuterProduct):
        return (record.output_grads[i].T @ record.inputs[i]).reshape(shape)
    if isinstance(record, Rows):
        rows = _factor(record.output_grads).new_zeros(record.size, record.output_grads.shape[2])
        return rows.index_add_(0, record.indices[i], record.output_grads[i]).reshape(shape)
    if isinstance(record, (Packed, PackedRows)):
        line: Any = torch.arange(record.size, device=_factor(record.samples).device)
        return combine({"": record}, (line == i).to(torch.float64))[""].reshape(shape)
    if isinstance(record, Dense):
        return _grads(record)[i].reshape(shape)
    return sum((written_out(part, shape, i) for part in record.parts[1:]), written_out(record.parts[0], shape, i))


_CASTS = frozenset(
    forms("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "alias")
)
_SHIFTS = frozenset(forms("add", "__add__", "__radd__", "sub", "__sub__"))
_TRANSPOSES = frozenset(
    [
        *forms("t", "transpose", "swapaxes", "swapdims", "permute", "adjoint"),
        *(getattr(Tensor, x).__get__ for x in ("T", "mT", "H", "mH")),
    ]
)
_EXPANSIONS = frozenset(forms("expand", "expand_as", "broadcast_to"))
_LOOKUPS = frozenset(forms("__getitem__"))
