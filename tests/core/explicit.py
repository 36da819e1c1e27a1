"""An independent account of records and operators: every gradient and every P written out with NumPy loops."""

from __future__ import annotations

import numpy as np

import ftw


def dense(record):
    """(n, *shape): each sample's gradient, summed token by token."""
    if isinstance(record, ftw.OuterProduct):
        a, b = np.asarray(record.inputs, float), np.asarray(record.output_grads, float)
        out = np.zeros((a.shape[0], b.shape[2], a.shape[2]))
        for i in range(a.shape[0]):
            for s in range(a.shape[1]):
                out[i] += np.outer(b[i, s], a[i, s])
        return out
    if isinstance(record, ftw.Rows):
        out = np.zeros((record.indices.shape[0], record.size, record.output_grads.shape[2]))
        for i in range(out.shape[0]):
            for s in range(record.indices.shape[1]):
                out[i, record.indices[i, s]] += record.output_grads[i, s]
        return out
    if isinstance(record, (ftw.Packed, ftw.PackedRows)):
        out = np.zeros((record.size, *record.shape))
        for s, i in enumerate(np.asarray(record.samples).tolist()):
            b = np.asarray(record.output_grads[s], float)
            if i >= 0 and isinstance(record, ftw.Packed):
                out[i] += np.outer(b, record.inputs[s])
            elif i >= 0:
                out[i, int(record.indices[s])] += b
        return out
    if isinstance(record, ftw.Dense):
        return np.asarray(record.grads, float)
    return sum(dense(part) for part in record.parts)


def matrix(operator, shape):
    """(p, p): P acting on the row-major vector of a parameter of ``shape``, from its definition."""
    p = int(np.prod(shape))
    if isinstance(operator, ftw.Scale):
        return float(operator.value) * np.eye(p)
    if isinstance(operator, ftw.Diagonal):
        return np.diag(np.asarray(operator.values, float).reshape(-1))
    if isinstance(operator, ftw.Kronecker):
        left, right = (np.diag(x) if x.ndim == 1 else x for x in (operator.left, operator.right))
        return np.kron(left, right.T)
    if isinstance(operator, ftw.Rotated):
        basis = np.kron(operator.left, operator.right)  # rows: entries of G, columns: entries in the rotated basis
        return basis @ np.diag(operator.values.reshape(-1)) @ basis.T
    columns = []
    for e in np.eye(p):  # the derivative of the polar factor, by the formula of the singular vectors
        k = operator.u.T @ e.reshape(shape) @ operator.vt.T
        s = operator.s
        out = np.zeros(shape)
        for i in range(len(s)):
            for j in range(len(s)):
                out += (k[i, j] - k[j, i]) / (s[i] + s[j]) * np.outer(operator.u[:, i], operator.vt[j])
        e = e.reshape(shape)
        for i in range(len(s)):
            out += (
                np.outer(operator.u[:, i], (operator.u[:, i] @ e) @ (np.eye(shape[1]) - operator.vt.T @ operator.vt))
                / s[i]
            )
            out += np.outer((np.eye(shape[0]) - operator.u @ operator.u.T) @ e @ operator.vt[i], operator.vt[i]) / s[i]
        columns.append(out.reshape(-1))
    return np.stack(columns, axis=1)


def flat(gradients):
    """(n, p): all parameters side by side."""
    return np.concatenate([dense(r).reshape(r.n, -1) for r in gradients.values()], axis=1)


def metric(gradients, geometry):
    """(p, p): P of the whole model, block by block."""
    blocks = [matrix(geometry[name], dense(r).shape[1:]) for name, r in gradients.items()]
    p = sum(len(b) for b in blocks)
    out, at = np.zeros((p, p)), 0
    for b in blocks:
        out[at : at + len(b), at : at + len(b)] = b
        at += len(b)
    return out
