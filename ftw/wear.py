"""Wear: how close a target that comes back may be matched.

A close match to a fresh target is right: its gradient is an unbiased estimate. Once its samples have been matched u
times, what their gradients still ask for is more and more what these samples alone have; a close match teaches that.
How much a sample has of its own shows in the candidates. With the cosines C of the s on the shortlist,

    A   = (C + r I)^-1,  r = 0.05
    h_i = 1 - 1 / ((1 + r) A_ii)          share of g_i that the other candidates explain, leaving i out
    R   = median_i h_i                     (copies, unless they are most of the shortlist, do not move it)
    D   = clip(2 - 4 R, 0, 1)              one where less than a quarter is shared, zero where more than half is
    ridge' = ridge * (1 + D u)             the ridge counts once more for each time that the target was matched

A larger ridge spreads the weights and moves the choice toward the best scores. Where samples share most of their
gradients, as images of ten classes do, even a few targets speak for others and the ridge stays.
"""

from __future__ import annotations

from typing import Any

from . import _array

__all__ = ["check_uses", "ridge", "shared"]

RIDGE = 0.05  # of the fit in h


@_array.quiet
def shared(gram: Any) -> Any:
    """Return R in [0, 1]: the share of a candidate's gradient that the others explain, at the median.

    Parameters
    ----------
    gram : array (s, s)
        ``<g_i, P g_j>``, finite. A candidate without a length shares nothing.

    Returns
    -------
    0-d array
        Costs an inverse of an (s, s) matrix.
    """
    xp, s = _array.namespace(gram, what="wear"), gram.shape[0]
    squares = xp.linalg.diagonal(gram)  # (s,)
    there = squares > 0
    lengths = xp.sqrt(xp.where(there, squares, 1.0))  # (s,)
    one = xp.eye(s, dtype=gram.dtype, device=_array.device(gram))  # (s, s)
    C = xp.where(there[:, None] & there[None, :], gram / lengths[:, None] / lengths[None, :], 0.0)  # (s, s)
    C = xp.where(one > 0, 1.0, xp.clip(C, -1.0, 1.0))
    A = xp.linalg.diagonal(_array.solve_positive(xp, C + RIDGE * one, one))  # (s,)
    explained = xp.clip(1 - 1 / ((1 + RIDGE) * A), 0.0, 1.0)  # (s,); a NaN of an indefinite Gram matrix goes on
    ordered = xp.sort(xp.where(xp.isnan(explained), 1.0, explained))  # the solver is to report it: no larger ridge
    return (ordered[(s - 1) // 2] + ordered[s // 2]) / 2


@_array.quiet
def ridge(base: Any, uses: Any, gram: Any) -> Any:
    """Return the ridge for a target whose samples have been matched ``uses`` times, in the mean.

    Parameters
    ----------
    base : float or 0-d array
        The ridge for a fresh target.
    uses : float or 0-d array
        How often each target sample was matched before, averaged over them; >= 0.
    gram : array (s, s)
        ``<g_i, P g_j>`` of the shortlist.

    Returns
    -------
    0-d array
        ``base * (1 + D uses)``.
    """
    common = shared(gram)
    base, uses = (_array.scalar_like(x, common) for x in (base, uses))
    return base * (1 + _clip(2 - 4 * common) * uses)


def check_uses(uses: Any) -> None:
    """Raise unless the uses are a finite number >= 0, or an array of no dimensions."""
    if isinstance(uses, (int, float)) and not isinstance(uses, bool):
        if not 0 <= uses < float("inf"):
            raise ValueError(f"filter_then_weight: uses={uses} must be finite and not negative")
    elif getattr(uses, "ndim", None) != 0:
        raise TypeError(f"filter_then_weight: uses must be a number or a 0-d array, got {type(uses).__name__}")


def _clip(x: Any) -> Any:
    return _array.namespace(x, what="wear").clip(x, 0.0, 1.0)
