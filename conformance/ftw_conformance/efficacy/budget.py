"""Runs at equal compute: every method goes on until its arithmetic has used up the same budget.

The budget counts forward and backward passes of one sample (`cost.one_sample`). Each method has a learning rate of its
own, tuned on seeds that are not reported (`rates`); it warms up over three steps and comes down to zero by the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .ablations import METHODS
from .baselines import WHOLE
from .cost import flops, one_sample
from .learner import Adam
from .rates import rate
from .scenarios import Scenario
from .step import Step
from .wear import Uses

__all__ = ["FIRST_SEED", "POINTS", "Job", "area", "run", "warm_up"]

POINTS = 12  # of a curve
FIRST_SEED = 100  # seeds below were used to set the tasks up
WARM_UP = 3  # steps


class Job(NamedTuple):
    """What one run is of; the learning rate is the tuned one unless it is given."""

    name: str
    scenario: Scenario
    method: str
    seed: int
    steps: int | None = None
    lr: float | None = None


_warm: set[tuple[str, str]] = set()


def warm_up(job: Job, task: Any) -> None:
    """Take a step that is thrown away, once a process: what is compiled at the first call is no part of a time."""
    if (job.name, job.method) in _warm:
        return
    _warm.add((job.name, job.method))
    model, optimizer = task.model()
    step = Step(task, model, optimizer, task.batches(0), np.random.default_rng(0), Uses())
    optimizer.update(step.update(METHODS[job.method].choose(step)))


def run(job: Job) -> dict[str, Any]:
    """Return the record of one run; its curve is over sample passes."""
    task = job.scenario.build(FIRST_SEED + job.seed)
    method = METHODS[job.method]
    warm_up(job, task)
    model, optimizer = task.model()
    assert isinstance(optimizer, Adam)
    price = flops(task, method.passes) / one_sample(task)  # sample passes a step
    assert job.scenario.budget is not None
    steps = job.steps or max(1, round(job.scenario.budget / price))
    highest = job.lr or rate(job.name, job.method)
    curve = [(0.0, model.test_loss())]
    sums: dict[str, list[float]] = {"effective_size": [], "good": [], "shrinkage": [], "signal": []}
    seconds, seen = 0.0, Uses()
    points = {round(steps * j / POINTS) for j in range(1, POINTS + 1)}
    for i in range(steps):
        optimizer.lr = highest * min(1.0, (i + 1) / WARM_UP) * (1 - i / steps)
        batches = task.batches(i)
        began = time.process_time()
        step = Step(task, model, optimizer, batches, np.random.default_rng([job.seed, 4, i]), seen)
        choice = method.choose(step)
        optimizer.update(step.update(choice))
        seconds += time.process_time() - began
        w = np.asarray(choice.weights, dtype=float)
        sums["effective_size"].append(float(w.sum() ** 2 / (w * w).sum()))
        sums["shrinkage"].append(choice.shrinkage)
        if math.isfinite(choice.signal):
            sums["signal"].append(choice.signal)
        if batches.good is not None and choice.share < 1:
            sums["good"].append(float(np.mean(batches.good[choice.indices])))
        if i + 1 in points:
            curve.append((round((i + 1) * price, 1), model.test_loss()))
    return {
        "scenario": job.name,
        "method": job.method,
        "seed": job.seed,
        "steps": steps,
        "lr": highest,
        "curve": [(x, round(loss, 5)) for x, loss in curve],
        "final": curve[-1][1],
        "accuracy": model.accuracy(),  # type: ignore[attr-defined]
        "area": area(curve),
        "equal_compute": curve[-1][1],
        "target_loss": float(model.losses(task.batches(0).target).mean()),
        "flops": price * one_sample(task),
        "whole_flops": flops(task, METHODS[WHOLE].passes),
        "seconds": seconds,
        **{name: float(np.mean(values)) if values else None for name, values in sums.items()},
    }


def area(curve: Sequence[tuple[float, float]]) -> float:
    """Return the mean of a curve over its steps, by trapezoids."""
    x, y = np.array(curve).T
    return float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)) / (x[-1] - x[0]))
