"""The guard: how far to trust a small target.

The same few target samples are matched at every step, and a sharp match memorises them: their own gradients shrink and
stop agreeing with each other. The guard watches for that and then moves g_T toward the mean gradient of the pool. In
the P metric, with m target samples g_Tj, their mean g_T, and the pool's mean g_P:

    v = (mean_j |g_Tj|^2 - |g_T|^2) / (m - 1)       variance of the target mean
    F = |g_T|^2 / v                                 at least 1 in expectation while the targets are fresh
    J = min(1, v / |g_T - g_P|^2)                   James-Stein's factor
    R = mean_i cos^2(g_i, g_T) / mean_{i != j} cos^2(g_i, g_j)      recognition, over the shortlist
    U = clip((0.1 - R) / 0.05, 0, 1)                the target is unknown to the pool
    a = max(J, U) * clip(slope * (1 - F), 0, cap)   zero while F >= 1
    b' = (1 - a) b + a * mean_j K_ij                scores of the shrunk target

J takes the spread of the target samples for the error of their mean. Once they are memorised that is too small: their
gradients shrink together, whatever the error. R asks the candidates instead: how parallel is the target to them, beside
how parallel they are to each other? Where it hardly is at all, what is left of the target is noise to everybody else
(``python -m ftw_conformance efficacy``, scenarios weak-20 and weak-40).
"""

from __future__ import annotations

from typing import Any

from . import _array

__all__ = ["recognition", "shrinkage", "signal"]

UNKNOWN, KNOWN = 0.05, 0.1  # recognition below which U is one, and above which it is zero


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
def recognition(scores: Any, gram: Any, target: Any) -> Any:
    """Return R, how well candidates know the target, in units of how well they know each other.

    Parameters
    ----------
    scores : array (s,)
        ``<g_i, P g_T>``.
    gram : array (s, s)
        ``<g_i, P g_j>``. Where a diagonal entry is not positive the candidate counts as orthogonal to everybody.
    target : float or 0-d array
        ``|g_T|^2`` in the P metric.

    Returns
    -------
    0-d array
        Infinite where the candidates are orthogonal to each other, or only one.
    """
    xp = _array.namespace(scores, gram, what="guard")
    s = scores.shape[0]
    target = _array.scalar_like(target, scores)
    squares = xp.linalg.diagonal(gram)  # (s,)
    there = squares > 0
    lengths = xp.sqrt(xp.where(there, squares, 1.0))  # (s,): cosines first, since squares of products could overflow
    goal = xp.sqrt(xp.where(target > 0, target, xp.ones_like(target)))
    to_target = xp.where(there, scores / lengths / goal, 0.0)  # (s,)
    others = xp.where(there[:, None] & there[None, :], gram / lengths[:, None] / lengths[None, :], 0.0)  # (s, s)
    others = others - others * xp.eye(s, dtype=others.dtype, device=_array.device(others))
    among = xp.sum(others * others) / max(s * (s - 1), 1)
    return xp.where(among > 0, xp.mean(to_target * to_target) / xp.where(among > 0, among, 1.0), xp.inf)


@_array.quiet
def shrinkage(
    target: Any,
    samples: Any,
    pool_distance: Any,
    m: int,
    *,
    cap: float = 0.3,
    slope: float = 2.0,
    recognition: Any = None,
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
    recognition : float or 0-d array, optional
        R; without it a = J * clip(slope * (1 - F), 0, cap).

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
    if _plain(target, samples, pool_distance, 0.0 if recognition is None else recognition):
        f, v = signal(target, samples, m)
        gate = min(max(slope * (1 - f), 0.0), cap)
        factor = min(1.0, v / pool_distance) if pool_distance > 0 else 1.0
        if recognition is not None:
            factor = max(factor, min(max((KNOWN - recognition) / (KNOWN - UNKNOWN), 0.0), 1.0))
        return (gate * factor if gate > 0 else 0.0), f
    given = [x for x in (target, samples, pool_distance, recognition) if x is not None]
    xp = _array.namespace(*given, what="guard")
    like = next(x for x in given if hasattr(x, "dtype"))
    target, samples, pool_distance = (
        xp.asarray(x, dtype=like.dtype, device=_array.device(like)) for x in (target, samples, pool_distance)
    )
    f, v = signal(target, samples, m)
    far = pool_distance > v
    james_stein = xp.where(far, v, xp.ones_like(v)) / xp.where(far, pool_distance, xp.ones_like(v))
    factor = james_stein
    if recognition is not None:
        unknown = (KNOWN - _array.scalar_like(recognition, factor)) / (KNOWN - UNKNOWN)
        factor = xp.maximum(factor, xp.clip(unknown, 0.0, 1.0))
    return factor * xp.clip(slope * (1 - f), 0.0, cap), f


def _plain(*values: Any) -> bool:
    return all(isinstance(x, (int, float)) for x in values)
