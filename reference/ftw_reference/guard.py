r"""How far to trust a small target.

The same few target samples are matched at every step, and in time the model memorises them: their mean gradient g_T
then points where only noise is left. The gradients g_T1 ... g_Tm of the target samples tell. In the metric P,

    v = (mean_j |g_Tj|^2 - |g_T|^2) / (m - 1)         the variance of their mean
    F = |g_T|^2 / v                                    at least 1, in expectation, for fresh targets

(the familiar ratio of an F test: signal over noise). While F >= 1 nothing happens. Below, the target may be memorised,
or it was only balanced by hand, so that its samples' gradients cancel more than those of a random draw. The s
candidates of the shortlist tell which, by their cosines c_i to g_T and C_ij to each other:

    E = c' (C + 0.05 I)^-1 c                           the share of |g_T|^2 that combinations of them explain
    T = mean_j |g_Tj|^2 / mean_i |g_i|^2               what is left to learn of the target samples
    D = max(u(E, 0.006 sqrt(s)), u(T, 0.01))           doubt, where u(x, c) = clip(2 - x / c, 0, 1)

If no combination comes near the target it is noise to everybody else; if its gradients are very short beside theirs it
has been learned by heart. Then g_T is pulled toward the mean gradient g_P of the whole pool:

    a = D * clip(4 (1 - F), 0, cap)                    cap 0.3; cap 0 turns the guard off
    g_T' = (1 - a) g_T + a g_P,    b' = (1 - a) b + a * mean_j K_ij.

Where nobody has formed a Gram matrix that one could ask, a = J * clip(2 (1 - F), 0, cap) with James and Stein's factor
J = min(1, v / |g_T - g_P|^2).

With one target sample there is no variance: a = 0, and a warning says so.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

__all__ = ["doubt", "shrinkage"]

Array = Any


def shrinkage(
    target: float,
    samples: float,
    pool_distance: float,
    m: int,
    *,
    cap: float = 0.3,
    slope: float = 2.0,
    doubt: float | None = None,
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
    doubt : float, optional
        D; unless told, James and Stein's factor.

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
    if doubt is None:
        doubt = min(1.0, variance / pool_distance) if pool_distance > 0.0 else 1.0
    return doubt * min(max(slope * (1.0 - ratio), 0.0), cap), ratio


def doubt(b: Array, K: Array, target: float, samples: float) -> float:
    """Return D of candidates with scores b (s,) and Gram matrix K (s, s); ``target`` and ``samples`` as above.

    A candidate without a length is orthogonal to everybody.

    Examples
    --------
    A target that is orthogonal to the candidates, then one that is not, then one whose samples are fitted.

    >>> import numpy as np
    >>> doubt(np.array([0.0, 0.0]), np.eye(2), 1.0, 9.0)
    1.0
    >>> doubt(np.array([0.5, 0.5]), np.eye(2), 1.0, 9.0)
    0.0
    >>> round(doubt(np.array([0.05, 0.05]), np.eye(2), 0.01, 0.015), 9)
    0.5
    """
    lengths = np.sqrt(np.where(np.diag(K) > 0.0, np.diag(K), 0.0))  # (s,)
    there = np.flatnonzero(lengths)
    if there.size == 0:
        return 1.0
    some = lengths[there]  # (r,)
    c = b[there] / some / (math.sqrt(target) if target > 0.0 else 1.0)  # (r,)
    C = np.clip(K[np.ix_(there, there)] / some[:, None] / some, -1.0, 1.0)  # (r, r)
    values, vectors = np.linalg.eigh(C)  # (r,), (r, r)
    explained = float(np.sum((vectors.T @ c) ** 2 / (values + 0.05)))
    left = samples / float(np.mean(lengths**2))
    return max(min(max(2.0 - x, 0.0), 1.0) for x in (explained / (0.006 * math.sqrt(b.shape[0])), left / 0.01))
