"""One run of one arm: so many seconds of training, whatever the number of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .arms import Arm, Learner
from .samples import Samples, ShuffledPasses, fold

__all__ = ["MARKS", "Cost", "Outcome", "Task", "evaluate", "race", "start"]

MARKS = (0.25, 0.5, 0.75, 1.0)  # parts of the time after which a run is judged
WARM_UP = 3  # steps
EVALUATION_BATCH = 16  # samples


@dataclass(frozen=True)
class Task:
    """Everything that the arms of a trial share."""

    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    per_sample_loss: Callable[[nn.Module, Any], Tensor]
    pool: Samples
    target: Samples
    target_numbers: Sequence[int]
    test: Samples | None
    test_numbers: Sequence[int]
    keep: int
    pool_size: int
    target_size: int
    micro_batch: int | None
    clock: Callable[[], float] = time.perf_counter

    def now(self) -> float:
        """Return the time in seconds, once the device has done what it was given."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return self.clock()


@dataclass(frozen=True)
class Cost:
    """What an arm was measured to cost, in seconds: its first step, which compiles and checks, and a later one."""

    first: float
    step: float


@dataclass(frozen=True)
class Outcome:
    """One run: an arm at a learning rate with a seed.

    Attributes
    ----------
    steps, seconds
        Steps taken, and the time they count for: the first step counts as much as a later one.
    curve : dict of float to float
        Validation loss by part of the time, from 0 to 1.
    validation : float
        The last of it; infinite if the run failed.
    test : float or None
        The loss on the test split, for the report alone.
    failure : str
        Why the run ended early; empty if it did not.
    """

    arm: str
    rate: float
    seed: int
    steps: int = 0
    seconds: float = 0.0
    curve: dict[float, float] = field(default_factory=dict)
    validation: float = math.inf
    test: float | None = None
    failure: str = ""


def start(task: Task, rate: float, seed: int) -> tuple[Learner, list[int]]:
    """Return a new learner, and the target samples kept apart: the same for every arm with this seed."""
    torch.manual_seed(seed)
    model = task.make_model()
    model.train()
    torch.manual_seed(seed)  # dropout is the same whatever the model has drawn
    optimizer = task.make_optimizer(model, rate)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    device = next(model.parameters()).device
    trained, apart = fold(task.target_numbers, seed)
    pool = ShuffledPasses(range(len(task.pool)), f"pool {seed}")
    target = ShuffledPasses(trained, f"target {seed}")
    learner = Learner(
        model,
        optimizer,
        task.per_sample_loss,
        lambda n: task.pool.batch(pool.draw(n), device),
        lambda n: task.target.batch(target.draw(n), device),
        task.keep,
        task.pool_size,
        min(task.target_size, len(trained)),
        task.micro_batch,
    )
    return learner, apart


@torch.no_grad()
def evaluate(learner: Learner, samples: Samples, numbers: Sequence[int]) -> float:
    """Return the mean loss of some samples; the model is in evaluation mode meanwhile."""
    model = learner.model
    device, training, total = next(model.parameters()).device, model.training, 0.0
    size = learner.micro_batch or EVALUATION_BATCH
    model.eval()
    try:
        for at in range(0, len(numbers), size):
            batch = samples.batch(numbers[at : at + size], device)
            total += float(learner.per_sample_loss(model, batch).double().sum())
    finally:
        model.train(training)
    return total / len(numbers)


def race(
    task: Task,
    name: str,
    arm: Arm,
    rate: float,
    seed: int,
    seconds: float,
    cost: Cost,
    *,
    curve: bool,
    note: Callable[[float, float, int], None] = lambda part, loss, steps: None,
    tick: Callable[[float], None] = lambda seconds: None,
) -> Outcome:
    """Train for ``seconds``, with a short warm-up and a learning rate that goes to zero as the time runs out.

    Parameters
    ----------
    seconds : float
        A run ends where another step would end more than half of it too late.
    cost : Cost
        As measured: its ``step`` is what the first step counts for.
    curve : bool
        Evaluate at the start and after each of `MARKS`, and on the test split at the end; otherwise at the end alone.
        Evaluation does not count.
    note, tick : callable
        Called with (part of the time, validation loss, steps), and with the seconds of each step.
    """
    learner, apart = start(task, rate, seed)
    outcome = Outcome(name, rate, seed)

    def judged(part: float) -> None:
        loss = outcome.curve[part] = evaluate(learner, task.target, apart)
        note(part, loss, outcome.steps)

    try:
        if curve:
            judged(0.0)
        take = arm(learner)
        due = [mark for mark in MARKS[:-1] if curve]
        while outcome.steps == 0 or outcome.seconds + cost.step / 2 <= seconds:
            set_rate(
                learner.optimizer, min(1.0, (outcome.steps + 1) / WARM_UP) * max(0.0, 1 - outcome.seconds / seconds)
            )
            began = task.now()
            take_step(learner, take)
            took = task.now() - began if outcome.steps else cost.step
            outcome = replace(outcome, steps=outcome.steps + 1, seconds=outcome.seconds + took)
            tick(took)
            while due and outcome.seconds >= due[0] * seconds:
                judged(due.pop(0))
        judged(1.0)
        if not math.isfinite(outcome.curve[1.0]):
            raise FloatingPointError("the validation loss is not finite")
        test = evaluate(learner, task.test, task.test_numbers) if curve and task.test is not None else None
        return replace(outcome, validation=outcome.curve[1.0], test=test)
    except (FloatingPointError, RuntimeError) as error:
        return replace(outcome, failure=str(error).split("\n")[0] or type(error).__name__)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to a part of its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def take_step(learner: Learner, take: Callable[[], object]) -> None:
    """Take one step of training."""
    take()
    learner.optimizer.step()
    learner.optimizer.zero_grad()
