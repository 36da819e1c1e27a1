r"""What one sample does for the target, and what two samples share.

Let sample i have the gradient g_i of its own loss, and let the optimizer answer a gradient g with the change -P g of
the parameters: P is symmetric and positive semi-definite, ``preconditioning.py`` writes it down. A step with the
weights w changes the parameters by  -P sum_i w_i g_i.  To first order the loss of the target, whose gradient is g_T,
falls by

    sum_i w_i b_i,      b_i = <g_i, P g_T>          the SCORE of sample i.

To second order, with the curvature taken to be P^-1 (the geometry that the optimizer itself believes in), it falls by

    b'w - 1/2 w'K w,    K_ij = <g_i, P g_j>         the GRAM matrix of the samples.

K_ij is large when i and j say the same thing: the second copy of a sample is worth less than the first. Completing the
square shows that to maximise this is to match the target's own update:

    1/2 w'Kw - b'w  =  1/2 |P^1/2 (sum_i w_i g_i - g_T)|^2  -  1/2 |P^1/2 g_T|^2.

Everything after this file needs only b and K. Both are written here as the definition says: gradients explicit, one
row per sample, one inner product at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import jit

__all__ = ["gram", "scores"]

Array = Any


def scores(grads: Array, target: Array, metric: Array) -> Array:
    """Return b_i = <g_i, P g_T> for every sample.

    Parameters
    ----------
    grads : array (n, p)
        Per-sample gradients.
    target : array (p,)
        The target's gradient g_T.
    metric : array (p,) or (p, p)
        The diagonal of P, or P itself.

    Returns
    -------
    array (n,)
        The scores.

    Examples
    --------
    >>> scores([[1.0, 0.0], [1.0, 1.0]], [2.0, 4.0], [1.0, 0.5])
    array([2., 4.])
    """
    G, P = _checked(grads, metric)
    t = np.ascontiguousarray(target, dtype=np.float64)  # (p,)
    if t.shape != (G.shape[1],):
        raise ValueError(f"target has shape {t.shape} and grads {G.shape}: target must be ({G.shape[1]},)")
    return inner_products(G, apply_metric(P, t.reshape(1, -1)))[:, 0]


def gram(grads: Array, metric: Array) -> Array:
    """Return K_ij = <g_i, P g_j> for every pair of samples.

    Parameters
    ----------
    grads : array (n, p)
        Per-sample gradients.
    metric : array (p,) or (p, p)
        The diagonal of P, or P itself.

    Returns
    -------
    array (n, n)
        Symmetric, positive semi-definite.

    Examples
    --------
    >>> gram([[1.0, 0.0], [1.0, 1.0]], [1.0, 0.5])
    array([[1. , 1. ],
           [1. , 1.5]])
    """
    G, P = _checked(grads, metric)
    K = inner_products(G, apply_metric(P, G))  # (n, n)
    return 0.5 * (K + K.T)


def cross_gram(grads: Array, others: Array, metric: Array) -> Array:
    """Return <g_i, P h_j> for samples g (n, p) and h (m, p): an array (n, m)."""
    G, P = _checked(grads, metric)
    H, _ = _checked(others, metric)
    return inner_products(G, apply_metric(P, H))


@jit
def apply_diagonal(d: Array, G: Array) -> Array:
    """Return d * g_i for every row: (p,), (n, p) -> (n, p)."""
    out = np.empty_like(G)  # (n, p)
    for i in range(G.shape[0]):
        out[i] = d * G[i]
    return out


@jit
def apply_matrix(P: Array, G: Array) -> Array:
    """Return P g_i for every row: (p, p), (n, p) -> (n, p)."""
    out = np.empty_like(G)  # (n, p)
    for i in range(G.shape[0]):
        for a in range(P.shape[0]):
            out[i, a] = np.sum(P[a] * G[i])
    return out


@jit
def inner_products(G: Array, H: Array) -> Array:
    """Return <g_i, h_j> for every pair of rows: (n, p), (m, p) -> (n, m)."""
    n, m = G.shape[0], H.shape[0]
    out = np.empty((n, m))  # (n, m)
    for i in range(n):
        for j in range(m):
            out[i, j] = np.sum(G[i] * H[j])
    return out


def apply_metric(P: Array, G: Array) -> Array:
    """Return P g_i for every row of G (n, p), for P (p,) or (p, p)."""
    return apply_diagonal(P, G) if P.ndim == 1 else apply_matrix(P, G)


def _checked(grads: Array, metric: Array) -> tuple[Array, Array]:
    G = np.ascontiguousarray(grads, dtype=np.float64)  # (n, p)
    P = np.ascontiguousarray(metric, dtype=np.float64)  # (p,) or (p, p)
    if G.ndim != 2 or G.shape[0] == 0:
        raise ValueError(f"grads has shape {G.shape}: give one row per sample, shape (n, p) with n >= 1")
    p = G.shape[1]
    if P.shape not in ((p,), (p, p)):
        raise ValueError(f"metric has shape {P.shape} and grads {G.shape}: metric must be ({p},) or ({p}, {p})")
    return G, P
