"""One step as a method sees it: what it asks for is computed then, and once."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import ftw
from ftw.geometry import Operator
from ftw.gradients import Record

from .learner import Array, Batches, Captured, Model, Optimizer, Task
from .wear import Uses

__all__ = ["DAMPING", "Choice", "Step", "solver"]

DAMPING = 0.1


class Choice(NamedTuple):
    """Who was chosen (k,), with which weights (k,), and how far the guard moved the target.

    ``share`` of the update is the mean gradient of the first ``taught`` target samples of the step.
    """

    indices: Array
    weights: Array
    shrinkage: float = 0.0
    signal: float = np.inf
    share: float = 0.0
    taught: int = 0


class Step:
    """The pool and the target at the model's present state.

    Parameters
    ----------
    task, model, optimizer
    batches : Batches
        What arrived.
    rng : numpy.random.Generator
        For methods that draw.
    seen : ftw_conformance.efficacy.wear.Uses, optional
        Counts the target samples of a run.
    """

    def __init__(
        self,
        task: Task,
        model: Model,
        optimizer: Optimizer,
        batches: Batches,
        rng: np.random.Generator,
        seen: Uses | None = None,
    ) -> None:
        self._seen = Uses() if seen is None else seen
        self.task, self.model, self.optimizer, self.batches, self.rng = task, model, optimizer, batches, rng
        self.size, self.keep = task.size, task.keep
        self.solver = solver()

    @property
    def good(self) -> Array:
        """Which candidates are known to be good (N,)."""
        if self.batches.good is None:
            raise ValueError("nobody knows which samples of this pool are good: leave the oracle out")
        return self.batches.good

    @functools.cached_property
    def losses(self) -> Array:
        """The candidates' losses (N,)."""
        return self.model.losses(self.batches.pool)

    @functools.cached_property
    def candidates(self) -> dict[str, Record]:
        """The candidates' gradients."""
        return self.model.capture(self.batches.pool).records

    @functools.cached_property
    def _target(self) -> Captured:
        return self.model.capture(self.batches.target)

    @property
    def target_samples(self) -> dict[str, Record]:
        """The target samples' gradients."""
        return self._target.records

    @functools.cached_property
    def uses(self) -> float:
        """How often each target sample was matched before, in the mean; asking counts this step."""
        arrays = [np.asarray(x) for x in self.batches.target]
        return self._seen.note([b"".join(x[i].tobytes() for x in arrays) for i in range(len(arrays[0]))])

    @property
    def target_loss(self) -> float:
        """The target samples' mean loss."""
        return float(self._target.losses.mean())

    @functools.cached_property
    def target(self) -> dict[str, Array]:
        """The target's mean gradient g_T."""
        return mean(self._target.records)

    @functools.cached_property
    def pool_mean(self) -> dict[str, Array]:
        """The pool's mean gradient."""
        return mean(self.candidates)

    @functools.cached_property
    def geometry(self) -> dict[str, Operator]:
        """P, with the target's gradient anticipated."""
        return self.optimizer.geometry(self.target, DAMPING)

    @functools.cached_property
    def identity(self) -> dict[str, Operator]:
        """P = I."""
        return {name: ftw.Scale(1.0) for name in self.model.params}

    def update(self, choice: Choice) -> dict[str, Array]:
        """Return the gradient to train with: of those chosen, and of the target samples that are taught."""
        if not choice.share:
            return self.gradient(choice.indices, choice.weights)
        taught = self.task.take(self.batches.target, np.arange(choice.taught))
        goal = mean(self.model.capture(taught).records)
        if choice.share == 1:
            return goal
        own = self.gradient(choice.indices, choice.weights)
        return {name: (1 - choice.share) * own[name] + choice.share * goal[name] for name in own}

    def gradient(self, indices: Array, weights: Array) -> dict[str, Array]:
        """Return ``sum_i w_i g_i`` of those chosen."""
        if "candidates" in self.__dict__:
            return ftw.combine(ftw.take(self.candidates, indices), weights)
        chosen = self.task.take(self.batches.pool, indices)  # nobody asked for the others
        return ftw.combine(self.model.capture(chosen).records, weights)


def mean(records: dict[str, Record]) -> dict[str, Array]:
    """Return the mean gradient of some samples."""
    n = next(iter(records.values())).n
    return ftw.combine(records, np.full(n, 1 / n, dtype=np.float32))


@functools.cache
def solver() -> Callable[..., Any] | None:
    """Return the compiled solver where it is installed, else None for the core's own."""
    try:
        if not importlib.import_module("ftw_reference").COMPILED:
            return None
        found: Callable[..., Any] = importlib.import_module("ftw_compiled").solve_qp
    except ImportError:
        return None
    return found
