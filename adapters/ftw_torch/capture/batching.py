"""How each function of PyTorch moves the samples' axis.

A handler gets ``(x, layout, n, args, kwargs, out)``, x one of the arguments, and returns the layout of the result; None
where nothing is known. Functions that are not listed leave the axes up to the samples' axis as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch_axis import Axis, Layout, Scattered, at, axis, broadcast, forms, getters, kept

__all__ = ["OF_MANY", "place"]


def place(func: Any, x: Tensor, layout: Layout | Scattered, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    """Return the layout of a function's result, given that of one of its arguments."""
    handler = moved.get(func)
    if handler is not None and (x is args[0] or func in OF_MANY):
        return handler(x, layout, n, args, kwargs, out)
    if func in broadcasts:
        return broadcast(tuple(x.shape), layout, tuple(out.shape), n)
    return kept(tuple(x.shape), layout, tuple(out.shape), n)


def _reshaped(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    if isinstance(layout, Scattered):
        return kept(tuple(x.shape), layout, tuple(out.shape), n)
    return layout if out.numel() == x.numel() else None


def _reordered(order: Callable[..., Sequence[int]]) -> Callable[..., Any]:
    """Return the handler of a permutation; ``order(ndim, args, kwargs)`` gives the old axis of each new one."""

    def handler(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
        old = order(x.ndim, args, kwargs)
        if isinstance(layout, Scattered):
            lead = layout.rows.ndim
            return layout if list(old[:lead]) == list(range(lead)) else None
        where = axis(x.shape, layout, n)
        return None if where is None else at(out.shape, where, list(old).index(where.number))

    return handler


def _argument(args: Any, kwargs: Any, index: int, names: Sequence[str], default: Any = None) -> Any:
    if len(args) > index:
        return args[index]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _swap(ndim: int, args: Any, kwargs: Any) -> list[int]:
    a, b = _argument(args, kwargs, 1, ("dim0", "axis0")), _argument(args, kwargs, 2, ("dim1", "axis1"))
    order = list(range(ndim))
    order[a % ndim], order[b % ndim] = order[b % ndim], order[a % ndim]
    return order


def _permute(ndim: int, args: Any, kwargs: Any) -> list[int]:
    dims = args[1:] if len(args) > 2 else _argument(args, kwargs, 1, ("dims",))
    return [d % ndim for d in ((dims,) if isinstance(dims, int) else dims)]


def _movedim(ndim: int, args: Any, kwargs: Any) -> list[int]:
    source, target = _argument(args, kwargs, 1, ("source",)), _argument(args, kwargs, 2, ("destination",))
    source, target = ([v % ndim for v in ((d,) if isinstance(d, int) else d)] for d in (source, target))
    order = [d for d in range(ndim) if d not in source]
    for new, old in sorted(zip(target, source, strict=True)):
        order.insert(new, old)
    return order


def _last_two(ndim: int, args: Any, kwargs: Any) -> list[int]:
    return list(range(ndim)) if ndim < 2 else [*range(ndim - 2), ndim - 1, ndim - 2]


def _reversed(ndim: int, args: Any, kwargs: Any) -> list[int]:
    return list(range(ndim))[::-1]


def _reduced(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    """Place the result of a reduction; one over samples couples them and has no layout."""
    dims = _argument(args, kwargs, 1, ("dim", "axis"))
    if dims is None or isinstance(dims, (Tensor, bool, str, float)):
        return None
    if isinstance(layout, Scattered):
        return kept(tuple(x.shape), layout, tuple(out.shape), n)
    where = axis(x.shape, layout, n)
    gone = {d % max(1, x.ndim) for d in ((dims,) if isinstance(dims, int) else dims)}
    if where is None or where.number in gone:
        return None
    index = where.number if out.ndim == x.ndim else where.number - sum(d < where.number for d in gone)
    return at(out.shape, where, index)


def _along(position: int) -> Callable[..., Any]:
    """Return the handler of a function that mixes the entries of one axis: fine unless that is the samples'."""

    def handler(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
        dims = _argument(args, kwargs, position, ("dim", "dims"), -1)
        if isinstance(layout, Layout):
            where = axis(x.shape, layout, n)
            if where is None or not isinstance(dims, (int, tuple, list)):
                return None
            if where.number in {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims)}:
                return None
        return kept(tuple(x.shape), layout, tuple(out.shape), n)

    return handler


def _unbound(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    dim = _argument(args, kwargs, 1, ("dim",), 0) % x.ndim
    return _selected(x, layout, n, dim, out)


def _selected(x: Tensor, layout: Any, n: int, dim: int, out: Tensor) -> Any:
    if isinstance(layout, Scattered):
        return layout if dim >= layout.rows.ndim else None
    where = axis(x.shape, layout, n)
    if where is None or where.number == dim:
        return None
    return at(out.shape, where, where.number - (dim < where.number))


def _select(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    return _selected(x, layout, n, _argument(args, kwargs, 1, ("dim",)) % x.ndim, out)


def _parts(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    dim = _argument(args, kwargs, 2, ("dim",), 0) % x.ndim
    if isinstance(layout, Scattered):
        return _run(x, layout, out, dim)
    where = axis(x.shape, layout, n)
    if where is None:
        return None
    return at(out.shape, where, where.number) if where.number != dim else _rounds(where, x, out, 0, dim)


def _run(x: Tensor, layout: Scattered, out: Tensor, dim: int) -> Scattered | None:
    """Place a piece of an axis of scattered rows, a view: where it starts is read off the memory."""
    if dim >= layout.rows.ndim or out.numel() == x.numel():
        return layout
    shared = out.numel() == 0 or out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    if not shared or out.stride() != x.stride() or not x.stride(dim):
        return None
    start = (out.storage_offset() - x.storage_offset()) // x.stride(dim) if out.numel() else 0
    return Scattered(layout.rows.narrow(dim, start, out.shape[dim]), layout.samples)


def _rounds(where: Axis, x: Tensor, out: Tensor, start: int, dim: int) -> Layout | None:
    """Place a piece of the samples' axis: whole rounds through the samples, or nothing is known."""
    outer, rest = divmod(out.shape[dim], x.shape[dim] // where.outer)
    if rest or not outer or start % (x.shape[dim] // where.outer):
        return None
    return at(out.shape, Axis(dim, outer, where.inner), dim)


def _narrow(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    return _parts(x, layout, n, (x, None, _argument(args, kwargs, 1, ("dim",))), {}, out)


def _joined(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    dim = _argument(args, kwargs, 1, ("dim", "axis"), 0) % x.ndim
    parts = args[0] if args else kwargs["tensors"]
    if isinstance(layout, Scattered):
        if dim >= layout.rows.ndim:
            return layout
        marks = [getattr(y, "_ftw_samples", (None, None)) for y in parts]  # of this capture, see `Capture.where`
        alike = {(serial, place.rows.ndim if isinstance(place, Scattered) else 0) for serial, place in marks}
        rows = [place.rows for _, place in marks if isinstance(place, Scattered)]
        return Scattered(torch.cat(rows, dim), n) if len(alike) == 1 else None
    where = axis(x.shape, layout, n)
    if where is None:
        return None
    if where.number == dim:  # several rounds through the samples, if all parts are alike
        return _rounds(where, x, out, 0, dim) if all(y.shape == x.shape for y in parts) else None
    return at(out.shape, where, where.number)


def _stacked(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    dim = _argument(args, kwargs, 1, ("dim",), 0) % out.ndim
    where = axis(x.shape, layout, n) if isinstance(layout, Layout) else None
    return None if where is None else at(out.shape, where, where.number + (dim <= where.number))


def _repeated(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    where = axis(x.shape, layout, n) if isinstance(layout, Layout) else None
    if where is None:
        return None
    k = where.number + out.ndim - x.ndim
    times = out.shape[k] // x.shape[where.number]
    return at(out.shape, Axis(k, where.outer * times, where.inner), k)


def _interleaved(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    times, dim = _argument(args, kwargs, 1, ("repeats",)), _argument(args, kwargs, 2, ("dim",))
    where = axis(x.shape, layout, n) if isinstance(layout, Layout) else None
    if where is None or not isinstance(times, int) or dim is None:
        return None
    inner = where.inner * (times if dim % x.ndim == where.number else 1)
    return at(out.shape, Axis(where.number, where.outer, inner), where.number)


def _expanded(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    return broadcast(tuple(x.shape), layout, tuple(out.shape), n)


def _indexed(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    """Place ``x[...]``: basic indices move the axis, tensors on the leading axes gather rows."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    gathers = [isinstance(i, (Tensor, list)) for i in index]
    if any(gathers):
        return _gathered(x, layout, n, index, gathers, out)
    if isinstance(layout, Scattered):
        lead = layout.rows.ndim
        if len(index) == 1 and isinstance(index[0], slice) and (index[0].step or 1) == 1:
            return _run(x, layout, out, 0)
        plain = index[:lead] == (slice(None),) * min(lead, len(index)) or index[:1] == (Ellipsis,)
        return kept(tuple(x.shape), layout, tuple(out.shape), n) if plain else None
    where = axis(x.shape, layout, n)
    if where is None:
        return None
    used = sum(i is not None and i is not Ellipsis for i in index)
    fill = [slice(None)] * (x.ndim - used)
    spread = index if Ellipsis in index else (*index, Ellipsis)
    new, old = 0, 0
    for i in itertools.chain.from_iterable(fill if e is Ellipsis else [e] for e in spread):
        if old == where.number and i is not None:
            if not isinstance(i, slice) or (i.step or 1) != 1:
                return None
            if out.shape[new] == x.shape[old]:
                return at(out.shape, where, new)
            start = range(x.shape[old])[i].start
            rounds = _rounds(where, x.movedim(old, 0), out.movedim(new, 0), start, 0)
            outer = 0 if rounds is None else out.shape[new] // (n * where.inner)
            return at(out.shape, Axis(new, outer, where.inner), new) if outer else None
        old += i is not None
        new += not isinstance(i, int)
    return None


def _gathered(x: Tensor, layout: Any, n: int, index: Any, gathers: list[bool], out: Tensor) -> Any:
    """Place a gather of rows: the sample numbers are gathered with the same indices."""
    lead = len(gathers) if all(gathers) else gathers.index(False)
    if any(gathers[lead:]) or lead == 0:
        return kept(tuple(x.shape), layout, tuple(out.shape), n)
    if any(i is None or isinstance(i, int) for i in index[lead:]):
        return None
    first = index[0]
    masked = isinstance(first, Tensor) and first.dtype == torch.bool
    width = first.ndim if masked else lead
    after = math.prod(x.shape[width:])
    if isinstance(layout, Layout):
        if after == 0 or layout.inner % after:
            return None
        where = axis(x.shape[:width], Layout(layout.outer, layout.inner // after), n)
        if where is None:
            return None
        line = torch.arange(x.shape[where.number], device=x.device) // where.inner % n
        if not masked:
            return _along_leading(line[index[where.number]], _shape(index[:lead]), n)
        ids = line.reshape(-1, *[1] * (width - where.number - 1)).expand(*x.shape[:width])
    else:
        most = layout.rows.ndim
        if width < most:
            return None
        ids = layout.rows.reshape(*layout.rows.shape, *[1] * (width - most)).expand(*x.shape[:width])
    return Scattered(ids[tuple(index[:lead])], n)


def _shape(indices: Sequence[Any]) -> Sequence[int]:
    """Return the shape to which indices broadcast."""
    together: Any = torch.broadcast_tensors(*indices)  # type: ignore[no-untyped-call]
    return tuple(together[0].shape)


def _along_leading(ids: Tensor, shape: Sequence[int], n: int) -> Scattered | None:
    """Return the layout of indices of this shape whose sample numbers are ``ids``, which broadcast to it."""
    ids = ids.reshape((1,) * (len(shape) - ids.ndim) + tuple(ids.shape))
    lead = max((k + 1 for k, size in enumerate(ids.shape) if size > 1), default=1)
    if not shape:
        return None
    return Scattered(ids.reshape(ids.shape[:lead]).expand(*shape[:lead]), n)


def _index_select(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    dim, index = _argument(args, kwargs, 1, ("dim",)) % x.ndim, _argument(args, kwargs, 2, ("index",))
    at_ = (slice(None),) * dim + (index,)
    return _gathered(x, layout, n, at_, [isinstance(i, Tensor) for i in at_], out)


def _same(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    return layout


def _blank(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    if isinstance(layout, Scattered):  # nothing says that rows to be written will lie alike
        return None
    return kept(tuple(x.shape), layout, tuple(out.shape), n)


def _einsum(x: Tensor, layout: Any, n: int, args: Any, kwargs: Any, out: Tensor) -> Any:
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if not isinstance(args[0], str) or "->" not in args[0] or "." in args[0] or not isinstance(layout, Layout):
        return None
    left, right = args[0].replace(" ", "").split("->")
    where = axis(x.shape, layout, n)
    places = [i for i, operand in enumerate(operands) if operand is x]
    letters = set() if where is None else {left.split(",")[i][where.number] for i in places}
    letter = letters.pop() if len(letters) == 1 else None
    return at(out.shape, where, right.index(letter)) if where is not None and letter and letter in right else None


_REDUCTIONS = (
    "sum mean amax amin max min var std norm logsumexp all any argmax argmin prod median nansum count_nonzero "
    "var_mean std_mean"
)

moved: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        forms("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as"), _reshaped
    ),
    **dict.fromkeys(forms("reshape_as", "_reshape_alias", "squeeze_", "unsqueeze_"), _reshaped),
    **dict.fromkeys(forms("transpose", "swapaxes", "swapdims"), _reordered(_swap)),
    **dict.fromkeys(forms("permute"), _reordered(_permute)),
    **dict.fromkeys(forms("movedim", "moveaxis"), _reordered(_movedim)),
    **dict.fromkeys([*forms("t", "adjoint"), *getters("mT mH")], _reordered(_last_two)),
    **dict.fromkeys(getters("T H"), _reordered(_reversed)),
    **dict.fromkeys(forms(_REDUCTIONS), _reduced),
    **dict.fromkeys(forms("softmax", "log_softmax", "cumsum", "cumprod", "flip", "gather", "argsort"), _along(1)),
    **dict.fromkeys(forms("sort", "logcumsumexp"), _along(1)),
    **dict.fromkeys(forms("topk", "roll", "take_along_dim", "kthvalue"), _along(2)),
    **dict.fromkeys(forms("unbind"), _unbound),
    **dict.fromkeys(forms("select"), _select),
    **dict.fromkeys(forms("split", "chunk", "tensor_split", "split_with_sizes"), _parts),
    **dict.fromkeys(forms("narrow"), _narrow),
    **dict.fromkeys(forms("cat", "concat", "concatenate"), _joined),
    **dict.fromkeys(forms("stack"), _stacked),
    **dict.fromkeys(forms("repeat", "tile"), _repeated),
    **dict.fromkeys(forms("repeat_interleave"), _interleaved),
    **dict.fromkeys(forms("expand", "expand_as", "broadcast_to"), _expanded),
    **dict.fromkeys(forms("__getitem__"), _indexed),
    **dict.fromkeys(forms("index_select"), _index_select),
    **dict.fromkeys(
        forms("index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_", "masked_fill_"), _same
    ),
    **dict.fromkeys(forms("einsum"), _einsum),
    **dict.fromkeys(forms("zeros_like ones_like empty_like full_like new_zeros new_empty"), _blank),
}

OF_MANY = frozenset(forms("cat", "concat", "concatenate", "stack", "einsum"))

_POINTWISE = (
    "add sub mul multiply div divide true_divide subtract where pow maximum minimum eq ne lt le gt ge "
    "logical_and logical_or bitwise_and bitwise_or lerp addcmul addcdiv masked_fill clamp atan2 fmod remainder "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __and__ __or__ "
    "__pow__ __rpow__"
)

broadcasts = frozenset(forms(_POINTWISE))
"""Elementwise functions, whose arguments are aligned from the right."""
