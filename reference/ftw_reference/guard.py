r"""How far to trust a small target.

The same few target samples are matched at every step, and in time the model memorises them: their mean gradient g_T
then points where only noise is left. The gradients g_T1 ... g_Tm of the target samples tell. In the metric P,

    v = (mean_j |g_Tj|^2 - |g_T|^2) / (m - 1)         the variance of their mean
    F = |g_T|^2 / v                                    at least 1, in expectation, for fresh targets

(the familiar ratio of an F test: signal over noise). While F >= 1 nothing happens. Below, g_T is pulled toward the mean
gradient g_P of the whole pool, as James and Stein would, but only as far as a gate is open:

    J = min(1, v / |g_T - g_P|^2)                      James-Stein
    a = J * clip(slope (1 - F), 0, cap)                slope 2, cap 0.3; cap 0 turns the guard off
    g_T' = (1 - a) g_T + a g_P,    b' = (1 - a) b + a * mean_j K_ij.

With one target sample there is no variance: a = 0, and a warning says so.
"""

from __future__ import annotations

import math
import warnings

__all__ = ["shrinkage"]


def shrinkage(
    target: float, samples: float, pool_distance: float, m: int, *, cap: float = 0.3, slope: float = 2.0
) -> tuple[float, float]:
    """Return the shrinkage a and the ratio F.

    Parameters
    ----------
    target : float
        ``|g_T|^2`` in the metric P.
    samples : float
        ``mean_j |g_Tj|^2``.
    pool_distance : float
        ``|g_T - g_P|^2``.
    m : int
        How many target samples there are.
    cap, slope : float
        The most shrinkage, and how fast the gate opens.

    Returns
    -------
    a : float
    F : float
        NaN with one target sample, infinite when the samples agree exactly.

    Examples
    --------
    >>> shrinkage(1.0, 9.0, 8.0, 5)
    (0.075, 0.5)
    """
    if cap < 0.0 or cap > 1.0:
        raise ValueError(f"cap is {cap}: give a number between 0 and 1")
    if m < 1:
        raise ValueError(f"m is {m}: the target needs at least one sample")
    if m == 1:
        if cap > 0.0:
            warnings.warn("the guard cannot act on one target sample: give two or more, or guard=0", stacklevel=2)
        return 0.0, math.nan
    variance = max(samples - target, 0.0) / (m - 1)
    if variance == 0.0:
        return 0.0, math.inf
    ratio = target / variance
    stein = min(1.0, variance / pool_distance) if pool_distance > 0.0 else 1.0
    return stein * min(max(slope * (1.0 - ratio), 0.0), cap), ratio
