"""``solve_qp`` with the weights and the report of ``ftw_reference``, in a fraction of the time."""

from __future__ import annotations

from typing import Any

import numpy as np
from ftw_reference import QPSolution, Status
from ftw_reference.projections import bounds

from .kernels import solve, solve_batch

__all__ = ["solve_qp"]

Array = Any

_STATUS = tuple(Status)
_ZERO, _INFINITE = np.zeros(1), np.full(1, np.inf)  # (1,): bounds that are the same for all
_NONE = np.zeros(0)


def solve_qp(
    gram: Array,
    linear: Array,
    constraint: Any,
    *,
    ridge: float = 0.0,
    tol: float | None = None,
    max_steps: int = 0,
    start: Array | None = None,
    assume_psd: bool = False,
) -> QPSolution:
    """Minimise 1/2 w'(K + ridge I) w - c'w over a constraint set; one problem, or a batch.

    Parameters
    ----------
    gram : array (n, n) or (B, n, n)
        K, symmetric and positive semi-definite. C-contiguous float64 is read in place.
    linear : array (n,) or (B, n)
        c.
    constraint : a NamedTuple
        NonNegative(), Simplex(total), CappedSimplex(cap, total) or Box(lower, upper), the same for all problems.
    ridge : float
        Added to the diagonal as it is.
    tol : float, optional
        Ignored, so that the call can stand for other solvers: the method is exact.
    max_steps : int
        The most rounds; 0 stands for 200 + 20 n.
    start : array (n,) or (B, n), optional
        Weights of a similar problem: their support is the first guess.
    assume_psd : bool
        Skip the factorisation of K that looks for an indefinite matrix, for a K that is a Gram matrix by construction.
        It is about half of the time. NOT_PSD is then found only where it shows on the free coordinates.

    Returns
    -------
    QPSolution
        As from ``qp.solve_qp``; for a batch, each field is an array with a leading axis B.

    Examples
    --------
    >>> from ftw_reference import NonNegative
    >>> solve_qp([[1.0, 0.0], [0.0, 1.0]], [1.0, -1.0], NonNegative()).weights
    array([1., 0.])
    """
    if getattr(constraint, "_fields", ())[:1] == ("sources",):
        raise TypeError("ftw_compiled solves no SourceShares: ftw_reference.solve_qp and ftw.solve_qp do")
    K = np.ascontiguousarray(gram, dtype=np.float64)  # (n, n) or (B, n, n)
    c = np.ascontiguousarray(linear, dtype=np.float64)  # (n,) or (B, n)
    shape = K.shape
    if len(shape) not in (2, 3) or shape[-1] != shape[-2] or shape[-1] == 0 or c.shape != shape[:-1]:
        raise ValueError(
            f"gram has shape {shape} and linear {c.shape}: give (n, n) and (n,), or (B, n, n) and (B, n), n >= 1"
        )
    if ridge < 0:
        raise ValueError(f"ridge is {ridge}: give a number >= 0")
    if start is None:
        first = _NONE if len(shape) == 2 else _NONE.reshape(shape[0], 0)
    else:
        first = np.ascontiguousarray(start, dtype=np.float64)
        if first.shape != c.shape:
            raise ValueError(f"start has shape {first.shape} and linear {c.shape}: they must be the same")
    fields = getattr(constraint, "_fields", None)
    if fields == ("total",) and type(constraint.total) is float:  # the usual ones, without a detour
        lower, upper, total, has_total = _ZERO, _INFINITE, constraint.total, True
    elif fields == ():
        lower, upper, total, has_total = _ZERO, _INFINITE, 0.0, False
    else:
        lower, upper, total, has_total = bounds(constraint, shape[-1])
    if len(shape) == 2:
        w, f, kkt, gap, steps, code = solve(
            K, c, lower, upper, total, has_total, float(ridge), first, max_steps, assume_psd
        )
        return QPSolution(w, f, kkt, gap, steps, _STATUS[code])
    return QPSolution(*solve_batch(K, c, lower, upper, total, has_total, float(ridge), first, max_steps, assume_psd))
