"""The guard: how far to trust a small target.

The same few target samples are matched at every step, and a sharp match memorises them: their own gradients shrink and
stop agreeing with each other. The guard watches for that and then moves g_T toward the mean gradient of the pool. In
the P metric, with m target samples g_Tj, their mean g_T, and the pool's mean g_P:

    v = (mean_j |g_Tj|^2 - |g_T|^2) / (m - 1)       variance of the target mean
    F = |g_T|^2 / v                                 at least 1 in expectation while the targets are fresh
    J = min(1, v / |g_T - g_P|^2)                   James-Stein's factor
    a = J * clip(slope * (1 - F), 0, cap)           zero while F >= 1
    b' = (1 - a) b + a * mean_j K_ij                scores of the shrunk target
"""

from __future__ import annotations

from typing import Any

from . import _array

__all__ = ["shrinkage", "signal"]


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
def shrinkage(
    target: Any, samples: Any, pool_distance: Any, m: int, *, cap: float = 0.3, slope: float = 2.0
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
    if _plain(target, samples, pool_distance):
        f, v = signal(target, samples, m)
        gate = min(max(slope * (1 - f), 0.0), cap)
        return (gate * (min(1.0, v / pool_distance) if pool_distance > 0 else 1.0) if gate > 0 else 0.0), f
    xp = _array.namespace(target, samples, pool_distance, what="guard")
    like = next(x for x in (target, samples, pool_distance) if hasattr(x, "dtype"))
    target, samples, pool_distance = (
        xp.asarray(x, dtype=like.dtype, device=_array.device(like)) for x in (target, samples, pool_distance)
    )
    f, v = signal(target, samples, m)
    far = pool_distance > v
    james_stein = xp.where(far, v, xp.ones_like(v)) / xp.where(far, pool_distance, xp.ones_like(v))
    return james_stein * xp.clip(slope * (1 - f), 0.0, cap), f


def _plain(*values: Any) -> bool:
    return all(isinstance(x, (int, float)) for x in values)
