"""Rules that see a parameter as a matrix: SOAP rotates it, Muon orthogonalises its momentum."""

from __future__ import annotations

import math
from typing import Any

from ftw import _array
from ftw._array import Array, widen
from ftw.geometry import Diagonal, Polar, Rotated, Scale

from ._update import LinearUpdate, correction, decoupled, inverse_root, number, pick

__all__ = ["muon", "soap"]


@_array.quiet
def soap(
    exp_avg: Array,
    exp_avg_sq: Array,
    left: Array | None,
    right: Array | None,
    step: Any,
    *,
    lr: Any,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """SOAP (Vyas et al. 2025): Adam in the eigenbases of Shampoo's two preconditioners.

    Parameters
    ----------
    exp_avg, exp_avg_sq : array (d_out, d_in)
        First and second moment, both in the rotated basis.
    left, right : array (d_out, d_out), (d_in, d_in), or None
        Eigenvectors in columns, those that the next step rotates with; None for a side that is not rotated.
    step : int or 0-d array
        Steps already taken.
    lr : float or 0-d array
    betas : (float, float)
    eps, weight_decay : float
        Decay is decoupled.
    param : array, optional
        Without it the offset leaves the decay out.
    anticipate : array, optional
        A gradient in the parameter's own basis; it is rotated here.
    damping : float
        See the module.

    Returns
    -------
    LinearUpdate
        The operator is a `Rotated`.
    """
    xp = _array.namespace(exp_avg, exp_avg_sq, left, right, anticipate, param, what="soap")
    m, v = widen(xp, exp_avg), widen(xp, exp_avg_sq)
    if v.ndim != 2:
        raise ValueError(f"soap: the state must be of a matrix, got {tuple(v.shape)}; use adamw for other shapes")
    left, right = (None if q is None else _array.cast(q, v) for q in (left, right))
    step, lr = number(step, v), number(lr, v)
    b1, b2 = betas
    if anticipate is not None:
        a = widen(xp, anticipate)
        a = a if left is None else left.T @ a
        a = a if right is None else a @ right
        v = (b2 * v + (1 - b2) * a**2) / correction(b2, step + 1)
        start: Any = False
    else:
        start = step == 0
        v = v / pick(xp, start, 1.0, correction(b2, step), v)
    inner = inverse_root(xp, v, lr * (1 - b1) / correction(b1, step + 1), eps, damping, start=start, at_start=lr)
    if isinstance(inner, Scale):  # the same in every basis
        operator: Any = inner
    else:
        assert isinstance(inner, Diagonal)
        operator = Rotated(left, inner.values, right)
    offset = inner.apply(m * (b1 / (1 - b1)))  # in the rotated basis
    offset = offset if left is None else left @ offset
    offset = offset if right is None else offset @ right.T
    return LinearUpdate(decoupled(offset, lr, weight_decay, param), operator)


@_array.quiet
def muon(
    momentum_buffer: Array | None,
    step: Any = None,
    *,
    lr: Any,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    adjust_lr_fn: str | None = None,
    floor: float = 0.002,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Muon (Jordan et al. 2024): the differential of the polar factor at the momentum that will be orthogonalised.

    With ``M = c_m buffer + c_g a = U diag(s) V'`` as the next step forms it (c_g = 1 - mu, with Nesterov 1 - mu^2; a is
    the anticipated gradient), the change is ``-lr' U V'`` at g = a and moves with g by ``lr' c_g Polar(U, s, V)``.

    Parameters
    ----------
    momentum_buffer : array (d_out, d_in), or None
        None before the first step.
    step : optional
        Not used.
    lr : float or 0-d array
    momentum, weight_decay : float
        Decay is decoupled.
    nesterov : bool
    adjust_lr_fn : {None, "original", "match_rms_adamw"}
        How lr' follows from lr and the shape: times sqrt(max(1, d_out / d_in)) (None is the same), or
        0.2 sqrt(max(d_out, d_in)); with any other word, not at all.
    floor : float
        Singular values are taken to be at least this multiple of the largest one: P grows like 1 / s, while five
        Newton-Schulz steps amplify nothing more than 3.4445^5, about 500 times.
    param : array, optional
        Without it the offset leaves the decay out.
    anticipate : array, optional
        With None M is the buffer alone; if that is zero too, P is lr' times the identity.
    damping : float
        Added to the singular values, as a multiple of their rms.

    Returns
    -------
    LinearUpdate
        The operator is a `Polar`. It ranks and weighs samples; Newton-Schulz steps leave singular values between 0.7
        and 1.2, so that the change itself is predicted in direction only.
    """
    del step
    some = momentum_buffer if momentum_buffer is not None else anticipate
    if some is None:
        raise ValueError("muon: before the first step there is no momentum: give anticipate=")
    xp = _array.namespace(momentum_buffer, anticipate, param, what="muon")
    if some.ndim != 2:
        raise ValueError(f"muon: the parameter must be a matrix, got {tuple(some.shape)}")
    of_gradient = 1 - momentum**2 if nesterov else 1 - momentum
    of_buffer = momentum**2 if nesterov else momentum
    M = xp.zeros_like(widen(xp, some))
    if momentum_buffer is not None:
        M = M + of_buffer * widen(xp, momentum_buffer)
    if anticipate is not None:
        M = M + of_gradient * widen(xp, anticipate)
    lr = number(lr, M)
    rate = lr * _adjusted(adjust_lr_fn, *M.shape)
    empty = ~xp.any(M != 0)
    if _array.known(empty, wait=True) or (isinstance(rate, (int, float)) and rate == 0):
        return LinearUpdate(decoupled(0.0, lr, weight_decay, param), Scale(rate * of_gradient))
    finite = xp.all(xp.isfinite(M))
    u, s, vt = xp.linalg.svd(xp.where(finite, M, 0.0), full_matrices=False)  # (d_out, r), (r,), (r, d_in)
    largest = xp.max(s)
    s = xp.where(s < floor * largest, floor * largest, s) + damping * xp.sqrt(xp.mean(s * s))
    s = xp.where(largest > 0, s, 1.0)
    s = xp.where(finite, s, xp.nan)  # an SVD of a NaN raises on some backends: it must show as one
    operator = Polar(u, s / _array.scalar_like(rate * of_gradient, s), vt)
    offset = rate * xp.where(largest > 0, u @ vt, 0.0)
    if anticipate is not None:
        offset = offset - operator.apply(anticipate)
    return LinearUpdate(decoupled(offset, lr, weight_decay, param), operator)


def _adjusted(adjust_lr_fn: str | None, height: int, width: int) -> float:
    if adjust_lr_fn is None or adjust_lr_fn == "original":
        return math.sqrt(max(1.0, height / width))
    return 0.2 * math.sqrt(max(height, width)) if adjust_lr_fn == "match_rms_adamw" else 1.0
