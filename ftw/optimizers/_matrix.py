"""Rules that see a parameter as a matrix: SOAP rotates it, Muon orthogonalises its momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ftw import _array
from ftw._array import Array, widen
from ftw.geometry import Diagonal, Gains, Polar, Rotated, Scale

from ._update import LinearUpdate, correction, decoupled, inverse_root, number, pick, rule

__all__ = ["muon", "soap"]


@rule
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


@rule
def muon(
    momentum_buffer: Array | None,
    step: Any = None,
    *,
    lr: Any,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    adjust_lr_fn: str | None = None,
    ns_coefficients: Sequence[Any] = (3.4445, -4.7750, 2.0315),
    ns_steps: int = 5,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Muon (Jordan et al. 2024): the derivative of its Newton-Schulz steps at the momentum that will go through them.

    With ``M = c_m buffer + c_g a = U diag(s) V'`` as the next step forms it (c_g = 1 - mu, with Nesterov 1 - mu^2; a is
    the anticipated gradient), the change is ``-lr' U f(s / |s|) V'`` at g = a, where f takes the steps ``x <- c0 x +
    c1 x^3 + c2 x^5``: it brings singular values close to one. With g it moves by ``lr' c_g / |s|`` times the derivative
    of this function of singular values, for which see `ftw.Polar`. Its symmetric part has gains of both signs, for f
    goes up and down on its way; those below zero are left out, which leaves the nearest PSD operator.

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
    ns_coefficients : three floats, or several rows of three
        Of the Newton-Schulz polynomial; of several, one a step.
    ns_steps : int
        Not used where there are several rows.
    param : array, optional
        Without it the offset leaves the decay out.
    anticipate : array, optional
        With None M is the buffer alone; if that is zero too, P is lr' times the identity.
    damping : float
        Singular values s count as ``sqrt(s^2 + d^2)`` in the response, d a multiple of their rms: P is the derivative
        of ``U h(s) V'`` with ``h(s) = s f(x) / x``, x the raised and normalised values.

    Returns
    -------
    LinearUpdate
        The operator is a `Polar`. It ranks and weighs samples: the change is predicted at g = a and, nearby, in
        direction.
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
    largest = xp.where(largest > 0, largest, 1.0)
    unit = s / largest  # (r,): squares of the values themselves could overflow
    norm = xp.sqrt(xp.sum(unit * unit))
    least = damping * norm / math.sqrt(s.shape[0])
    raised = xp.sqrt(unit * unit + least * least)  # (r,)
    length = xp.sqrt(xp.sum(raised * raised))
    length = xp.where(length > 0, length, 1.0)
    steps = _polynomials(ns_coefficients, ns_steps)
    factor = _array.scalar_like(rate * of_gradient, s) / length / largest
    slopes = _slopes(xp, steps, unit / length, least / length, raised / length)  # (r, r), (r, r), (r,)
    gains = [xp.where(slope < 0, 0.0, slope) * factor for slope in slopes]
    broken = xp.where(finite, xp.ones_like(largest), xp.nan)  # an SVD of a NaN raises on some backends: it must show
    operator = Polar(u, s, vt, Gains(*(gain * broken for gain in gains)))
    unit = unit / xp.where(norm > 0, norm, 1.0)
    f = unit * _slope(steps, unit, xp.zeros_like(unit))  # (r,): f(x) = x f[x, 0]
    offset = rate * ((u * (f * broken)[None, :]) @ vt)
    if anticipate is not None:
        offset = offset - operator.apply(anticipate)
    return LinearUpdate(decoupled(offset, lr, weight_decay, param), operator)


def _polynomials(coefficients: Sequence[Any], steps: int) -> list[tuple[Any, Any, Any]]:
    """Return the coefficients of each step."""
    rows = list(coefficients)
    if getattr(rows[0], "ndim", 0) or isinstance(rows[0], (tuple, list)):
        return [(row[0], row[1], row[2]) for row in rows]
    return [(rows[0], rows[1], rows[2])] * steps


def _slopes(xp: Any, steps: list[tuple[Any, Any, Any]], s: Any, least: Any, raised: Any) -> tuple[Any, Any, Any]:
    """Return the differences of ``h(s) = s f(x) / x, x = sqrt(s^2 + d^2)``: h[s_i, s_j], h[s_i, -s_j] and h[s_i, 0].

    With m and e half the sum and half the difference of ``f[x_i, x_j]`` and ``f[x_i, -x_j]`` they are ``m + e (s_i s_j
    - d^2) / (x_i x_j)`` and ``m - e (s_i s_j + d^2) / (x_i x_j)``: f(x) / x is a function q of x^2, and e is ``x_i x_j
    q[x_i^2, x_j^2]``. h is odd as f is. Where s is zero all three agree, so that it does not matter which null vectors
    an SVD returns.
    """
    x, y = raised[:, None], raised[None, :]
    same, other = _slope(steps, x, y), _slope(steps, x, -y)  # (r, r), (r, r)
    middle, apart = (same + other) / 2, (same - other) / 2
    product, sizes, square = s[:, None] * s[None, :], x * y, least * least
    apart = apart / xp.where(sizes > 0, sizes, 1.0)
    outside = _slope(steps, raised, xp.zeros_like(raised))  # (r,)
    return middle + apart * (product - square), middle - apart * (product + square), outside


def _slope(steps: list[tuple[Any, Any, Any]], x: Any, y: Any) -> Any:
    """Return ``(f(x) - f(y)) / (x - y)`` of the odd polynomials one after another: no division, the slope where x = y.

    Of one, ``a x + b x^3 + c x^5``, it is ``a + b (x^2 + x y + y^2) + c (x^4 + x^3 y + x^2 y^2 + x y^3 + y^4)``.
    """
    total: Any = 1.0
    for a, b, c in steps:
        squares, product = x * x + y * y, x * y
        total = total * (a + b * (squares + product) + c * (squares * squares + product * (squares - product)))
        x, y = (z * (a + b * z * z + c * z * z * z * z) for z in (x, y))
    return total


def _adjusted(adjust_lr_fn: str | None, height: int, width: int) -> float:
    if adjust_lr_fn is None or adjust_lr_fn == "original":
        return math.sqrt(max(1.0, height / width))
    return 0.2 * math.sqrt(max(height, width)) if adjust_lr_fn == "match_rms_adamw" else 1.0
