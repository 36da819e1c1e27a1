"""What a step of each arm costs here, and how to spend the minutes: how many seeds, how long a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .arms import RANDOM, Arm
from .errors import TrialError
from .race import MARKS, Cost, Task, evaluate, set_rate, start, take_step

__all__ = ["FEW_STEPS", "Measured", "Plan", "measure", "plan"]

SEEDS = {8: 60, 6: 30, 5: 10, 4: 5, 3: 1}  # the most whose runs have so many steps of the slowest arm
FEW_STEPS = 30
TIMED_STEPS, TIMED_SECONDS = 8, 2.0  # the most that are timed of an arm, after the first step


@dataclass(frozen=True)
class Measured:
    """What the arms cost, what could not be run and why, and the seconds that go into making and judging a run."""

    costs: dict[str, Cost]
    failures: dict[str, str]
    make: float
    validation: float
    test: float


@dataclass(frozen=True)
class Plan:
    """How the minutes are spent: seconds of training in a run, and how many seeds are compared."""

    seconds: float
    seeds: int


def measure(task: Task, arms: Mapping[str, Arm], rate: float, deadline: float) -> Measured:
    """Take a few steps of each arm on models of its own, and time them.

    Raises
    ------
    TrialError
        If the simplest arm, random, does not run: no other arm could. If the deadline comes first.
    """
    for _ in range(2):  # what the process does for the first time takes longer
        began = task.now()
        learner, apart = start(task, rate, 0)
        make = task.now() - began
        began = task.now()
        evaluate(learner, task.target, apart)
        validation = task.now() - began
    began = task.now()
    if task.test is not None:
        evaluate(learner, task.test, task.test_numbers)
    test = task.now() - began
    costs, failures = {}, {}
    for name, arm in arms.items():
        try:
            costs[name] = _cost(task, name, arm, rate, deadline)
        except TrialError:
            raise
        except Exception as error:  # of the user's loss or of the selector
            failures[name] = str(error).split("\n")[0] or type(error).__name__
            if name == RANDOM:
                advice = "; smaller: --micro-batch, --max-length, --keep" if "memory" in failures[name] else ""
                raise TrialError(f"a plain step fails: {failures[name]}{advice}") from error
    return Measured(costs, failures, make, validation, test)


def _cost(task: Task, name: str, arm: Arm, rate: float, deadline: float) -> Cost:
    """Return what an arm's first step and its later ones cost; the rate is lower than in a run."""
    for _ in range(2):
        learner, _ = start(task, rate, 0)
        set_rate(learner.optimizer, 1e-3)
        take = arm(learner)
        began = task.now()
        take_step(learner, take)
        first = task.now() - began
        refuse_late(task, name, first, deadline)
    times = list[float]()
    while len(times) < 2 or (len(times) < TIMED_STEPS and sum(times) < TIMED_SECONDS):
        began = task.now()
        take_step(learner, take)
        times.append(task.now() - began)
        refuse_late(task, name, times[-1], deadline)
    return Cost(first, statistics.median(times))


def refuse_late(task: Task, name: str, took: float, deadline: float) -> None:
    """Raise if the time is over before anything is known."""
    if task.now() > deadline:
        raise TrialError(
            f"too few minutes: they were over before a step of {name} was measured, the last one took {took:.2g} s; "
            "more --minutes, or smaller --pool-size, --keep, --max-length"
        )


def plan(measured: Measured, rates: int, seconds: float, spent: float, seeds: int | None) -> Plan:
    """Divide what is left of the time among the runs.

    Parameters
    ----------
    measured : Measured
    rates : int
        Learning rates that each arm is tried at, with one seed.
    seconds, spent : float
        For everything, and how many of them are gone.
    seeds : int or None
        Seeds to compare; by default as many, from 3 to 8, as leave a run some steps.

    Raises
    ------
    TrialError
        If a run would be shorter than one step of the slowest arm; the message says how many minutes are enough.
    """
    costs = measured.costs
    slowest = max(costs, key=lambda name: costs[name].step)
    step = costs[slowest].step
    length, count = 0.0, 0
    for count in [*SEEDS] if seeds is None else [seeds]:
        runs = len(costs) * (rates + count)
        fixed = _fixed(measured, rates, count)
        length = (seconds - spent - fixed) / runs
        if length >= SEEDS.get(count, 1) * step:
            break
    if length < step or length <= 0:
        least = seeds or min(SEEDS)
        needed = _fixed(measured, rates, least) + len(costs) * (rates + least) * max(step, 1e-9)
        minutes = math.ceil(12 * (spent + needed) / 60) / 10
        raise TrialError(
            f"too few minutes: a step of {slowest} takes {step:.2g} s, and {len(costs)} arms at {rates} learning rates "
            f"and with {least} seeds need a step each: --minutes {minutes:.2g} or more, or smaller "
            "--pool-size, --keep, --max-length"
        )
    return Plan(length, count)


def _fixed(measured: Measured, rates: int, seeds: int) -> float:
    """Return the seconds that do not go into training: making models, first steps, judging."""
    arms = len(measured.costs)
    first = sum(max(0.0, cost.first - cost.step) for cost in measured.costs.values())
    judging = arms * (rates * measured.validation + seeds * ((len(MARKS) + 1) * measured.validation + measured.test))
    return (rates + seeds) * (first + arms * measured.make) + judging
