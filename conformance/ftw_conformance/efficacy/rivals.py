r"""What selection has to beat for the same compute: the target in the update, losses in the place of gradients.

==============  ========================================================================================================
rand+T, 1/3     k random candidates and k/2 target samples, whose share of the gradient is a third
rand+T, 1/2     k of each, and half of the gradient
target alone    k target samples
whole + T       all N candidates and all V target samples, a third of the gradient the target's
small loss      k candidates of the smallest loss: labels that are likely to be true (Han et al. 2018, co-teaching)
forward top-k   the k largest ``l_i(theta) - l_i(theta - P g_T)``, two forward passes and no gradient of a candidate
==============  ========================================================================================================
"""

from __future__ import annotations

import numpy as np

from .baselines import LESS, METHOD, NO_GUARD, ORACLE, RANDOM, WHOLE, Choice, Method, Passes, equal, highest
from .learner import Array
from .step import Step

__all__ = ["BUDGETED", "FORWARD", "RAND_T", "RIVALS", "WHOLE_T"]

RAND_T, HALF_T, ALONE, WHOLE_T = "rand+T, 1/3", "rand+T, 1/2", "target alone", "whole + T"
SMALL, FORWARD = "small loss", "forward top-k"


def with_target(indices: Array, count: int, share: float) -> Choice:
    """Return a choice whose update has ``share`` of the mean gradient of ``count`` target samples."""
    return equal(indices)._replace(share=share, taught=count)


def mixed(step: Step, random: int, count: int, share: float) -> Choice:
    """Return random candidates, and target samples to train on beside them."""
    count = max(1, min(count, step.task.targets))
    return with_target(step.rng.permutation(step.size)[: max(1, random)], count, share)


def forward(step: Step) -> Choice:
    """Return the candidates whose loss a step along the target's gradient lowers most."""
    before = step.losses
    change = {name: op.apply(step.target[name]) for name, op in step.geometry.items()}
    kept = {name: p.copy() for name, p in step.model.params.items()}
    try:
        for name, p in step.model.params.items():
            p -= change[name]
        after = step.model.losses(step.batches.pool)
    finally:
        for name, p in step.model.params.items():
            p[...] = kept[name]
    return highest(before - after, step.keep)


RIVALS: dict[str, Method] = {
    RAND_T: Method(lambda s: mixed(s, s.keep, s.keep // 2, 1 / 3), Passes(taught=0.5)),
    HALF_T: Method(lambda s: mixed(s, s.keep, s.keep, 1 / 2), Passes(taught=1.0)),
    ALONE: Method(lambda s: mixed(s, 1, s.keep, 1.0), Passes(trained=0.0, taught=1.0)),
    WHOLE_T: Method(lambda s: with_target(np.arange(s.size), s.task.targets, 1 / 3), Passes(trained=None, taught=None)),
    SMALL: Method(lambda s: highest(-s.losses, s.keep), Passes(1)),
    FORWARD: Method(forward, Passes(2, 3, reused=False)),
}
BUDGETED = (RANDOM, *RIVALS, WHOLE, LESS, METHOD, NO_GUARD, "ridge by use", ORACLE)  # what is compared at equal compute
