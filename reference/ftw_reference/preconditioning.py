r"""What the optimizer will do with a gradient: the geometry P.

An optimizer turns the next gradient g into a change of the parameters. With its second moments held still, the change
is affine in g:

    change = -(offset + P g),

and the offset (momentum, decoupled weight decay) does not depend on which samples are chosen. P does all the work. Each
function below returns P for one parameter: its diagonal as an array shaped like the parameter, or, where P is not
diagonal, a symmetric matrix over the flattened parameter. t = step + 1 counts the step about to be taken.

**SGD.** P = lr. With momentum mu the new buffer is mu m + (1 - dampening) g, so P = lr (1 - dampening); Nesterov
looks once more ahead, P = lr (1 + mu (1 - dampening)). In the first step the buffer is g itself, without dampening.

**Adam.** m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  and the change is -lr mhat / (sqrt(vhat) + eps) with
mhat = m / (1 - b1^t). The coefficient of g is

    P = lr (1 - b1) / (1 - b1^t)  /  (sqrt(vhat) + eps).

vhat depends on g as well. Two ways out. *Raw*: vhat = v / (1 - b2^step), as the last step left it; on coordinates
that were never touched it is zero, and P explodes. *Anticipated*: fold a gradient a that is known beforehand into v,
usually the target's:  vhat = (b2 v + (1 - b2) a^2) / (1 - b2^t);  and keep the rare coordinates in check with a
*damping* relative to the typical denominator:  sqrt(vhat) + eps + damping * rms(sqrt vhat).  The other adaptive
methods differ in their v only.

**Kronecker** methods (Shampoo, K-FAC) answer a matrix gradient G with L G R: over the flattened parameter P = L (x)
R'. **Rotated** ones (SOAP) run Adam in the eigenbases:  P G = U (values * (U' G V)) V'.

**Muon** replaces a matrix M by its polar factor U V', M = U diag(s) V'. For a small change E of M, with C = U'EV, the
polar factor changes by

    P E = U [(C - C')_ij / (s_i + s_j)] V'  +  U S^-1 U'E (I - V V')  +  (I - U U') E V S^-1 V',

which is the Hessian of the nuclear norm: symmetric, positive semi-definite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import jit

__all__ = ["adagrad", "adam", "adamax", "kronecker", "polar", "rmsprop", "rotated", "sgd"]

Array = Any


def sgd(
    shape: tuple[int, ...],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
) -> Array:
    """Return the diagonal of P for SGD, shaped like the parameter; ``first`` tells that there is no buffer yet."""
    share = 1.0 if first or momentum == 0.0 else 1.0 - dampening
    if nesterov and momentum > 0.0:
        share = 1.0 + momentum * share
    return np.full(shape, lr * share)


def adam(
    exp_avg_sq: Array,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    anticipate: Array | None = None,
    damping: float = 0.0,
    max_exp_avg_sq: Array | None = None,
) -> Array:
    """Return the diagonal of P for Adam.

    Parameters
    ----------
    exp_avg_sq : array, shaped like the parameter
        v, uncorrected.
    step : int
        Steps already taken.
    lr, betas, eps : numbers
        The optimizer's own.
    anticipate : array like ``exp_avg_sq``, optional
        A gradient to fold into v. Without it, and before the first step, P is lr.
    damping : float
        Relative to the root mean square of sqrt(vhat) over the parameter.
    max_exp_avg_sq : array like ``exp_avg_sq``, optional
        AMSGrad's running maximum, uncorrected.

    Returns
    -------
    array, shaped like the parameter
        Zero where vhat is zero everywhere: an untouched parameter does not move.

    Examples
    --------
    >>> adam([0.04], 1, lr=1.0, betas=(0.0, 0.0), eps=0.0)
    array([5.])
    """
    v = np.asarray(exp_avg_sq, dtype=np.float64)
    t = step + 1
    if anticipate is None and step == 0:
        return np.full(v.shape, float(lr))
    if anticipate is not None:
        a = np.asarray(anticipate, dtype=np.float64)
        if a.shape != v.shape:
            raise ValueError(f"anticipate has shape {a.shape} and exp_avg_sq {v.shape}: they must be the same")
        v = betas[1] * v + (1 - betas[1]) * a**2
    if max_exp_avg_sq is not None:
        v = np.maximum(v, np.asarray(max_exp_avg_sq, dtype=np.float64))
    corrected = v / (1 - betas[1] ** (step if anticipate is None else t))
    return inverse_root(corrected, lr * (1 - betas[0]) / (1 - betas[0] ** t), eps, damping)


def adagrad(total: Array, step: int, *, lr: float, lr_decay: float = 0.0, eps: float = 1e-10) -> Array:
    """Return the diagonal of P for Adagrad; ``total`` is the sum of the squared gradients, the parameter's shape."""
    return inverse_root(np.asarray(total, dtype=np.float64), lr / (1 + step * lr_decay), eps, 0.0)


