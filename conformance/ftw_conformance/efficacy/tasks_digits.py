"""Handwritten digits (scikit-learn's, 8 x 8 pixels) from a polluted stream, by a small perceptron in NumPy.

The base task: 40 % of the stream's labels are wrong, five classes are five times as frequent as the others, and 30 % of
each pool are copies of a few samples. The target is a handful of samples with true labels; what counts is the loss on
a balanced test set with true labels.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftw.gradients import OuterProduct

from .learner import Adam, Array, Batches, Captured, Layer, Optimizer, Sgd, Tree

__all__ = ["Digits"]

CLASSES, TESTS, RESERVED = 10, 500, 300  # RESERVED samples are kept for targets


@functools.cache
def data() -> tuple[Array, Array]:
    """Return pixels (1797, 64) in [0, 1], and labels (1797,)."""
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise SystemExit("the digits need scikit-learn: pip install scikit-learn, or choose --task text") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32), labels


class Perceptron:
    """One hidden layer; biases are weights on a constant input. A batch is (x (n, d), y (n,))."""

    def __init__(self, rng: np.random.Generator, inputs: int, hidden: int, test: Any) -> None:
        def normal(d_out: int, d_in: int) -> Array:
            w = rng.normal(size=(d_out, d_in + 1)) / np.sqrt(d_in)
            w[:, -1] = 0.0
            return w.astype(np.float32)

        self.params: Tree = {"hidden": normal(hidden, inputs), "output": normal(CLASSES, hidden)}
        self.test = test

    def forward(self, x: Array) -> tuple[Array, Array, Array]:
        """Return both layers' inputs (n, d + 1), (n, h + 1) and the logarithms of the probabilities (n, 10)."""
        one = np.ones((len(x), 1), dtype=x.dtype)  # (n, 1)
        x = np.concatenate([x, one], axis=1)  # (n, d + 1)
        h = np.maximum(x @ self.params["hidden"].T, 0)  # (n, h)
        h = np.concatenate([h, one], axis=1)  # (n, h + 1)
        z = h @ self.params["output"].T  # (n, 10)
        z -= z.max(axis=1, keepdims=True)
        return x, h, z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    def losses(self, batch: Any) -> Array:
        """Return each sample's cross-entropy (n,)."""
        x, y = batch
        return -self.forward(x)[2][np.arange(len(y)), y]

    def test_loss(self) -> float:
        """Return the mean loss on the test set."""
        return float(self.losses(self.test).mean())

    def capture(self, batch: Any) -> Captured:
        """Return losses (n,) and gradients as outer products, one token a sample."""
        x, y = batch
        x, h, p = self.forward(x)
        losses = -p[np.arange(len(y)), y]  # (n,)
        dz = np.exp(p)  # (n, 10)
        dz[np.arange(len(y)), y] -= 1
        dh = (dz @ self.params["output"])[:, :-1] * (h[:, :-1] > 0)  # (n, h)
        return Captured(
            losses,
            {"hidden": OuterProduct(x[:, None], dh[:, None]), "output": OuterProduct(h[:, None], dz[:, None])},
        )


@dataclass
class Digits:
    """A scenario on digits.

    Attributes
    ----------
    targets : int
        Target samples.
    clean : float
        Share of the stream's labels that are true.
    noise : float
        Standard deviation of what is added to every pixel, of stream, target and test alike (weak features).
    missing : int
        How many classes the target lacks.
    optimizer, lr
        "adam" or "sgd" (with momentum), and its learning rate.
    """

    seed: int
    targets: int = 40
    clean: float = 0.6
    noise: float = 0.0
    missing: int = 0
    optimizer: str = "adam"
    lr: float = 1e-2
    steps: int = 120
    size: int = 96
    keep: int = 6
    hidden: int = 64
    copied: float = 0.3

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 1])
        x, y = data()
        order = rng.permutation(len(y))
        if self.noise:
            x = x + rng.normal(size=x.shape).astype(np.float32) * np.float32(self.noise)
        test, reserve, stream = np.split(order, [TESTS, TESTS + RESERVED])
        self.test = x[test], y[test]
        allowed = reserve[y[reserve] < CLASSES - self.missing]
        # as many of each class as possible
        rank = np.array([np.sum(y[allowed[:i]] == y[j]) for i, j in enumerate(allowed)])
        chosen = allowed[np.argsort(rank, kind="stable")[: self.targets]]
        self.target = x[chosen], y[chosen]
        self.x, self.truth = x[stream], y[stream]
        wrong = rng.random(len(stream)) >= self.clean
        self.y = np.where(wrong, (self.truth + rng.integers(1, CLASSES, len(stream))) % CLASSES, self.truth)
        frequent = rng.permutation(CLASSES)[: CLASSES // 2]
        self.odds = np.where(np.isin(self.truth, frequent), 5.0, 1.0)
        self.odds /= self.odds.sum()
        self.hot = rng.choice(len(stream), size=3, replace=False)

    def model(self) -> tuple[Perceptron, Optimizer]:
        """Return a fresh model, the same for all methods, and its optimizer."""
        model = Perceptron(np.random.default_rng([self.seed, 2]), self.x.shape[1], self.hidden, self.test)
        return model, Adam(model.params, self.lr) if self.optimizer == "adam" else Sgd(model.params, self.lr)

    def batches(self, step: int) -> Batches:
        """Return the pool of a step, the target, and whose labels are true."""
        rng = np.random.default_rng([self.seed, 3, step])
        copies = round(self.copied * self.size)
        drawn = rng.choice(len(self.y), size=self.size - copies, replace=False, p=self.odds)
        pool = rng.permutation(np.concatenate([drawn, rng.choice(self.hot, size=copies)]))  # (N,)
        return Batches((self.x[pool], self.y[pool]), self.target, self.y[pool] == self.truth[pool])

    def take(self, batch: Any, indices: Array) -> Any:
        """Return some samples of a batch."""
        return batch[0][indices], batch[1][indices]

    def layers(self) -> list[Layer]:
        """Return the two matrices."""
        return [Layer(1, self.x.shape[1] + 1, self.hidden), Layer(1, self.hidden + 1, CLASSES)]
