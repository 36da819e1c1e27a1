"""Accelerated projected gradient with adaptive restart: no factorisation, no guess, and many steps.

One step from the extrapolated point y (Beck & Teboulle 2009), with L a bound on the largest eigenvalue of M:

    z+ = Proj(y - (My - q) / L),    t+ = (1 + sqrt(1 + 4 t^2)) / 2,    y+ = z+ + (t - 1)/t+ (z+ - z)

and t falls back to 1 wherever the momentum points uphill, ``(y - z+)'(z+ - z) > 0`` (O'Donoghue & Candès 2015). Each
step costs one product with M and one projection. It is what remains of `solve_qp` without the polish (docs/qp.md has
the count of its steps): the projection is then in the metric of the diagonal of K, as the problem is scaled.
"""

from __future__ import annotations

from typing import Any

from ftw import _array, _loops
from ftw.constraints import clip, project_scaled

from .problem import Problem, column, dot, largest, nonzero, product


def descend(xp: Any, p: Problem, z: Any, count: int) -> Any:
    """Return z (..., n) after ``count`` plain gradient steps of exact length, clipped: a first guess of the support.

    The sum is kept by rescaling, not by a projection: two products with M and no sort make a step, and a few
    find most of the weights that are zero.
    """
    lower, upper, total = p.limits[:3]
    read = _array.read

    def rescaled(z: Any) -> Any:
        return z if total is None else z * column(total / nonzero(xp, read(dot(xp, z, p.normal))))

    def step(_: Any, z: Any) -> Any:
        slope = product(xp, p.M, z) - p.q  # (..., n)
        if total is not None:  # the multiplier that complementarity suggests
            slope = slope - column(read(dot(xp, z, slope)) / safe) * p.normal
        slope = xp.where(z > lower, slope, xp.minimum(slope, zero))
        if upper is not None:
            slope = xp.where(z < upper, slope, xp.maximum(slope, zero))
        bend = read(dot(xp, slope, product(xp, p.M, slope)))  # (...)
        length = read(dot(xp, slope, slope)) / nonzero(xp, bend)  # (...)
        return rescaled(clip(xp, z - column(length) * slope, p.limits))

    zero = xp.zeros_like(z)
    safe = None if total is None else nonzero(xp, total)  # what normal'z is, (...)
    return _loops.fori_loop(count, step, rescaled(z))


def lipschitz(xp: Any, M: Any) -> Any:
    """Return an upper bound of the largest eigenvalue of M (..., n, n): its largest row sum, (...)."""
    return xp.max(xp.sum(xp.abs(M), axis=-1), axis=-1)


def accelerated(xp: Any, p: Problem, z: Any, tol: Any, max_steps: int, *, check_every: int = 1) -> tuple[Any, Any]:
    """Return the last point (..., n) and the number of steps (...) taken from ``z``.

    Stops where the natural residual at the extrapolated point, ``L max |y - z+|``, is below ``tol`` times the size of
    the problem.
    """
    one = xp.ones_like(p.q[..., 0])  # (...)
    L = xp.maximum(lipschitz(xp, p.M), 1e-3 * one)  # (...)
    size = p.size * one  # (...)

    def keep_going(state: tuple[Any, ...]) -> Any:
        _, _, _, residual, steps = state
        return xp.any((residual > tol) & (steps < max_steps))

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        z, y, t, residual, steps = state
        active = (residual > tol) & (steps < max_steps)
        new = project_scaled(xp, y - (product(xp, p.M, y) - p.q) / L[..., None], p.limits, p.normal)
        move, back = new - z, y - new  # (..., n)
        uphill = xp.sum(back * move, axis=-1) > 0
        t = xp.where(uphill, 1.0, t)
        t_next = 0.5 * (1 + xp.sqrt(1 + 4 * t * t))
        pushed = new + (xp.where(uphill, 0.0, (t - 1) / t_next))[..., None] * move
        error = L * xp.max(xp.abs(back), axis=-1) / xp.maximum(largest(xp, new), size)
        keep = active[..., None]
        return (
            xp.where(keep, new, z),
            xp.where(keep, pushed, y),
            t_next,
            xp.where(active, error, residual),
            steps + xp.astype(active, steps.dtype),
        )

    steps = xp.zeros_like(p.q[..., 0], dtype=xp.int32)
    z, _, _, _, steps = _loops.while_loop(keep_going, step, (z, z, one, one * xp.inf, steps), check_every=check_every)
    return z, steps
