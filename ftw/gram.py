"""Scores and Gram matrices: inner products of per-sample gradients in the optimizer's geometry.

    b_i  = <g_i, P g_T>       ``scores``      how much candidate i lowers the target loss, to first order
    K_ij = <g_i, P g_j>       ``gram``        how much candidates i and j say the same thing

Both are sums over parameters. A score needs ``M = P g_T`` once and no per-sample gradient. The Gram matrix walks over
blocks of rows and columns of the per-sample gradients, no larger than ``max_bytes``, or over pairs of tokens where that is
cheaper (``_plan.py`` decides).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from . import _array, _plan, gradients
from ._array import Array
from .geometry import Diagonal, Kronecker, Operator, Piece, Polar, Rotated, Scale
from .gradients import OuterProduct, Record, Rows, matrix_shape

__all__ = ["cross_gram", "gram", "scores"]

MAX_BYTES = 2**28


def scores(candidates: Mapping[str, Record], target: Mapping[str, Array], geometry: Mapping[str, Operator]) -> Any:
    """Return ``b_i = <g_i, P g_T>``, the first-order decrease of the target loss by candidate i.

    Parameters
    ----------
    candidates : mapping of str to record
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
    xp, _ = check_model(candidates, geometry, target, what="scores")
    total: Any = None
    for name, record in candidates.items():
        g = _array.widen(xp, target[name])
        part = record.dot(xp, geometry[name].apply(g))  # (n,)
        total = part if total is None else total + part
    return total


def gram(candidates: Mapping[str, Record], geometry: Mapping[str, Operator], *, max_bytes: int = MAX_BYTES) -> Any:
    """Return ``K_ij = <g_i, P g_j>``.

    Parameters
    ----------
    candidates : mapping of str to record
        Gradients of n candidates.
    geometry : mapping of str to operator
        The optimizer's linearised response P.
    max_bytes : int
        Size of the largest block of per-sample gradients formed at a time.

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
    xp, n = check_model(candidates, geometry, what="gram")
    total = _accumulate(xp, n, n, candidates, candidates, geometry, max_bytes)
    return (total + total.T) / 2


def cross_gram(
    candidates: Mapping[str, Record],
    others: Mapping[str, Record],
    geometry: Mapping[str, Operator],
    *,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return ``<g_i, P h_j>`` (n, m) between the gradients of n candidates and of m other samples.

    Parameters, errors and cost are those of `gram`.
    """
    xp, n = check_model(candidates, geometry, what="cross_gram")
    xq, m = check_model(others, geometry, what="cross_gram")
    if xp is not xq:
        _array.namespace(*_array.leaves(candidates), *_array.leaves(others), what="cross_gram")
    return _accumulate(xp, n, m, candidates, others, geometry, max_bytes)


def squared_norms(candidates: Mapping[str, Record], geometry: Mapping[str, Operator]) -> Any:
    """Return ``<g_i, P g_i>`` (n,), the diagonal of `gram` at n times less than its cost for the products."""
    xp, n = check_model(candidates, geometry, what="squared_norms")
    total: Any = None
    for name, record in candidates.items():
        for piece in geometry[name].split(xp, record, record):
            plan = _plan_piece(xp, n, n, piece, MAX_BYTES, norms=True)
            for x, y in _walk(xp, piece, plan):
                part = xp.sum(x * y, axis=1)  # (n,)
                total = part if total is None else total + part
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
    total: Any = None
    for name, record in candidates.items():
        for piece in geometry[name].split(xp, record, others[name]):
            piece = _compact(xp, piece)
            plan = _plan_piece(xp, n, m, piece, max_bytes)
            part = _by_tokens(xp, piece, plan) if plan.route == "tokens" else _by_blocks(xp, piece, plan)  # (n, m)
            total = part if total is None else total + part
    return total


def _plan_piece(xp: Any, n: int, m: int, piece: Piece, max_bytes: int, *, norms: bool = False) -> _plan.Plan:
    plain = getattr(piece.weights, "ndim", 0) == 0 and not norms
    x, y = piece.left, piece.right
    tokens = None
    if plain and isinstance(x, OuterProduct) and isinstance(y, OuterProduct):
        tokens = (x.inputs.shape[1], y.inputs.shape[1])
    return _plan.plan_gram(
        n,
        m,
        matrix_shape(x.shape),
        tokens=tokens,
        symmetric=x is y,
        itemsize=4 if gradients.dtype(xp, x) == xp.float32 else 8,
        max_bytes=max_bytes,
    )


def _walk(xp: Any, piece: Piece, plan: _plan.Plan) -> Iterator[tuple[Any, Any]]:
    """Yield blocks (n, e) and (m, e) of both records, e elements at a time, the weights worked in."""
    x, y, weights = piece
    n, m, shape = x.samples, y.samples, matrix_shape(x.shape)
    elementwise = getattr(weights, "ndim", 0) == 2
    if elementwise:
        weights = xp.broadcast_to(weights, shape)
    for rows, columns in _plan.blocks(shape, plan):
        left = x.block(xp, rows, columns)  # (n, r, c)
        if x is y:  # P^1/2 on both sides: the product is symmetric and PSD as it stands
            if elementwise:
                left = left * xp.astype(weights[rows, columns], left.dtype) ** 0.5
            left = xp.reshape(left, (n, -1))
            right = left
        else:
            right = y.block(xp, rows, columns)  # (m, r, c)
            if elementwise:
                right = right * xp.astype(weights[rows, columns], right.dtype)
            left, right = xp.reshape(left, (n, -1)), xp.reshape(right, (m, -1))
        yield (left, right) if elementwise else (left * _array.scalar_like(weights, left), right)


