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
from .shares_interior import interior_path, rounded
from .shares_system import Sources, equality, signs, sums_of

PATIENCE = 5  # exchanges without fewer wrong signs before giving up


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


def solve(xp: Any, p: Problem, run: Any, steps: Any, start: Any, tol: Any, max_steps: int) -> tuple[Any, Any, Any]:
    """Return z (..., n), the steps taken (...), and the certificate of z; ``run`` (...) says where to do anything."""
    device = _array.device(p.q)
    run = xp.asarray(run, device=device) if isinstance(run, bool) else run
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
        path = interior_path(xp, p, s, guess.steps, left, max_steps, 1e-14 if bits == 64 else 1e-7)
        free, held = rounded(xp, s, path)
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
    sums = sums_of(xp, s, z)
    low = s.fixed | (s.floored & (sums - p.limits.low <= near))
    high = s.capped & (p.limits.high - sums <= near)
    return s.alive & (z * p.normal > near / z.shape[-1]), signs(xp, low, high)


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
    sums = sums_of(xp, s, x)
    doubt = xp.max(xp.where(s.inside & free[..., None, :], (noise / p.normal)[..., None, :], 0.0), axis=-1)
    grain = 8 * eps * xp.sum(s.rows * xp.abs(x)[..., None, :], axis=-1) + eps * high  # (..., m + 1)
    release = ~s.fixed & (((g.held < 0) & (e < -doubt)) | ((g.held > 0) & (e > doubt)))
    loose = g.held == 0
    under, over = loose & s.floored & (sums < low - grain), loose & s.capped & (sums > high + grain)
    held = xp.where(release, xp.zeros_like(g.held), xp.where(loose, signs(xp, under, over), g.held))
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
    h = xp.concat([missing, bound - sums_of(xp, s, z)], axis=-1)  # (..., m + 2)
    move, price = equality(xp, A, xp.where(free, right, 0.0), C, h, active, xp.zeros_like(h))
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
