"""Calls of the operators and of transformed records, and their accounts by explicit matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import ftw
from ftw import spi
from ftw.gradients import matrix_shape
from ftw_conformance.verify.table import Expect, exactly, rounded, summed

from . import explicit, models
from .sizes import length, record_terms

Array = Any


def acted(p: Any, g: Any, h: Any) -> dict[str, Any]:
    """Return an operator on one gradient, and on a stack of them."""
    return {
        "apply": p.apply(g),
        "apply, stacked": p.apply(h),
        "inner": p.inner(g, h[1, ...]),
        "inner, the other way": p.inner(h[1, ...], g),
        "sqrt twice": p.sqrt(p.sqrt(h)),
        "sqrt": p.inner(g, g) - _square(p.sqrt(g)),
        "is_psd": spi.namespace(g).asarray(p.is_psd()),
    }


def definite(p: Any) -> dict[str, Any]:
    """Return whether an operator has no negative eigenvalue."""
    xp = spi.namespace(*spi.leaves(p))
    return {"is_psd": xp.asarray(p.is_psd())}


def account_definite(shape: tuple[int, ...]) -> Callable[..., dict[str, Expect]]:
    """Return an account that looks at the eigenvalues of the explicit matrix."""

    def account(got: Mapping[str, Array], p: Any) -> dict[str, Expect]:
        values = np.linalg.eigvalsh(explicit.matrix(p, shape))
        return {"is_psd": exactly(bool(values.min() >= -1e-6 * np.abs(values).max()))}

    return account


def negatives(rng: Any, shape: tuple[int, int]) -> dict[str, Any]:
    """Return operators with one negative part each, by name."""
    one = {kind: models.operator(rng, kind, shape) for kind in models.KINDS}
    rows, columns = shape

    def flipped(x: Any, at: Any) -> Any:
        x = np.array(x)
        x[at] = -x[at]
        return x

    corner = (0, shape[1] - 1)
    gains = one["spectral"].gains
    u, s, vt = (getattr(one["spectral"], name) for name in ("u", "s", "vt"))
    return {
        "scale": ftw.Scale(np.asarray(-1e-3)),
        "diagonal": ftw.Diagonal(flipped(one["diagonal"].values, corner)),
        "left": ftw.Kronecker(flipped(np.ones(rows), 1), np.ones(columns)),
        "right": ftw.Kronecker(models.psd(rng, rows), flipped(np.ones(columns), 2)),
        "dense left": ftw.Kronecker(models.psd(rng, rows) - 0.1 * np.eye(rows) * rows, np.ones(columns)),
        "dense right": ftw.Kronecker(np.ones(rows), -models.psd(rng, columns)),
        "rotated": ftw.Rotated(one["rotated"].left, flipped(one["rotated"].values, corner), one["rotated"].right),
        "polar": ftw.Polar(u, flipped(s, -1) - 5.0 * (np.arange(len(s)) == len(s) - 1), vt),
        "antisymmetric": ftw.Polar(
            u, s, vt, gains._replace(antisymmetric=flipped(gains.antisymmetric, ((0, 1), (1, 0))))
        ),
        "symmetric": ftw.Polar(u, s, vt, gains._replace(symmetric=flipped(gains.symmetric, (1, 1)))),
        "outside": ftw.Polar(u, s, vt, gains._replace(outside=flipped(gains.outside, 0))),
    }


def _square(x: Any) -> Any:
    xp = spi.namespace(x)
    return xp.sum(x * x)


def account_acted(got: Mapping[str, Array], p: Any, g: Array, h: Array) -> dict[str, Expect]:
    """Multiply by the explicit matrix."""
    P = explicit.matrix(p, g.shape)
    norm = np.linalg.norm(P, 2)
    a, size = P @ g.reshape(-1), g.size
    b = h.reshape(2, -1) @ P
    inner = g.reshape(-1) @ P @ h[1].reshape(-1)
    length, other = np.linalg.norm(g), np.linalg.norm(h)
    condition = 64 * size  # of an eigendecomposition
    return {
        "apply": summed(a.reshape(g.shape), norm * length, 64 * size),
        "apply, stacked": summed(b.reshape(h.shape), norm * other, 64 * size),
        "inner": summed(inner, norm * length * other, 64 * size),
        "inner, the other way": summed(inner, norm * length * other, 64 * size),
        "sqrt twice": rounded(b.reshape(h.shape), norm * other, condition),
        "sqrt": rounded(0.0, norm * length**2, condition),
        "is_psd": exactly(True),
    }


def turned(x: Any) -> dict[str, Any]:
    """Return what an operator may make of a record: its transpose, its negative."""
    first = spi.leaves(x)[0]
    xp = spi.namespace(first)
    out = {}
    for name, record in x.items():
        for what, made in (("transposed", record.transposed(xp)), ("negated", record.negated(xp))):
            rows, columns = matrix_shape(made.shape)
            block = made.block(xp, slice(0, rows), slice(0, columns))
            out[f"{what} {name}"] = xp.reshape(block, (made.n, rows, columns))
    return out


def account_turned(got: Mapping[str, Array], x: Any) -> dict[str, Expect]:
    """Expect the explicit gradients, transposed and negated."""
    out = {}
    for name, record in x.items():
        G = explicit.dense(record)
        G = G.reshape(len(G), *matrix_shape(record.shape))
        scale = np.max(length(record))
        out[f"transposed {name}"] = summed(np.swapaxes(G, 1, 2), scale, 64 * record_terms(record))
        out[f"negated {name}"] = summed(-G, scale, 64 * record_terms(record))
    return out
