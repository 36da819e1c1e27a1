"""A loss that is one number for a batch, followed as one number a sample.

Inside the mode a model or a trainer computes its loss as ever. Each of torch's loss functions is evaluated a sample at
a time as well, and the few operations between it and the loss that comes out (scaling, means, sums of two losses) are
repeated on the samples' values. What is added that belongs to the batch as a whole, as a router's balance loss does,
is kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .losses import LOSSES, SampleLosses, sample_losses
from .owners import Owners

__all__ = ["Followed", "PerSample"]


class Followed(NamedTuple):
    """A scalar of the batch."""

    value: Tensor  # (), held so that its id stays its own
    rows: Tensor  # (n,), the same of each sample alone
    shared: Tensor | None = None  # (), what was added for the batch as a whole


_T = torch.Tensor
_ADD = {torch.add, _T.add, _T.__add__, _T.__radd__, _T.add_, _T.__iadd__}
_SUB = {torch.sub, _T.sub, _T.__sub__, _T.sub_, _T.__isub__}
_RSUB = {_T.__rsub__}
_MUL = {torch.mul, _T.mul, _T.__mul__, _T.__rmul__, _T.mul_, _T.__imul__, torch.multiply, _T.multiply}
_DIV = {torch.div, _T.div, _T.__truediv__, _T.div_, _T.__itruediv__, torch.true_divide, _T.true_divide}
_LINEAR = {_T.neg, torch.neg, _T.__neg__, _T.float, _T.double, _T.to, _T.clone, torch.clone, _T.contiguous}
_ALONE = {_T.exp, torch.exp, _T.log, torch.log, _T.clamp, torch.clamp, _T.abs, torch.abs, _T.__pow__, _T.pow}
_ALONE |= {_T.detach, _T.nan_to_num, torch.nan_to_num, _T.sqrt, torch.sqrt, torch.sigmoid, _T.sigmoid}
_ALONE |= {_T.ne, _T.__ne__, _T.eq, _T.__eq__, _T.gt, _T.__gt__, _T.ge, _T.__ge__, _T.lt, _T.__lt__, _T.le, _T.__le__}
_ALONE |= {_T.__and__, _T.__invert__, torch.logical_not, _T.logical_not, _T.bool, _T.long, _T.masked_fill}
_TOTAL = {_T.sum, torch.sum, _T.mean, torch.mean}
_ALONE |= {F.logsigmoid, torch.relu, F.relu, _T.relu, torch.log1p, _T.log1p, torch.exp, _T.__rpow__}
_SAME = {torch.as_tensor, _T.squeeze, torch.squeeze, _T.reshape, _T.view}
_IN_PLACE = {_T.add_, _T.__iadd__, _T.sub_, _T.__isub__, _T.mul_, _T.__imul__, _T.div_, _T.__itruediv__}
_BOTH = _ADD | _SUB | _RSUB | _MUL | _DIV | _LINEAR | _ALONE
_OUT_OF_PLACE: dict[Any, Any] = {_T.add_: torch.add, _T.__iadd__: torch.add, _T.sub_: torch.sub, _T.__isub__: torch.sub}
_OUT_OF_PLACE |= {_T.mul_: torch.mul, _T.__imul__: torch.mul, _T.div_: torch.div, _T.__itruediv__: torch.div}


class PerSample(TorchFunctionMode):
    """Follows losses a sample at a time while a forward runs.

    Parameters
    ----------
    owners : Owners
        Whose the terms of the loss are.
    """

    def __init__(self, owners: Owners) -> None:
        super().__init__()
        self.owners = owners
        self.counts: Tensor | None = None  # (n,), labels of each sample in the last loss over classes
        self._scalars: dict[int, Followed] = {}
        self._leading: dict[int, Tensor] = {}  # elementwise terms of the loss
        self._halves: dict[int, Tensor] = {}  # (2 n, ...): of all chosen, then of all rejected
        self._paused = False

    def of(self, loss: Any) -> Followed | None:
        """Return what is known of a scalar."""
        return self._scalars.get(id(loss))

    def follow(self, value: Tensor, rows: Tensor, shared: Tensor | None = None) -> Tensor:
        """Go on from a scalar whose values a sample are given; return it."""
        self._scalars[id(value)] = Followed(value, rows, shared)
        return value

    def lead(self, x: Tensor) -> Tensor:
        """Go on from terms of the loss that can be told apart; return them."""
        self._leading[id(x)] = x
        return x

    def halve(self, x: Tensor) -> Tensor:
        """Go on from terms of pairs, the first of all samples before the second; return them."""
        self._halves[id(x)] = x
        return x

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing within a block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def by_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a loss function that is called on one sample at a time; its value is the mean."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._paused:
                return function(*args, **kwargs)
            kwargs = {k: None if k == "num_items_in_batch" else x for k, x in kwargs.items()}
            pieces = self.owners.cut((args, kwargs))
            if pieces is None:
                return function(*args, **kwargs)
            with self.paused():
                rows = torch.stack([function(*a, **k).reshape(()) for a, k in pieces])  # (n,)
                return self.follow(rows.mean(), rows)

        return call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of PyTorch, and follow it."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func in LOSSES:
            found = sample_losses(func, args, kwargs, self.owners)
            if isinstance(found, SampleLosses):
                self.counts = self.counts if found.counts is None else found.counts
                return self.follow(found.value, found.rows)
            return func(*args, **kwargs) if found is None else self.lead(found)
        if args and id(args[0]) in self._halves:
            return self._pairs(func, args, kwargs)
        if args and (self._scalars or self._leading):
            first, second = args[0], args[1] if len(args) > 1 else None
            if id(first) in self._scalars or id(second) in self._scalars:
                return self._scalar(func, args, kwargs)
            if id(first) in self._leading or id(second) in self._leading:
                return self._terms(func, args, kwargs)
        return func(*args, **kwargs)

    def _scalar(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a function of a followed scalar."""
        parts = [self._scalars.get(id(x)) for x in args[:2]]
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.ndim:
            return out
        found = self._result(func, args, kwargs, parts, out)
        if found is None:
            self._scalars.pop(id(out), None)
            return out
        return self.follow(out, *found)

    def _result(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        parts: list[Followed | None],
        out: Tensor,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return the samples' values of a function of followed scalars, and what is shared; None if not known."""
        if func in _TOTAL or func in _SAME or func is _T.view_as:
            return None if parts[0] is None else (parts[0].rows, parts[0].shared)
        if func not in _BOTH:
            return None
        one, two = parts[0], parts[1] if len(parts) > 1 else None
        rest = args[2:]
        clean = _OUT_OF_PLACE.get(func, func)

        def on(values: list[Any]) -> Tensor:
            result: Tensor = clean(*values, *rest, **kwargs)
            return result

        rows = [x if p is None else p.rows for x, p in zip(args[:2], parts, strict=True)]
        shares = [None if p is None else p.shared for p in parts]
        if func in _ADD | _SUB | _RSUB:
            other = args[1] if one is not None else args[0]
            if (one is None or two is None) and isinstance(other, Tensor):
                place = 1 if one is not None else 0  # of what belongs to the batch
                rows[place], shares[place] = 0.0, other
                if not isinstance(rows[0], Tensor):
                    rows[0] = torch.zeros_like(rows[1])
            shared = None
            if any(x is not None for x in shares):
                zero = torch.zeros((), dtype=out.dtype, device=out.device)
                shared = on([zero if x is None else x for x in shares])
            return on(rows), shared
        if func in _MUL | _DIV:
            if one is not None and two is not None:
                return None if any(x is not None for x in shares) else (on(rows), None)
            if shares[0] is not None:
                return on(rows), on([shares[0], args[1]])
            if len(shares) > 1 and shares[1] is not None:
                return (on(rows), on([args[0], shares[1]])) if func in _MUL else None
            return on(rows), None
        if one is None or two is not None:
            return None
        if func in _LINEAR:
            return on(rows), None if one.shared is None else on([one.shared, *args[1:2]])
        return (on(rows), None) if one.shared is None else None

    def _terms(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a function of terms of the loss."""
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        first = args[0]
        if func in _TOTAL and id(first) in self._leading:
            if out.ndim == 0 and first.ndim:
                of_each = self.owners.sums if func in (_T.sum, torch.sum) else self.owners.means
                return self.follow(out, of_each(first))
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            dims = (dims,) if isinstance(dims, int) else dims
            if dims and all(d % first.ndim for d in dims) and self.owners.holds(out):  # the slowest axis stays
                return self.lead(out)
            return out
        if self.owners.in_rows and _keeps_rows(func, args) and first.shape[:1] == out.shape[:1]:
            return self.lead(out)
        if func in _BOTH | _SAME and out.ndim and self.owners.holds(out):
            known = first if id(first) in self._leading else args[1]
            if func in _SAME or out.shape == known.shape:
                return self.lead(out)
        return out

    def _pairs(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a function of terms of pairs."""
        out, first = func(*args, **kwargs), args[0]
        if func in (torch.chunk, _T.chunk):
            chunks, dim = (*args[1:], *(kwargs[k] for k in ("chunks", "dim") if k in kwargs), 0)[:2]
            return tuple(map(self.lead, out)) if chunks == 2 and dim == 0 else out
        if not isinstance(out, Tensor) or not out.ndim or len(out) != len(first):
            return out
        if func in _BOTH | _SAME or (func in _TOTAL and out.ndim < first.ndim) or _keeps_rows(func, args):
            return self.halve(out)
        return out


def _keeps_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an index leaves the slowest axis as it is."""
    index = args[1] if func is _T.__getitem__ and len(args) == 2 else None
    return isinstance(index, tuple) and (index[0] is Ellipsis or index[0] == slice(None))
