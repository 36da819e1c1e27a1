"""What each part of the default method brings: the method with one part exchanged.

=====================  =================================================================================================
identity geometry      P = I
raw second moment      P at the optimizer's own v, nothing anticipated, no damping
no damping             the target's gradient anticipated, but no damping
pool anticipated       the pool's mean gradient anticipated in the place of the target's
top-k filter           the k best by b, then the QP's weights
uniform weights        matching filter, each counts 1/k
top-k and uniform      neither (the LESS-like baseline)
capped weights         no weight above 2/k
all on the Gram        no shortlist
shortlist of N/4       half as long as the default's
without guard          guard 0
ridge by use           a ridge that grows with how often the target samples were matched (`wear`)
ridge of 8             ridge 8, close to top-k with weights
James-Stein's factor   J in the place of the guard's doubt (with the pool's exact mean)
reach alone            doubt by E alone: the target is out of the candidates' reach (likewise)
length alone           doubt by T alone: the target's gradients are short (likewise)
exact route            no shortlist, the pool's mean anticipated, and for the guard the pool's mean without sampling
=====================  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import ftw
from ftw import guard
from ftw.inner_products import squared_norms

from .baselines import BASELINES, METHOD, NO_GUARD, Choice, Method, Passes, matched
from .learner import Array
from .rivals import RIVALS
from .step import DAMPING, Step
from .wear import ridge

__all__ = ["ABLATIONS", "METHODS"]

USUAL: dict[str, Any] = {"guard": 0.3, "shortlist": 0.5}
PASSES = BASELINES[METHOD].passes


def _pool(step: Step) -> dict[str, ftw.geometry.Operator]:
    return step.optimizer.geometry(step.pool_mean, DAMPING)


def _capped(step: Step) -> Choice:
    return matched(step, constraint=ftw.CappedSimplex(2 / step.keep), **USUAL)


def _worn(step: Step) -> Choice:
    b = ftw.scores(step.candidates, step.target, step.geometry)  # (N,)
    short = np.argsort(-b, kind="stable")[: step.size // 2]  # (s,)
    gram = ftw.gram(ftw.take(step.candidates, short), step.geometry)  # (s, s)
    return matched(step, ridge=ridge(0.05, step.uses, gram), **USUAL)


def _guarded(step: Step, judge: str) -> Choice:
    """Return the choice for a target that was shrunk beforehand, as far as one of the guard's judges says."""
    P, goal, pool = step.geometry, step.target, step.pool_mean

    def square(g: Mapping[str, Array]) -> float:
        return float(sum(P[name].inner(g[name], g[name]) for name in g))

    length, spread = square(goal), float(np.mean(squared_norms(step.target_samples, P)))
    b = ftw.scores(step.candidates, goal, P)  # (N,)
    short = np.sort(np.argsort(-b, kind="stable")[: step.size // 2])  # (s,)
    doubt = None
    if judge == "reach":
        gram = ftw.gram(ftw.take(step.candidates, short), P)  # (s, s)
        doubt = float(guard.doubt(b[short], gram, length, np.inf))
    elif judge == "length":
        theirs = float(np.mean(squared_norms(ftw.take(step.candidates, short), P)))
        doubt = float(np.clip(2 - spread / theirs / guard.LEFT, 0, 1))
    distance = square({name: goal[name] - pool[name] for name in goal})
    slope = 2.0 if doubt is None else guard.SLOPE
    a, ratio = guard.shrinkage(length, spread, distance, step.task.targets, slope=slope, doubt=doubt)
    mixed = {name: (1 - a) * goal[name] + a * pool[name] for name in goal}
    chosen = matched(step, target=mixed, shortlist=0.5)
    return chosen._replace(shrinkage=a, signal=ratio)


ABLATIONS: dict[str, Method] = {
    "identity geometry": Method(lambda s: matched(s, s.identity, **USUAL), PASSES),
    "raw second moment": Method(lambda s: matched(s, s.optimizer.geometry(None, 0.0), **USUAL), PASSES),
    "no damping": Method(lambda s: matched(s, s.optimizer.geometry(s.target, 0.0), **USUAL), PASSES),
    "pool anticipated": Method(lambda s: matched(s, _pool(s), **USUAL), Passes(3, 3, 0.5)),
    "top-k filter": Method(lambda s: matched(s, filter="top_k", **USUAL), PASSES),
    "uniform weights": Method(lambda s: matched(s, weight="uniform", **USUAL), PASSES),
    "top-k and uniform": Method(lambda s: matched(s, filter="top_k", weight="uniform"), Passes(3, 3)),
    "capped weights": Method(_capped, PASSES),
    "all on the Gram": Method(lambda s: matched(s, guard=0.3), Passes(3, 3, 1.0)),
    "shortlist of N/4": Method(lambda s: matched(s, guard=0.3, shortlist=0.25), Passes(3, 3, 0.25)),
    NO_GUARD: BASELINES[NO_GUARD],
    "ridge by use": Method(_worn, PASSES),
    "ridge of 8": Method(lambda s: matched(s, ridge=8.0, **USUAL), PASSES),
    "James-Stein's factor": Method(lambda s: _guarded(s, "James-Stein"), PASSES),
    "reach alone": Method(lambda s: _guarded(s, "reach"), PASSES),
    "length alone": Method(lambda s: _guarded(s, "length"), PASSES),
    "exact route": Method(lambda s: matched(s, _pool(s), guard=0.3), Passes(3, 3, 1.0)),
}
METHODS: dict[str, Method] = {**BASELINES, **RIVALS, **ABLATIONS}
