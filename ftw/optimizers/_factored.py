"""Adafactor: a second moment kept as its row and column means, which makes P a Kronecker product of diagonals."""

from __future__ import annotations

import math
from typing import Any

from ftw import _array
from ftw._array import Array, scalar_like, widen
from ftw.geometry import Diagonal, Kronecker, Operator, Scale

from ._update import LinearUpdate, decoupled, inverse_root, number, pick, rule, smaller

__all__ = ["adafactor", "hf_adafactor"]


@rule
def adafactor(
    row_var: Array | None,
    col_var: Array | None,
    variance: Array | None,
    step: Any,
    *,
    lr: Any,
    param: Array,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Adafactor (Shazeer & Stern 2018) as ``torch.optim`` has it, ``alpha / clip * rsqrt(row col / mean(row))``.

    The step is relative, ``alpha = max(eps[1], rms(param)) * min(lr, 1 / sqrt(t))``, and clipped over the whole tensor,
    ``clip = max(1, rms(update) / d)``: evaluated at the anticipated gradient, and 1 without one.

    Parameters
    ----------
    row_var, col_var : array (..., rows, 1) and (..., 1, columns), or None
        Running means of the squared gradients over columns and over rows, for parameters of two axes or more.
    variance : array, or None
        The unfactored second moment of a vector.
    step : int or 0-d array
        Steps already taken.
    lr : float or 0-d array
    param : array
        The parameter: its rms sets the step.
    beta2_decay, d, weight_decay : float
        Decay is decoupled.
    eps : (float or None, float)
        The first floors the root of the second moment (None: the machine epsilon of ``param``).
    anticipate, damping
        See the module; the damping goes to both sides, each relative to its own rms.

    Returns
    -------
    LinearUpdate
        The operator is a `Kronecker` of two vectors for a matrix, a `Diagonal` for other shapes. Rows and columns that
        were never touched have no response.
    """
    xp = _array.namespace(row_var, col_var, variance, param, anticipate, what="adafactor")
    p = widen(xp, param)
    step, lr = number(step, p), number(lr, p)
    share = (step + 1) ** beta2_decay  # 1 - beta2 of this step
    floor = float(xp.finfo(param.dtype).eps) if eps[0] is None else eps[0]
    relative = xp.sqrt(xp.sum(p * p) / max(math.prod(p.shape), 1))  # ()
    alpha = xp.where(relative > eps[1], relative, eps[1]) * smaller(xp, lr, (step + 1) ** -0.5, p)
    a = None if anticipate is None else widen(xp, anticipate)
    start = step == 0 if a is None else False  # nothing is known yet: P is alpha times the identity
    if start is True:
        return LinearUpdate(decoupled(0.0, lr, weight_decay, p), Scale(alpha))

    operator: Operator
    if p.ndim < 2:
        if variance is None:
            raise ValueError(f"adafactor: a parameter {tuple(p.shape)} needs variance=")
        v = widen(xp, variance)
        v = v if a is None else (1 - share) * v + share * a**2
        v = xp.where(v < floor**2, floor**2, v)
        operator = inverse_root(xp, v, alpha, 0.0, damping, start=start, at_start=alpha)
        operator = operator if a is None else _clipped(xp, operator, a, alpha, d)
    else:
        if row_var is None or col_var is None:
            raise ValueError(f"adafactor: a parameter {tuple(p.shape)} needs row_var and col_var")
        r, c = widen(xp, row_var), widen(xp, col_var)  # (..., rows, 1), (..., 1, columns)
        if a is not None:
            r = (1 - share) * r + share * xp.mean(a * a, axis=-1, keepdims=True)
            c = (1 - share) * c + share * xp.mean(a * a, axis=-2, keepdims=True)
        mean = xp.mean(r, axis=-2, keepdims=True)  # (..., 1, 1)
        divisor = xp.where(mean < floor, floor, mean)
        r = r / xp.where(divisor == 0, 1.0, divisor)
        left, right = (pick(xp, start, 1.0, _inverse(xp, v, damping), v) for v in (r, c))
        plain = p.ndim == 2
        operator = Kronecker(alpha * left[:, 0], right[0, :]) if plain else Diagonal(alpha * left * right)
        operator = operator if a is None else _clipped(xp, operator, a, alpha, d)
    return LinearUpdate(decoupled(0.0, lr, weight_decay, p), operator)


@rule
def hf_adafactor(
    exp_avg_sq_row: Array | None,
    exp_avg_sq_col: Array | None,
    variance: Array | None,
    step: Any,
    *,
    lr: Any = None,
    param: Array,
    exp_avg: Array | None = None,
    beta1: float | None = None,
    decay_rate: float = -0.8,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Adafactor (Shazeer & Stern 2018) as fairseq and ``transformers`` have it.

    It differs from `adafactor` in where ``eps`` enters (it is added to the squared gradients), in a learning rate that
    is given or relative, ``min(1e-2, 1 / sqrt(t))``, and in a first moment of the updates.

    Parameters
    ----------
    exp_avg_sq_row, exp_avg_sq_col : array (..., rows) and (..., columns), or None
        Running means of the squared gradients, for parameters of two axes or more.
    variance : array, or None
        The unfactored second moment of a vector.
    step : int or 0-d array
        Steps already taken.
    lr : float or 0-d array
        Not used with ``relative_step``, where a warm-up makes it ``min(1e-6 t, 1 / sqrt(t))``.
    param : array
        Its rms multiplies the rate with ``scale_parameter``, at least ``eps[1]``.
    exp_avg : array, optional
        First moment of the updates, with ``beta1``.
    decay_rate, clip_threshold, weight_decay : float
        The clip is evaluated at the anticipated gradient, and 1 without one. Decay is decoupled.
    anticipate, damping
        See the module; the damping goes to both sides, each relative to its own rms.

    Returns
    -------
    LinearUpdate
        The operator is a `Kronecker` of two vectors for a matrix, a `Diagonal` for other shapes.
    """
    xp = _array.namespace(exp_avg_sq_row, exp_avg_sq_col, variance, param, anticipate, exp_avg, what="hf_adafactor")
    p = widen(xp, param)
    step = number(step, p)
    t = step + 1
    if relative_step:
        lr = smaller(xp, 1e-6 * t if warmup_init else 1e-2, t**-0.5, p)
    elif lr is None:
        raise ValueError("hf_adafactor: lr= is needed without relative_step")
    alpha = number(lr, p)
    if scale_parameter:
        relative = xp.sqrt(xp.sum(p * p) / max(math.prod(p.shape), 1))  # ()
        alpha = xp.where(relative > eps[1], relative, eps[1]) * alpha
    offset: Any = decoupled(0.0, alpha, weight_decay, p)
    rate = alpha
    if beta1 is not None:
        offset = offset if exp_avg is None else offset + beta1 * widen(xp, exp_avg)
        rate = alpha * (1 - beta1)
    a = None if anticipate is None else widen(xp, anticipate)
    start = step == 0 if a is None else False  # nothing is known yet: P is the rate times the identity
    if start is True:
        return LinearUpdate(offset, Scale(rate))
    share = t**decay_rate  # 1 - beta2 of this step

    def moment(v: Any, axis: int | None) -> Any:
        v = widen(xp, v)
        if a is None:
            return v
        square = a * a + eps[0]
        return (1 - share) * v + share * (square if axis is None else xp.mean(square, axis=axis))

    operator: Operator
    if p.ndim < 2:
        if variance is None:
            raise ValueError(f"hf_adafactor: a parameter {tuple(p.shape)} needs variance=")
        v = moment(variance, None)
        values = _inverse(xp, v, damping) * _touched(xp, v, eps[0])
        operator = Diagonal(scalar_like(rate, p) * pick(xp, start, 1.0, values, p))
    else:
        if exp_avg_sq_row is None or exp_avg_sq_col is None:
            raise ValueError(f"hf_adafactor: a parameter {tuple(p.shape)} needs exp_avg_sq_row and exp_avg_sq_col")
        r, c = moment(exp_avg_sq_row, -1), moment(exp_avg_sq_col, -2)  # (..., rows), (..., columns)
        touched = _touched(xp, r, eps[0])
        mean = xp.mean(r, axis=-1, keepdims=True)  # (..., 1)
        r = r / xp.where(mean == 0, 1.0, mean)
        left = scalar_like(rate, p) * pick(xp, start, 1.0, _inverse(xp, r, damping) * touched, p)
        right = pick(xp, start, 1.0, _inverse(xp, c, damping), p)
        left, right = left + xp.zeros_like(r), right + xp.zeros_like(c)
        operator = Kronecker(left, right) if p.ndim == 2 else Diagonal(left[..., :, None] * right[..., None, :])
    if a is not None:
        operator = _clipped(xp, operator, a, rate, clip_threshold)
    return LinearUpdate(offset, operator)


def _touched(xp: Any, v: Any, floor: float) -> Any:
    """Return 1 where any squared gradient was more than the floor that is added to all of them, else 0."""
    return xp.astype(~(xp.max(v) <= 2 * floor), v.dtype)


def _inverse(xp: Any, v: Any, damping: float) -> Any:
    """Return ``1 / (sqrt(v) + damping * rms(sqrt v))``, zero where v is."""
    root = xp.sqrt(v) + damping * xp.sqrt(xp.sum(v) / max(math.prod(v.shape), 1))
    return xp.where(root > 0, 1 / xp.where(root > 0, root, 1.0), 0 * root)


def _clipped(xp: Any, operator: Operator, a: Any, alpha: Any, d: float) -> Operator:
    """Return the operator divided by ``max(1, rms(update) / d)``, where the update is its answer to a, less alpha."""
    still = alpha == 0
    update = operator.apply(a) / pick(xp, still, 1.0, alpha, a)
    size = xp.sqrt(xp.sum(update * update) / max(math.prod(a.shape), 1)) / d  # ()
    clip = xp.where(size > 1, size, 1.0)
    if isinstance(operator, Kronecker):
        return Kronecker(operator.left / clip, operator.right)
    return Diagonal(operator.values / clip) if isinstance(operator, Diagonal) else operator
