"""Scores and Gram matrices: inner products of per-sample gradients in the optimizer's geometry.

    b_i  = <g_i, P g_T>       ``scores``      how much candidate i lowers the target loss, to first order
    K_ij = <g_i, P g_j>       ``gram``        how much candidates i and j say the same thing

Both are sums over parameters. A score needs ``M = P g_T`` once and no per-sample gradient. The Gram matrix is summed
over blocks of rows and columns of the per-sample gradients, no larger than ``max_bytes``, or over pairs of tokens where
that is cheaper (``planner.py`` decides).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from . import _array, planner
from . import gradients as records
from ._array import Array
from ._check import check_alike, check_model
from ._packed import pack, sum_by_sample
from .geometry import Operator, Piece
from .gradients import OuterProduct, Packed, PackedRows, Record, Rows, Sum, matrix_shape

__all__ = ["cross_gram", "gram", "scores"]

MAX_BYTES = 2**28


@_array.quiet
def scores(gradients: Mapping[str, Record], target: Mapping[str, Array], geometry: Mapping[str, Operator]) -> Any:
    """Return ``b_i = <g_i, P g_T>``, the first-order decrease of the target loss by candidate i.

    Parameters
    ----------
    gradients : mapping of str to record
        Gradients of n candidates.
    target : mapping of str to array
        Mean gradient g_T of the target samples, one array of each parameter's shape.
    geometry : mapping of str to operator
        The optimizer's linearised response P.

    Returns
    -------
    array (n,)

    Raises
    ------
    ValueError, TypeError
        If names, shapes, dtypes, namespaces or devices do not fit together.

    Notes
    -----
    2 n t d_out d_in FLOPs for an `OuterProduct`; the largest temporary is (n, t, min(d_out, d_in)).
    """
    xp, n = check_model(gradients, geometry, target, what="scores")
    total = _zeros(xp, gradients, (n,))
    for name, record in gradients.items():
        total = total + record.dot(xp, geometry[name].apply(target[name]))  # (n,)
    return total


@_array.quiet
def gram(gradients: Mapping[str, Record], geometry: Mapping[str, Operator], *, max_bytes: int = MAX_BYTES) -> Any:
    """Return ``K_ij = <g_i, P g_j>``.

    Parameters
    ----------
    gradients : mapping of str to record
        Gradients of n candidates.
    geometry : mapping of str to operator
        The optimizer's linearised response P.
    max_bytes : int
        Bound of the temporaries: blocks of per-sample gradients, or products of token pairs. Copies that act on the
        factors of one parameter (a rotation, a widening of 16 bits) come on top.

    Returns
    -------
    array (n, n)
        Symmetric.

    Raises
    ------
    ValueError, TypeError
        If names, shapes, dtypes, namespaces or devices do not fit together, or ``max_bytes`` holds not even one element
        of each gradient.

    Notes
    -----
    (2 n t + 2 n^2) d_out d_in FLOPs for an `OuterProduct`, or 2 n^2 t^2 (d_out + d_in) if that is less.
    """
    xp, n = check_model(gradients, geometry, what="gram")
    total = _accumulate(xp, n, n, gradients, gradients, geometry, _bytes(max_bytes, "gram"))
    return (total + total.T) / 2


@_array.quiet
def cross_gram(
    gradients: Mapping[str, Record],
    others: Mapping[str, Record],
    geometry: Mapping[str, Operator],
    *,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return ``<g_i, P h_j>`` (n, m) between the gradients of n candidates and of m other samples.

    Parameters, errors and cost are those of `gram`.
    """
    xp, n = check_model(gradients, geometry, what="cross_gram")
    _, m = check_model(others, geometry, what="cross_gram: others")
    check_alike(gradients, others, what="cross_gram: others")
    return _accumulate(xp, n, m, gradients, others, geometry, _bytes(max_bytes, "cross_gram"))


