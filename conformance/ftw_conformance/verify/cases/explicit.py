"""Records, operators and whole models written out as explicit gradients and matrices: the independent account.

Nothing here calls the core; its classes serve as named tuples of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw

__all__ = ["dense", "flat", "flat_target", "matrix", "metric"]

Array = Any


def dense(record: Any) -> Array:
    """Return each sample's gradient (n, *shape), added up token by token."""
    if isinstance(record, ftw.OuterProduct):
        a, b = (np.asarray(x, dtype=float) for x in (record.inputs, record.output_grads))
        out = np.zeros((a.shape[0], b.shape[2], a.shape[2]))
        for i in range(a.shape[0]):
            for s in range(a.shape[1]):
                out[i] += np.outer(b[i, s], a[i, s])
        return out
    if isinstance(record, ftw.Rows):
        b = np.asarray(record.output_grads, dtype=float)
        out = np.zeros((b.shape[0], record.size, b.shape[2]))
        for i in range(b.shape[0]):
            for s in range(b.shape[1]):
                out[i, int(record.indices[i, s])] += b[i, s]
        return out
    if isinstance(record, ftw.Packed):
        return ref.gradients.packed(record.inputs, record.output_grads, record.samples, record.size)
    if isinstance(record, ftw.PackedRows):
        factors = record.indices, record.output_grads, record.samples
        return ref.gradients.packed_rows(*factors, record.size, record.height)
    if isinstance(record, ftw.Dense):
        return np.asarray(record.grads, dtype=float)
    return sum(dense(part) for part in record.parts)


def matrix(operator: Any, shape: tuple[int, ...]) -> Array:
    """Return P (p, p) on the row-major vector of a parameter of ``shape``, from the definition of its kind."""
    p = int(np.prod(shape))
    if isinstance(operator, ftw.Scale):
        return float(operator.value) * np.eye(p)
    if isinstance(operator, ftw.Diagonal):
        return np.diag(np.asarray(operator.values, dtype=float).reshape(-1))
    if isinstance(operator, ftw.Kronecker):
        both = (np.asarray(x, dtype=float) for x in (operator.left, operator.right))
        left, right = (np.diag(x) if x.ndim == 1 else x for x in both)
        return np.kron(left, right.T)
    if isinstance(operator, ftw.Rotated):
        values = np.asarray(operator.values, dtype=float)
        sides = zip((operator.left, operator.right), values.shape, strict=True)
        left, right = (np.eye(d) if q is None else np.asarray(q, dtype=float) for q, d in sides)
        basis = np.kron(left, right)  # rows: entries of G, columns: directions
        return basis @ np.diag(values.reshape(-1)) @ basis.T
    u, s, vt = (np.asarray(x, dtype=float) for x in (operator.u, operator.s, operator.vt))
    gains = operator.gains and [np.asarray(x, dtype=float) for x in operator.gains]
    return np.stack([polar(u, s, vt, e.reshape(shape), gains).reshape(-1) for e in np.eye(p)], axis=1)


def polar(u: Array, s: Array, vt: Array, g: Array, gains: Any = None) -> Array:
    """Return the derivative of the polar factor at ``u diag(s) vt`` along g, or what ``gains`` make of its parts.

    With full bases U and V, and s padded by zeros, direction by direction: the antisymmetric part of the square block
    is divided by the mean of two singular values, what lies outside it by one.
    """
    rows, columns = u.shape[0], vt.shape[1]
    U = np.concatenate([u, null_space(u)], axis=1)  # (d_out, d_out)
    V = np.concatenate([vt.T, null_space(vt.T)], axis=1)  # (d_in, d_in)
    C = U.T @ g @ V  # (d_out, d_in)
    r = len(s)
    out = np.zeros((rows, columns))
    both, skew, beyond = gains or (np.zeros((r, r)), 2 / (s[:, None] + s), 1 / s)
    for i in range(rows):
        for j in range(columns):
            if i < r and j < r:
                out[i, j] = skew[i, j] * (C[i, j] - C[j, i]) / 2 + both[i, j] * (C[i, j] + C[j, i]) / 2
            elif i < r:
                out[i, j] = C[i, j] * beyond[i]
            elif j < r:
                out[i, j] = C[i, j] * beyond[j]
    return U @ out @ V.T


def null_space(basis: Array) -> Array:
    """Return orthonormal columns (d, d - r) that complete the orthonormal columns (d, r)."""
    return np.linalg.svd(basis, full_matrices=True)[0][:, basis.shape[1] :]


def flat(gradients: Mapping[str, Any]) -> Array:
    """Return the gradients of a model side by side (n, p)."""
    return np.concatenate([dense(r).reshape(r.n, -1) for r in gradients.values()], axis=1)


def flat_target(target: Mapping[str, Any]) -> Array:
    """Return a target side by side (p,)."""
    return np.concatenate([np.asarray(g, dtype=float).reshape(-1) for g in target.values()])


def metric(gradients: Mapping[str, Any], geometry: Mapping[str, Any]) -> Array:
    """Return P of a whole model (p, p), block by block."""
    blocks = [matrix(geometry[name], dense(r).shape[1:]) for name, r in gradients.items()]
    out = np.zeros((sum(map(len, blocks)),) * 2)
    at = 0
    for block in blocks:
        out[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return out
