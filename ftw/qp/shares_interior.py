"""The interior point over weights and sources, for what the exchange of `shares` leaves unsolved."""

from __future__ import annotations

from typing import Any, NamedTuple

from ftw import _array, _loops

from .problem import Problem, dot, keep, largest, nonzero, product
from .shares_system import Sources, equality, signs, sums_of

__all__ = ["Path", "interior_path", "rounded"]


class Path(NamedTuple):
    """A point near the central path."""

    z: Any  # (..., n)
    y: Any  # (..., n): multiplier of z >= 0
    t: Any  # (...): multiplier of the total
    e: Any  # (..., m + 1): multiplier of the sources that are fixed
    room: Any  # (..., 2, m + 1): E z - low and high - E z
    price: Any  # (..., 2, m + 1): their multipliers
    length: Any  # (...): of the last step
    going: Any  # (...) booleans
    steps: Any  # (...), int32


def interior_path(xp: Any, p: Problem, s: Sources, steps: Any, run: Any, max_steps: int, tol: float) -> Path:
    """Follow the central path where ``run`` (...), until complementarity and slopes are ``tol`` times their size."""
    low, high = p.limits.low, p.limits.high
    eps = float(xp.finfo(p.q.dtype).eps)
    slack = max(tol, 16 * eps)
    unit = xp.eye(p.q.shape[-1], dtype=p.q.dtype, device=_array.device(p.q))
    bounded = xp.stack([s.floored, s.capped], axis=-2)  # (..., 2, m + 1)
    alive, total = s.alive, p.limits.total * xp.ones_like(p.q[..., 0])
    count = xp.count_nonzero(alive, axis=-1) + xp.count_nonzero(s.floored, axis=-1)
    count = nonzero(xp, xp.astype(count + xp.count_nonzero(s.capped, axis=-1), p.q.dtype))  # (...)
    some = xp.any(s.inside & alive[..., None, :], axis=-1)  # (..., m + 1)
    summed = xp.any(some & ~s.fixed, axis=-1)[..., None]  # (..., 1)

    def positive(x: Any) -> Any:
        return xp.where(x > eps * eps, x, eps * eps)

    def shrink(x: Any, dx: Any, mask: Any) -> Any:
        return xp.max(xp.where(mask, -dx / xp.where(mask, x, 1.0), -xp.inf), axis=-1)

    def rooms(z: Any) -> Any:
        sums = sums_of(xp, s, z)
        return xp.stack([sums - low, high - sums], axis=-2)  # (..., 2, m + 1)

    span = xp.where(some, high - low, 0.0)
    part = (total - xp.sum(low, axis=-1)) / nonzero(xp, xp.sum(span, axis=-1))
    amounts = low + part[..., None] * span  # (..., m + 1): inside all bounds
    members = xp.astype(s.inside & alive[..., None, :], p.q.dtype)
    each = amounts / nonzero(xp, xp.sum(members, axis=-1))
    z = positive(xp.sum(members * each[..., :, None], axis=-2) / p.normal)  # (..., n)
    z = xp.where(alive, z, 0.0)
    slope = product(xp, p.M, z) - p.q
    t = dot(xp, p.normal, slope) / dot(xp, p.normal, p.normal)
    slope = slope - t[..., None] * p.normal
    tiny = 1e-6 * total[..., None, None]
    room = xp.where(bounded, xp.maximum(rooms(z), tiny), 1.0)
    mu = xp.maximum(dot(xp, xp.abs(slope), z), 1e-3 * dot(xp, z, z)) / count  # (...)
    y = xp.where(alive, mu[..., None] / xp.where(alive, z, 1.0), 0.0)
    price = xp.where(bounded, mu[..., None, None] / room, 0.0)

    def step(a: Path) -> Path:
        z, y, room, price = a.z, a.y, a.room, a.price
        safe = xp.where(alive, z, 1.0)
        e = xp.where(s.fixed, a.e, price[..., 0, :] - price[..., 1, :])  # (..., m + 1)
        own = a.t[..., None] + xp.sum(p.limits.member * e[..., :, None], axis=-2)
        Mz = product(xp, p.M, z)
        dual = xp.where(alive, Mz - p.q - y - own * p.normal, 0.0)  # (..., n)
        product_ = dot(xp, z, y) + xp.sum(xp.where(bounded, room * price, 0.0), axis=(-2, -1))  # (...)
        aim = xp.where(a.length > 0.87, 0.02, (1 - a.length) ** 2) * product_ / count
        off = xp.where(bounded, rooms(z) - room, 0.0)  # (..., 2, m + 1)
        push = xp.where(bounded, (aim[..., None, None] - price * off) / room - price, 0.0)
        stiff = xp.where(bounded, price / room, 0.0)
        D = stiff[..., 0, :] + stiff[..., 1, :]  # (..., m + 1)
        bends = D > 0
        g = (push[..., 0, :] - push[..., 1, :]) / nonzero(xp, D)
        sums = sums_of(xp, s, z)
        h = xp.concat([(total - dot(xp, p.normal, z))[..., None], xp.where(s.fixed, low - sums, g)], axis=-1)
        soft = xp.concat([xp.zeros_like(total)[..., None], xp.where(bends, 1 / nonzero(xp, D), 0.0)], axis=-1)
        active = xp.concat([summed, bends | s.fixed], axis=-1)  # (..., m + 2)
        C = xp.concat([p.normal[..., None, :], s.rows], axis=-2)
        C = xp.where(alive[..., None, :] & active[..., None], C, 0.0)
        A = xp.where(alive[..., :, None] & alive[..., None, :], p.shifted, unit) + unit * (y / safe)[..., None]
        right = xp.where(alive, aim[..., None] / safe - y - dual, 0.0)
        dz, dy_ = equality(xp, A, right, C, h, active, soft)
        dz = xp.where(alive, dz, 0.0)
        dt, de = dy_[..., 0], dy_[..., 1:]
        dy = xp.where(alive, aim[..., None] / safe - y - y * dz / safe, 0.0)
        change = sums_of(xp, s, dz)
        moved = xp.stack([change, -change], axis=-2)  # (..., 2, m + 1)
        droom = xp.where(bounded, moved + off, 0.0)
        dprice = xp.where(bounded, push - stiff * moved, 0.0)
        shorter = xp.maximum(shrink(z, dz, alive), shrink(y, dy, alive))
        for i in range(2):
            mask = bounded[..., i, :]
            shorter = xp.maximum(shorter, shrink(room[..., i, :], droom[..., i, :], mask))
            shorter = xp.maximum(shorter, shrink(price[..., i, :], dprice[..., i, :], mask))
        length = 0.995 / xp.where(shorter > 0.995, shorter, 0.995)  # (...)
        size = dot(xp, z, xp.abs(Mz) + xp.abs(p.q))
        reach = xp.maximum(largest(xp, z), p.size * xp.ones_like(total))
        near = (product_ <= tol * size) & (largest(xp, dual) <= slack * reach)
        sound = xp.isfinite(dot(xp, dz, dz) + dt + xp.sum(de, axis=-1))
        going = sound & ~near & (length > 1e-6) & (a.steps + 1 < max_steps)
        ahead = length[..., None]
        new: tuple[Any, ...] = (
            xp.where(alive, positive(z + ahead * dz), 0.0),
            xp.where(alive, positive(y + ahead * dy), 0.0),
            a.t + length * dt,
            a.e + ahead * xp.where(s.fixed, de, 0.0),
            xp.where(bounded, positive(room + ahead[..., None] * droom), 1.0),
            xp.where(bounded, positive(price + ahead[..., None] * dprice), 0.0),
        )
        new = keep(xp, sound, new, a[:6])
        after: tuple[Any, ...] = (*new, length, going, a.steps + 1)
        return Path(*keep(xp, a.going, after, tuple(a)))

    e = xp.zeros_like(low)
    start = Path(z, y, t, e, room, price, xp.zeros_like(t), run & (steps < max_steps), steps)
    return _loops.while_loop(lambda a: xp.any(a.going), step, start)


def rounded(xp: Any, s: Sources, a: Path) -> tuple[Any, Any]:
    """Return which weights are free (..., n) and which sources held (..., m + 1) at the end of the path."""
    tight = a.price >= a.room
    low, high = s.fixed | (s.floored & tight[..., 0, :]), s.capped & tight[..., 1, :]
    return s.alive & (a.z > a.y), signs(xp, low, high)
