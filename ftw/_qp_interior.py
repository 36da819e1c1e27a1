"""Primal-dual interior point: the fallback that converges on every kind of problem, singular or not, in 10 to 25 steps.

Each bound gets a slack and a multiplier, ``s = z - lower`` with y and ``t = upper - z`` with v, all positive. A Newton step on

    Mz - q - m normal - y + v = 0,    normal'z = total,    s y = sigma mu,    t v = sigma mu

reduces to one linear system with ``M + diag(y/s + v/t)``, which is positive definite however singular M is (Wright 1997, chapter
10). The centring sigma follows the length of the step before, so that one factorisation a step is enough. The result is good to
about eight digits: it serves to tell the free weights from the held ones, and the active-set method then finishes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array, _loops
from ._qp_problem import Problem, keep, largest, product


class Path(NamedTuple):
    """A point of the central path's neighbourhood; arrays (..., n) and (...)."""

    z: Any
    multiplier: Any  # (...)
    s: Any
    t: Any
    y: Any
    v: Any
    length: Any  # (...): the last step's length
    going: Any  # (...) booleans
    steps: Any  # (...), int32


def interior(xp: Any, p: Problem, steps: Any, run: Any, max_steps: int, *, tol: float) -> Path:
    """Follow the path, for the problems named by ``run`` (...), until the complementarity is below ``tol`` of the objective."""
    lower, upper, total = p.limits
    below, above = lower > -xp.inf, upper < xp.inf  # (..., n): which bounds there are
    lower, upper = xp.where(below, lower, 0.0), xp.where(above, upper, 0.0)
    zero, one = xp.zeros_like(p.q), xp.ones_like(p.q)
    n = p.q.shape[-1]
    eps = float(xp.finfo(p.q.dtype).eps)
    unit = xp.eye(n, dtype=p.q.dtype, device=_array.device(p.q))
    bounds = xp.sum(xp.where(below, one, zero) + xp.where(above, one, zero), axis=-1)  # (...)
    bounds = xp.where(bounds > 0, bounds, xp.ones_like(bounds))

    def dot(a: Any, b: Any) -> Any:
        return xp.sum(a * b, axis=-1)

    # a start well inside, all complementarity products equal
    if total is None:
        middle = xp.where(below & above, 0.5 * (lower + upper), xp.where(above, upper - 1, lower + xp.where(below, 1.0, zero)))
    else:
        middle = total[..., None] / (n * p.normal)
        middle = xp.where(above, xp.minimum(middle, 0.9 * upper), middle)
    slope = product(xp, p.M, middle) - p.q
    m = xp.zeros_like(p.value)
    if total is not None:
        m = dot(p.normal, slope) / dot(p.normal, p.normal)
        slope = slope - m[..., None] * p.normal
    tiny = 1e-6 * largest(xp, middle)[..., None]
    s = xp.where(below, xp.maximum(middle - lower, tiny), one)
    t = xp.where(above, xp.maximum(upper - middle, tiny), one)
    room = xp.where(below, s, zero) + xp.where(above, t, zero)
    mu = (xp.maximum(dot(xp.abs(slope), room), 1e-3 * dot(room, room)) / bounds)[..., None]
    y, v = xp.where(below, mu / s, zero), xp.where(above, mu / t, zero)

    def keep_going(a: Path) -> Any:
        return a.going if a.z.ndim == 1 else xp.any(a.going)

    def step(a: Path) -> Path:
        z, m, s, t, y, v = a[:6]
        Mz = product(xp, p.M, z)
        dual = Mz - p.q - y + v  # (..., n)
        if total is not None:
            dual = dual - m[..., None] * p.normal
        off_s = xp.where(below, z - lower - s, zero)
        off_t = xp.where(above, upper - z - t, zero)
        mu = (dot(s, y) + dot(t, v)) / bounds  # (...)
        aim = (xp.clip((1 - a.length) ** 2, 0.02, 1.0) * mu)[..., None]
        push_s = xp.where(below, (aim - y * off_s) / s - y, zero)
        push_t = xp.where(above, (aim - v * off_t) / t - v, zero)
        A = p.M + unit * (y / s + v / t + 2 * n * eps)[..., None]  # (..., n, n)
        right = push_s - push_t - dual
        if total is None:
            dz, dm = _array.solve_positive(xp, A, right[..., None])[..., 0], xp.zeros_like(m)
        else:
            both = _array.solve_positive(xp, A, xp.stack([right, p.normal], axis=-1))  # (..., n, 2)
            dm = (total - dot(p.normal, z) - dot(p.normal, both[..., 0])) / dot(p.normal, both[..., 1])
            dz = both[..., 0] + dm[..., None] * both[..., 1]
        ds, dt = xp.where(below, dz + off_s, zero), xp.where(above, off_t - dz, zero)
        dy, dv = xp.where(below, push_s - y * dz / s, zero), xp.where(above, push_t + v * dz / t, zero)
        # the longest step that keeps everything positive
        shrink = xp.maximum(-ds / s, -dt / t)
        shrink = xp.maximum(shrink, xp.where(below, -dy / xp.where(below, y, one), zero))
        shrink = xp.maximum(shrink, xp.where(above, -dv / xp.where(above, v, one), zero))
        length = 0.995 / xp.maximum(xp.max(shrink, axis=-1), 0.995 * xp.ones_like(m))  # (...), at most 1
        h = length[..., None]
        z_new = z + h * dz
        # how far the point just left was from the optimum: the step that follows it only helps
        size = xp.maximum(dot(xp.abs(z), xp.abs(Mz)), dot(xp.abs(z), xp.abs(p.q)))
        near = (mu * bounds <= tol * size) & (xp.max(xp.abs(dual), axis=-1) <= tol * xp.maximum(largest(xp, p.q), largest(xp, z)))
        sound = xp.all(xp.isfinite(z_new), axis=-1)
        new = Path(
            z_new, m + length * dm, s + h * ds, t + h * dt, y + h * dy, v + h * dv,
            length, ~near & sound & (a.steps + 1 < max_steps), a.steps + 1,
        )  # fmt: skip
        sound_only = Path(*keep(xp, sound, new, a))
        sound_only = sound_only._replace(going=new.going, steps=new.steps)
        return sound_only if a.z.ndim == 1 else Path(*keep(xp, a.going, sound_only, a))

    return _loops.while_loop(
        keep_going, step, Path(middle, m, s, t, y, v, xp.zeros_like(m), run & (steps < max_steps), steps)
    )