def rmsprop(square_avg: Array, *, lr: float, eps: float = 1e-8, grad_avg: Array | None = None) -> Array:
    """Return the diagonal of P for RMSprop, centered where ``grad_avg`` is given; both have the parameter's shape."""
    v = np.asarray(square_avg, dtype=np.float64)
    if grad_avg is not None:
        v = v - np.asarray(grad_avg, dtype=np.float64) ** 2
    return inverse_root(v, lr, eps, 0.0)


def adamax(exp_inf: Array, step: int, *, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> Array:
    """Return the diagonal of P for Adamax, lr (1 - b1) / (1 - b1^t) / u; u, the running maximum, has its shape."""
    u = np.asarray(exp_inf, dtype=np.float64)
    return inverse_root(u * u, lr * (1 - betas[0]) / (1 - betas[0] ** (step + 1)), 0.0, 0.0)


def inverse_root(v: Array, numerator: float, eps: float, damping: float) -> Array:
    """Return numerator / (sqrt(v) + eps + damping * rms(sqrt v)), and zero where v is zero everywhere."""
    flat = np.ascontiguousarray(v.reshape(-1))  # (p,)
    return inverse_root_loop(flat, float(numerator), float(eps), float(damping)).reshape(v.shape)


@jit
def inverse_root_loop(v: Array, numerator: float, eps: float, damping: float) -> Array:
    """Do the work of `inverse_root`, coordinate by coordinate: (p,) -> (p,)."""
    out = np.zeros_like(v)  # (p,)
    total = 0.0
    for i in range(v.shape[0]):
        total += v[i]
    if total == 0.0:
        return out
    rms = np.sqrt(total / v.shape[0])
    for i in range(v.shape[0]):
        denominator = np.sqrt(v[i]) + eps + damping * rms
        if denominator > 0.0:
            out[i] = numerator / denominator
    return out


def kronecker(left: Array, right: Array) -> Array:
    """Return P with P vec(G) = vec(left @ G @ right); a vector (d,) stands for a diagonal matrix.

    Parameters
    ----------
    left : array (d_out, d_out) or (d_out,)
        Symmetric.
    right : array (d_in, d_in) or (d_in,)
        Symmetric.

    Returns
    -------
    array (d_out * d_in, d_out * d_in)
    """
    L, R = (np.diag(x) if x.ndim == 1 else x for x in map(np.asarray, (left, right)))
    return as_matrix(lambda G: L @ G @ R, (L.shape[0], R.shape[0]))


def rotated(left: Array, values: Array, right: Array) -> Array:
    """Return P of left @ (values * (left.T @ G @ right)) @ right.T; (d_out, d_out), (d_out, d_in), (d_in, d_in)."""
    U, s, V = map(np.asarray, (left, values, right))
    return as_matrix(lambda G: U @ (s * (U.T @ G @ V)) @ V.T, s.shape)


def polar(u: Array, s: Array, vt: Array) -> Array:
    """Return P of the polar factor at u diag(s) vt; (d_out, r), (r,), (r, d_in) with r = min(d_out, d_in), s > 0."""
    U, values, V = np.asarray(u), np.asarray(s), np.asarray(vt).T

    def apply(E: Array) -> Array:
        C = U.T @ E @ V  # (r, r)
        inside = U @ ((C - C.T) / (values[:, None] + values)) @ V.T  # (d_out, d_in)
        rows = (U / values) @ (U.T @ E - C @ V.T)  # what lies outside the row space
        columns = (E @ V - U @ C) / values @ V.T  # what lies outside the column space
        return inside + rows + columns

    return as_matrix(apply, (U.shape[0], V.shape[0]))


def as_matrix(apply: Any, shape: tuple[int, int]) -> Array:
    """Return a linear map of matrices as a matrix over the flattened ones, one column per unit matrix."""
    size = shape[0] * shape[1]
    columns = np.empty((size, size))  # (d_out * d_in, d_out * d_in)
    for j in range(size):
        unit = np.zeros(size)
        unit[j] = 1.0
        columns[:, j] = apply(unit.reshape(shape)).reshape(-1)
    return columns
