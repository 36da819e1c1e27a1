"""Cheaper scores and Gram matrices, with a stated error: count sketches and low-rank directions.

A **count sketch** (Charikar, Chen & Farach-Colton 2002) of x in R^p adds every coordinate, with a random sign, to one
of m buckets: ``(S x)_k = sum over j with h(j) = k of s(j) x_j``. Inner products survive without bias,

    E <Sx, Sy> = <x, y>,    Var <Sx, Sy> <= (|x|^2 |y|^2 + <x, y>^2) / m,

so that the error is about ``|x| |y| / sqrt(m)``. Here x is P^1/2 g_i, a block of bounded size at a time; the hashes h
and s are integer arithmetic on the coordinates, not tables, and the same on every backend for one seed.

A **low-rank direction** replaces ``M = P g_T`` of each matrix by its best approximation of rank r, found by subspace
iteration (Halko, Martinsson & Tropp 2011). A score then costs ``2 n t r (d_in + d_out)`` FLOPs in place of
``2 n t d_in d_out``, and is wrong by at most ``|G_i|`` times the first singular value left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import _array, planner
from . import gradients as records
from ._array import Array
from ._check import check_model
from .geometry import Kronecker, Operator, Piece, half
from .gradients import OuterProduct, Packed, PackedRows, Record, Rows, Sum, matrix_shape
from .inner_products import MAX_BYTES, gradient_blocks, plan_piece

__all__ = ["LowRank", "count_sketch", "gram", "low_rank", "low_rank_scores", "scores"]

LARGEST = 2**15 - 1  # the arithmetic of the hashes stays within 31 bits
ROUNDS = 4


@_array.quiet
def count_sketch(
    gradients: Mapping[str, Record],
    geometry: Mapping[str, Operator],
    size: int,
    *,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return count sketches of ``P^1/2 g_i``, all parameters added into one.

    Parameters
    ----------
    gradients : mapping of str to record
        Gradients of n samples; for a target, ``{name: Dense(g[None])}``.
    geometry : mapping of str to operator
        The optimizer's linearised response P.
    size : int
        Number of buckets m, 1 <= m <= 32767.
    seed : int
        Sketches can be compared if they share seed, size, geometry and names, on whatever backend they were made.
    max_bytes : int
        Bound of the temporaries, as in `ftw.gram`.

    Returns
    -------
    array (n, size)

    Raises
    ------
    ValueError, TypeError
        As `ftw.gram`, and if ``size`` or ``seed`` is no int in range.

    Notes
    -----
    Forms every gradient once: 2 n t d_out d_in FLOPs for an `OuterProduct`, and a pass over it.
    """
    xp, n = check_model(gradients, geometry, what="count_sketch")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST:
        raise ValueError(f"count_sketch: size={size!r} must be an int in 1 .. {LARGEST}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"count_sketch: seed={seed!r} must be an int")
    first = _array.leaves(gradients)[0]
    dtype = xp.result_type(*(records.dtype(xp, record) for record in gradients.values()))
    total = xp.zeros((n, size), dtype=dtype, device=_array.device(first))
    for i, name in enumerate(sorted(gradients)):
        for j, piece in enumerate(_halves(xp, geometry[name], gradients[name])):
            plan = plan_piece(xp, piece, max(1, max_bytes // 3), by_tokens=False)  # the block, its signed copy, a sort
            height, width = matrix_shape(piece.left.shape)
            above, beside = (_line(xp, d, _keys(seed, i, j, side), first) for side, d in enumerate((height, width)))
            blocks = planner.blocks((height, width), plan)
            for (rows, columns), (x, _) in zip(blocks, gradient_blocks(xp, piece, plan), strict=True):
                bucket, sign = _hash(xp, above, beside, rows, columns, _keys(seed, i, j, 2), size)  # (e,), (e,)
                signed = x * _array.over(sign, x)  # (n, e)
                scale = _array.scalar_like(_root(piece.weights), x)
                total = total + scale * _array.segment_sum(xp, signed.T, bucket, size).T
                del x, signed  # before the next block is formed
    return total


def scores(sketches: Array, target: Array) -> Any:
    """Return estimates (n,) of ``<g_i, P g_T>`` from sketches (n, m) and the target's, (m,) or (1, m)."""
    xp = _same(sketches, target, "scores")
    return sketches @ xp.reshape(target, (target.shape[-1],))


def gram(sketches: Array, others: Array | None = None) -> Any:
    """Return estimates of ``<g_i, P h_j>`` (n, m') from sketches (n, m) and others (m', m), by default the same."""
    if others is None:
        others = sketches
    _same(sketches, others, "gram")
    return sketches @ others.T


class LowRank(NamedTuple):
    """A matrix as ``left @ right``.

    Attributes
    ----------
    left : array (d_out, r)
    right : array (r, d_in)
        Orthonormal rows.
    """

    left: Any
    right: Any


@_array.quiet
def low_rank(
    target_direction: Mapping[str, Array], rank: int, *, iterations: int = 2, oversample: int = 8
) -> dict[str, Any]:
    """Return the direction ``{name: P g_T}`` with every matrix that is larger replaced by one of rank ``rank``.

    Parameters
    ----------
    target_direction : mapping of str to array
        ``{name: geometry[name].apply(target[name])}``.
    rank : int
        At least 1. Vectors, and matrices with a side of at most ``rank + oversample``, stay as they are.
    iterations : int
        Subspace iterations; each multiplies twice with M.
    oversample : int
        Extra directions that are iterated and then dropped.

    Returns
    -------
    dict of str to `LowRank` or array

    Notes
    -----
    4 (iterations + 1) (rank + oversample) d_out d_in FLOPs a matrix.
    """
    for what, value, least in (("rank", rank, 1), ("iterations", iterations, 0), ("oversample", oversample, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"low_rank: {what}={value!r} must be an int >= {least}")
    if not isinstance(target_direction, Mapping) or not target_direction:
        raise TypeError("low_rank: target_direction must be a non-empty mapping {parameter name: array}")
    xp = _array.namespace(*target_direction.values(), what="low_rank")
    out: dict[str, Any] = {}
    for name, m in target_direction.items():
        m = _array.widen(xp, m)
        k = rank + oversample
        out[name] = m if m.ndim != 2 or min(m.shape) <= k else _truncated(xp, m, rank, k, iterations)
    return out


@_array.quiet
def low_rank_scores(gradients: Mapping[str, Record], direction: Mapping[str, Any]) -> Any:
    """Return ``<g_i, M>`` (n,) for a direction of `low_rank`; 2 n t r (d_in + d_out) FLOPs an `OuterProduct`."""
    xp, _ = records.check(gradients, what="low_rank_scores")
    if set(direction) != set(gradients):
        missing, extra = sorted(set(gradients) - set(direction)), sorted(set(direction) - set(gradients))
        raise ValueError(f"low_rank_scores: direction lacks {missing}, has besides {extra}")
    total: Any = 0.0
    for name, record in gradients.items():
        m = direction[name]
        shape = (m.left.shape[0], m.right.shape[1]) if isinstance(m, LowRank) else tuple(m.shape)
        if shape != record.shape:
            raise ValueError(f"low_rank_scores: direction of {name!r} is {shape}, its gradients are {record.shape}")
        total = total + _dot(xp, record, m)
    return total


def _dot(xp: Any, record: Record, m: Any) -> Any:
    """Return ``<G_i, m>`` (n,)."""
    if not isinstance(m, LowRank):
        return record.dot(xp, m)
    if isinstance(record, Sum):
        return sum(_dot(xp, part, m) for part in record.parts)
    if isinstance(record, (OuterProduct, Packed)):
        a, b = _array.together(xp, record.inputs, record.output_grads)  # (n, t, .), or (t, .) packed
        inner = (b @ _array.cast(m.left, b)) * (a @ _array.cast(m.right, a).T)  # (n, t, r) or (t, r)
        return record.over_tokens(xp, xp.sum(inner, axis=-1))
    if isinstance(record, (Rows, PackedRows)):
        b = _array.widen(xp, record.output_grads)  # (n, t, d) or (t, d)
        indices = xp.reshape(record.indices, (-1,))
        picked = xp.take(_array.cast(m.left, b), indices, axis=0)  # (n t, r) or (t, r)
        inner = b @ _array.cast(m.right, b).T  # (n, t, r) or (t, r)
        return record.over_tokens(xp, xp.sum(xp.reshape(picked, inner.shape) * inner, axis=-1))
    return record.dot(xp, m.left @ m.right)


def _truncated(xp: Any, m: Any, rank: int, k: int, iterations: int) -> LowRank:
    """Return the best approximation of rank ``rank`` within a subspace of dimension k that iteration finds."""
    finite = xp.all(xp.isfinite(m))
    safe = xp.where(finite, m, 0.0)  # an SVD of a NaN raises on some backends
    width = m.shape[1]
    above, beside = (_line(xp, d, _keys(0, 0, 0, side), m) for side, d in enumerate((width, k)))
    _, sign = _hash(xp, above, beside, slice(0, width), slice(0, k), _keys(0, 0, 0, 2), 1)
    y = safe @ _array.cast(xp.reshape(sign, (width, k)), m)  # (d_out, k)
    for _ in range(iterations):
        q, _ = xp.linalg.qr(y)
        q, _ = xp.linalg.qr(safe.T @ q)  # (d_in, k)
        y = safe @ q
    q, _ = xp.linalg.qr(y)  # (d_out, k)
    u, s, vt = xp.linalg.svd(q.T @ safe, full_matrices=False)  # (k, k), (k,), (k, d_in)
    left = (q @ u[:, :rank]) * s[None, :rank]
    return LowRank(xp.where(finite, left, xp.nan), vt[:rank, :])


def _halves(xp: Any, operator: Operator, record: Record) -> list[Piece]:
    """Return the pieces of ``<g, P g>`` with the same record on both sides, so that a root can be taken of each."""
    if isinstance(operator, Kronecker):
        sides = half(xp, operator.left), half(xp, operator.right)
        x = record.transform(xp, *sides)
        return [Piece(x, x, 1.0)]
    return operator.split(xp, record, record)


def _root(weights: Any) -> Any:
    return 1.0 if getattr(weights, "ndim", 0) else weights**0.5


def _same(x: Any, y: Any, what: str) -> Any:
    xp = _array.namespace(x, y, what=f"sketch.{what}")
    if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"sketch.{what}: sketches {tuple(x.shape)} and {tuple(y.shape)} must be of one size (n, m)")
    return xp


# ---------------------------------------------------------------------------------------------------------------------
# Hashes: two words of 16 bits, mixed by a Feistel network whose products stay within 31 bits


def _keys(*numbers: int) -> list[tuple[int, int]]:
    """Return the multiplier and the increment of each round, from a few integers (splitmix64)."""
    state = 0
    for x in numbers:
        state = _splitmix(state ^ (x & (2**64 - 1)))
    keys = []
    for _ in range(ROUNDS):
        state = _splitmix(state)
        keys.append((state >> 40 & 0x3FFF | 0x2001, state & 0x1FFFFFFF))
    return keys


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _mix(high: Any, low: Any, keys: list[tuple[int, int]]) -> tuple[Any, Any]:
    for multiplier, increment in keys:
        high, low = low, high ^ ((low * multiplier + increment) >> 9 & 0xFFFF)
    return high, low


def _line(xp: Any, length: int, keys: list[tuple[int, int]], like: Any) -> tuple[Any, Any]:
    """Return the two words (length,) of every row, or of every column."""
    numbers = xp.arange(length, dtype=xp.int32, device=_array.device(like))
    return _mix(numbers >> 16, numbers & 0xFFFF, keys)


def _hash(
    xp: Any, above: Any, beside: Any, rows: slice, columns: slice, keys: list[tuple[int, int]], size: int
) -> tuple[Any, Any]:
    """Return bucket and sign (r c,) of the elements of a block."""
    high, low = (a[rows][:, None] ^ b[columns][None, :] for a, b in zip(above, beside, strict=True))  # (r, c)
    high, low = _mix(high, low, keys)
    bucket = (high * size + (low * size >> 16)) >> 16  # in [0, size)
    sign = 1 - 2 * (low & 1)
    return xp.reshape(bucket, (-1,)), xp.reshape(sign, (-1,))
