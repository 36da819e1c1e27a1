"""The guard: how far to trust a small target.

The same few target samples are matched at every step, and a sharp match memorises them: their own gradients shrink and
stop agreeing with each other. The guard watches for that and then moves g_T toward the mean gradient of the pool. In
the P metric, with m target samples g_Tj, their mean g_T, and the pool's mean g_P:

    v = (mean_j |g_Tj|^2 - |g_T|^2) / (m - 1)       variance of the target mean
    F = |g_T|^2 / v                                 at least 1 in expectation while the targets are fresh

F alone is no proof: it is below one too for a target that was balanced by hand, whose gradients cancel more than those
of a random draw. So the s candidates of the shortlist are consulted as well, with their cosines c_i to g_T and C_ij to
each other:

    E = c' (C + 0.05 I)^-1 c                        share of |g_T|^2 that their combinations explain
    T = mean_j |g_Tj|^2 / mean_i |g_i|^2            what is left to learn of the targets, beside the candidates
    D = max(u(E, 0.006 sqrt(s)), u(T, 0.01))        doubt, with u(x, c) = clip(2 - x / c, 0, 1)
    a = D * clip(4 (1 - F), 0, cap)                 zero while F >= 1
    b' = (1 - a) b + a * mean_j K_ij                scores of the shrunk target

A target that no combination of candidates comes near is noise to everybody but itself; one whose gradients are a tenth
as long as the candidates' has been learned by heart. (E of a good target grows about as sqrt(s); hence the bound.)
Where the filter needs no Gram matrix, a = J * clip(2 (1 - F), 0, cap) with James and Stein's factor
J = min(1, v / |g_T - g_P|^2). It takes the spread of the target samples for the error of their mean, which is too small
once they are memorised, and it moves good targets as well (``python -m ftw_conformance efficacy``, the row
*James-Stein's factor*).
"""

from __future__ import annotations

from typing import Any

from . import _array

__all__ = ["doubt", "shrinkage", "signal"]

RIDGE = 0.05  # of the fit in E
SLOPE = 4.0  # how fast the gate opens where there is a doubt
EXPLAINED, LEFT = 0.006, 0.01  # E / sqrt(s) and T below which doubt is one; above twice as much it is zero


@_array.quiet
def signal(target: Any, samples: Any, m: int) -> tuple[Any, Any]:
    """Return ``(F, v)``: the squared length of the target mean over its variance, and that variance.

    Parameters are those of `shrinkage`. With m = 1 there is no variance: F is infinite.
    """
    if not isinstance(m, int) or m < 1:
        raise ValueError(f"guard: the number of target samples must be an int >= 1, got {m!r}")
    if _plain(target, samples):
        v = max(samples - target, 0.0) / (m - 1) if m > 1 else 0.0
        return (float("inf") if v <= 0 else target / v), v
    xp = _array.namespace(target, samples, what="guard")
    like = samples if hasattr(samples, "dtype") else target
    target, samples = (xp.asarray(x, dtype=like.dtype, device=_array.device(like)) for x in (target, samples))
    spread = samples - target
    v = xp.where(spread < 0, 0.0, spread) / max(m - 1, 1) * (1.0 if m > 1 else 0.0)
    none = v <= 0  # a NaN goes on
    f = xp.where(none, xp.inf, target) / xp.where(none, 1.0, v)
    return f, v


