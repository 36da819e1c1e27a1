"""Primal-dual interior point: the fallback that converges on every kind of problem, singular or not, in 10 to 25 steps.

Each bound gets a slack and a multiplier, ``s = z - lower`` with y and ``t = upper - z`` with v, all positive. A
Newton step on

    Mz - q - m normal - y + v = 0,    normal'z = total,    s y = sigma mu,    t v = sigma mu

reduces to one linear system with ``M + diag(y/s + v/t)``, which is positive definite however singular M is (Wright
1997, chapter 10). The centring sigma follows the length of the step before, so that one factorisation a step is
enough. The result is good to about eight digits: it serves to tell the free weights from the held ones, and the
active-set method then finishes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ftw import _array, _loops

from .problem import Problem, column, dot, keep, largest, nonzero, product


class Path(NamedTuple):
    """A point near the central path; ``t`` and ``v`` are None for a set without upper bounds."""

    z: Any  # (..., n)
    multiplier: Any  # (...)
    s: Any  # (..., n): room below
    y: Any  # (..., n): its multiplier
    t: Any  # (..., n): room above
    v: Any  # (..., n): its multiplier
    length: Any  # (...): of the last step
    going: Any  # (...) booleans
    steps: Any  # (...), int32


def interior(xp: Any, p: Problem, steps: Any, run: Any, max_steps: int, tol: float) -> Path:
    """Follow the path, where ``run`` (...) says so, until complementarity and slopes are ``tol`` times their size."""
    read = _array.read
    lower, upper, total = p.limits[:3]
    zero, one = xp.zeros_like(p.q), xp.ones_like(p.q)
    unit = xp.eye(p.q.shape[-1], dtype=p.q.dtype, device=_array.device(p.q))
    eps = float(xp.finfo(p.q.dtype).eps)
    slack = max(tol, 16 * eps)  # slopes cannot be met better than they are computed
    below: Any = None
    above: Any = None  # (..., n): which bounds there are, None for all
    count = xp.sum(one, axis=-1)  # (...): how many
    if upper is not None:
        below, above = lower > -xp.inf, upper < xp.inf
        count = xp.sum(xp.astype(below, p.q.dtype) + xp.astype(above, p.q.dtype), axis=-1)
        count = nonzero(xp, count)
        lower, upper = xp.where(below, lower, 0.0), xp.where(above, upper, 0.0)

    def at(mask: Any, x: Any, other: Any = 0.0) -> Any:
        return x if mask is None else xp.where(mask, x, other)

    def shorten(x: Any, dx: Any, mask: Any) -> Any:
        """Return 1/h for the longest step h that keeps x positive, (...)."""
        return xp.max(at(mask, -dx / at(mask, x, 1.0)), axis=-1)

    def positive(x: Any) -> Any:
        return xp.where(x > eps * eps, x, eps * eps)  # no ratio of two may overflow

    # a start well inside, with equal products of room and multiplier
    if total is not None:
        z = column(total) / (p.q.shape[-1] * p.normal)  # (..., n)
        z = z if upper is None else at(above, xp.minimum(z, 0.9 * upper), z)
    elif upper is None:
        z = one
    else:
        z = xp.where(below & above, 0.5 * (lower + upper), xp.where(above, upper - 1, xp.where(below, lower + 1, zero)))
    slope = product(xp, p.M, z) - p.q
    multiplier = xp.zeros_like(p.q[..., 0])
    if total is not None:
        multiplier = dot(xp, p.normal, slope) / dot(xp, p.normal, p.normal)
        slope = slope - multiplier[..., None] * p.normal
    tiny = 1e-6 * column(nonzero(xp, largest(xp, z)))
    s = at(below, xp.maximum(z - lower, tiny), one)
    t = None if upper is None else at(above, xp.maximum(upper - z, tiny), one)
    room = at(below, s)
    room = room if t is None else room + at(above, t)
    mu = (xp.maximum(dot(xp, xp.abs(slope), room), 1e-3 * dot(xp, room, room)) / count)[..., None]
    y, v = at(below, mu / s), None if t is None else at(above, mu / t)

    def keep_going(a: Path) -> Any:
        return a.going if a.z.ndim == 1 else xp.any(a.going)

    def step(a: Path) -> Path:
        z, m, s, y, t, v = a[:6]
        Mz = product(xp, p.M, z)
        dual = Mz - p.q - y  # (..., n)
        dual = dual if v is None else dual + v
        dual = dual if total is None else dual - m[..., None] * p.normal
        complementarity = dot(xp, s, y) if v is None else dot(xp, s, y) + dot(xp, t, v)  # (...)
        aim = column(_array.pick(xp, a.length > 0.87, 0.02, (1 - a.length) ** 2) * complementarity / count)
        off_s = at(below, z - lower - s)
        push_s = at(below, (aim - y * off_s) / s - y)
        stiff = y / s
        right = push_s - dual
        off_t = push_t = None
        if v is not None:
            off_t = at(above, upper - z - t)
            push_t = at(above, (aim - v * off_t) / t - v)
            stiff = stiff + v / t
            right = right - push_t
        A = p.shifted + _array.over(unit, p.shifted) * stiff[..., None]  # (..., n, n)
        if total is None:
            dm = xp.zeros_like(m)
            dz = _array.solve_positive(xp, A, right[..., None])[..., 0]
        else:
            both = _array.solve_positive(xp, A, xp.stack([right, p.normal], axis=-1))  # (..., n, 2)
            move, bend = both[..., 0], both[..., 1]
            dm = (total - dot(xp, p.normal, z + move)) / dot(xp, p.normal, bend)
            dz = move + dm[..., None] * bend
        ds, dy = at(below, dz + off_s), at(below, push_s - y * dz / s)
        shrink = xp.maximum(shorten(s, ds, below), shorten(y, dy, below))
        dt = dv = None
        if v is not None:
            dt, dv = at(above, off_t - dz), at(above, push_t + v * dz / t)
            shrink = xp.maximum(shrink, xp.maximum(shorten(t, dt, above), shorten(v, dv, above)))
        shrink = read(shrink)
        length = 0.995 / _array.pick(xp, shrink > 0.995, shrink, 0.995)  # (...), at most 1
        # how far the point just left was from the optimum: the step from it only helps
        size = dot(xp, xp.abs(z), xp.abs(Mz) + xp.abs(p.q))
        reach = read(largest(xp, z))
        reach = _array.pick(xp, reach > p.size, reach, p.size)
        near = read(complementarity <= tol * size) & read(largest(xp, dual) <= slack * reach)
        sound = read(xp.isfinite(dot(xp, dz, dz) + dm))
        going = sound & (near ^ True) & (a.steps + 1 < max_steps)
        h = column(length)
        t, v = (t, v) if v is None else (positive(t + h * dt), at(above, positive(v + h * dv)))
        moved = (z + h * dz, m + length * dm, positive(s + h * ds), at(below, positive(y + h * dy)), t, v)
        z, m, s, y, t, v = keep(xp, sound, moved, a[:6])
        new = Path(z, m, s, y, t, v, length, going, a.steps + 1)
        return new if a.z.ndim == 1 else Path(*keep(xp, a.going, new, a))

    length = 0.0 if isinstance(steps, int) else xp.zeros_like(multiplier)
    going = run & (steps < max_steps)
    return _loops.while_loop(keep_going, step, Path(z, multiplier, s, y, t, v, length, going, steps))


def rounded(xp: Any, p: Problem, a: Path) -> tuple[Any, Any, Any]:
    """Return the point with every weight at the bound it tends to (..., n); which are free; which are held above."""
    low = a.y >= a.s
    z = xp.maximum(a.z, p.limits.lower)
    z = xp.where(low, p.limits.lower, z)
    if p.limits.upper is None:
        return z, ~low, low & ~low
    high = a.v >= a.t
    z = xp.where(high, p.limits.upper, xp.minimum(z, p.limits.upper))
    return z, ~low & ~high, high
