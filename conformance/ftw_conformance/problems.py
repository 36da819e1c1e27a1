"""Small dense QPs of the kinds that data selection meets, for tests and timings.

Each kind is a recipe for per-sample gradients and a target in a metric; the problem is their Gram matrix and scores,

    K_ij = <g_i, P g_j>,    c_i = <g_i, P g_T>

except where the kind is about K itself. Seeds are passed in; the same seed gives the same problem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["KINDS", "make"]

Problem = tuple[np.ndarray, np.ndarray]
Rng = np.random.Generator


def _from_gradients(G: np.ndarray, target: np.ndarray) -> Problem:
    return G @ G.T, G @ target


def _pool(rng: Rng, n: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """Return gradients (n, p) that share a direction with a target (p,), each to its own degree."""
    target = rng.normal(size=p)
    G = rng.normal(size=(n, p)) + rng.uniform(-0.3, 1.0, size=(n, 1)) * target
    return G, target


def wide(rng: Rng, n: int) -> Problem:
    """Twice as many parameters as samples: full rank."""
    return _from_gradients(*_pool(rng, n, 2 * n))


def narrow(rng: Rng, n: int) -> Problem:
    """Half as many parameters as samples: rank n/2."""
    return _from_gradients(*_pool(rng, n, max(n // 2, 1)))


def square(rng: Rng, n: int) -> Problem:
    """As many parameters as samples: full rank, but only just."""
    return _from_gradients(*_pool(rng, n, n))


def twins(rng: Rng, n: int) -> Problem:
    """Every gradient appears twice, to the bit."""
    G, target = _pool(rng, (n + 1) // 2, 2 * n)
    return _from_gradients(np.concatenate([G, G])[rng.permutation(2 * len(G))[:n]], target)


def near_twins(rng: Rng, n: int) -> Problem:
    """Every gradient appears twice, up to 1e-6."""
    G, target = _pool(rng, (n + 1) // 2, 2 * n)
    G = np.concatenate([G, G * (1 + 1e-6 * rng.normal(size=G.shape))])
    return _from_gradients(G[rng.permutation(len(G))[:n]], target)


def heavy(rng: Rng, n: int) -> Problem:
    """Norms spread over six decades."""
    G, target = _pool(rng, n, 2 * n)
    return _from_gradients(G * 10 ** rng.uniform(-3, 3, size=(n, 1)), target)


def zeros(rng: Rng, n: int) -> Problem:
    """Zero gradients for a quarter of the samples."""
    G, target = _pool(rng, n, 2 * n)
    return _from_gradients(G * (rng.uniform(size=(n, 1)) > 0.25), target)


def conditioned(rng: Rng, n: int) -> Problem:
    """Singular values falling evenly to a condition number of K of 1e10."""
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    V, _ = np.linalg.qr(rng.normal(size=(n, n)))
    G = Q @ (np.logspace(0, -5, n)[:, None] * V)
    return _from_gradients(G, G.T @ rng.uniform(size=n) / n + 0.1 * rng.normal(size=n) / n)


def diagonal(rng: Rng, n: int) -> Problem:
    """Gradients that share no coordinate."""
    return np.diag(10 ** rng.uniform(-2, 2, size=n)), rng.normal(size=n)


def negative(rng: Rng, n: int) -> Problem:
    """No sample helps the target."""
    G, target = _pool(rng, n, 2 * n)
    K, c = _from_gradients(G, target)
    return K, -np.abs(c)


def clusters(rng: Rng, n: int) -> Problem:
    """Cluster the gradients: a few groups, strongly correlated."""
    p = 2 * n
    centres = rng.normal(size=(max(n // 8, 2), p))
    G = centres[rng.integers(len(centres), size=n)] + 0.1 * rng.normal(size=(n, p))
    return _from_gradients(G, centres.mean(0) + 0.1 * rng.normal(size=p))


def tiny(rng: Rng, n: int) -> Problem:
    """Gradients of size 1e-6: K of size 1e-12."""
    G, target = _pool(rng, n, 2 * n)
    return _from_gradients(1e-6 * G, 1e-6 * target)


def huge(rng: Rng, n: int) -> Problem:
    """Gradients of size 1e6: K of size 1e12."""
    G, target = _pool(rng, n, 2 * n)
    return _from_gradients(1e6 * G, 1e6 * target)


def adam(rng: Rng, n: int) -> Problem:
    """Sparse gradients under an Adam-like metric: coordinates of very different scales, some hardly ever touched."""
    p = 4 * n
    scale = 10 ** rng.uniform(-4, 0, size=p)
    target = scale * rng.normal(size=p)
    G = (scale * rng.normal(size=(n, p)) + rng.uniform(-0.3, 1.0, size=(n, 1)) * target) * (rng.uniform(size=p) < 0.3)
    v = np.mean(G * G, axis=0) * 10 ** rng.normal(size=p) + (0.1 * np.mean(scale)) ** 2
    return (G / np.sqrt(v)) @ G.T, (G / np.sqrt(v)) @ target


KINDS: dict[str, Callable[[Rng, int], Problem]] = {
    f.__name__: f
    for f in (
        wide, narrow, square, twins, near_twins, heavy, zeros, conditioned, diagonal, negative, clusters, tiny, huge,
        adam,
    )
}  # fmt: skip


def make(kind: str, n: int, seed: int) -> tuple[Any, Any]:
    """Return K (n, n), symmetric, and c (n,), float64, of one kind; the same seed gives the same problem."""
    K, c = KINDS[kind](np.random.default_rng([seed, n, *kind.encode()]), n)
    return 0.5 * (K + K.T), c
