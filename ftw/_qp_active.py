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
from ._qp_problem import Problem, keep, product

PATIENCE = 4  # exchanges without fewer wrong signs before giving up


class Guess(NamedTuple):
    """Where the method stands: ``z`` (..., n), its multiplier (...), which weights are free, which are held above."""

    z: Any
    multiplier: Any
    free: Any  # (..., n) booleans
    above: Any  # (..., n) booleans: held at the upper bound
    wrong: Any  # (...), int32: the fewest wrong signs seen; 0 once the guess was right
    patience: Any  # (...), int32: exchanges left; negative where the search has ended
    residual: Any  # (...): of the free weights, in units of rounding
    steps: Any  # (...), int32


def begin(xp: Any, p: Problem, z: Any, multiplier: Any, free: Any, above: Any, steps: Any, run: Any) -> Guess:
    """Return a guess to search from; where ``run`` (...) is False nothing will be done."""
    count = xp.zeros_like(steps)
    return Guess(
        z,
        multiplier,
        free,
        above,
        count + (p.q.shape[-1] + 1),
        xp.where(run, count + PATIENCE, count - 1),
        xp.full_like(p.value, xp.inf),
        steps,
    )


def search(xp: Any, p: Problem, guess: Guess, max_steps: int) -> Guess:
    """Exchange until the guess is right to rounding, or goes nowhere; O(|F|^3) per exchange."""

    def going(g: Guess) -> Any:
        return (g.patience >= 0) & (g.steps < max_steps)

    def keep_going(g: Guess) -> Any:
        return going(g) if g.z.ndim == 1 else xp.any(going(g))

    def step(g: Guess) -> Guess:
        new = exchange(xp, p, g)
        return new if g.z.ndim == 1 else Guess(*keep(xp, going(g), new, g))

    return _loops.while_loop(keep_going, step, guess)


def exchange(xp: Any, p: Problem, g: Guess) -> Guess:
    """Solve for the free weights, then correct the guess."""
    lower, upper, total = p.limits
    free, above = g.free, g.above
    eps = float(xp.finfo(p.q.dtype).eps)
    move, multiplier = _solve(xp, p, g)
    x = g.z + move  # (..., n)
    slope = product(xp, p.M, x) - p.q  # (..., n)
    # what rounding alone may do to a slope and to a weight
    noise = xp.sum(xp.abs(x), axis=-1)[..., None] + xp.abs(p.q)  # (..., n)
    if total is not None:
        shift = multiplier[..., None] * p.normal
        slope = slope - shift
        noise = noise + xp.abs(shift)
    noise = 8 * eps * noise
    blur = 4 * eps * xp.max(xp.abs(x), axis=-1)[..., None]
    over = free & (x > upper + blur)
    gone = over | (free & (x < lower - blur))
    entering = ~free & (xp.where(above, slope, -slope) > noise) & (lower < upper)
    flips = gone | entering
    wrong = xp.astype(xp.sum(xp.astype(flips, p.q.dtype), axis=-1), xp.int32)  # (...)
    right = wrong == 0
    residual = xp.max(xp.where(free, xp.abs(slope) / (noise + eps * eps), 0.0), axis=-1)  # (...)
    refined = right & ((residual <= 1) | (residual > 0.5 * g.residual))
    better = (wrong < g.wrong) | right
    patience = xp.where(better, xp.full_like(wrong, PATIENCE), g.patience - 1)
    patience = xp.where(refined, -1, patience)
    above = (above & ~entering) | over
    free = xp.where(flips, ~free, free)
    if total is not None:  # a multiplier needs a weight that can move
        closest = xp.argmin(xp.abs(slope) / p.normal, axis=-1)[..., None]  # (..., 1)
        lone = xp.arange(free.shape[-1], device=_array.device(x)) == closest
        free = free | (lone & ~xp.any(free, axis=-1)[..., None])
    return Guess(
        xp.clip(x, lower, upper),
        multiplier,
        free,
        above,
        xp.where(wrong < g.wrong, wrong, g.wrong),
        xp.astype(patience, xp.int32),
        xp.where(right, residual, xp.full_like(residual, xp.inf)),
        g.steps + 1,
    )


def _solve(xp: Any, p: Problem, g: Guess) -> tuple[Any, Any]:
    """Return the move of the free weights, zero elsewhere (..., n), and the multiplier of the sum (...)."""
    n = p.q.shape[-1]
    delta = 2 * n * float(xp.finfo(p.q.dtype).eps)
    total = p.limits.total
    slope = p.q - product(xp, p.M, g.z)  # (..., n)
    place = None
    if g.z.ndim > 1 or _array.is_jax(g.z):
        # fixed shapes: the held weights stay in the system, each as an equation of its own that says zero
        on = xp.astype(g.free, p.q.dtype)  # (..., n)
        unit = xp.eye(n, dtype=p.q.dtype, device=_array.device(g.z))
        A = p.M * (on[..., :, None] * on[..., None, :]) + unit * (1 + delta - on)[..., None]  # (..., n, n)
        slope, normal = slope * on, p.normal * on
    else:
        order = xp.argsort(xp.astype(g.free, xp.int8), descending=True, stable=True)  # (n,): the free weights first
        size = int(xp.sum(xp.astype(g.free, xp.int32)))
        if size == 0:
            return xp.zeros_like(g.z), g.multiplier
        index = order[:size]  # (f,)
        A = xp.take(xp.take(p.M, index, axis=0), index, axis=1)  # (f, f)
        A = A + delta * xp.eye(size, dtype=p.q.dtype, device=_array.device(g.z))
        slope, normal = xp.take(slope, index), xp.take(p.normal, index)
        place = order
    if total is None:
        move, multiplier = _array.solve_positive(xp, A, slope[..., None])[..., 0], g.multiplier
    else:
        both = _array.solve_positive(xp, A, xp.stack([slope, normal], axis=-1))  # (..., f, 2)
        move, bend = both[..., 0], both[..., 1]
        missing = total - xp.sum(p.normal * g.z, axis=-1)  # (...)
        rate = xp.sum(normal * bend, axis=-1)
        multiplier = (missing - xp.sum(normal * move, axis=-1)) / xp.where(rate == 0, xp.ones_like(rate), rate)
        move = move + multiplier[..., None] * bend
    if place is not None:
        rest = xp.zeros(n - move.shape[0], dtype=move.dtype, device=_array.device(move))
        move = xp.take(xp.concat([move, rest]), xp.argsort(place))
    return move, multiplier
