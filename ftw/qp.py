"""The weights: a small dense convex QP, solved to machine precision on every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array
from ._qp_active import begin, search
from ._qp_interior import interior
from ._qp_problem import Problem, certificate, product, scaled_problem
from .constraints import Constraint, Limits, as_limits, feasible, field, finite, project_scaled
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
    n = c.shape[-1]
    is_finite = xp.all(xp.isfinite(K), axis=(-2, -1)) & xp.all(xp.isfinite(c), axis=-1) & xp.isfinite(ridge)
    is_finite = is_finite & finite(xp, limits)
    is_feasible = feasible(xp, limits)
    good = is_finite & is_feasible  # (...)
    # a problem that cannot be solved is replaced by an empty one, so that no NaN reaches a loop
    one = good[..., None]
    K, c = xp.where(one[..., None], K, 0.0), xp.where(one, c, 0.0)
    total = None if limits.total is None else xp.where(good, limits.total, 0.0)
    limits = Limits(xp.where(one, limits.lower, 0.0), xp.where(one, limits.upper, 0.0), total)
    ridge = xp.where(good, ridge, 0.0)

    p = scaled_problem(xp, K, c, limits, ridge)
    psd = _is_psd(xp, p.M)  # (...)
    run = good & psd
    steps = xp.zeros_like(p.value, dtype=xp.int32)
    z, multiplier, steps, certified = _solve(xp, p, run, steps, start, tol, max_steps)
    w = xp.clip(z * p.scale, limits.lower, limits.upper)
    if total is not None:  # rounding in the sum goes to the weights that are free to take it
        loose = xp.where((w > limits.lower) & (w < limits.upper), w, 0.0)
        mass = xp.sum(loose, axis=-1)
        excess = (total - xp.sum(w, axis=-1)) / xp.where(mass > 0, mass, 1.0)
        w = xp.minimum(w + excess[..., None] * loose, limits.upper)
    f, kkt, gap = certified
    status = xp.where((kkt <= tol) & (gap <= tol), xp.zeros_like(steps), int(Status.MAX_STEPS))
    status = xp.where(psd, status, int(Status.NOT_PSD))
    status = xp.where(is_feasible, status, int(Status.INFEASIBLE))
    status = xp.where(is_finite, status, int(Status.NOT_FINITE))
    good = run
    return QPSolution(
        xp.where(good[..., None], w, xp.nan),
        xp.where(good, f * p.value, xp.nan),
        xp.where(good, kkt, xp.nan),
        xp.where(good, gap, xp.nan),
        steps,
        xp.astype(status, xp.int32),
    )


def _is_psd(xp: Any, M: Any) -> Any:
    """Tell whether the unit-diagonal M (..., n, n) has no eigenvalue below -sqrt(eps), by a Cholesky factorisation."""
    n = M.shape[-1]
    shift = float(xp.finfo(M.dtype).eps) ** 0.5
    return _array.is_positive(xp, M + shift * xp.eye(n, dtype=M.dtype, device=_array.device(M)))


def _solve(
    xp: Any, p: Problem, run: Any, steps: Any, start: Any, tol: Any, max_steps: int
) -> tuple[Any, Any, Any, tuple[Any, Any, Any]]:
    """Return z (..., n), the multiplier of the sum (...), the steps taken (...), and the certificate of z."""
    lower, upper, total = p.limits
    zero = xp.zeros_like(p.value)
    if start is not None:
        z = project_scaled(xp, xp.where(xp.isfinite(start), start, 0.0) / p.scale, p.limits, p.normal)
        free, above = (z > lower) & (z < upper), z >= upper
    elif total is None:
        z = xp.clip(xp.zeros_like(p.q), lower, upper)
        slope = product(xp, p.M, z) - p.q
        above = z >= upper
        free = ((z > lower) | (slope < 0)) & ((z < upper) | (slope > 0))
    else:
        z, free, above = _first(xp, p)
    guess = search(xp, p, begin(xp, p, z, zero, free, above, steps, run), max_steps)
    certified = certificate(xp, p, guess.z, guess.multiplier)

    # the exchange cycles: cross by the interior, and exchange again from there
    run = run & ~((guess.wrong == 0) & (certified[1] <= tol))
    path = interior(xp, p, guess.steps, run, max_steps, tol=1e-14 if xp.finfo(p.q.dtype).bits == 64 else 1e-6)
    free = (path.s > path.y) & (path.t > path.v)
    again = begin(xp, p, xp.where(run[..., None], path.z, guess.z), path.multiplier, free, path.t <= path.v, path.steps, run)
    again = search(xp, p, again, max_steps)
    z = xp.where(run[..., None], again.z, guess.z)
    multiplier = xp.where(run, again.multiplier, guess.multiplier)
    return z, multiplier, again.steps, certificate(xp, p, z, multiplier)


def _first(xp: Any, p: Problem) -> tuple[Any, Any, Any]:
    """Return a first point, and which of its weights are free and held above, for a set with a sum."""
    lower, upper, total = p.limits
    z = total[..., None] / (p.q.shape[-1] * p.normal)  # (..., n): equal weights
    slope = (product(xp, p.M, z) - p.q) / p.normal
    free = slope <= xp.mean(slope, axis=-1)[..., None]
    return xp.zeros_like(z), free, xp.zeros_like(free)


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
    dtype = xp.result_type(gram.dtype, linear.dtype)
    c = _array.widen(xp, xp.astype(linear, dtype))
    K = xp.astype(gram, c.dtype)
    shape = c.shape[:-1]
    if tol is None:
        tol = 1e-9 if xp.finfo(c.dtype).bits == 64 else 1e-5
    return (
        xp,
        K,
        c,
        as_limits(xp, constraint, c),
        field(xp, "ridge", ridge, c, shape),
        field(xp, "tol", tol, c, shape),
        None if start is None else xp.astype(start, c.dtype),
    )
