"""The weights: a small dense convex QP, solved to machine precision on every backend.

    minimise  f(w) = 1/2 w'(K + ridge I)w - c'w    over    lower <= w <= upper  [, sum w = total]

The whole, one file each:

1. the door (here): shapes raise; NaN, empty sets and indefinite matrices become a status;
2. ``direct.py``: the short way for one small problem over ``w >= 0`` in NumPy's memory, left where anything is unusual;
3. ``problem.py``: Jacobi scaling to a unit diagonal, after which no unit of the gradients is left; the certificate;
4. ``active_set.py``: guess which weights are free, solve for them exactly, exchange whole blocks (semismooth Newton):
   3 to 15 exchanges, on most problems the whole of the work, for a right guess is the solution to rounding;
5. ``interior.py``: where the exchange cycles (twins, condition numbers of 1e10), a primal-dual interior point in 15 to
   25 steps, whose end tells the free weights from the held ones; the exchange then starts again from there;
6. the certificate decides, and the best point of all stages is returned with it.

``shares.py`` does 2 to 5 for the sets with bounds on each source's sum.

``gradient.py`` holds accelerated projected gradient, which needs hundreds of products where this needs a few
factorisations. The same code runs eagerly, on one problem or on leading axes, and under ``jax.jit`` and
``jax.vmap``: eager backends factorise the free block only, a trace the whole matrix with the held weights masked out.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from ftw import _array, _kinds, _loops
from ftw.constraints import (
    Constraint,
    Limits,
    as_limits,
    clip,
    feasible,
    field,
    finite,
    narrowed,
    project_scaled,
    require_fields,
)
from ftw.status import Status

from . import shares
from .active_set import Guess, begin, search
from .direct import LARGEST, direct
from .gradient import accelerated, descend
from .interior import interior, rounded
from .problem import Problem, balance, certificate, column, keep, nonzero, scaled_problem

__all__ = ["QPSolution", "solve_qp"]


class QPSolution(NamedTuple):
    """What ``solve_qp`` reached; ``(...)`` are the leading axes of the problems.

    Attributes
    ----------
    weights
        (..., n), in the set: never beyond a bound, their sum exact to rounding. NaN where the status is NOT_FINITE,
        INFEASIBLE or NOT_PSD.
    objective
        (...), ``1/2 w'(K + ridge I)w - linear'w``.
    kkt
        (...), the natural residual in the Jacobi metric, free of scale: with ``z_i = w_i sqrt(K_ii)``, and q, M to
        match, ``max |z - Proj(z - (Mz - q))| / max(max |z|, max |q|)``.
    gap
        (...), the duality gap ``max_v grad'(w - v)``, a bound on ``f(w) - min f``, over ``|w|'(|Kw| + |c|)``, or over
        what rounding leaves of it where these cancel in a set with a total. Where the set is unbounded v is kept within
        twice the size of the solution.
    steps
        (...), int32: systems solved, by either method.
    status
        (...), int32, a `Status`: OK, or MAX_STEPS where kkt or gap is above the tolerance.
    """

    weights: Any
    objective: Any
    kkt: Any
    gap: Any
    steps: Any
    status: Any


@_array.untracked
@_array.quiet
def solve_qp(
    gram: Any,
    linear: Any,
    constraint: Constraint,
    *,
    ridge: Any = 0.0,
    tol: Any = None,
    max_steps: int = 100,
    start: Any = None,
    _polish: bool = True,
) -> QPSolution:
    """Minimise ``1/2 w'(gram + ridge I)w - linear'w`` over a constraint set.

    Parameters
    ----------
    gram
        Array (..., n, n), float, positive semi-definite up to rounding; its symmetric part is taken.
    linear
        Array (..., n), float, with the same leading axes.
    constraint
        `NonNegative`, `Simplex`, `CappedSimplex`, `Box` or `SourceShares`; its fields are numbers or arrays that
        broadcast to (..., n), a total to (...), bounds of m sources to (..., m). Its type is static under jit.
    ridge
        Number or array (...), not negative: added to the diagonal as it is.
    tol
        Number or 0-d array: the largest `kkt` and `gap` that are called OK; 1e-8 in float64 and 1e-4 in float32 if
        None. The solver goes to rounding where it can, whatever this says.
    max_steps
        Static int: the most systems solved.
    start
        Array (..., n) of weights from a similar problem, or None: its support is the first guess.

    Returns
    -------
    QPSolution
        In the wider dtype of ``gram`` and ``linear``, 16-bit floats widened to float32.

    Raises
    ------
    TypeError
        If an array is not floating, ``constraint`` is none of the five sets, or the arrays are of several namespaces.
    ValueError
        If a shape does not fit, or ``ridge``, ``tol`` or ``max_steps`` is out of range.

    Notes
    -----
    Values never raise: NaN, infinities, empty sets and indefinite matrices (an eigenvalue below ``-sqrt(eps)`` with the
    diagonal scaled to 1) are reported by the status, eager and under jit alike. A problem without a minimum ends as
    MAX_STEPS.

    Each step is one factorisation of the free block (of the whole matrix under jit and in batches), O(n^3) at most.
    Among identical samples the answer is deterministic but not unique; only the objective is.

    References
    ----------
    Hintermüller, Ito & Kunisch, "The primal-dual active set strategy as a semismooth Newton method", 2002. Júdice &
    Pires, "A block principal pivoting algorithm for large-scale strictly monotone linear complementarity problems",
    1994. Wright, "Primal-dual interior-point methods", 1997.

    Examples
    --------
    >>> import numpy as np
    >>> import ftw
    >>> ftw.solve_qp(np.eye(3), np.array([3.0, 1.0, -1.0]), ftw.Simplex(1.0)).weights
    array([1., 0., 0.])
    """
    xp, K, c, limits, ridge, tol, start = _checked(gram, linear, constraint, ridge, tol, max_steps, start)
    views = _array.numpy_views((K, c, *limits, ridge, tol, start))
    if views is not None:
        K, c, *bounds, ridge, tol, start = views
        xp, limits = _array.lean(_array.namespace(K)), type(limits)(*bounds)
        found = _direct(xp, K, c, limits, ridge, tol, start, max_steps, _polish)
        found = found or _solution(K, c, limits, ridge, tol, start, xp=xp, max_steps=max_steps, polish=_polish)
        return QPSolution(*_array.torch_views(found))
    found = _direct(xp, K, c, limits, ridge, tol, start, max_steps, _polish)
    if found is not None:
        return QPSolution(*found)
    run = _loops.compiled(_solution, ("xp", "max_steps", "polish"), c)
    return QPSolution(*run(K, c, limits, ridge, tol, start, xp=xp, max_steps=max_steps, polish=_polish))


def _direct(
    xp: Any, K: Any, c: Any, limits: Limits, ridge: Any, tol: Any, start: Any, max_steps: int, polish: bool
) -> tuple[Any, ...] | None:
    """Return the fields of the solution if the short way serves: one small problem of NumPy, not negative weights."""
    if not (c.ndim == 1 and c.shape[0] <= LARGEST and limits.upper is None and limits.member is None and polish):
        return None
    if not (_array.is_free(c) and _array.is_numpy(xp) and isinstance(ridge, float) and isinstance(tol, float)):
        return None
    found = direct(xp, K, c, limits, ridge, tol, start, max_steps)
    if found is None:
        return None
    w, *numbers, steps = found
    proof = (xp.asarray(x, dtype=c.dtype) for x in numbers)
    return w, *proof, xp.asarray(steps, dtype=xp.int32), xp.asarray(int(Status.OK), dtype=xp.int32)


def _solution(
    K: Any, c: Any, limits: Limits, ridge: Any, tol: Any, start: Any, *, xp: Any, max_steps: int, polish: bool
) -> tuple[Any, ...]:
    """Return the fields of the solution of a problem whose shapes are right."""
    read, pick = _array.read, _array.pick
    is_finite = xp.all(xp.isfinite(K), axis=(-2, -1)) & xp.all(xp.isfinite(c), axis=-1) & finite(xp, limits)  # (...)
    is_finite = read(is_finite & (math.isfinite(ridge) if isinstance(ridge, float) else xp.isfinite(ridge)))
    is_feasible = read(feasible(xp, limits))
    good = is_finite & is_feasible  # (...)
    if good is not True:
        # a problem that cannot be solved is replaced by an empty one, so that no NaN reaches a loop
        K, c = keep(xp, good, (K, c), (xp.zeros_like(K), xp.zeros_like(c)))
        ridge = (ridge if math.isfinite(ridge) else 0.0) if isinstance(ridge, float) else xp.where(good, ridge, 0.0)
        limits = Limits(*keep(xp, good, limits, [None if x is None else xp.zeros_like(x) for x in limits]))
    limits = narrowed(xp, limits)
    p = scaled_problem(xp, K, c, limits, ridge)
    is_psd = read(_array.is_positive(xp, p.shifted))  # (...)
    everywhere = is_psd if isinstance(is_psd, bool) else xp.all(is_psd)
    is_psd, shifted = _loops.cond(
        everywhere, lambda *x: x[:2], functools.partial(_second_look, xp), is_psd, p.shifted, p.M
    )
    p = p._replace(shifted=shifted)
    run = good & is_psd
    steps = 0 if isinstance(run, bool) else xp.zeros_like(c[..., 0], dtype=xp.int32)
    if polish:
        method = _solve if limits.member is None else shares.solve
        z, steps, (f, kkt, gap) = method(xp, p, run, steps, start, tol, max_steps)
    else:
        z = project_scaled(xp, xp.zeros_like(c), p.limits, p.normal)
        z, steps = accelerated(xp, p, z, tol, max_steps)
        f, kkt, gap = _proof(xp, p, z)
    certified = _certified(xp, c, kkt, gap, tol)
    w = z * p.scale
    if limits.total is None:
        w = clip(xp, w, limits)
    else:
        everywhere = certified if isinstance(certified, bool) else xp.all(certified)
        repair = functools.partial(_repaired, xp, limits)
        force = functools.partial(_forced, xp, limits, p, certified) if limits.member is None else repair
        w, f, kkt, gap = _loops.cond(everywhere, repair, force, w, f, kkt, gap)
    ok = 0 if isinstance(run, bool) else xp.zeros_like(steps)
    status = pick(xp, certified, ok, ok + int(Status.MAX_STEPS))
    status = pick(xp, is_psd, status, ok + int(Status.NOT_PSD))
    status = pick(xp, is_feasible, status, ok + int(Status.INFEASIBLE))
    status = pick(xp, is_finite, status, ok + int(Status.NOT_FINITE))
    if run is not True:
        nan = xp.full_like(c[..., 0], xp.nan)  # (...)
        w, f, kkt, gap = keep(xp, run, (w, f, kkt, gap), (w * nan[..., None], nan, nan, nan))
    device = _array.device(c)

    def back(x: Any, dtype: Any) -> Any:  # Python numbers, where there is one eager problem
        number = isinstance(x, (int, float))
        return xp.asarray(x, dtype=dtype, device=device) if number else xp.astype(x, dtype)

    f = f * p.value
    return w, back(f, c.dtype), back(kkt, c.dtype), back(gap, c.dtype), back(steps, xp.int32), back(status, xp.int32)


def _second_look(xp: Any, is_psd: Any, shifted: Any, M: Any) -> tuple[Any, Any]:
    """Return whether M (..., n, n) lacks more than rounding and an inexact Gram matrix explain; shift it by as much."""
    unit = _array.over(xp.eye(M.shape[-1], dtype=M.dtype, device=_array.device(M)), M)
    more = M + float(xp.finfo(M.dtype).eps) ** 0.5 * unit
    (shifted,) = keep(xp, is_psd, (shifted,), (more,))
    return is_psd | _array.read(_array.is_positive(xp, more)), shifted


def _certified(xp: Any, c: Any, kkt: Any, gap: Any, tol: Any) -> Any:
    """Return whether residual and gap are within the tolerance; of the gap no less is asked than rounding leaves."""
    slack = 1e4 * float(xp.finfo(c.dtype).eps)
    return (kkt <= tol) & (gap <= _array.pick(xp, tol > slack, tol, slack))


def _repaired(xp: Any, limits: Limits, w: Any, *proof: Any) -> tuple[Any, ...]:
    """Return w (..., n) in its bounds, its sum exact to rounding: the weights free to take it share what is missing."""
    w = clip(xp, w, limits)
    if limits.upper is None:
        return w * (limits.total / nonzero(xp, xp.sum(w, axis=-1)))[..., None], *proof
    loose = xp.where(w < limits.upper, w, 0.0)
    missing = limits.total - xp.sum(w, axis=-1)  # (...)
    return clip(xp, w + (missing / nonzero(xp, xp.sum(loose, axis=-1)))[..., None] * loose, limits), *proof


def _forced(xp: Any, limits: Limits, p: Problem, certified: Any, w: Any, *proof: Any) -> tuple[Any, ...]:
    """Return the point of the set nearest to w (..., n), which may be far from it, with a certificate of its own."""
    w = project_scaled(xp, w, limits, xp.ones_like(w))
    z = w / p.scale
    return w, *keep(xp, certified, proof, _proof(xp, p, z))


def _proof(xp: Any, p: Problem, z: Any) -> tuple[Any, Any, Any]:
    """Return the objective, the natural residual and the relative duality gap of z (..., n)."""
    if p.limits.member is not None:
        return shares.certificate(xp, p, z)
    return certificate(xp, p, z, balance(xp, p, z))


def _solve(
    xp: Any, p: Problem, run: Any, steps: Any, start: Any, tol: Any, max_steps: int
) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    """Return z (..., n), the steps taken (...), and the certificate of z: objective, residual, gap (...).

    One round exchanges. Where that does not end in a certified point, it also crosses the set by its interior, and a
    second round exchanges again from the other end. The best point of all is kept.
    """

    def better(run: Any, z: Any, proof: Any, other: Any, multiplier: Any) -> tuple[Any, Any]:
        new = certificate(xp, p, other, multiplier)
        gain = run & (new[1] + new[2] < proof[1] + proof[2])
        z, *proof = keep(xp, gain, (other, *new), (z, *proof))
        return z, tuple(proof)

    def keep_going(state: tuple[Any, ...]) -> Any:
        going = state[0].going
        return going if isinstance(going, bool) else xp.any(going)

    def round_(state: tuple[Any, ...]) -> tuple[Any, ...]:
        guess, z, proof, fresh = state
        guess = search(xp, p, guess, max_steps)
        z, proof = better(run, z, proof, guess.z, guess.multiplier)
        left = fresh & (_certified(xp, p.q, proof[1], proof[2], tol) ^ True) & (guess.steps < max_steps)
        needed = left if isinstance(left, bool) else xp.any(left)
        guess, z, proof = _loops.cond(needed, cross, stay, guess, z, proof, left)
        return guess, z, proof, fresh & False

    def cross(guess: Guess, z: Any, proof: Any, left: Any) -> tuple[Any, ...]:
        path = interior(xp, p, guess.steps, left, max_steps, 1e-14 if xp.finfo(p.q.dtype).bits == 64 else 1e-7)
        point, free, above = rounded(xp, p, path)
        z, proof = better(left, z, proof, point, path.multiplier)
        return begin(xp, p, point, path.multiplier, free, above, path.steps, left & (path.steps < max_steps)), z, proof

    def stay(guess: Guess, z: Any, proof: Any, left: Any) -> tuple[Any, ...]:
        return guess, z, proof

    guess = _first(xp, p, run, steps, start)
    far = math.inf if isinstance(run, bool) else xp.full_like(p.q[..., 0], xp.inf)
    state = (guess, guess.z, (far, far, far), run)
    guess, z, proof, _ = _loops.while_loop(keep_going, round_, state)
    return z, guess.steps, proof


def _first(xp: Any, p: Problem, run: Any, steps: Any, start: Any) -> Guess:
    """Return the first guess: a few gradient steps from the weights given, from equal ones, or from none."""
    lower, upper, total = p.limits[:3]
    if start is not None:
        z = clip(xp, xp.where(xp.isfinite(start), start, 0.0) / p.scale, p.limits)
    elif total is None:
        z = clip(xp, xp.zeros_like(p.q), p.limits)
    else:
        z = column(total) / (p.q.shape[-1] * p.normal)  # (..., n): equal weights
    z = descend(xp, p, z, 4 if start is None else 2)
    free = z > lower
    above = free & ~free
    if upper is not None:
        above = z >= upper
        free = free & ~above
        above = above & (lower < upper)
    return begin(xp, p, clip(xp, z, p.limits), xp.zeros_like(p.q[..., 0]), free, above, steps, run)


def _checked(
    gram: Any, linear: Any, constraint: Any, ridge: Any, tol: Any, max_steps: Any, start: Any
) -> tuple[Any, Any, Any, Limits, Any, Any, Any]:
    fields = _array.leaves(constraint) if isinstance(constraint, tuple) else ()
    given = {"gram": gram, "linear": linear, "start": start, "ridge": ridge, "tol": tol}
    for name, x in given.items():
        _kinds.require(x, f"solve_qp: {name}")
    require_fields(constraint, "solve_qp")
    xp = _array.namespace(gram, linear, start, ridge, tol, *fields, what="solve_qp")
    for name, x in (("gram", gram), ("linear", linear), ("start", start)):
        if x is not None and not _array.is_floating(xp, x):
            raise TypeError(f"solve_qp: {name} must be floating, got {x.dtype}; cast it first")
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"solve_qp: gram must be (..., n, n) with n >= 1, got {tuple(gram.shape)}")
    if tuple(linear.shape) != tuple(gram.shape[:-1]):
        raise ValueError(
            f"solve_qp: linear must be (..., n) with the same n and leading axes as gram, "
            f"got linear {tuple(linear.shape)} and gram {tuple(gram.shape)}"
        )
    if start is not None and tuple(start.shape) != tuple(linear.shape):
        raise ValueError(
            f"solve_qp: start must have the shape of linear {tuple(linear.shape)}, got {tuple(start.shape)}"
        )
    if isinstance(ridge, (int, float)) and (ridge < 0 or (type(ridge) is float and math.isnan(ridge))):
        raise ValueError(f"solve_qp: ridge must be >= 0, got {ridge}")
    if isinstance(tol, (int, float)) and not tol > 0:
        raise ValueError(f"solve_qp: tol must be > 0, got {tol}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"solve_qp: max_steps must be an int >= 1, got {max_steps!r}")
    xp = _array.lean(xp)
    K, c = _array.together(xp, gram, linear)
    shape = c.shape[:-1]
    if tol is None:
        tol = 1e-8 if xp.finfo(c.dtype).bits == 64 else 1e-4
    return (
        xp,
        K,
        c,
        as_limits(xp, constraint, c),
        float(ridge) if isinstance(ridge, (int, float)) else _array.read(field(xp, "ridge", ridge, c, shape)),
        float(tol) if isinstance(tol, (int, float)) else _array.read(field(xp, "tol", tol, c, shape)),
        None if start is None else xp.astype(start, c.dtype),
    )
