"""The trial: arms at their best learning rates, paired by seed, for the same time each."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ftw.report import Recorder

from .arms import ARMS, RANDOM, Arm
from .errors import TrialError
from .notes import notes_on
from .plan import Measured, Plan, measure, plan
from .race import Outcome, Task, race
from .result import Result, summarise
from .samples import LEAST_TARGET, Samples, first_of_each, refuse_shared

__all__ = ["run"]

FACTORS = (1 / 3, 1.0, 3.0)  # of the learning rate
MOST_TEST = 512  # test samples
LATE = 1.1  # a round of seeds begins if it is likely to end within this many times the minutes


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW without weight decay over what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def run(
    make_model: Callable[[], nn.Module],
    per_sample_loss: Callable[[nn.Module, Any], Tensor],
    pool: Any,
    target: Any,
    test: Any = None,
    *,
    lr: float,
    factors: Sequence[float] = FACTORS,
    make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw,
    collate: Callable[[list[Any]], Any] | None = None,
    arms: Mapping[str, Arm] = ARMS,
    keep: int = 8,
    pool_size: int = 64,
    target_size: int = 16,
    micro_batch: int | None = None,
    minutes: float = 10.0,
    seeds: int | None = None,
    record: str | os.PathLike[str] | None = None,
    header: Mapping[str, Any] | None = None,
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Find out whether selection pays for a model and data: which arm to use, if any.

    Every arm trains for the same time. First each is run at each learning rate with one seed, and keeps the rate with
    the lowest validation loss; then the arms are compared over fresh seeds. A seed decides the order of the pool, which
    third of the target samples is kept apart to validate on, and the model's random numbers, alike for all arms.

    Parameters
    ----------
    make_model : callable
        Returns the model that a run starts from; called once a run, after `torch.manual_seed`.
    per_sample_loss : callable
        ``per_sample_loss(model, batch) -> (n,)``, as `ftw_torch.FilterThenWeight` takes it.
    pool, target, test : sequence of samples, or batch
        Lists or map-style datasets, batched by ``collate``; or nested mappings or tuples of tensors with samples on
        axis 0. The test split is only reported: neither a learning rate nor the verdict depends on it.
    lr : float
        The middle learning rate.
    factors : sequence of float
        The rates are ``lr`` times these.
    make_optimizer : callable
        ``make_optimizer(model, lr)``; AdamW without weight decay by default.
    collate : callable, optional
        Makes a batch of a list of samples; `torch.utils.data.default_collate` by default.
    arms : mapping of str to callable
        From the simplest on; ``"random"`` is the baseline. An arm takes a `Learner` and returns a function without
        arguments that fills ``.grad`` for one step.
    keep, pool_size, target_size : int
        Samples trained on in a step; candidates that arrive at one; target samples of one.
    micro_batch : int, optional
        Samples that go through the model at once.
    minutes : float
        For everything.
    seeds : int, optional
        To compare the arms over; by default 3 to 8, as the minutes allow.
    record : path, optional
        A file for the record, JSON lines as of `ftw.report`, a line as soon as a loss is known.
    header : mapping, optional
        More for the record's first line.
    progress : bool
        Show a progress bar.
    clock : callable
        Returns seconds.

    Returns
    -------
    Result

    Raises
    ------
    TrialError
        If there are too few samples, or too few minutes for one step of each arm: before anything is trained.

    Notes
    -----
    Cost: ``minutes``, and memory for one model in training beside what ``make_model`` keeps.
    """
    began = clock()
    given = {"pool": pool, "target": target} | ({} if test is None else {"test": test})
    splits = {name: Samples(split, collate, name) for name, split in given.items()}
    keys = {name: split.keys() for name, split in splits.items()}
    for one, other in itertools.combinations(reversed(keys.items()), 2):
        refuse_shared(one, other)
    task = Task(
        make_model,
        make_optimizer,
        per_sample_loss,
        splits["pool"],
        splits["target"],
        first_of_each(keys["target"]),
        splits.get("test"),
        _test_numbers(len(splits.get("test", ()))),
        keep,
        pool_size,
        target_size,
        micro_batch,
        clock,
    )
    rates = tuple(lr * factor for factor in factors)
    _check(task, rates, arms, minutes, seeds)
    with _recorder(record, task, minutes, header) as recorder:
        found = measure(task, arms, rates[len(rates) // 2], began + 60 * minutes)
        arms = {name: arm for name, arm in arms.items() if name in found.costs}
        planned = plan(found, len(rates), 60 * minutes, clock() - began, seeds)
        deadline = began + 60 * LATE * minutes
        outcomes = _outcomes(task, arms, rates, found, planned, deadline, recorder, progress)
    return summarise(outcomes, planned, found, notes_on(task, found, outcomes))


def _test_numbers(count: int) -> list[int]:
    """Return which test samples are measured on: all, or a random part, the same for every arm and seed."""
    return sorted(random.Random("test").sample(range(count), min(count, MOST_TEST)))


def _check(task: Task, rates: Sequence[float], arms: Mapping[str, Arm], minutes: float, seeds: int | None) -> None:
    """Raise what can be seen to be wrong before anything is measured."""
    for name, value in {"keep": task.keep, "pool_size": task.pool_size, "target_size": task.target_size}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TrialError(f"{name}={value!r} must be an int >= 1")
    if seeds is not None and (not isinstance(seeds, int) or seeds < 1):
        raise TrialError(f"seeds={seeds!r} must be an int >= 1")
    if not minutes > 0:
        raise TrialError(f"minutes={minutes!r} must be positive")
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise TrialError(f"the learning rates {[*rates]} must be positive numbers")
    if RANDOM not in arms or len(arms) < 2:
        raise TrialError(
            f"the arms {[*arms]} must hold {RANDOM!r}, which the others are compared with, and another one"
        )
    if task.keep > task.pool_size:
        raise TrialError(f"keep={task.keep} is more than pool_size={task.pool_size}")
    if len(task.pool) < task.pool_size:
        raise TrialError(
            f"too few samples: the pool has {len(task.pool)}, and {task.pool_size} arrive at a step; give more, or a "
            f"smaller pool_size (--pool-size {max(1, len(task.pool) // 2)} --keep {max(1, len(task.pool) // 16)})"
        )
    if len(task.target_numbers) < LEAST_TARGET:
        raise TrialError(
            f"too few samples: the target has {len(task.target_numbers)} that differ, and a third of them is "
            f"kept apart to judge by; give at least {LEAST_TARGET}"
        )


@contextlib.contextmanager
def _recorder(
    path: str | os.PathLike[str] | None, task: Task, minutes: float, header: Mapping[str, Any] | None
) -> Iterator[Recorder | None]:
    if path is None:
        yield None
        return
    setup: dict[str, Any] = {
        "title": "Does selection pay here?",
        "samples": {"pool": len(task.pool), "target": len(task.target_numbers), "test": len(task.test_numbers)},
        "step": f"{task.keep} of {task.pool_size} candidates, {task.target_size} target samples",
        "minutes": minutes,
    }
    with Recorder(path, fresh=True, **setup, **(header or {})) as recorder:
        yield recorder


def _outcomes(
    task: Task,
    arms: Mapping[str, Arm],
    rates: Sequence[float],
    found: Measured,
    planned: Plan,
    deadline: float,
    recorder: Recorder | None,
    progress: bool,
) -> list[Outcome]:
    """Run all that is planned: each arm at each rate with seed 0, then each at its best rate with the other seeds."""
    outcomes = list[Outcome]()
    runs = len(arms) * (len(rates) + planned.seeds)
    names = [*arms]
    with tqdm(
        total=runs * planned.seconds, unit="s", disable=None if progress else True, dynamic_ncols=True, mininterval=0.5,
        bar_format="{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of training [{elapsed}]",
    ) as bar:  # fmt: skip

        def one(name: str, rate: float, seed: int, place: int, *, curve: bool) -> Outcome:
            title = f"{name}, lr {rate:.3g}, seed {seed}"
            bar.set_description(title)

            def tick(seconds: float) -> None:
                bar.update(max(0.0, min(seconds, place * planned.seconds - bar.n)))

            def note(part: float, loss: float, steps: int) -> None:
                if recorder is not None:
                    recorder.step(title, round(100 * part), watch_loss=loss, steps_taken=steps)

            if recorder is not None:
                recorder.run(title, method=name if curve else f"{name}, choice of the rate", seed=seed, rate=rate)
            outcome = race(
                task, name, arms[name], rate, seed, planned.seconds, found.costs[name],
                curve=curve, note=note, tick=tick,
            )  # fmt: skip
            if recorder is not None:
                fields = {"watch_loss": outcome.validation, "test_loss": outcome.test, "failure": outcome.failure}
                recorder.step(title, 100, steps_taken=outcome.steps, trained_seconds=outcome.seconds, **fields)
            tick(planned.seconds)  # what the last step, or a failure, left
            return outcome

        place = 0
        for rate in rates:
            for name in names:
                outcomes.append(one(name, rate, 0, place := place + 1, curve=False))
        best = best_rates(outcomes)
        for seed in range(1, planned.seeds + 1):
            began = task.now()
            order = names[seed % len(names) :] + names[: seed % len(names)]  # slow drifts of the machine are shared
            for name in order:
                outcomes.append(one(name, best[name], seed, place := place + 1, curve=True))
            if 2 * task.now() - began > deadline:
                break
        bar.set_description("done")
    return outcomes


def best_rates(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return each arm's learning rate with the lowest validation loss; the smallest if all runs failed."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(outcome.arm for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.arm == name and outcome.seed == 0]
        found[name] = min(own, key=lambda outcome: (outcome.validation, outcome.rate)).rate
    return found
