"""Scores from forward passes alone: what a short step along ``-P g_T`` takes off each candidate's loss.

    b_i = (loss_i(theta) - loss_i(theta - s P g_T)) / s = <g_i, P g_T> - s/2 <P g_T, H_i P g_T> + O(s^2)

The error is the curvature term at large s and the rounding of the losses at small s. Both are equal, up to the
curvature's constant, at the classic step of a one-sided difference: a relative change of sqrt(eps).
"""

from __future__ import annotations

from typing import Any

from . import _array
from ._array import Array

__all__ = ["forward_scores", "forward_step"]


@_array.quiet
def forward_scores(losses: Array, losses_after: Array, step: Any) -> Array:
    """Return the scores (n,) of candidates from their losses before and after a step of length s along ``-P g_T``.

    Parameters
    ----------
    losses, losses_after : array (n,)
        ``loss_i(theta)`` and ``loss_i(theta - s P g_T)``. 16-bit losses are widened to float32 before the difference.
    step : number or array ()
        s, positive.

    Returns
    -------
    array (n,)
        ``<g_i, P g_T>`` up to ``s/2 <P g_T, H_i P g_T>`` and the rounding of the losses divided by s.

    Raises
    ------
    ValueError
        If the shapes are not (n,), or differ.
    """
    xp = _array.namespace(losses, losses_after, what="forward_scores")
    if losses.ndim != 1 or tuple(losses.shape) != tuple(losses_after.shape):
        raise ValueError(
            f"forward_scores: losses {tuple(losses.shape)} and losses_after {tuple(losses_after.shape)} must be (n,), "
            "the same candidates in the same order"
        )
    wide = xp.float64 if losses.dtype == xp.float64 else xp.float32
    before, after = xp.astype(losses, wide), xp.astype(losses_after, wide)  # (n,), (n,)
    scores: Array = (before - after) / _array.scalar_like(step, before)
    return scores


@_array.quiet
def forward_step(target_losses: Array, decrease: Any, eps: float) -> Any:
    """Return the step s () that is to take ``sqrt(eps)`` of its size off the target loss, to first order.

    Parameters
    ----------
    target_losses : array (m,)
        Losses of the target samples.
    decrease : number or array ()
        ``<g_T, P g_T>``, what a step of length one takes off the target loss to first order.
    eps : float
        Relative rounding of the coarsest dtype that the losses went through.

    Returns
    -------
    array ()
        ``sqrt(eps) mean_j |loss_j| / <g_T, P g_T>``; one where that is not a positive number. The scores do not depend
        on the scale of the losses or of P.
    """
    xp = _array.namespace(target_losses, what="forward_step")
    wide = xp.float64 if target_losses.dtype == xp.float64 else xp.float32
    size = xp.mean(xp.abs(xp.astype(target_losses, wide)))  # ()
    slope = _array.scalar_like(decrease, size) * xp.ones_like(size)  # ()
    usable = (slope > 0) & (size > 0)
    step = eps**0.5 * size / xp.where(usable, slope, xp.ones_like(slope))
    return xp.where(usable & xp.isfinite(step), step, xp.ones_like(step))
