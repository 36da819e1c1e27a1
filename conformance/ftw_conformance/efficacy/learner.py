"""What the runs share: a model as a mapping of NumPy arrays, and its optimizer.

A task brings a model: its parameters, its per-sample gradients as records, its test loss. The optimizers are written
out, so that their state is at hand and one text serves models of any framework: a torch parameter and its array share
memory, and the update is made in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

import ftw
from ftw.geometry import Operator
from ftw.gradients import Record

__all__ = ["Adam", "Batches", "Captured", "Layer", "Model", "Optimizer", "Sgd", "Task"]

Array = Any
Tree = dict[str, Any]


class Captured(NamedTuple):
    """Losses (n,) and gradients of n samples."""

    losses: Array
    records: dict[str, Record]


class Batches(NamedTuple):
    """What arrives at a step: a pool, the target, and which of the pool are good (n,), where that is known."""

    pool: Any
    target: Any
    good: Array | None


class Layer(NamedTuple):
    """A matrix (outputs, inputs) that ``tokens`` tokens of a sample go through."""

    tokens: int
    inputs: int
    outputs: int
    trained: bool = True


class Model(Protocol):
    """A model in training."""

    params: Tree

    def capture(self, batch: Any) -> Captured:
        """Return losses and gradients, sample by sample."""
        ...

    def losses(self, batch: Any) -> Array:
        """Return losses alone (n,)."""
        ...

    def test_loss(self) -> float:
        """Return the mean loss on the test set."""
        ...


class Task(Protocol):
    """What a scenario trains on: everything is a function of the seed."""

    size: int  # N
    keep: int  # k
    targets: int  # V
    steps: int

    def model(self) -> tuple[Model, Optimizer]:
        """Return a fresh model at the common start, and its optimizer."""
        ...

    def batches(self, step: int) -> Batches:
        """Return what arrives at a step."""
        ...

    def take(self, batch: Any, indices: Array) -> Any:
        """Return some samples of a batch."""
        ...

    def layers(self) -> list[Layer]:
        """Return the matrices a sample goes through, for the count of FLOPs."""
        ...


class Optimizer(Protocol):
    """Updates parameters in place, and says how it will respond to a gradient."""

    def update(self, gradient: Mapping[str, Array]) -> None:
        """Take one step."""
        ...

    def geometry(self, anticipate: Mapping[str, Array] | None, damping: float) -> dict[str, Operator]:
        """Return P at this step."""
        ...


class Adam:
    """Adam (Kingma & Ba 2015)."""

    def __init__(self, params: Tree, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.params, self.lr, self.betas, self.eps, self.taken = params, lr, betas, eps, 0
        self.m = {name: np.zeros_like(p) for name, p in params.items()}
        self.v = {name: np.zeros_like(p) for name, p in params.items()}

    def update(self, gradient: Mapping[str, Array]) -> None:
        """Take one step."""
        self.taken += 1
        b1, b2 = self.betas
        for name, p in self.params.items():
            g, m, v = gradient[name], self.m[name], self.v[name]
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            root = np.sqrt(v / (1 - b2**self.taken)) + self.eps
            p -= self.lr / (1 - b1**self.taken) * m / root

    def geometry(self, anticipate: Mapping[str, Array] | None, damping: float) -> dict[str, Operator]:
        """Return P, with a gradient folded into the second moment (or none: the raw one)."""
        return {
            name: ftw.optimizers.adam(
                self.m[name],
                self.v[name],
                self.taken,
                lr=self.lr,
                betas=self.betas,
                eps=self.eps,
                anticipate=None if anticipate is None else anticipate[name],
                damping=damping,
            ).operator
            for name in self.params
        }


class Sgd:
    """SGD with momentum (Sutskever et al. 2013)."""

    def __init__(self, params: Tree, lr: float, momentum: float = 0.9) -> None:
        self.params, self.lr, self.momentum = params, lr, momentum
        self.buffer = {name: np.zeros_like(p) for name, p in params.items()}

    def update(self, gradient: Mapping[str, Array]) -> None:
        """Take one step."""
        for name, p in self.params.items():
            buffer = self.buffer[name]
            buffer *= self.momentum
            buffer += gradient[name]
            p -= self.lr * buffer

    def geometry(self, anticipate: Mapping[str, Array] | None, damping: float) -> dict[str, Operator]:
        """Return P, a multiple of the identity."""
        del anticipate, damping
        return {
            name: ftw.optimizers.sgd(b, lr=self.lr, momentum=self.momentum).operator for name, b in self.buffer.items()
        }