@_array.quiet
def squared_norms(candidates: Mapping[str, Record], geometry: Mapping[str, Operator]) -> Any:
    """Return ``<g_i, P g_i>`` (n,), the diagonal of `gram` without the products of different samples."""
    xp, n = check_model(candidates, geometry, what="squared_norms")
    total = _zeros(xp, candidates, (n,))
    for name, record in candidates.items():
        for piece in geometry[name].split(xp, record, record):
            plan = plan_piece(xp, piece, MAX_BYTES // 2, by_tokens=False)  # and their product
            for x, y in gradient_blocks(xp, piece, plan):
                total = total + _weighted(xp.sum(x * y, axis=1), piece)  # (n,)
                del x, y  # before the next block is formed
    return total


def _accumulate(
    xp: Any,
    n: int,
    m: int,
    candidates: Mapping[str, Record],
    others: Mapping[str, Record],
    geometry: Mapping[str, Operator],
    max_bytes: int,
) -> Any:
    total = _zeros(xp, candidates, (n, m))
    for name, record in candidates.items():
        for piece in geometry[name].split(xp, record, others[name]):
            piece = _compact(xp, piece)
            plan = plan_piece(xp, piece, max_bytes)
            if plan.route == "tokens":
                total = total + _weighted(_by_tokens(xp, piece, plan), piece)  # (n, m)
                continue
            for x, y in gradient_blocks(xp, piece, plan):
                total = total + _weighted(x @ y.T, piece)  # (n, m)
                del x, y  # before the next block is formed
    return total


def plan_piece(xp: Any, piece: Piece, max_bytes: int, *, by_tokens: bool = True) -> planner.Plan:
    """Return the plan for one term of a bilinear form."""
    x, y, elementwise = piece.left, piece.right, _elementwise(piece)
    return planner.plan_gram(
        _side(x),
        None if x is y else _side(y),
        matrix_shape(x.shape),
        by_tokens=by_tokens and not elementwise and all(isinstance(r, (OuterProduct, Packed)) for r in (x, y)),
        elementwise=elementwise,
        itemsize=xp.finfo(records.dtype(xp, x)).bits // 8,
        max_bytes=max_bytes,
    )


def _side(record: Record) -> planner.Side:
    """Return what the planner wants to know of a record."""
    if isinstance(record, OuterProduct):
        return planner.Side(record.n, record.inputs.shape[1])
    if isinstance(record, Packed):
        n, t = record.n, record.inputs.shape[0]
        # the chunks' products, their copy in the order of the samples, and the sums
        return planner.Side(n, 0, 1 + -(-2 * planner.chunks(n, t)[0] // max(n, 1)), packed=t)
    if isinstance(record, Sum):
        parts = [_side(part) for part in record.parts]
        # the sum so far, the next part, and the new sum
        copies = max(parts[0].copies, *(1 + max(2, p.copies) for p in parts[1:])) if parts[1:] else parts[0].copies
        return planner.Side(record.n, sum(p.tokens for p in parts), copies, sum(p.packed for p in parts))
    return planner.Side(record.n, 0, 2 if isinstance(record, (Rows, PackedRows)) else 1)


def gradient_blocks(xp: Any, piece: Piece, plan: planner.Plan) -> Iterator[tuple[Any, Any]]:
    """Yield blocks (n, e) and (m, e) of both records, e elements at a time, elementwise weights worked in."""
    x, y, weights = piece
    n, m, shape = x.n, y.n, matrix_shape(x.shape)
    elementwise = _elementwise(piece)
    if elementwise:
        weights = xp.broadcast_to(weights, shape)
    for rows, columns in planner.blocks(shape, plan):
        size = (rows.stop - rows.start) * (columns.stop - columns.start)
        left = x.block(xp, rows, columns)  # (n, r, c)
        if x is y:  # P^1/2 on both sides: the product is symmetric and PSD as it stands
            if elementwise:
                left = left * _array.over(weights[rows, columns], left) ** 0.5
            left = right = xp.reshape(left, (n, size))
        else:
            right = y.block(xp, rows, columns)  # (m, r, c)
            if elementwise:
                right = right * _array.over(weights[rows, columns], right)
            left, right = xp.reshape(left, (n, size)), xp.reshape(right, (m, size))
            left, right = _array.together(xp, left, right)
        yield left, right
        del left, right  # before the next block is formed


def _by_tokens(xp: Any, piece: Piece, plan: planner.Plan) -> Any:
    """Return ``sum_{s,t} (A_is . A'_jt)(B_is . B'_jt)`` (n, m), a chunk of samples i at a time."""
    x, y = piece.left, piece.right
    assert isinstance(x, (OuterProduct, Packed))
    assert isinstance(y, (OuterProduct, Packed))
    if isinstance(x, Packed) or isinstance(y, Packed):
        return _by_packed_tokens(xp, pack(xp, x), pack(xp, y), plan)
    n, t, d_in = x.inputs.shape
    m, u, d_out = y.output_grads.shape
    flat_a = xp.reshape(y.inputs, (m * u, d_in))  # (m u, d_in)
    flat_b = xp.reshape(y.output_grads, (m * u, d_out))  # (m u, d_out)
    parts = []
    for i in range(0, max(n, 1), plan.rows):
        stop = min(n, i + plan.rows)
        a, b = x.inputs[i:stop, :, :], x.output_grads[i:stop, :, :]  # (c, t, d_in), (c, t, d_out)
        c = a.shape[0]
        a, b = xp.reshape(a, (c * t, d_in)), xp.reshape(b, (c * t, d_out))  # (c t, d_in), (c t, d_out)
        a, flat_a, b, flat_b = _array.together(xp, a, flat_a, b, flat_b)
        product = (a @ flat_a.T) * (b @ flat_b.T)  # (c t, m u)
        parts.append(xp.sum(xp.reshape(product, (c, t, m, u)), axis=(1, 3)))  # (c, m)
        del product
    return xp.concat(parts, axis=0)  # (n, m)


def _by_packed_tokens(xp: Any, x: Packed, y: Packed, plan: planner.Plan) -> Any:
    """Return the same sums (n, m) for packed samples, a chunk of tokens of x at a time."""
    a, every_a, b, every_b = _array.together(xp, x.inputs, y.inputs, x.output_grads, y.output_grads)  # (t, .), (u, .)
    total = xp.zeros((x.n, y.n), dtype=a.dtype, device=_array.device(a))
    for i in range(0, a.shape[0], plan.rows):
        chunk = slice(i, min(a.shape[0], i + plan.rows))
        product = (a[chunk, :] @ every_a.T) * (b[chunk, :] @ every_b.T)  # (c, u)
        beside = sum_by_sample(xp, product.T, y.samples, y.n)  # (m, c)
        del product
        total = total + sum_by_sample(xp, beside.T, x.samples[chunk], x.n)  # (n, m)
    return total


def _elementwise(piece: Piece) -> bool:
    return getattr(piece.weights, "ndim", 0) == 2


def _weighted(value: Any, piece: Piece) -> Any:
    """Return an inner product times the piece's weight, if that is one number."""
    return value if _elementwise(piece) else value * _array.scalar_like(piece.weights, value)


def _zeros(xp: Any, candidates: Mapping[str, Record], shape: tuple[int, ...]) -> Any:
    first = _array.leaves(candidates)[0]
    dtype = xp.result_type(*(records.dtype(xp, record) for record in candidates.values()))
    return xp.zeros(shape, dtype=dtype, device=_array.device(first))


def _bytes(max_bytes: Any, what: str) -> int:
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
        raise ValueError(f"{what}: max_bytes={max_bytes!r} must be a positive int")
    return max_bytes


def _compact(xp: Any, piece: Piece) -> Piece:
    """Renumber the rows of two embedding records by those that occur, if they are fewer than the table has."""
    x, y, weights = piece
    if not (isinstance(x, (Rows, PackedRows)) and isinstance(y, (Rows, PackedRows))):
        return piece
    sides = (x,) if x is y else (x, y)
    size, height = sum(math.prod(r.indices.shape) for r in sides), x.shape[0]
    if not 0 < size < height:
        return piece
    flat = [xp.reshape(r.indices, (-1,)) for r in sides]
    every = xp.sort(xp.concat(flat))  # (size,)
    first = xp.concat([xp.ones_like(every[:1]), xp.astype(every[1:] != every[:-1], every.dtype)])
    rank = xp.cumulative_sum(first) - 1  # position of each sorted index among the distinct ones
    numbers = xp.arange(size, dtype=rank.dtype, device=_array.device(rank))
    where = xp.searchsorted(rank, numbers)  # first place of each distinct index
    distinct = xp.take(every, xp.clip(where, 0, max(size - 1, 0)))  # (size,), padded with the last
    new = [xp.take(rank, xp.searchsorted(every, f)) for f in flat]
    both = [r.renumbered(xp.reshape(i, r.indices.shape), size) for r, i in zip(sides, new, strict=True)]
    if getattr(weights, "ndim", 0) == 2 and weights.shape[0] == height:
        weights = xp.take(weights, distinct, axis=0)
    return Piece(both[0], both[-1], weights)
