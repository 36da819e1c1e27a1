"""How much arithmetic a step of a method takes, counted in FLOPs of matrix products.

A pass of one sample of t tokens through a matrix (d_out, d_in) is ``2 t d_out d_in``. To train on a sample takes three:
forward, backward to the activations, weight gradient (two where the matrix is frozen). A score takes as much as a
weight gradient. The Gram matrix of s samples takes ``min((2 s t + s^2) d_out d_in, s^2 t^2 (d_out + d_in))``, half of
a symmetric product counted. The filter and the weights, which work on s numbers a sample, are left out, and so is the
optimizer's update, which all methods share. A target sample that a method trains on takes three passes.
"""

from __future__ import annotations

from .baselines import Passes
from .learner import Task

__all__ = ["flops", "one_sample"]


def flops(task: Task, passes: Passes) -> float:
    """Return the FLOPs of one step."""
    trained = task.size if passes.trained is None else round(passes.trained * task.keep)
    after = 3 - (min(passes.pool, 2) if passes.reused else 0)  # passes still to be done for those chosen
    taught = task.targets if passes.taught is None else min(round(passes.taught * task.keep), task.targets)
    total = 0.0
    for t, d_in, d_out, learns in task.layers():
        matrix, most = d_in * d_out, 3 if learns else 2
        count = min(passes.pool, most) * task.size + min(passes.target, most) * task.targets + most * taught
        total += 2 * t * matrix * (count + (after if learns else after - 1) * trained)
        s = round(passes.gram * task.size) if learns else 0
        total += min((2 * s * t + s * s) * matrix, s * s * t * t * (d_in + d_out))
    return total


def one_sample(task: Task) -> float:
    """Return the FLOPs of training on one sample: the unit of a budget."""
    return sum(2 * t * d_in * d_out * (3 if learns else 2) for t, d_in, d_out, learns in task.layers())
