"""The weights: a small dense convex QP, solved to machine precision on every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array
from ._qp_gradient import accelerated
from ._qp_problem import certificate, scaled_problem
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
    psd = xp.max(xp.abs(p.M), axis=(-2, -1)) <= 1 + n * float(xp.finfo(c.dtype).eps) ** 0.5  # (...)
    z = xp.zeros_like(c) if start is None else start / p.scale
    z = project_scaled(xp, z, p.limits, p.normal)
    z, steps = accelerated(xp, p, z, tol, max_steps)
    f, kkt, gap = certificate(xp, p, z)
    w = xp.clip(z * p.scale, limits.lower, limits.upper)
    if total is not None:
        w = project_scaled(xp, w, limits, xp.ones_like(w))
    status = xp.where(kkt <= 10 * tol, xp.zeros_like(steps), int(Status.MAX_STEPS))
    status = xp.where(psd, status, int(Status.NOT_PSD))
    status = xp.where(is_feasible, status, int(Status.INFEASIBLE))
    status = xp.where(is_finite, status, int(Status.NOT_FINITE))
    good = good & psd
    return QPSolution(
        xp.where(good[..., None], w, xp.nan),
        xp.where(good, f * p.value, xp.nan),
        xp.where(good, kkt, xp.nan),
        xp.where(good, gap, xp.nan),
        steps,
        xp.astype(status, xp.int32),
    )


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
