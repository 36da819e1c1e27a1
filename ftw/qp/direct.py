"""The short way for one small problem over ``w >= 0``, with or without a sum, in NumPy's memory.

The arithmetic of a problem of n = 16 takes ten microseconds, and the calls around it take hundreds. Here the block
exchange of ``active_set.py`` runs from all weights free with as few calls as it can. Nothing is decided here: what it
finds is held to the same certificate, and where anything is unusual (a zero diagonal, a NaN, a matrix without a
Cholesky factor, an exchange that cycles, a certificate above rounding) it returns None, and the whole solver starts.
"""

from __future__ import annotations

from typing import Any

from ftw.constraints import Limits

from .problem import Problem, certificate

__all__ = ["LARGEST", "direct"]

LARGEST = 64  # above, the calls no longer matter, and a first guess with few free weights saves more
EXCHANGES = 12
PATIENCE = 4  # exchanges without fewer wrong signs before giving up


def direct(
    np: Any, K: Any, c: Any, limits: Limits, ridge: float, tol: float, start: Any, max_steps: int
) -> tuple[Any, ...] | None:
    """Return the weights (n,), objective, kkt, gap and steps of a certified solution, or None.

    Parameters
    ----------
    np : namespace
        NumPy itself.
    K, c : arrays (n, n), (n,)
    limits : Limits
        Lower bounds of zero, no upper ones.
    ridge, tol : float
    start : array (n,) or None
        Its support is the first guess.
    """
    n = c.shape[0]
    eps = float(np.finfo(c.dtype).eps)
    total = None if limits.total is None else float(limits.total)
    d = K.diagonal() + ridge  # (n,)
    least, top = float(d.min()), float(d.max())
    if not (least > eps * top and top < 1e30 and least > 1e-30 and (total is None or 1e-30 < total < 1e30)):
        return None
    r = d**-0.5  # (n,)
    M = K * (0.5 * r)[:, None] * r
    M = M + M.T  # (n, n)
    if ridge:
        M.flat[:: n + 1] += ridge * r * r
    shifted = M.copy()
    shifted.flat[:: n + 1] += 2 * n * eps
    q = c * r  # (n,)
    size = float(abs(q).max())
    if not 0 < size < 1e30:
        return None
    try:
        np.linalg.cholesky(shifted)
        found = _exchange(np, M, shifted, q, r, total, start, eps, min(max_steps, EXCHANGES))
    except np.linalg.LinAlgError:
        return None
    if found is None:
        return None
    z, multiplier, steps = found
    p = Problem(M, shifted, q, Limits(limits.lower, None, total), r, r, 1.0, size)
    f, kkt, gap = certificate(np, p, z, multiplier)
    if not (kkt <= min(tol, 64 * n * eps) and gap <= 1e4 * eps):  # to rounding: the whole solver goes there too
        return None
    w = z * r
    if total is not None:
        w = w * (total / float(w.sum()))
    return w, f, kkt, gap, steps


def _exchange(
    np: Any, M: Any, shifted: Any, q: Any, normal: Any, total: float | None, start: Any, eps: float, most: int
) -> tuple[Any, float, int] | None:
    """Return z (n,), the multiplier of the sum and the systems solved, or None if the exchange does not end."""
    n = q.shape[0]
    sides = q[:, None] if total is None else np.stack([q, normal], axis=1)  # (n, 1 or 2)
    grain = 8 * eps
    grains = grain * abs(q)  # (n,): what rounding may do to a slope
    free = np.ones(n, dtype=bool) if start is None else start > 0  # (n,)
    fewest, patience, t = n + 1, PATIENCE, 0.0
    for steps in range(1, most + 1):
        (index,) = free.nonzero()  # (f,)
        z = np.zeros_like(q)
        if index.shape[0]:
            A = shifted[index[:, None], index]  # (f, f)
            x, t = _point(np, A, sides[index], total)
            z[index] = x
        elif total is not None:
            return None
        slope = M @ z - q  # (n,)
        noise = grains + grain * float(abs(z).sum())  # (n,)
        if total is not None:
            slope -= t * normal
            noise += grain * abs(t) * normal
        flips = np.where(free, z < 0, slope + noise < 0)  # (n,)
        wrong = int(np.count_nonzero(flips))
        if wrong == 0:
            return (*_corrected(np, A, z, t, slope, index, sides, total), steps) if index.shape[0] else (z, t, steps)
        patience = PATIENCE if wrong < fewest else patience - 1
        if patience == 0:
            return None
        fewest = min(fewest, wrong)
        free = free ^ flips
    return None


def _corrected(
    np: Any, A: Any, z: Any, t: float, slope: Any, index: Any, sides: Any, total: float | None
) -> tuple[Any, float]:
    """Return z (n,) and the multiplier after one correction: with it the shift of A moves no answer."""
    right = sides[index]  # (f, 1 or 2)
    right[:, 0] = -slope[index]
    left = None if total is None else total - float(sides[:, 1] @ z)
    move, by = _point(np, A, right, left)
    z[index] += move
    return z, t + by


def _point(np: Any, A: Any, sides: Any, total: float | None) -> tuple[Any, float]:
    """Solve ``A x - t normal = right, normal'x = total`` from the sides (f, 2), or ``A x = right`` from one (f, 1)."""
    both = np.linalg.solve(A, sides)  # (f, 1 or 2)
    x = both[:, 0]
    if total is None:
        return x, 0.0
    bend, normal = both[:, 1], sides[:, 1]
    t = (total - float(normal @ x)) / float(normal @ bend)
    return x + t * bend, t
