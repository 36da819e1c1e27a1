"""The problem that the QP's algorithms work on: scaled to a unit diagonal, every constraint set in one shape; its certificate.

With ``s_i = 1 / sqrt(K_ii)`` and ``w = scale * z`` the problem ``min 1/2 w'Kw - c'w`` over ``C`` becomes

    min 1/2 z'Mz - q'z    over    lower <= z <= upper  [, normal'z = total],        diag(M) = 1

(Jacobi scaling). A common factor in ``K``, ``c`` or the bounds has then gone into ``scale`` and ``value``, so that nothing that
follows depends on the units of the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array
from .constraints import Limits, clip


class Problem(NamedTuple):
    """A scaled problem. ``M`` (..., n, n); ``q``, ``normal`` and ``scale`` (..., n); ``value`` (...): f(w) = value f(z)."""

    M: Any
    shifted: Any  # M plus a few roundings on the diagonal: safe to factorise
    q: Any
    limits: Limits
    normal: Any
    scale: Any
    value: Any


def product(xp: Any, M: Any, z: Any) -> Any:
    """Return M z, (..., n)."""
    return M @ z if z.ndim == 1 else (M @ z[..., None])[..., 0]


def dot(xp: Any, a: Any, b: Any) -> Any:
    """Return the inner product over the last axis, (...)."""
    return a @ b if a.ndim == 1 and b.ndim == 1 else xp.sum(a * b, axis=-1)


def largest(xp: Any, x: Any) -> Any:
    """Return max |x| over the last axis, 1 where that is 0: a safe divisor, (...)."""
    top = xp.max(xp.abs(x), axis=-1)
    return xp.where(top > 0, top, 1.0)


def keep(xp: Any, where: Any, new: Any, old: Any) -> Any:
    """Return the arrays of the tuple ``new`` for the problems that ``where`` (...) names, of ``old`` for the others."""

    def one(a: Any, b: Any) -> Any:
        if a is None:
            return None
        return xp.where(xp.reshape(where, where.shape + (1,) * (a.ndim - where.ndim)), a, b)

    return tuple(one(a, b) for a, b in zip(new, old, strict=True))


def scaled_problem(xp: Any, K: Any, c: Any, limits: Limits, ridge: Any) -> Problem:
    """Return the scaled form of a problem whose numbers are finite; ``K`` need not be exactly symmetric."""
    n = c.shape[-1]
    eps = float(xp.finfo(c.dtype).eps)
    lower, upper, total = limits
    unit = xp.eye(n, dtype=c.dtype, device=_array.device(c))
    diagonal = xp.linalg.diagonal(K) + ridge[..., None]  # (..., n)
    top = largest(xp, diagonal)  # (...)
    diagonal = diagonal / top[..., None]
    # a zero gradient has a zero row, and takes part as the smallest one that rounding can tell from it
    if total is None:
        s = 1 / xp.sqrt(xp.where(diagonal > eps * eps, diagonal, 1.0))  # (..., n)
    else:
        s = 1 / xp.sqrt(xp.where(diagonal > eps, diagonal, eps))
    M = (K / top[..., None, None]) * (s[..., :, None] * s[..., None, :])  # (..., n, n)
    M = 0.5 * (M + xp.matrix_transpose(M))
    M = xp.where(unit > 0, (diagonal * s * s)[..., None], M)
    q = c * s  # (..., n)
    length = largest(xp, q)  # (...)
    q = q / length[..., None]
    length = length / top
    if total is not None:
        size = xp.where(total > 0, total, 1.0)  # (...)
    elif upper is None:
        size = length
    else:  # a box is measured by its own reach, if that is less than the slopes'
        reach = xp.max(xp.maximum(xp.abs(lower), xp.abs(upper)) / s, axis=-1)  # (...)
        size = xp.where((reach > 0) & (reach < length), reach, length)
    q = q * (length / size)[..., None]
    scale = s * size[..., None]  # (..., n): w = scale * z
    inner = Limits(
        lower / scale if upper is not None and total is None else lower,
        None if upper is None else upper / scale,
        None if total is None else total / size,
    )
    return Problem(M, M + (2 * n * eps) * unit, q, inner, s, scale, top * size * size)


def certificate(xp: Any, p: Problem, z: Any, multiplier: Any) -> tuple[Any, Any, Any]:
    """Return the objective, the scaled natural residual and the relative duality gap of a feasible z; (...) each.

    With ``slope = Mz - q - multiplier * normal`` the residual is ``max |z - clip(z - slope, lower, upper)|``. Every feasible v has
    ``f(v) >= f(z) + slope'(v - z)``, as M is PSD and both have the same sum, so that the gap is ``max slope'(z - v)`` over the box.
    """
    lower, upper, total = p.limits
    Mz = product(xp, p.M, z)  # (..., n)
    f = dot(xp, z, 0.5 * Mz - p.q)
    slope = Mz - p.q
    size = xp.maximum(largest(xp, z), largest(xp, p.q))  # (...)
    if total is not None:
        slope = slope - multiplier[..., None] * p.normal
        widest = total[..., None] / p.normal
    else:  # where there is no bound, out to twice the point
        widest = 2 * size[..., None]
        lower = xp.maximum(lower, -widest)
    upper = widest if upper is None else xp.minimum(upper, widest)
    kkt = xp.max(xp.abs(z - clip(xp, z - slope, p.limits)), axis=-1) / size
    loss = dot(xp, slope, z - xp.where(slope > 0, lower, upper))
    scale = xp.maximum(dot(xp, xp.abs(z), xp.abs(Mz)), dot(xp, xp.abs(z), xp.abs(p.q)))
    return f, kkt, xp.where(loss > 0, loss, 0.0) / xp.where(scale > 0, scale, 1.0)