def _by_blocks(xp: Any, piece: Piece, plan: _plan.Plan) -> Any:
    total: Any = None
    for left, right in _walk(xp, piece, plan):
        part = left @ right.T  # (n, m)
        total = part if total is None else total + part
    return total


def _by_tokens(xp: Any, piece: Piece, plan: _plan.Plan) -> Any:
    """Return ``sum_{s,t} (A_is . A'_jt)(B_is . B'_jt)`` (n, m), a chunk of samples i at a time."""
    x, y = piece.left, piece.right
    assert isinstance(x, OuterProduct)
    assert isinstance(y, OuterProduct)
    n, t, d_in = x.inputs.shape
    m, u, _ = y.inputs.shape
    d_out = x.output_grads.shape[2]
    flat_a = xp.reshape(_array.widen(xp, y.inputs), (m * u, d_in)).T  # (d_in, m u)
    flat_b = xp.reshape(_array.widen(xp, y.output_grads), (m * u, d_out)).T  # (d_out, m u)
    parts = []
    for i in range(0, n, plan.rows):
        a = _array.widen(xp, x.inputs[i : i + plan.rows, :, :])  # (c, t, d_in)
        b = _array.widen(xp, x.output_grads[i : i + plan.rows, :, :])  # (c, t, d_out)
        c = a.shape[0]
        product = (xp.reshape(a, (c * t, d_in)) @ flat_a) * (xp.reshape(b, (c * t, d_out)) @ flat_b)  # (c t, m u)
        parts.append(xp.sum(xp.reshape(product, (c, t, m, u)), axis=(1, 3)))  # (c, m)
    total = xp.concat(parts, axis=0)  # (n, m)
    return total * _array.scalar_like(piece.weights, total)


def _compact(xp: Any, piece: Piece) -> Piece:
    """Renumber the rows of two embedding records by those that occur, if they are fewer than the table has."""
    x, y, weights = piece
    if not (isinstance(x, Rows) and isinstance(y, Rows)):
        return piece
    n_x, n_y = math.prod(x.indices.shape), 0 if y is x else math.prod(y.indices.shape)
    if n_x + n_y >= x.size:
        return piece
    flat = [xp.reshape(r.indices, (-1,)) for r in ((x,) if x is y else (x, y))]
    every = xp.sort(xp.concat(flat))  # (n_x + n_y,)
    first = xp.concat([xp.ones_like(every[:1]), xp.astype(every[1:] != every[:-1], every.dtype)])
    rank = xp.cumulative_sum(first) - 1  # position of each sorted index among the distinct ones
    size = n_x + n_y
    numbers = xp.arange(size, dtype=rank.dtype, device=_array.device(rank))
    where = xp.searchsorted(rank, numbers)  # first place of each distinct index
    distinct = xp.take(every, xp.clip(where, 0, size - 1))  # (size,), padded with the last
    new = [xp.reshape(xp.take(rank, xp.searchsorted(every, f)), r.indices.shape) for f, r in zip(flat, (x, y))]
    left = Rows(new[0], x.output_grads, size)
    right = left if y is x else Rows(new[1], y.output_grads, size)
    if getattr(weights, "ndim", 0) == 2 and weights.shape[0] == x.size:
        weights = xp.take(weights, distinct, axis=0)
    return Piece(left, right, weights)


def check_model(
    candidates: Mapping[str, Record],
    geometry: Mapping[str, Operator],
    target: Mapping[str, Array] | None = None,
    *,
    what: str,
) -> tuple[Any, int]:
    """Return the namespace and the number of samples, or raise where candidates, target and geometry disagree."""
    xp, n = gradients.check(candidates, what=what)
    names = set(candidates)
    for kind, mapping in (("geometry", geometry), ("target", target)):
        if mapping is None:
            continue
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{what}: {kind} must be a mapping by parameter name, got {type(mapping).__name__}")
        if set(mapping) != names:
            missing, extra = sorted(names - set(mapping)), sorted(set(mapping) - names)
            raise ValueError(
                f"{what}: {kind} and gradients differ in names: {kind} lacks {missing}, has besides {extra}"
            )
    _array.namespace(*_array.leaves([candidates, dict(geometry), dict(target or {})]), what=what)
    for name, record in candidates.items():
        shape = record.shape
        if target is not None:
            g = target[name]
            if tuple(g.shape) != shape:
                raise ValueError(f"{what}: target of {name!r} is {tuple(g.shape)}, its gradients are {shape}")
            if not _array.is_floating(xp, g):
                raise TypeError(f"{what}: target of {name!r} is {g.dtype}; it must be of a real floating dtype")
        operator = geometry[name]
        if not isinstance(operator, (Scale, Diagonal, Kronecker, Rotated, Polar)):
            raise TypeError(
                f"{what}: the operator of {name!r} is a {type(operator).__name__}; expected Scale, Diagonal, Kronecker, "
                "Rotated or Polar"
            )
        operator.check(name)
        if operator.shape is not None and operator.shape != shape:
            raise ValueError(
                f"{what}: {type(operator).__name__} of {name!r} is {operator.shape}, its gradients are {shape}"
            )
    return xp, n
