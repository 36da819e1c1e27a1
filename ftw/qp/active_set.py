"""Active-set Newton: guess which weights are free, solve for them exactly, correct the guess by whole blocks.

With every weight outside the free set F held at a bound, the free ones and the multiplier t of the sum solve a
linear system,

    M_FF z_F + M_FB z_B - q_F = t normal_F,      normal'z = total,

here in the form of a correction to the present z, so that repeating a step refines it. Then every free weight that
left its bounds goes to the bound it crossed, and every weight at a bound whose multiplier has the wrong sign is set
free. This is the semismooth Newton method on the natural residual, or the primal-dual active-set method
(Hintermüller, Ito & Kunisch 2002), with the exchange rule of block principal pivoting (Júdice & Pires 1994), which
does not jump from one bound to the other. It ends after 3 to 15 exchanges or begins to cycle; the count of wrong
signs tells, and the caller then turns elsewhere.

The system is shifted by ``delta`` of a few roundings. Because what is solved for is the correction, the shift moves
no answer: it is one step of the proximal point method (Rockafellar 1976), and among twins it divides the weight evenly.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ftw import _array, _loops
from ftw.constraints import clip

from .problem import Problem, column, dot, keep, product

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
    far = math.inf if isinstance(steps, int) else xp.full_like(p.q[..., 0], xp.inf)
    return Guess(z, multiplier, free, above, 0 * steps + (p.q.shape[-1] + 1), far, steps + PATIENCE, run, steps)


def search(xp: Any, p: Problem, guess: Guess, max_steps: int) -> Guess:
    """Exchange until the guess is right to rounding, or goes nowhere; O(|F|^3) per exchange."""
    eps = float(xp.finfo(p.q.dtype).eps)
    fixed = (
        8 * eps * abs(p.q),
        8 * eps * xp.ones_like(p.q),
        None if p.limits.total is None else 8 * eps * p.normal,
        None if p.limits.upper is None else p.limits.lower < p.limits.upper,
    )
    single = guess.z.ndim == 1

    def keep_going(g: Guess) -> Any:
        return g.going if single else xp.any(g.going)

    def step(g: Guess) -> Guess:
        new = _exchange(xp, p, g, fixed, max_steps)
        return new if single else Guess(*keep(xp, g.going, new, g))

    return _loops.while_loop(keep_going, step, guess)


def _exchange(xp: Any, p: Problem, g: Guess, fixed: tuple[Any, ...], max_steps: int) -> Guess:
    """Solve for the free weights, then correct the guess."""
    lower, upper, total = p.limits[:3]
    grain, grains, grain_normal, movable = fixed
    x, multiplier, free = _solve(xp, p, g)
    slope = product(xp, p.M, x) - p.q  # (..., n)
    # what rounding alone may do to a weight (..., 1) and to a slope (..., n)
    blur = column(_array.read(dot(xp, abs(x), grains)))
    noise = grain + blur
    if total is not None:
        slope = slope - column(multiplier) * p.normal
        noise = noise + column(abs(multiplier)) * grain_normal
    if upper is None:
        above = g.above
        flips = xp.where(free, x + blur < lower, slope + noise < 0)
    else:
        over = free & (x - blur > upper)
        entering = movable & (xp.where(g.above, slope, -slope) > noise)
        flips = xp.where(free, over | (x + blur < lower), entering)
        above = xp.where(free, over, g.above & ~flips)
    wrong = (
        int(xp.count_nonzero(flips))
        if isinstance(g.steps, int)
        else xp.astype(xp.count_nonzero(flips, axis=-1), xp.int32)
    )
    steps = g.steps + 1
    right = wrong == 0
    # in double precision a residual of n roundings is far below what anyone can see in the objective, its square
    enough = p.q.shape[-1] if xp.finfo(p.q.dtype).bits == 64 else 1
    residual: Any = math.inf
    done: Any = False
    if right is not False:
        residual = _array.read(xp.max(xp.where(free, abs(slope) - enough * noise, 0.0), axis=-1))  # (...)
        done = right & ((residual <= 0) | (residual > 0.5 * g.residual) | (residual != residual))
        residual = _array.pick(xp, right, residual, math.inf)
    deadline = _array.pick(xp, right | (wrong < g.wrong), steps + PATIENCE, g.deadline)
    return Guess(
        clip(xp, x, p.limits),
        multiplier,
        free ^ flips,
        above,
        _array.pick(xp, wrong < g.wrong, wrong, g.wrong),
        residual,
        deadline,
        (done ^ True) & (steps < deadline) & (steps < max_steps),
        steps,
    )


def _solve(xp: Any, p: Problem, g: Guess) -> tuple[Any, Any, Any]:
    """Return the point that is stationary in the free weights (..., n), its multiplier (...), and the free set used."""
    n = p.q.shape[-1]
    total = p.limits.total
    free = g.free
    right = p.q - product(xp, p.M, g.z)  # (..., n)
    normal = p.normal
    index = None
    if isinstance(g.steps, int):  # one eager problem: only the free weights enter the system
        size = int(xp.count_nonzero(free))
        if size == 0:
            if total is None:
                return g.z, g.multiplier, free
            free, size = _closest(xp, p, g, right), 1
        A = p.shifted
        if size < n:
            index = _array.true_indices(xp, free, size)  # (f,)
            A = _array.submatrix(xp, A, index)  # (f, f)
            right, normal = xp.take(right, index), xp.take(normal, index)
    else:
        if total is not None:
            free = free | (_closest(xp, p, g, right) & ~xp.any(free, axis=-1)[..., None])
        # held weights stay in the system, each as an equation of its own that says zero
        both = free[..., :, None] & free[..., None, :]
        unit = _array.over(xp.eye(n, dtype=xp.bool, device=_array.device(g.z)), both)
        A = xp.where(both | unit, p.shifted, 0.0)  # (..., n, n)
        right, normal = xp.where(free, right, 0.0), xp.where(free, normal, 0.0)
    if total is None:
        move, multiplier = _array.solve_positive(xp, A, right[..., None])[..., 0], g.multiplier
    else:
        sides = xp.concat([right[..., None, :], normal[..., None, :]], axis=-2)  # (..., 2, f)
        both = _array.solve_positive(xp, A, xp.matrix_transpose(sides))  # (..., f, 2)
        move, bend = both[..., 0], both[..., 1]
        missing = total - dot(xp, p.normal, g.z)  # (...)
        multiplier = _array.read((missing - dot(xp, normal, move)) / dot(xp, normal, bend))
        move = move + column(multiplier) * bend
    if index is not None:
        move = _array.scatter(xp, move, index, n)
    return g.z + move, multiplier, free


def _closest(xp: Any, p: Problem, g: Guess, right: Any) -> Any:
    """Tell the weight (..., n) whose slope is nearest to the multiplier's: with a sum, one at least must be free."""
    distance = xp.abs(right / p.normal + column(g.multiplier))  # (..., n)
    closest = xp.argmin(distance, axis=-1)[..., None]  # (..., 1)
    return _array.over(xp.arange(right.shape[-1], device=_array.device(right)), closest) == closest