@_array.quiet
def doubt(scores: Any, gram: Any, target: Any, samples: Any) -> Any:
    """Return D in [0, 1]: one where the target is out of the candidates' reach, or learned by heart.

    Parameters
    ----------
    scores : array (s,)
        ``<g_i, P g_T>``.
    gram : array (s, s)
        ``<g_i, P g_j>``. Where a diagonal entry is not positive the candidate counts as orthogonal to everybody.
    target, samples : float or 0-d array
        ``|g_T|^2`` and ``mean_j |g_Tj|^2`` in the P metric.

    Returns
    -------
    0-d array
    """
    xp = _array.namespace(scores, gram, what="guard")
    s = scores.shape[0]
    device = _array.device(scores)
    target, samples = (xp.asarray(x, dtype=scores.dtype, device=device) for x in (target, samples))
    squares = xp.linalg.diagonal(gram)  # (s,)
    there = squares > 0
    lengths = xp.sqrt(xp.where(there, squares, 1.0))  # (s,): cosines first, since squares of products could overflow
    length = xp.sqrt(xp.where(target > 0, target, xp.ones_like(target)))
    c = xp.where(there, scores / lengths / length, 0.0)  # (s,)
    C = xp.where(there[:, None] & there[None, :], gram / lengths[:, None] / lengths[None, :], 0.0)  # (s, s)
    C = xp.clip(C, -1.0, 1.0) + RIDGE * xp.eye(s, dtype=C.dtype, device=device)
    explained = xp.sum(c * _array.solve_positive(xp, C, c[:, None])[:, 0])
    explained = xp.where(xp.isnan(explained), xp.inf, explained)  # an indefinite Gram matrix is the solver's to report
    long = xp.sum(xp.where(there, squares, 0.0) / s)
    left = xp.where(long > 0, samples / xp.where(long > 0, long, 1.0), xp.inf)
    doubts = [xp.clip(2 - x, 0.0, 1.0) for x in (explained / (EXPLAINED * s**0.5), left / LEFT)]
    return xp.maximum(*doubts)


@_array.quiet
def shrinkage(
    target: Any,
    samples: Any,
    pool_distance: Any,
    m: int,
    *,
    cap: float = 0.3,
    slope: float = 2.0,
    doubt: Any = None,
) -> tuple[Any, Any]:
    """Return ``(a, F)``: how far to shrink the target toward the pool's mean, and the ratio it was decided by.

    Parameters
    ----------
    target : float or 0-d array
        ``|g_T|^2`` in the P metric.
    samples : float or 0-d array
        ``mean_j |g_Tj|^2`` over the m target samples.
    pool_distance : float or 0-d array
        ``|g_T - g_P|^2``.
    m : int
        Number of target samples; with one, a = 0.
    cap : float
        Largest shrinkage, in [0, 1]; 0 turns the guard off.
    slope : float
        How fast it opens below F = 1.
    doubt : float or 0-d array, optional
        D; without it James and Stein's factor.

    Returns
    -------
    (float, float) or (0-d array, 0-d array)
        a in [0, cap], and F.

    Raises
    ------
    ValueError
        If ``cap`` is outside [0, 1], ``slope`` is negative, or m is not a positive int.
    """
    if not 0 <= cap <= 1:
        raise ValueError(f"guard: cap={cap} must lie in [0, 1]")
    if slope < 0:
        raise ValueError(f"guard: slope={slope} must not be negative")
    if _plain(target, samples, pool_distance, 0.0 if doubt is None else doubt):
        f, v = signal(target, samples, m)
        gate = min(max(slope * (1 - f), 0.0), cap)
        james_stein = min(1.0, v / pool_distance) if pool_distance > 0 else 1.0
        factor = james_stein if doubt is None else doubt
        return (gate * factor if gate > 0 else 0.0), f
    given = [x for x in (target, samples, pool_distance, doubt) if x is not None]
    xp = _array.namespace(*given, what="guard")
    like = next(x for x in given if hasattr(x, "dtype"))
    target, samples, pool_distance = (
        xp.asarray(x, dtype=like.dtype, device=_array.device(like)) for x in (target, samples, pool_distance)
    )
    f, v = signal(target, samples, m)
    far = pool_distance > v
    james_stein = xp.where(far, v, xp.ones_like(v)) / xp.where(far, pool_distance, xp.ones_like(v))
    factor = james_stein if doubt is None else _array.scalar_like(doubt, james_stein)
    return factor * xp.clip(slope * (1 - f), 0.0, cap), f


def _plain(*values: Any) -> bool:
    return all(isinstance(x, (int, float)) for x in values)
