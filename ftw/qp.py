"""The weights: a small dense convex QP, solved to machine precision on every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array, _loops
from ._qp_active import Guess, begin, search
from ._qp_interior import interior, rounded
from ._qp_problem import Problem, certificate, keep, product, scaled_problem
from .constraints import Constraint, Limits, as_limits, clip, feasible, field, finite, project_scaled
from .status import Status

__all__ = ["QPSolution", "solve_qp"]


class QPSolution(NamedTuple):
    """What ``solve_qp`` reached; ``(...)`` are the leading axes of the problems.

    Attributes
    ----------
    weights
        (..., n), feasible; NaN where the status is NOT_FINITE, INFEASIBLE or NOT_PSD.
    objective
        (...), ``1/2 w'(K + ridge I)w - linear'w``.
    kkt
        (...), the natural residual.
    gap
        (...), the duality gap over the objective's own size.
    steps
        (...), int32.
    status
        (...), int32, a `Status`.
    """

    weights: Any
    objective: Any
    kkt: Any
    gap: Any
    steps: Any
    status: Any


def solve_qp(
    gram: Any,
    linear: Any,
    constraint: Constraint,
    *,
    ridge: Any = 0.0,
    tol: Any = None,
    max_steps: int = 10000,
    start: Any = None,
) -> QPSolution:
    """Minimise ``1/2 w'(gram + ridge I)w - linear'w`` over a constraint set."""
    xp, K, c, limits, ridge, tol, start = _checked(gram, linear, constraint, ridge, tol, max_steps, start)
    is_finite = xp.all(xp.isfinite(K), axis=(-2, -1)) & xp.all(xp.isfinite(c), axis=-1) & xp.isfinite(ridge)
    is_finite = is_finite & finite(xp, limits)
    is_feasible = feasible(xp, limits)
    good = is_finite & is_feasible  # (...)
    if _array.known(xp.all(good)) is not True:
        # a problem that cannot be solved is replaced by an empty one, so that no NaN reaches a loop
        one = good[..., None]
        K, c, ridge = xp.where(one[..., None], K, 0.0), xp.where(one, c, 0.0), xp.where(good, ridge, 0.0)
        limits = Limits(
            xp.where(one, limits.lower, 0.0),
            None if limits.upper is None else xp.where(one, limits.upper, 0.0),
            None if limits.total is None else xp.where(good, limits.total, 0.0),
        )
    p = scaled_problem(xp, K, c, limits, ridge)
    psd = _is_psd(xp, p.M)  # (...)
    run = good & psd
    steps = xp.zeros_like(p.value, dtype=xp.int32)
    z, steps, certified = _solve(xp, p, run, steps, start, tol, max_steps)
    w = _repaired(xp, z * p.scale, limits)
    f, kkt, gap = certified
    status = xp.where((kkt <= tol) & (gap <= tol), xp.zeros_like(steps), int(Status.MAX_STEPS))
    status = xp.where(psd, status, int(Status.NOT_PSD))
    status = xp.where(is_feasible, status, int(Status.INFEASIBLE))
    status = xp.where(is_finite, status, int(Status.NOT_FINITE))
    return QPSolution(
        xp.where(run[..., None], w, xp.nan),
        xp.where(run, f * p.value, xp.nan),
        xp.where(run, kkt, xp.nan),
        xp.where(run, gap, xp.nan),
        steps,
        xp.astype(status, xp.int32),
    )


def _is_psd(xp: Any, M: Any) -> Any:
    """Tell whether the unit-diagonal M (..., n, n) has no eigenvalue below -sqrt(eps), by a Cholesky factorisation."""
    n = M.shape[-1]
    shift = float(xp.finfo(M.dtype).eps) ** 0.5
    return _array.is_positive(xp, M + shift * xp.eye(n, dtype=M.dtype, device=_array.device(M)))


def _repaired(xp: Any, w: Any, limits: Limits) -> Any:
    """Return w (..., n) within its bounds, with its sum exact to rounding: the weights that are free to take it share the rest."""
    w = clip(xp, w, limits)
    if limits.total is None:
        return w
    loose = w if limits.upper is None else xp.where(w < limits.upper, w, 0.0)
    mass = xp.sum(loose, axis=-1)
    excess = (limits.total - xp.sum(w, axis=-1)) / xp.where(mass > 0, mass, 1.0)
    return clip(xp, w + excess[..., None] * loose, limits)


def _solve(
    xp: Any, p: Problem, run: Any, steps: Any, start: Any, tol: Any, max_steps: int
) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    """Return z (..., n), the steps taken (...), and the certificate of z: objective, residual, gap (...)."""
    guess = search(xp, p, _first(xp, p, run, steps, start), max_steps)
    certified = certificate(xp, p, guess.z, guess.multiplier)
    found = (guess.z, guess.steps, certified)
    run = run & ~((certified[1] <= tol) & (certified[2] <= tol))

    def cross(found: tuple[Any, ...], run: Any) -> tuple[Any, ...]:
        """The exchange cycles: cross by the interior, and exchange again from there."""
        z, steps, certified = found
        path = interior(xp, p, steps, run, max_steps, 1e-14 if xp.finfo(p.q.dtype).bits == 64 else 1e-6)
        crossed, free, above = rounded(xp, p, path)
        second = certificate(xp, p, crossed, path.multiplier)
        again = begin(xp, p, crossed, path.multiplier, free, above, path.steps, run)
        again = search(xp, p, again, max_steps)
        third = certificate(xp, p, again.z, again.multiplier)
        for point, proof in ((crossed, second), (again.z, third)):
            better = run & (xp.maximum(proof[1], proof[2]) < xp.maximum(certified[1], certified[2]))
            z, *certified = keep(xp, better, (point, *proof), (z, *certified))
        return z, again.steps, tuple(certified)

    def stay(found: tuple[Any, ...], run: Any) -> tuple[Any, ...]:
        return found

    z, steps, certified = _loops.cond(xp.any(run), cross, stay, found, run)
    return z, steps, certified


def _first(xp: Any, p: Problem, run: Any, steps: Any, start: Any) -> Guess:
    """Return the first guess: of the weights given, or of what a step from the middle of the set would free."""
    lower, upper, total = p.limits
    zero = xp.zeros_like(p.value)
    if start is not None:
        z = project_scaled(xp, xp.where(xp.isfinite(start), start, 0.0) / p.scale, p.limits, p.normal)
    elif total is None:
        z = clip(xp, xp.zeros_like(p.q), p.limits)
    else:
        z = total[..., None] / (p.q.shape[-1] * p.normal)  # (..., n): equal weights
        slope = (product(xp, p.M, z) - p.q) / p.normal
        free = slope <= xp.mean(slope, axis=-1)[..., None]
        return begin(xp, p, xp.zeros_like(z), zero, free, free & ~free, steps, run)
    free = z > lower
    above = free & ~free if upper is None else z >= upper
    free = free if upper is None else free & ~above
    if start is None:
        slope = product(xp, p.M, z) - p.q
        free = free | xp.where(above, slope > 0, slope < 0)
    return begin(xp, p, z, zero, free, above & ~free, steps, run)


def _checked(
    gram: Any, linear: Any, constraint: Any, ridge: Any, tol: Any, max_steps: Any, start: Any
) -> tuple[Any, Any, Any, Limits, Any, Any, Any]:
    fields = tuple(constraint) if isinstance(constraint, tuple) else ()
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
    if isinstance(ridge, (int, float)) and not ridge >= 0:
        raise ValueError(f"solve_qp: ridge must be >= 0, got {ridge}")
    if isinstance(tol, (int, float)) and not tol > 0:
        raise ValueError(f"solve_qp: tol must be > 0, got {tol}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"solve_qp: max_steps must be an int >= 1, got {max_steps!r}")
    xp = _array.lean(xp)
    dtype = xp.result_type(gram.dtype, linear.dtype)
    c = _array.widen(xp, xp.astype(linear, dtype))
    K = xp.astype(gram, c.dtype)
    shape = c.shape[:-1]
    if tol is None:
        tol = 1e-8 if xp.finfo(c.dtype).bits == 64 else 1e-4
    return (
        xp,
        K,
        c,
        as_limits(xp, constraint, c),
        field(xp, "ridge", ridge, c, shape),
        field(xp, "tol", tol, c, shape),
        None if start is None else xp.astype(start, c.dtype),
    )
