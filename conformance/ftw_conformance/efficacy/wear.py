"""Ridge by use: a ridge that grows with how often the target samples were matched; the ablation of that name.

A close match to a fresh target is right: its gradient is an unbiased estimate. After u matches of the same samples,
more and more of what is left of their gradients belongs to these samples alone. How much belongs to one alone shows in
the candidates. With the cosines C of the s on the shortlist,

    A   = (C + r I)^-1,  r = 0.05
    h_i = 1 - 1 / ((1 + r) A_ii)          share of g_i that the other candidates explain
    ridge' = ridge * (1 + u clip(2 - 4 median_i h_i, 0, 1))
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from .learner import Array

__all__ = ["Uses", "ridge", "shared"]

RIDGE = 0.05  # of the fit in h


class Uses:
    """Counts how often each sample was matched over a run."""

    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}

    def note(self, keys: Sequence[Hashable]) -> float:
        """Return how often these samples were matched before, in the mean, and count them once more."""
        before = [self._counts.get(key, 0) for key in keys]
        for key, count in zip(keys, before, strict=True):
            self._counts[key] = count + 1
        return sum(before) / len(before) if before else 0.0


def shared(gram: Array) -> float:
    """Return the median share, in [0, 1], of a candidate's gradient that the others explain.

    Parameters
    ----------
    gram : array (s, s)
        ``<g_i, P g_j>``, positive diagonal.
    """
    G = np.asarray(gram, dtype=np.float64)  # (s, s)
    lengths = np.sqrt(np.diagonal(G))  # (s,)
    C = G / lengths[:, None] / lengths[None, :]  # (s, s)
    A = np.diagonal(np.linalg.inv(C + RIDGE * np.eye(len(C))))  # (s,)
    return float(np.median(np.clip(1 - 1 / ((1 + RIDGE) * A), 0.0, 1.0)))


def ridge(base: float, uses: float, gram: Array) -> float:
    """Return the ridge for a target whose samples were matched ``uses`` times, in the mean."""
    return base * (1 + min(max(2 - 4 * shared(gram), 0.0), 1.0) * uses)
