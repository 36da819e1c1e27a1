r"""How far to trust a small target.

The same few target samples are matched at every step, and in time the model memorises them: their mean gradient g_T
then points where only noise is left. The gradients g_T1 ... g_Tm of the target samples tell. In the metric P,

    v = (mean_j |g_Tj|^2 - |g_T|^2) / (m - 1)         the variance of their mean
    F = |g_T|^2 / v                                    at least 1, in expectation, for fresh targets

(the familiar ratio of an F test: signal over noise). While F >= 1 nothing happens. Below, g_T is pulled toward the mean
gradient g_P of the whole pool, as James and Stein would, but only as far as a gate is open:

    J = min(1, v / |g_T - g_P|^2)                      James-Stein
    a = max(J, U) * clip(slope (1 - F), 0, cap)        slope 2, cap 0.3; cap 0 turns the guard off
    g_T' = (1 - a) g_T + a g_P,    b' = (1 - a) b + a * mean_j K_ij.

J rests on v, the spread of the target samples. Once they are memorised their gradients shrink together, v with them,
and J trusts a mean that is off by much more. So the candidates are asked as well: how parallel is the target to them,
compared with how parallel they are to each other?

    R = mean_i cos^2(g_i, g_T) / mean_(i != j) cos^2(g_i, g_j)         recognition, over the shortlist
    U = clip((0.1 - R) / 0.05, 0, 1)                                   one where the target is noise to the pool

With one target sample there is no variance: a = 0, and a warning says so.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

__all__ = ["recognition", "shrinkage"]

Array = Any


def shrinkage(
    target: float,
    samples: float,
    pool_distance: float,
    m: int,
    *,
    cap: float = 0.3,
    slope: float = 2.0,
    recognition: float = math.inf,
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
    recognition : float
        R; infinite, and so without a say, unless told.

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
    unknown = min(max((0.1 - recognition) / 0.05, 0.0), 1.0)
    return max(stein, unknown) * min(max(slope * (1.0 - ratio), 0.0), cap), ratio


def recognition(b: Array, K: Array, target: float) -> float:
    """Return R of candidates with scores b (s,) and Gram matrix K (s, s), for a target of squared length ``target``.

    A candidate without a length counts as orthogonal; R is infinite where all candidates are orthogonal to each other.

    Examples
    --------
    >>> import numpy as np
    >>> recognition(np.array([0.5, 0.5]), np.array([[1.0, 1.0], [1.0, 1.0]]), 1.0)
    0.25
    """
    s = b.shape[0]
    to_target, among = 0.0, 0.0
    for i in range(s):
        if K[i, i] <= 0.0:
            continue
        if target > 0.0:
            to_target += b[i] ** 2 / (K[i, i] * target)
        for j in range(s):
            if j != i and K[j, j] > 0.0:
                among += K[i, j] ** 2 / (K[i, i] * K[j, j])
    if among <= 0.0:
        return math.inf
    return float((to_target / s) / (among / (s * (s - 1))))
