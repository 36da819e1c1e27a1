"""Random models: records and operators of every kind, as NumPy arrays of one seed."""

from __future__ import annotations

import numpy as np

import ftw


def psd(rng, d):
    x = rng.normal(size=(d, d))
    return x @ x.T / d


def orthonormal(rng, d, r=None):
    return np.linalg.qr(rng.normal(size=(d, d)))[0][:, : r or d]


SMALL = ("linear", "wide", "table", "tied", "bias")


def records(rng, n, t=3, dtype=np.float64, names=None):
    """One record of each kind, or those in ``names``; the tied parameter has three uses."""

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    def tokens(size):
        return rng.integers(0, size, size=(n, t))

    every = {
        "linear": ftw.OuterProduct(normal(n, t, 5), normal(n, t, 4)),
        "tall": ftw.OuterProduct(normal(n, 1, 3), normal(n, 1, 6)),
        "wide": ftw.OuterProduct(normal(n, 2 * t, 6), normal(n, 2 * t, 3)),
        "embedding": ftw.Rows(tokens(7), normal(n, t, 4), 7),
        "table": ftw.Rows(tokens(60), normal(n, t, 2), 60),
        "bias": ftw.Dense(normal(n, 4)),
        "kernel": ftw.Dense(normal(n, 2, 3, 2)),
        "gain": ftw.Dense(normal(n)),
        "tied": ftw.Sum(
            (
                ftw.Rows(tokens(7), normal(n, t, 3), 7),
                ftw.OuterProduct(normal(n, t, 3), normal(n, t, 7)),
                ftw.Dense(normal(n, 7, 3)),
            )
        ),
    }
    return {name: every[name] for name in names or every}


def shapes(gradients):
    return {name: record.shape for name, record in gradients.items()}


def operator(rng, kind, shape):
    """An operator of a kind for a shape; kinds that need a matrix fall back to Diagonal elsewhere."""
    if kind == "scale":
        return ftw.Scale(rng.uniform(0.5, 2))
    if kind == "diagonal" or len(shape) != 2:
        return ftw.Diagonal(rng.uniform(0, 2, size=shape))
    rows, columns = shape
    if kind == "kronecker":
        return ftw.Kronecker(psd(rng, rows), psd(rng, columns))
    if kind == "kronecker-diagonal":
        return ftw.Kronecker(rng.uniform(0, 2, size=rows), rng.uniform(0, 2, size=columns))
    if kind == "kronecker-mixed":
        return ftw.Kronecker(psd(rng, rows), rng.uniform(0, 2, size=columns))
    if kind == "rotated":
        return ftw.Rotated(orthonormal(rng, rows), rng.uniform(0, 2, size=shape), orthonormal(rng, columns))
    u, s, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return ftw.Polar(u, s + 0.1, vt)


KINDS = ("scale", "diagonal", "kronecker", "kronecker-diagonal", "kronecker-mixed", "rotated", "polar")


def geometry(rng, gradients, kind="diagonal"):
    """Operators of one kind, or of all of them in turn if ``kind`` is a number: where to start."""
    names = shapes(gradients)
    kinds = [kind if isinstance(kind, str) else KINDS[(kind + i) % len(KINDS)] for i in range(len(names))]
    return {name: operator(rng, k, shape) for k, (name, shape) in zip(kinds, names.items(), strict=True)}


def target(rng, gradients, dtype=np.float64):
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes(gradients).items()}
