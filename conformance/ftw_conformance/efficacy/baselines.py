r"""The methods side by side, each a few lines over the core.

Notation: candidates i with gradients g_i and losses l_i, target gradient g_T, the optimizer's response P (at the
anticipated second moment, damping 0.1), b_i = <g_i, P g_T>, K_ij = <g_i, P g_j>. "Identity geometry" is P = I. Every
method keeps k candidates; where no weights are named each counts 1/k. The weights of all methods sum to one.

=======================  ===============================================================================================
random                   k candidates uniformly
whole pool               all N, each 1/N
max loss                 the largest l_i (Loshchilov & Hutter 2015, online batch selection)
gradient norm            the largest |g_i| (Katharopoulos & Fleuret 2018, importance sampling)
TracIn                   the largest <g_i, g_T> (Pruthi et al. 2020)
LESS-like top-k          the largest <g_i, P g_T> (Xia et al. 2024: TracIn with Adam's update; here at the live state)
GREATS                   greedily  argmax b_i - eta (K_ii / 2 + sum_{j picked} K_ij), identity geometry (Wang et al.
                         2024); eta is the best step of the k top scores together
GRAD-MATCH (target)      orthogonal matching pursuit of g_T with w >= 0, weights of its last fit divided by their sum,
                         identity geometry (Killamsetty et al. 2021)
GRAD-MATCH (pool)        the same with the pool's own mean gradient in the place of g_T
OPUS-like                drawn one by one with probability ~ exp(u_i / (temperature std u)), u_i = b_i - eta (K_ii / 2 +
                         sum_{j picked} K_ij), b and K from count sketches of P^1/2 g_i (projected utility)
oracle                   k of the candidates that are known to be good: true labels, the target's kind of text
Filter-then-Weight       the default: shortlist of N/2 by b, matching pursuit in the geometry P with ridge 0.05, weights
                         of its last fit divided by their sum, guard 0.3
without guard            the same, guard 0
=======================  ===============================================================================================

LESS, GREATS and OPUS are named after papers whose full systems do more (warm-up checkpoints, projections, their own
schedules); what is compared here is their rule of choice at each step, with everything else alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import ftw
from ftw import filters, sketch
from ftw.gradients import Dense
from ftw.inner_products import squared_norms

from .learner import Array
from .step import Choice, Step

__all__ = [
    "BASELINES",
    "LESS",
    "METHOD",
    "NO_GUARD",
    "ORACLE",
    "RANDOM",
    "WHOLE",
    "Choice",
    "Method",
    "Passes",
    "matched",
]

RANDOM, WHOLE, ORACLE, LESS = "random", "whole pool", "oracle", "LESS-like top-k"
METHOD, NO_GUARD = "Filter-then-Weight", "without guard"


class Passes(NamedTuple):
    """What a choice computes, for the count of FLOPs.

    Attributes
    ----------
    pool : int
        Passes over the pool: 0 nothing, 1 forward, 2 with the backward to activations, 3 with inner products too.
    target : int
        The same of the target samples.
    gram : float
        Share of the pool that the Gram matrix is formed for.
    trained : float or None
        Candidates trained on, as a multiple of k; None for the whole pool.
    taught : float or None
        Target samples trained on, as a multiple of k and never more than a step has; None for all of these.
    reused : bool
        Whether what the pool's passes computed serves to train the chosen.
    """

    pool: int = 0
    target: int = 0
    gram: float = 0.0
    trained: float | None = 1.0
    taught: float | None = 0.0
    reused: bool = True


class Method(NamedTuple):
    """A rule of choice and its cost."""

    choose: Callable[[Step], Choice]
    passes: Passes


def equal(indices: Any) -> Choice:
    """Return a choice with equal weights."""
    indices = np.asarray(indices)
    return Choice(indices, np.full(len(indices), 1 / len(indices), dtype=np.float32))


def highest(values: Array, keep: int) -> Choice:
    """Return the candidates of the highest values, ties by index."""
    return equal(filters.top_k(values, keep).indices)


def random(step: Step) -> Choice:
    """Return k candidates, uniformly."""
    return equal(step.rng.permutation(step.size)[: step.keep])


def oracle(step: Step) -> Choice:
    """Return k of the good candidates; the others fill up where there are too few."""
    order = step.rng.permutation(step.size)
    return equal(order[np.argsort(~step.good[order], kind="stable")[: step.keep]])


def gradient_norm(step: Step) -> Choice:
    """Return the largest |g_i|."""
    return highest(squared_norms(step.candidates, step.identity), step.keep)


def opus(step: Step, size: int = 512, temperature: float = 0.1) -> Choice:
    """Return draws by projected utility, one after the other."""
    P = step.geometry
    everyone = sketch.count_sketch(step.candidates, P, size)  # (N, size)
    goal = sketch.count_sketch({name: Dense(g[None]) for name, g in step.target.items()}, P, size)  # (1, size)
    b, K = sketch.scores(everyone, goal), sketch.gram(everyone)  # (N,), (N, N)
    top = filters.top_k(b, step.keep).indices  # (k,)
    gain, cost = b[top].sum(), K[np.ix_(top, top)].sum()
    eta = gain / cost if gain > 0 and cost > 0 else 0.0  # the best step of the k top scores together
    utility, picked = b - eta * np.diag(K) / 2, list[int]()
    for _ in range(step.keep):
        noise = step.rng.random(step.size).astype(b.dtype)  # (N,)
        others = np.setdiff1d(np.arange(step.size), picked)
        draw = filters.boltzmann(utility[others], 1, temperature=temperature, uniforms=noise[others])
        picked.append(int(others[int(draw.indices[0])]))
        utility = utility - eta * K[:, picked[-1]]
    return equal(picked)


def matched(
    step: Step, geometry: Any = None, *, target: Any = "the step's", guard: float = 0.0, **options: Any
) -> Choice:
    """Return the core's choice, for the step's target and geometry unless told; None takes the pool's mean."""
    chosen = ftw.filter_then_weight(
        step.candidates,
        step.target if isinstance(target, str) else target,
        step.geometry if geometry is None else geometry,
        keep=step.keep,
        target_samples=step.target_samples if guard else None,
        **({"solver": step.solver, "guard": guard} | options),
    )
    return Choice(chosen.indices, chosen.weights.astype(np.float32), float(chosen.shrinkage), float(chosen.signal))


