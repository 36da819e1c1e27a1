"""The problem that the QP's algorithms work on: scaled to a unit diagonal, every constraint set in one shape; its certificate.

With ``s_i = 1 / sqrt(K_ii)`` and ``w = scale * z`` the problem ``min 1/2 w'Kw - c'w`` over ``C`` becomes

    min 1/2 z'Mz - q'z    over    lower <= z <= upper  [, normal'z = total],        diag(M) = 1

(Jacobi scaling). A common factor in ``K``, ``c`` or the bounds has then gone into ``scale`` and ``value``, so that nothing that
follows depends on the units of the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array
from .constraints import Limits


class Problem(NamedTuple):
    """A scaled problem. ``M`` (..., n, n); ``q``, ``normal`` and ``scale`` (..., n); ``value`` (...): f(w) = value f(z)."""

    M: Any
    q: Any
    limits: Limits
    normal: Any
    scale: Any
    value: Any


def product(xp: Any, M: Any, z: Any) -> Any:
    """Return M z for M (..., n, n) and z (..., n)."""
    return M @ z if z.ndim == 1 else (M @ z[..., None])[..., 0]


def largest(xp: Any, x: Any) -> Any:
    """Return max |x| over the last axis, 1 where that is 0: a safe divisor, (...)."""
    top = xp.max(xp.abs(x), axis=-1)
    return xp.where(top > 0, top, 1.0)


def keep(xp: Any, where: Any, new: Any, old: Any) -> Any:
    """Return the arrays of the tuple ``new`` for the problems that ``where`` (...) names, of ``old`` for the others."""

    def one(a: Any, b: Any) -> Any:
        return xp.where(xp.reshape(where, where.shape + (1,) * (a.ndim - where.ndim)), a, b)

    return tuple(one(a, b) for a, b in zip(new, old, strict=True))


def scaled_problem(xp: Any, K: Any, c: Any, limits: Limits, ridge: Any) -> Problem:
    """Return the scaled form of a problem whose numbers are finite; ``K`` need not be exactly symmetric."""
    n = c.shape[-1]
    eps = float(xp.finfo(c.dtype).eps)
    top = largest(xp, xp.linalg.diagonal(K) + ridge[..., None])  # (...)
    K = K / top[..., None, None]
    K = 0.5 * (K + xp.matrix_transpose(K))  # (..., n, n)
    diagonal = xp.linalg.diagonal(K) + (ridge / top)[..., None]  # (..., n), at most 1
    # a zero gradient has a zero row, and takes part as the smallest one that rounding can tell from it
    floor = eps * eps if limits.total is None else eps
    s = 1 / xp.sqrt(xp.where(diagonal > floor, diagonal, floor if limits.total is not None else 1.0))  # (..., n)
    M = K * s[..., :, None] * s[..., None, :]  # (..., n, n)
    unit = xp.eye(n, dtype=c.dtype, device=_array.device(c))
    M = xp.where(unit > 0, (diagonal * s * s)[..., None], M)
    q = c * s  # (..., n)
    length = largest(xp, q)  # (...)
    q = q / length[..., None]
    length = length / top
    if limits.total is not None:
        size = xp.where(limits.total > 0, limits.total, 1.0)  # (...)
        q = q * (length / size)[..., None]
    else:
        reach = xp.maximum(xp.abs(limits.lower), xp.abs(limits.upper)) / s  # (..., n)
        reach = xp.max(reach, axis=-1)  # (...)
        size = xp.where((reach > 0) & (reach < length), reach, length)
        q = q * (length / size)[..., None]
    scale = s * size[..., None]  # (..., n): w = scale * z
    total = None if limits.total is None else limits.total / size
    inner = Limits(limits.lower / scale, limits.upper / scale, total)
    return Problem(M, q, inner, s, scale, top * size * size)


def certificate(xp: Any, p: Problem, z: Any, multiplier: Any) -> tuple[Any, Any, Any]:
    """Return the objective, the scaled natural residual and the relative duality gap of a feasible z; (...) each.

    With ``slope = Mz - q - multiplier * normal`` the residual is ``max |z - clip(z - slope, lower, upper)|``. Every feasible v has
    ``f(v) >= f(z) + slope'(v - z)``, as M is PSD and both have the same sum, so that the gap is ``max slope'(z - v)`` over the box.
    """
    lower, upper, total = p.limits
    Mz = product(xp, p.M, z)  # (..., n)
    f = xp.sum(z * (0.5 * Mz - p.q), axis=-1)
    slope = Mz - p.q
    size = xp.maximum(largest(xp, z), largest(xp, p.q))  # (...)
    if total is not None:
        slope = slope - multiplier[..., None] * p.normal
        upper = xp.minimum(upper, total[..., None] / p.normal)
    else:  # where there is no bound, out to twice the point
        upper, lower = xp.minimum(upper, 2 * size[..., None]), xp.maximum(lower, -2 * size[..., None])
    kkt = xp.max(xp.abs(z - xp.clip(z - slope, p.limits.lower, p.limits.upper)), axis=-1) / size
    loss = xp.sum(slope * (z - xp.where(slope > 0, lower, upper)), axis=-1)
    scale = xp.maximum(xp.sum(xp.abs(z * Mz), axis=-1), xp.sum(xp.abs(p.q * z), axis=-1))
    return f, kkt, xp.maximum(loss, xp.zeros_like(loss)) / xp.where(scale > 0, scale, 1.0)
