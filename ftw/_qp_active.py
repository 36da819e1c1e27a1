"""Active-set Newton: guess which weights are free, solve for them exactly, correct the guess by whole blocks.

With every weight outside the free set F held at a bound, the free ones and the multiplier t of the sum solve a linear system,

    M_FF z_F + M_FB z_B - q_F = t normal_F,      normal'z = total,

here in the form of a correction to the present z, so that repeating a step refines it. Then every free weight that left its
bounds goes to the bound it crossed, and every weight at a bound whose multiplier has the wrong sign is set free. This is the
semismooth Newton method on the natural residual, or the primal-dual active-set method (Hintermüller, Ito & Kunisch 2002), with
the exchange rule of block principal pivoting (Júdice & Pires 1994), which does not jump from one bound to the other. It ends
after 3 to 15 exchanges or begins to cycle; the count of wrong signs tells, and the caller then turns elsewhere.

The system is shifted by ``delta`` of a few roundings. Because what is solved for is the correction, the shift moves no answer:
it is one step of the proximal point method (Rockafellar 1976), and among twins it divides the weight evenly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array, _loops
from ._qp_problem import Problem, dot, keep, product
from .constraints import clip

PATIENCE = 4  # exchanges without fewer wrong signs before giving up


class Guess(NamedTuple):
    """Where the search stands; a right guess has ``wrong == 0``."""

    z: Any  # (..., n), within its bounds
    multiplier: Any  # (...)
    free: Any  # (..., n) booleans
    above: Any  # (..., n) booleans: held at the upper bound
    wrong: Any  # (...), int32: the fewest wrong signs seen so far
    residual: Any  # (...): of the free weights, beyond what rounding explains; infinite while signs are wrong
    deadline: Any  # (...), int32: give up at this step
    going: Any  # (...) booleans
    steps: Any  # (...), int32


def begin(xp: Any, p: Problem, z: Any, multiplier: Any, free: Any, above: Any, steps: Any, run: Any) -> Guess:
    """Return a guess to search from; where ``run`` (...) is False nothing will be done."""
    count = xp.zeros_like(steps)
    far = xp.full_like(p.value, xp.inf)
    return Guess(z, multiplier, free, above, count + (p.q.shape[-1] + 1), far, steps + PATIENCE, run, steps)


def search(xp: Any, p: Problem, guess: Guess, max_steps: int) -> Guess:
    """Exchange until the guess is right to rounding, or goes nowhere; O(|F|^3) per exchange."""
    eps = float(xp.finfo(p.q.dtype).eps)
    grain = 8 * eps * xp.abs(p.q)  # (..., n)
    movable = None if p.limits.upper is None else p.limits.lower < p.limits.upper
    single = guess.z.ndim == 1

    def keep_going(g: Guess) -> Any:
        return g.going if single else xp.any(g.going)

    def step(g: Guess) -> Guess:
        new = _exchange(xp, p, g, eps, grain, movable, max_steps)
        return new if single else Guess(*keep(xp, g.going, new, g))

    return _loops.while_loop(keep_going, step, guess)


def _exchange(xp: Any, p: Problem, g: Guess, eps: float, grain: Any, movable: Any, max_steps: int) -> Guess:
    """Solve for the free weights, then correct the guess."""
    lower, upper, total = p.limits
    x, multiplier, free = _solve(xp, p, g)
    slope = product(xp, p.M, x) - p.q  # (..., n)
    # what rounding alone may do to a weight (...) and to a slope (..., n)
    blur = ((8 * eps) * xp.sum(xp.abs(x), axis=-1))[..., None]
    noise = grain + blur
    if total is not None:
        shift = multiplier[..., None] * p.normal
        slope = slope - shift
        noise = noise + (8 * eps) * xp.abs(shift)
    if upper is None:
        above = g.above
        flips = xp.where(free, x + blur < lower, slope + noise < 0)
    else:
        over = free & (x - blur > upper)
        entering = movable & (xp.where(g.above, slope, -slope) > noise)
        flips = xp.where(free, over | (x + blur < lower), entering)
        above = xp.where(free, over, g.above & ~flips)
    wrong = xp.astype(xp.count_nonzero(flips, axis=-1), xp.int32)  # (...)
    residual = xp.max(xp.where(free, xp.abs(slope) - noise, 0.0), axis=-1)  # (...)
    right = wrong == 0
    done = right & ((residual <= 0) | (residual > 0.5 * g.residual))
    steps = g.steps + 1
    deadline = xp.where(right | (wrong < g.wrong), steps + PATIENCE, g.deadline)
    return Guess(
        clip(xp, x, p.limits),
        multiplier,
        free ^ flips,
        above,
        xp.minimum(wrong, g.wrong),
        xp.where(right, residual, xp.inf),
        deadline,
        ~done & (steps < deadline) & (steps < max_steps),
        steps,
    )


def _solve(xp: Any, p: Problem, g: Guess) -> tuple[Any, Any, Any]:
    """Return the point that is stationary in the free weights (..., n), its multiplier (...), and the free set used."""
    total = p.limits.total
    free = g.free
    right = p.q - product(xp, p.M, g.z)  # (..., n)
    fixed_shape = g.z.ndim > 1 or _array.is_jax(g.z)
    if fixed_shape:
        if total is not None:
            free = free | (_closest(xp, p, g, right) & ~xp.any(free, axis=-1)[..., None])
        # held weights stay in the system, each as an equation of its own that says zero
        unit = xp.eye(p.q.shape[-1], dtype=xp.bool, device=_array.device(g.z))
        A = xp.where((free[..., :, None] & free[..., None, :]) | unit, p.shifted, 0.0)  # (..., n, n)
        right = xp.where(free, right, 0.0)
        normal = xp.where(free, p.normal, 0.0)
    else:
        size = int(xp.count_nonzero(free))
        if size == 0:
            if total is None:
                return g.z, g.multiplier, free
            free, size = _closest(xp, p, g, right), 1
        order = xp.argsort(xp.astype(~free, xp.int8), stable=True)  # (n,): the free weights first
        index = order[:size]  # (f,)
        A = xp.take(xp.take(p.shifted, index, axis=0), index, axis=1)  # (f, f)
        right, normal = xp.take(right, index), xp.take(p.normal, index)
    if total is None:
        move, multiplier = _array.solve_positive(xp, A, right[..., None])[..., 0], g.multiplier
    else:
        both = _array.solve_positive(xp, A, xp.stack([right, normal], axis=-1))  # (..., f, 2)
        move, bend = both[..., 0], both[..., 1]
        missing = total - dot(xp, p.normal, g.z)  # (...)
        multiplier = (missing - dot(xp, normal, move)) / dot(xp, normal, bend)
        move = move + multiplier[..., None] * bend
    if not fixed_shape:
        place = xp.cumulative_sum(xp.astype(free, order.dtype)) - 1  # (n,): of the free weights among themselves
        move = xp.where(free, xp.take(move, xp.where(free, place, 0)), 0.0)
    return g.z + move, multiplier, free


def _closest(xp: Any, p: Problem, g: Guess, right: Any) -> Any:
    """Tell the one weight (..., n) whose slope is nearest to the multiplier's: with a sum, one at least must be free."""
    distance = xp.abs(right / p.normal + g.multiplier[..., None])  # (..., n)
    closest = xp.argmin(distance, axis=-1)[..., None]  # (..., 1)
    return xp.arange(right.shape[-1], device=_array.device(right)) == closest
