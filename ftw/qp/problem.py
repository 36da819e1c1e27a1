"""The problem that the QP's algorithms work on, scaled to a unit diagonal, and the certificate of an answer.

With ``s_i = 1 / sqrt(K_ii)`` and ``w = scale * z`` the problem ``min 1/2 w'Kw - c'w`` over ``C`` becomes

    min 1/2 z'Mz - q'z    over    lower <= z <= upper  [, normal'z = total],        diag(M) = 1

(Jacobi scaling). A common factor in ``K``, ``c`` or the bounds has then gone into ``scale`` and ``value``, so that
nothing that follows depends on the units of the gradients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ftw import _array
from ftw.constraints import Limits, clip


class Problem(NamedTuple):
    """A scaled problem; f(w) = value f(z) at w = scale z."""

    M: Any  # (..., n, n)
    shifted: Any  # (..., n, n): M plus a few roundings on the diagonal, safe to factorise
    q: Any  # (..., n)
    limits: Limits
    normal: Any  # (..., n)
    scale: Any  # (..., n)
    value: Any  # (...)
    size: Any  # (...): max |q|, 1 if that is 0


def product(xp: Any, M: Any, z: Any) -> Any:
    """Return M z, (..., n)."""
    return M @ z if z.ndim == 1 else (M @ z[..., None])[..., 0]


def dot(xp: Any, a: Any, b: Any) -> Any:
    """Return the inner product over the last axis, (...)."""
    return a @ b if a.ndim == 1 and b.ndim == 1 else xp.sum(a * b, axis=-1)


def largest(xp: Any, x: Any) -> Any:
    """Return max |x| over the last axis, (...)."""
    return xp.max(xp.abs(x), axis=-1)


def nonzero(xp: Any, x: Any) -> Any:
    """Return x, or 1 where x is 0: a safe divisor."""
    return _array.pick(xp, x != 0, x, 1.0)


def column(x: Any) -> Any:
    """Return x (...) as (..., 1); a Python number as it is."""
    return x if isinstance(x, float) else x[..., None]


def keep(xp: Any, where: Any, new: Any, old: Any) -> Any:
    """Return the arrays of the tuple ``new`` for the problems that ``where`` (...) names, of ``old`` for the others."""
    if isinstance(where, bool):
        return tuple(new if where else old)

    def one(a: Any, b: Any) -> Any:
        if a is None:
            return None
        return xp.where(xp.reshape(where, where.shape + (1,) * (a.ndim - where.ndim)), a, b)

    return tuple(one(a, b) for a, b in zip(new, old, strict=True))


def scaled_problem(xp: Any, K: Any, c: Any, limits: Limits, ridge: Any) -> Problem:
    """Return the scaled form of a problem whose numbers are finite.

    ``K`` need not be exactly symmetric. ``ridge`` is (...), or a Python float.
    """
    read = _array.read
    n = c.shape[-1]
    eps = float(xp.finfo(c.dtype).eps)
    lower, upper, total = limits[:3]
    unit = _array.over(xp.eye(n, dtype=c.dtype, device=_array.device(c)), K)  # (..., n, n)
    diagonal = xp.linalg.diagonal(K)  # (..., n)
    ridged = not (isinstance(ridge, float) and ridge == 0)
    if ridged:
        diagonal = diagonal + column(ridge)
    top = nonzero(xp, read(largest(xp, diagonal)))  # (...)
    # a zero gradient has a zero row, and takes part as the smallest one that rounding can tell from it
    floor = column((eps * eps if total is None else eps) * top)
    r = 1 / xp.sqrt(xp.where(diagonal > floor, diagonal, column(top) if total is None else floor))  # (..., n)
    half = math.sqrt(0.5) * r
    M = (K * half[..., :, None]) * half[..., None, :]
    M = M + xp.matrix_transpose(M)  # (..., n, n): symmetric whatever K was
    if ridged:
        M = M + unit * (r * (column(ridge) * r))[..., None]
    s = r * column(top**0.5)  # (..., n), at least about 1
    q = c * r  # (..., n)
    length = nonzero(xp, read(largest(xp, q)))  # (...)
    q = q / column(length)
    length = length / top**0.5
    if total is not None:
        total = read(total)
        size = _array.pick(xp, total > 0, total, 1.0)  # (...)
        inner = limits._replace(upper=None if upper is None else upper / (s * column(size)), total=total / size)
        if limits.member is not None:
            inner = inner._replace(low=limits.low / column(size), high=limits.high / column(size))
        ratio = length / size
    elif upper is None:
        inner, size, ratio = limits, length, 1.0
    else:  # a box is measured by its own reach, if that is less than the slopes'
        reach = read(xp.max(xp.maximum(xp.abs(lower), xp.abs(upper)) / s, axis=-1))  # (...)
        size = _array.pick(xp, (reach > 0) & (reach < length), reach, length)
        inner = Limits(lower / (s * column(size)), upper / (s * column(size)), None)
        ratio = length / size
    q = q * column(ratio)
    return Problem(M, M + (2 * n * eps) * unit, q, inner, s, s * column(size), top * size * size, nonzero(xp, ratio))


def balance(xp: Any, p: Problem, z: Any) -> Any:
    """Return the multiplier (...) of the sum that explains the slopes of z (..., n) best, by least squares.

    Each weight counts by its distance from its bounds: one that is as good as held hardly counts at all.
    """
    lower, upper, total = p.limits[:3]
    if total is None:
        return xp.zeros_like(z[..., 0])
    room = z - lower if upper is None else xp.minimum(z - lower, upper - z)  # (..., n)
    pull = xp.where(room > 0, room, 0.0) * p.normal
    return dot(xp, pull, product(xp, p.M, z) - p.q) / nonzero(xp, dot(xp, pull, p.normal))


def certificate(xp: Any, p: Problem, z: Any, multiplier: Any) -> tuple[Any, Any, Any]:
    """Return the objective, the natural residual and the relative duality gap of z within its bounds; (...) each.

    With ``slope = Mz - q - multiplier * normal`` the residual is ``max |z - clip(z - slope, lower, upper)|`` over
    the larger of ``max |z|`` and ``max |q|``; what the sum misses counts as well. Every v of the set has ``f(v) >=
    f(z) + slope'(v - z)``, M being PSD and both sums the same, so that ``f(z)`` exceeds the minimum by at most
    ``max_v slope'(z - v)``: the gap, taken over the bounds, where there is none over twice the point, and divided by
    ``|z|'(|Mz| + |q|)``. Where that cancels over a set with a sum (a minimum of zero) it is divided by what rounding
    can tell: a slope is known to some eps of ``sum |z|``, no entry of M being above one.
    """
    read = _array.read
    lower, upper, total = p.limits[:3]
    Mz = product(xp, p.M, z)  # (..., n)
    slope = Mz - p.q
    f = dot(xp, z, 0.5 * (slope - p.q))
    length = abs(z)  # (..., n)
    size = read(xp.max(length, axis=-1))  # (...)
    size = _array.pick(xp, size > p.size, size, p.size)
    if total is not None:
        slope = slope - column(multiplier) * p.normal
        widest = column(total) / p.normal  # (..., n)
    else:  # where there is no bound, out to twice the point
        widest = 2 * column(size) * xp.ones_like(lower)  # (..., n)
        lower = xp.maximum(lower, -widest)
    upper = widest if upper is None else xp.minimum(upper, widest)
    kkt = xp.max(abs(z - clip(xp, z - slope, p.limits)), axis=-1) / size
    if total is not None:
        missing = abs(total - dot(xp, p.normal, z)) / nonzero(xp, total)
        kkt = xp.maximum(kkt, missing)
    loss = read(dot(xp, slope, z - xp.where(slope > 0, lower, upper)))
    scale = read(dot(xp, length, abs(Mz) + abs(p.q)))
    if total is not None and not (isinstance(loss, float) and loss <= 1e-12 * scale):
        eps = float(xp.finfo(z.dtype).eps)
        floor = 32 * eps / max(1e-8, 1e4 * eps) * total * read(xp.sum(length, axis=-1))
        scale = _array.pick(xp, scale > floor, scale, floor)
    scale = nonzero(xp, scale)
    return read(f), read(kkt), _array.pick(xp, loss > 0, loss, 0.0) / scale
