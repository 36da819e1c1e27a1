r"""Scores without a single per-sample gradient: take the step, look at the losses.

The score b_i = <g_i, P g_T> is what the target's own update takes off the loss of sample i, to first order. So take a
short step s along it and look:

    loss_i(theta - s P g_T) = loss_i(theta) - s b_i + s^2/2 <P g_T, H_i P g_T> - ...

    (loss_i(theta) - loss_i(theta - s P g_T)) / s = b_i - s/2 <P g_T, H_i P g_T> + O(s^2)

Two forward passes of the pool, and nothing is known of any layer.

**How long a step.** A long one measures the curvature H_i as well. After a short one the losses agree in nearly all
their digits: a loss of size L is known to eps L, the score to eps L / s. The errors s c / 2 and eps L / s are smallest
together at s = sqrt(2 eps L / c). The curvature c is not known; but if the target's loss would take a step of one to
fall by most of itself, c is about <g_T, P g_T>^2 / L, and s is, up to a factor near one,

    s = sqrt(eps) L / <g_T, P g_T>:         the step that takes the share sqrt(eps) off the target's loss.

In this form it does not depend on the scale of the losses, nor on that of P.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["forward_scores", "forward_step"]

Array = Any


def forward_scores(losses: Array, losses_after: Array, step: float) -> Array:
    """Return the difference quotient of every sample's loss.

    Parameters
    ----------
    losses, losses_after : array (n,)
        loss_i(theta) and loss_i(theta - s P g_T).
    step : float
        s.

    Returns
    -------
    array (n,)
        The scores, up to the curvature term.

    Examples
    --------
    >>> forward_scores([3.0, 2.0], [2.5, 2.0], 0.5)
    array([1., 0.])
    """
    before, after = np.asarray(losses, dtype=np.float64), np.asarray(losses_after, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"losses {before.shape} and losses_after {after.shape} must both be (n,)")
    out = np.zeros(len(before))
    for i in range(len(before)):
        out[i] = (before[i] - after[i]) / step
    return out


def forward_step(target_losses: Array, decrease: float, eps: float) -> float:
    """Return s = sqrt(eps) L / <g_T, P g_T>, L the mean size of the target's losses; one where there is no such step.

    Parameters
    ----------
    target_losses : array (m,)
        Losses of the target samples.
    decrease : float
        <g_T, P g_T>.
    eps : float
        Relative rounding of the losses.

    Examples
    --------
    >>> forward_step([1.0, 3.0], 0.5, 1e-8)
    0.0004
    """
    size = 0.0
    for loss in np.asarray(target_losses, dtype=np.float64):
        size += abs(float(loss)) / len(target_losses)
    if not (size > 0 and decrease > 0):
        return 1.0
    step = math.sqrt(eps) * size / float(decrease)
    return step if math.isfinite(step) else 1.0
