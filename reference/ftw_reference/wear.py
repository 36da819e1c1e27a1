r"""How close a target that comes back may be matched.

Each candidate's gradient is predicted from the others', by ridge regression on their cosines C_ij:

    h_i = 1 - (error of the prediction) = c_i' (C_o + 0.05 I)^-1 c_i / 1.05,    c_i: cosines of i to the others o
    R   = median_i h_i                 how much of a sample's gradient others share
    D   = clip(2 - 4 R, 0, 1)          doubt that a sample speaks for others
    r'  = r (1 + D u)                  the ridge after u matches of each target sample
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ridge", "shared"]

Array = Any


def shared(K: Array) -> float:
    """Return R of a Gram matrix K (s, s), one regression a candidate.

    Examples
    --------
    Candidates that have nothing in common, then three that point alike.

    >>> shared(np.eye(3))
    0.0
    >>> round(shared(np.ones((3, 3))), 3)
    0.929
    """
    s = K.shape[0]
    lengths = np.sqrt(np.where(np.diag(K) > 0.0, np.diag(K), 0.0))  # (s,)
    explained = []
    for i in range(s):
        others = [j for j in range(s) if j != i and lengths[j] > 0.0]
        if lengths[i] == 0.0 or not others:
            explained.append(0.0)
            continue
        c = np.clip(K[i, others] / lengths[i] / lengths[others], -1.0, 1.0)  # (o,)
        C = np.clip(K[np.ix_(others, others)] / np.outer(lengths[others], lengths[others]), -1.0, 1.0)  # (o, o)
        np.fill_diagonal(C, 1.05)
        explained.append(min(max(float(c @ np.linalg.solve(C, c)) / 1.05, 0.0), 1.0))
    return float(np.median(explained))


def ridge(base: float, uses: float, K: Array) -> float:
    """Return ``base (1 + D uses)``.

    Examples
    --------
    >>> ridge(0.05, 3.0, np.eye(4))
    0.2
    """
    return base * (1.0 + min(max(2.0 - 4.0 * shared(K), 0.0), 1.0) * uses)
