"""Sentiment of real sentences: a linear head on the frozen features of a pretrained encoder.

Sentences of four domains (`real_data`) are positive or negative by their mean rating. The stream draws from all domains
alike; a fifth of it are sentences without a clear rating, whose labels are random, and of the others three in ten have
the wrong label. The target is a few sentences of one domain with true labels; what counts is the loss on others of that
domain. A step sees ``targets`` of the ``held`` target sentences, in shuffled rounds: with 48 of them each comes back
tens of times in a run, with 1500 about once.

Only the head is trained, so that a run takes a second. Its price is counted as if the encoder were trained too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftw.gradients import OuterProduct

from . import real_data
from .learner import Adam, Array, Batches, Captured, Layer, Optimizer, Tree

__all__ = ["Sentiment"]

CLEAR, NEUTRAL = 0.5, 0.35  # |rating| from which a sentence has a label, and up to which it has none
TESTS = 1000  # sentences, and never more than a third of a domain
TOKENS, WIDTH, BLOCKS = 24, 384, 6  # of a sentence, and of the encoder


@functools.cache
def data() -> tuple[Array, Array, Array]:
    """Return features (n, 385), with a constant for the bias, ratings (n,) and domains (n,)."""
    found = real_data.sentences()
    x = found.features - found.features.mean(axis=0)
    x /= np.sqrt(np.mean(x * x))
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1), found.ratings, found.domains


class Head:
    """Logistic regression as a softmax of two classes. A batch is (x (n, d), y (n,))."""

    def __init__(self, inputs: int, test: Any) -> None:
        self.params: Tree = {"head": np.zeros((2, inputs), dtype=np.float32)}
        self.test = test

    def forward(self, x: Array) -> Array:
        """Return the logarithms of the probabilities (n, 2)."""
        z = x @ self.params["head"].T  # (n, 2)
        z -= z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    def losses(self, batch: Any) -> Array:
        """Return each sample's cross-entropy (n,)."""
        x, y = batch
        return -self.forward(x)[np.arange(len(y)), y]

    def test_loss(self) -> float:
        """Return the mean loss on the test set."""
        return float(self.losses(self.test).mean())

    def accuracy(self) -> float:
        """Return the share of the test set that is right."""
        x, y = self.test
        return float(np.mean(self.forward(x).argmax(axis=1) == y))

    def capture(self, batch: Any) -> Captured:
        """Return losses (n,) and gradients as outer products, one token a sample."""
        x, y = batch
        p = self.forward(x)  # (n, 2)
        losses = -p[np.arange(len(y)), y]  # (n,)
        dz = np.exp(p)  # (n, 2)
        dz[np.arange(len(y)), y] -= 1
        return Captured(losses, {"head": OuterProduct(x[:, None], dz[:, None])})


@dataclass
class Sentiment:
    """A scenario on sentiment.

    Attributes
    ----------
    domain : str
        Of the target and the test set: one of `real_data.DOMAINS`.
    held : int
        Target sentences there are.
    targets : int
        Target sentences in a step.
    flipped, neutral : float
        Share of the labels that are wrong, and of the stream that has random labels.
    lr : float
        Highest learning rate; the run warms up to it and comes down to zero.
    steps : int
        Steps of a run.
    """

    seed: int
    domain: str = "films"
    held: int = 48
    flipped: float = 0.3
    neutral: float = 0.2
    lr: float = 1e-2
    steps: int = 120
    size: int = 64
    keep: int = 8
    targets: int = 16

    def __post_init__(self) -> None:
        if self.domain not in real_data.DOMAINS:
            raise ValueError(f"sentiment: no domain {self.domain!r}; choose from {', '.join(real_data.DOMAINS)}")
        rng = np.random.default_rng([self.seed, 1])
        self.x, ratings, domains = data()
        own = list(real_data.DOMAINS).index(self.domain)
        label = (ratings > 0).astype(np.int64)
        clear = np.abs(ratings) >= CLEAR
        mine = rng.permutation(np.flatnonzero(clear & (domains == own)))
        tests = min(TESTS, len(mine) // 3)
        test, target, rest = np.split(mine, [tests, tests + self.held])
        if len(target) < self.held or not len(rest):
            raise ValueError(
                f"sentiment: {self.domain} has {len(mine)} rated sentences, too few for {self.held} targets"
            )
        self.test, self.target = (self.x[test], label[test]), target
        self.clear = [
            rest if d == own else np.flatnonzero(clear & (domains == d)) for d in range(len(real_data.DOMAINS))
        ]
        self.unclear = [np.flatnonzero((np.abs(ratings) <= NEUTRAL) & (domains == d)) for d in range(len(self.clear))]
        self.own, self.label = own, label
        self.wrong = rng.random(len(ratings)) < self.flipped
        self.random = rng.integers(0, 2, len(ratings))

    def model(self) -> tuple[Head, Optimizer]:
        """Return a head of zeros and its optimizer."""
        head = Head(self.x.shape[1], self.test)
        return head, Adam(head.params, self.lr)

    def batches(self, step: int) -> Batches:
        """Return the pool of a step, the target, and which of the pool are of the domain and have a true label."""
        rng = np.random.default_rng([self.seed, 3, step])
        domains = rng.integers(0, len(self.clear), self.size)  # (N,)
        neutral = rng.random(self.size) < self.neutral  # (N,)
        from_ = [(self.unclear if n else self.clear)[d] for d, n in zip(domains, neutral, strict=True)]
        pool = np.array([choices[rng.integers(len(choices))] for choices in from_])  # (N,)
        y = np.where(neutral, self.random[pool], self.label[pool] ^ self.wrong[pool])  # (N,)
        good = (domains == self.own) & ~neutral & ~self.wrong[pool]
        target = self.target[self.turn(step)]
        return Batches((self.x[pool], y), (self.x[target], self.label[target]), good)

    def turn(self, step: int) -> Array:
        """Return which of the held target sentences a step sees (V,): shuffled rounds, all before any comes back."""
        a_round = self.held // self.targets
        order = np.random.default_rng([self.seed, 5, step // a_round]).permutation(self.held)
        first = step % a_round * self.targets
        return order[first : first + self.targets]

    def take(self, batch: Any, indices: Array) -> Any:
        """Return some samples of a batch."""
        return batch[0][indices], batch[1][indices]

    def layers(self) -> list[Layer]:
        """Return the encoder's matrices, since that is what a step over them would cost, and the head."""
        square, wide = Layer(TOKENS, WIDTH, WIDTH), 4 * WIDTH
        block = [square] * 4 + [Layer(TOKENS, WIDTH, wide), Layer(TOKENS, wide, WIDTH)]
        return block * BLOCKS + [Layer(1, WIDTH + 1, 2)]
