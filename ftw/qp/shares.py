"""Weights with bounds on each source's sum: an active set over weights and sources, an interior point behind it.

In the scaled problem of `problem` source s has the sum ``E_s z = sum_(i in s) normal_i z_i``, and z is a minimum when
there are a multiplier t of the total and e_s of each source with

    (Mz - q)_i - (t + e_s) normal_i  >= 0,  = 0 where z_i > 0,
    e_s >= 0 where E_s z = low_s,   e_s <= 0 where E_s z = high_s,   e_s = 0 in between.

The two methods are those of `active_set` and `interior` with the sources' rows as further equations: a source that is
held at a bound gives one, and a few small systems (m + 2, m + 2) carry them (a Schur complement). Where every source
with a free weight is held, the total says nothing new and its row is left out. `certificate` needs no multipliers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ftw import _array, _loops
from ftw.constraints import project_scaled

from .problem import Problem, dot, keep, largest, nonzero, product

ROUNDS = 6  # of iterative refinement: near-twins in different sources need them
PATIENCE = 5  # exchanges without fewer wrong signs before giving up


class Sources(NamedTuple):
    """What does not change while a problem is solved."""

    rows: Any  # (..., m + 1, n): normal_i where weight i is of the source
    inside: Any  # (..., m + 1, n) booleans
    alive: Any  # (..., n) booleans: weights of a source whose sum may be positive
    fixed: Any  # (..., m + 1) booleans: low == high, and some weight is alive
    floored: Any  # (..., m + 1) booleans: a lower bound that can bind
    capped: Any  # (..., m + 1) booleans: an upper bound that can bind


class Guess(NamedTuple):
    """Where the exchange stands; as in `active_set`, with the sources."""

    z: Any  # (..., n)
    free: Any  # (..., n) booleans
    held: Any  # (..., m + 1) int32: -1 at the lower bound, 1 at the upper, 0 in between
    wrong: Any  # (...), int32
    residual: Any  # (...)
    deadline: Any  # (...), int32
    going: Any  # (...) booleans
    steps: Any  # (...), int32


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


def solve(xp: Any, p: Problem, run: Any, steps: Any, start: Any, tol: Any, max_steps: int) -> tuple[Any, Any, Any]:
    """Return z (..., n), the steps taken (...), and the certificate of z; ``run`` (...) says where to do anything."""
    place = _array.device(p.q)
    run = xp.asarray(run, device=place) if isinstance(run, bool) else run
    steps = xp.zeros_like(p.q[..., 0], dtype=xp.int32)  # (...)
    s = _sources(xp, p)
    bits = xp.finfo(p.q.dtype).bits

    def better(where: Any, best: tuple[Any, ...], z: Any) -> tuple[Any, ...]:
        z = project_scaled(xp, z, p.limits, p.normal)
        new = (z, *certificate(xp, p, z))
        out: tuple[Any, ...] = keep(xp, where & (new[2] + new[3] < best[2] + best[3]), new, best)
        return out

    def round_(state: tuple[Any, ...]) -> tuple[Any, ...]:
        guess, best, fresh = state
        guess = _search(xp, p, s, guess, max_steps)
        best = better(run, best, guess.z)
        good = (best[2] <= tol) & (best[3] <= _array.pick(xp, tol > slack, tol, slack))
        left = fresh & ~good & (guess.steps < max_steps)
        guess, best = _loops.cond(xp.any(left), cross, stay, guess, best, left)
        return guess, best, fresh & False

    def cross(guess: Guess, best: tuple[Any, ...], left: Any) -> tuple[Any, ...]:
        path = _interior(xp, p, s, guess.steps, left, max_steps, 1e-14 if bits == 64 else 1e-7)
        free, held = _rounded(xp, s, path)
        again = left & (path.steps < max_steps)
        return _begin(xp, p, path.z, free, held, path.steps, again), better(left, best, path.z)

    def stay(guess: Guess, best: tuple[Any, ...], left: Any) -> tuple[Any, ...]:
        return guess, best

    slack = 1e4 * float(xp.finfo(p.q.dtype).eps)
    z = _first(xp, p, start)
    free, held = _support(xp, p, s, z)
    far = xp.full_like(p.q[..., 0], xp.inf)
    state = (_begin(xp, p, z, free, held, steps, run), (z, far, far, far), run)
    guess, best, _ = _loops.while_loop(lambda state: xp.any(state[0].going), round_, state)
    z, *proof = best
    return z, _array.read(guess.steps), tuple(map(_array.read, proof))


def certificate(xp: Any, p: Problem, z: Any) -> tuple[Any, Any, Any]:
    """Return the objective, the natural residual and the relative duality gap of z in the set; (...) each.

    The residual is ``max |z - Proj(z - (Mz - q))|`` over the larger of ``max |z|`` and ``max |q|``. For the gap
    ``max_v slope'(z - v)`` each source puts all of its weight on its cheapest sample, and what the lower bounds leave
    of the total goes to the cheapest sources; it is divided as in `problem.certificate`.
    """
    eps = float(xp.finfo(z.dtype).eps)
    member, low, high = p.limits.member, p.limits.low, p.limits.high
    total = p.limits.total * xp.ones_like(z[..., 0])  # (...)
    Mz = product(xp, p.M, z)  # (..., n)
    slope = Mz - p.q
    f = dot(xp, z, 0.5 * (slope - p.q))
    size = xp.maximum(largest(xp, z), p.size * xp.ones_like(total))
    kkt = xp.max(xp.abs(z - project_scaled(xp, z - slope, p.limits, p.normal)), axis=-1) / size
    missing = xp.abs(total - dot(xp, p.normal, z)) / nonzero(xp, total)
    prices = slope / p.normal  # (..., n)
    ceiling = xp.max(prices, axis=-1)[..., None]  # (..., 1)
    cheapest = xp.min(xp.where(member > 0, prices[..., None, :], ceiling[..., None]), axis=-1)  # (..., m + 1)
    own = xp.sum(member * cheapest[..., :, None], axis=-2)  # (..., n): the cheapest price of each weight's source
    order = xp.argsort(cheapest, axis=-1)
    cost, span = (xp.take_along_axis(x, order, axis=-1) for x in (cheapest, high - low))
    before = xp.cumulative_sum(span, axis=-1) - span
    given = xp.clip((total - xp.sum(low, axis=-1))[..., None] - before, 0.0, xp.inf)  # (..., m + 1)
    amount = xp.take_along_axis(low, order, axis=-1) + xp.minimum(given, span)
    sums = xp.take_along_axis(xp.sum(member * (p.normal * z)[..., None, :], axis=-1), order, axis=-1)
    middle = dot(xp, cost, sums) / nonzero(
        xp, total
    )  # (...): both sums are the total, so that any level may be taken off
    loss = dot(xp, (prices - own) * p.normal, z) + dot(xp, cost - middle[..., None], sums - amount)
    length = xp.abs(z)
    scale = dot(xp, length, xp.abs(Mz) + xp.abs(p.q))
    floor = 32 * eps / max(1e-8, 1e4 * eps) * total * xp.sum(length, axis=-1)
    scale = xp.where((scale > floor) | (loss <= 1e-12 * scale), scale, floor)
    return f, xp.maximum(kkt, missing), xp.where(loss > 0, loss, 0.0) / nonzero(xp, scale)


def _sources(xp: Any, p: Problem) -> Sources:
    member, low, high = p.limits.member, p.limits.low, p.limits.high
    total = (p.limits.total * xp.ones_like(p.q[..., 0]))[..., None]  # (..., 1)
    tiny = 64 * float(xp.finfo(p.q.dtype).eps) * total
    inside = member > 0
    some = xp.any(inside, axis=-1)
    alive = xp.any(inside & (high > 0)[..., None], axis=-2)
    fixed = (high - low <= tiny) & some & (high > 0)
    floored = (low > 0) & some & ~fixed
    capped = (high < total) & (high > 0) & some & ~fixed
    return Sources(member * p.normal[..., None, :], inside, alive, fixed, floored, capped)


def _sums(xp: Any, s: Sources, z: Any) -> Any:
    return xp.sum(s.rows * z[..., None, :], axis=-1)  # (..., m + 1)


def _first(xp: Any, p: Problem, start: Any) -> Any:
    """Return a point to guess from: the weights given, or equal ones."""
    if start is None:
        z = p.limits.total * xp.ones_like(p.q[..., 0])
        z = z[..., None] / (p.q.shape[-1] * p.normal)  # (..., n)
    else:
        z = xp.where(xp.isfinite(start), start, 0.0) / p.scale
    return project_scaled(xp, z, p.limits, p.normal)


def _support(xp: Any, p: Problem, s: Sources, z: Any) -> tuple[Any, Any]:
    """Return which weights are free (..., n), and which sources are held (..., m + 1), at a point of the set."""
    near = 1e-10 if xp.finfo(z.dtype).bits == 64 else 1e-5
    near = near * (p.limits.total * xp.ones_like(z[..., 0]))[..., None]
    sums = _sums(xp, s, z)
    low = s.fixed | (s.floored & (sums - p.limits.low <= near))
    high = s.capped & (p.limits.high - sums <= near)
    return s.alive & (z * p.normal > near / z.shape[-1]), _signs(xp, low, high)


def _signs(xp: Any, low: Any, high: Any) -> Any:
    return xp.astype(high & ~low, xp.int32) - xp.astype(low, xp.int32)


def _begin(xp: Any, p: Problem, z: Any, free: Any, held: Any, steps: Any, run: Any) -> Guess:
    far = xp.full_like(p.q[..., 0], xp.inf)
    wrong = xp.zeros_like(steps) + (p.q.shape[-1] + held.shape[-1] + 1)
    return Guess(z, free, held, wrong, far, steps + PATIENCE, run, steps)


def _search(xp: Any, p: Problem, s: Sources, guess: Guess, max_steps: int) -> Guess:
    """Exchange weights and sources until the guess is right to rounding, or goes nowhere."""

    def step(g: Guess) -> Guess:
        return Guess(*keep(xp, g.going, _exchange(xp, p, s, g, max_steps), g))

    return _loops.while_loop(lambda g: xp.any(g.going), step, guess)


def _exchange(xp: Any, p: Problem, s: Sources, g: Guess, max_steps: int) -> Guess:
    eps = float(xp.finfo(p.q.dtype).eps)
    low, high = p.limits.low, p.limits.high
    x, t, e, free = _newton(xp, p, s, g)
    own = xp.sum(p.limits.member * e[..., :, None], axis=-2)  # (..., n)
    slope = product(xp, p.M, x) - p.q - (t[..., None] + own) * p.normal
    blur = 8 * eps * xp.sum(xp.abs(x), axis=-1)[..., None]  # (..., 1)
    noise = 8 * eps * (xp.abs(p.q) + (xp.abs(t)[..., None] + xp.abs(own)) * p.normal) + blur  # (..., n)
    flips = s.alive & xp.where(free, x + blur < 0, slope + noise < 0)
    sums = _sums(xp, s, x)
    doubt = xp.max(xp.where(s.inside & free[..., None, :], (noise / p.normal)[..., None, :], 0.0), axis=-1)
    grain = 8 * eps * xp.sum(s.rows * xp.abs(x)[..., None, :], axis=-1) + eps * high  # (..., m + 1)
    release = ~s.fixed & (((g.held < 0) & (e < -doubt)) | ((g.held > 0) & (e > doubt)))
    loose = g.held == 0
    under, over = loose & s.floored & (sums < low - grain), loose & s.capped & (sums > high + grain)
    held = xp.where(release, xp.zeros_like(g.held), xp.where(loose, _signs(xp, under, over), g.held))
    wrong = xp.count_nonzero(flips, axis=-1) + xp.count_nonzero(release | under | over, axis=-1)
    wrong = xp.astype(wrong, xp.int32)
    steps = g.steps + 1
    right = wrong == 0
    enough = p.q.shape[-1] if xp.finfo(p.q.dtype).bits == 64 else 1
    residual = xp.max(xp.where(free, xp.abs(slope) - enough * noise, 0.0), axis=-1)  # (...)
    done = right & ((residual <= 0) | (residual > 0.5 * g.residual) | xp.isnan(residual))
    deadline = xp.where(right | (wrong < g.wrong), steps + PATIENCE, g.deadline)
    return Guess(
        xp.where(x > 0, x, 0.0),
        free ^ flips,
        held,
        xp.where(wrong < g.wrong, wrong, g.wrong),
        xp.where(right, residual, xp.inf),
        deadline,
        ~done & (steps < deadline) & (steps < max_steps),
        steps,
    )


def _newton(xp: Any, p: Problem, s: Sources, g: Guess) -> tuple[Any, Any, Any, Any]:
    """Return the stationary point x (..., n) of a guess, its t (...) and e (..., m + 1), and the free weights used."""
    n = p.q.shape[-1]
    unit = xp.eye(n, dtype=xp.bool, device=_array.device(g.z))
    z = xp.where(g.free, g.z, 0.0)
    right = p.q - product(xp, p.M, z)  # (..., n)
    bound = xp.where(g.held > 0, p.limits.high, p.limits.low)  # (..., m + 1)
    # a source that must have weight needs a free sample, the cheapest; and so does the set as a whole
    prices = -right / p.normal
    gains = xp.where(s.inside & s.alive[..., None, :], -prices[..., None, :], -xp.inf)  # (..., m + 1, n)
    best = xp.argmax(gains, axis=-1)[..., None]  # (..., m + 1, 1)
    first = _array.over(xp.arange(n, device=_array.device(g.z)), best) == best  # (..., m + 1, n)
    has = xp.any(s.inside & g.free[..., None, :], axis=-1)  # (..., m + 1)
    needy = ~has & xp.any(s.inside & s.alive[..., None, :], axis=-1) & ((p.limits.low > 0) | (g.held != 0))
    free = g.free | xp.any(first & needy[..., None], axis=-2)
    gains = xp.where(s.alive, -prices, -xp.inf)
    first = xp.arange(n, device=_array.device(g.z)) == xp.argmax(gains, axis=-1)[..., None]  # (..., n)
    free = free | (first & ~xp.any(free, axis=-1)[..., None])
    has = xp.any(s.inside & free[..., None, :], axis=-1)

    A = xp.where((free[..., :, None] & free[..., None, :]) | unit, p.shifted, 0.0)  # (..., n, n)
    held = (g.held != 0) & has  # (..., m + 1)
    summed = xp.any(~held & has, axis=-1)[..., None]  # (..., 1): the total is an equation of its own
    active = xp.concat([summed, held], axis=-1)  # (..., m + 2)
    C = xp.concat([p.normal[..., None, :], s.rows], axis=-2)  # (..., m + 2, n)
    C = xp.where(free[..., None, :] & active[..., None], C, 0.0)
    missing = (p.limits.total - dot(xp, p.normal, z))[..., None]
    h = xp.concat([missing, bound - _sums(xp, s, z)], axis=-1)  # (..., m + 2)
    move, price = _equality(xp, A, xp.where(free, right, 0.0), C, h, active, xp.zeros_like(h))
    x = z + xp.where(free, move, 0.0)
    u = price[..., 1:]  # (..., m + 1): e where the total is active, t + e where it is not
    # without its row t is anywhere between what the held sources and the idle weights allow
    slopes = xp.where(s.alive & ~free, (product(xp, p.M, x) - p.q) / p.normal, xp.inf)  # (..., n)
    idle = xp.where(s.inside & ~has[..., None], slopes[..., None, :], xp.inf)
    least = xp.max(xp.where(held & (g.held > 0), u, -xp.inf), axis=-1)
    most = xp.min(xp.where(held & (g.held < 0) & ~s.fixed, u, xp.inf), axis=-1)
    most = xp.minimum(most, xp.min(xp.min(idle, axis=-1), axis=-1))
    ends = xp.isfinite(least), xp.isfinite(most)
    low, high = xp.where(ends[0], least, 0.0), xp.where(ends[1], most, 0.0)
    between = xp.where(ends[0] & ends[1], (low + high) / 2, low + high)
    t = xp.where(summed[..., 0], price[..., 0], between)
    e = xp.where(held, xp.where(summed, u, u - t[..., None]), 0.0)
    return x, t, e, free


def _equality(xp: Any, A: Any, right: Any, C: Any, h: Any, active: Any, soft: Any) -> tuple[Any, Any]:
    """Solve ``A x - C' y = right``, ``C x + soft y = h`` on the active rows: x (..., n) and y (..., r), 0 elsewhere."""
    sides = xp.concat([right[..., None, :], C], axis=-2)  # (..., 1 + r, n)
    X = _array.solve_positive(xp, A, xp.matrix_transpose(sides))  # (..., n, 1 + r)
    x, bends = X[..., 0], X[..., 1:]
    S = C @ bends  # (..., r, r)
    S = (S + xp.matrix_transpose(S)) / 2
    unit = xp.eye(h.shape[-1], dtype=h.dtype, device=_array.device(h))
    scale = xp.where(active, xp.linalg.diagonal(S) + soft, 1.0)  # (..., r)
    root = xp.sqrt(xp.where(scale > 0, scale, 1.0))
    both = active[..., :, None] & active[..., None, :]
    S = xp.where(both, (S + unit * soft[..., None]) / root[..., :, None] / root[..., None, :], 0.0)
    shift = 4 * h.shape[-1] * float(xp.finfo(h.dtype).eps)
    S = S + unit * xp.where(active, shift, xp.ones_like(h))[..., None]

    def refine(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        x, y = state
        left = right + dot_rows(xp, xp.matrix_transpose(C), y) - dot_rows(xp, A, x)
        x = x + _array.solve_positive(xp, A, left[..., None])[..., 0]
        missing = xp.where(active, (h - dot_rows(xp, C, x) - soft * y) / root, 0.0)  # last: the sums are to hold
        dy = xp.where(active, _array.solve_positive(xp, S, missing[..., None])[..., 0] / root, 0.0)
        return x + dot_rows(xp, bends, dy), y + dy

    # both parts of x may be far larger than their sum: what that loses is solved for again
    solved: tuple[Any, Any] = _loops.fori_loop(ROUNDS, refine, (x, xp.zeros_like(h)))
    return solved


def dot_rows(xp: Any, A: Any, x: Any) -> Any:
    """Return A x, (..., r) for A (..., r, n)."""
    return (A @ x[..., None])[..., 0]


def _interior(xp: Any, p: Problem, s: Sources, steps: Any, run: Any, max_steps: int, tol: float) -> Path:
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
        sums = _sums(xp, s, z)
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
        sums = _sums(xp, s, z)
        h = xp.concat([(total - dot(xp, p.normal, z))[..., None], xp.where(s.fixed, low - sums, g)], axis=-1)
        soft = xp.concat([xp.zeros_like(total)[..., None], xp.where(bends, 1 / nonzero(xp, D), 0.0)], axis=-1)
        active = xp.concat([summed, bends | s.fixed], axis=-1)  # (..., m + 2)
        C = xp.concat([p.normal[..., None, :], s.rows], axis=-2)
        C = xp.where(alive[..., None, :] & active[..., None], C, 0.0)
        A = xp.where(alive[..., :, None] & alive[..., None, :], p.shifted, unit) + unit * (y / safe)[..., None]
        right = xp.where(alive, aim[..., None] / safe - y - dual, 0.0)
        dz, dy_ = _equality(xp, A, right, C, h, active, soft)
        dz = xp.where(alive, dz, 0.0)
        dt, de = dy_[..., 0], dy_[..., 1:]
        dy = xp.where(alive, aim[..., None] / safe - y - y * dz / safe, 0.0)
        change = _sums(xp, s, dz)
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


def _rounded(xp: Any, s: Sources, a: Path) -> tuple[Any, Any]:
    """Return which weights are free (..., n) and which sources held (..., m + 1) at the end of the path."""
    tight = a.price >= a.room
    low, high = s.fixed | (s.floored & tight[..., 0, :]), s.capped & tight[..., 1, :]
    return s.alive & (a.z > a.y), _signs(xp, low, high)