def _dots(step: Step) -> Array:
    return ftw.scores(step.candidates, step.target, step.identity)


BASELINES: dict[str, Method] = {
    RANDOM: Method(random, Passes()),
    WHOLE: Method(lambda s: equal(np.arange(s.size)), Passes(trained=None)),
    "max loss": Method(lambda s: highest(s.losses, s.keep), Passes(1)),
    "gradient norm": Method(gradient_norm, Passes(3)),
    "TracIn": Method(lambda s: highest(_dots(s), s.keep), Passes(3, 3)),
    LESS: Method(lambda s: matched(s, filter="top_k", weight="uniform"), Passes(3, 3)),
    "GREATS": Method(lambda s: matched(s, s.identity, filter="greedy_utility", weight="uniform"), Passes(3, 3, 1.0)),
    "GRAD-MATCH (target)": Method(lambda s: matched(s, s.identity), Passes(3, 3, 1.0)),
    "GRAD-MATCH (pool)": Method(lambda s: matched(s, s.identity, target=None), Passes(3, 0, 1.0)),
    "OPUS-like": Method(opus, Passes(3, 3)),
    ORACLE: Method(oracle, Passes()),
    METHOD: Method(lambda s: matched(s, guard=0.3, shortlist=0.5), Passes(3, 3, 0.5)),
    NO_GUARD: Method(lambda s: matched(s, shortlist=0.5), Passes(3, 3, 0.5)),
}
