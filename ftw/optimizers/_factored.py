"""Adafactor: a second moment kept as its row and column means, which makes P a Kronecker product of diagonals."""

from __future__ import annotations

import math
from typing import Any

from ftw import _array
from ftw._array import Array, scalar_like, widen
from ftw.geometry import Diagonal, Kronecker, Operator, Scale

from ._update import LinearUpdate, decoupled, inverse_root, number, pick, rule

__all__ = ["adafactor"]


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
    alpha = xp.where(relative > eps[1], relative, eps[1]) * _least(xp, lr, (step + 1) ** -0.5, p)
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


def _inverse(xp: Any, v: Any, damping: float) -> Any:
    """Return ``1 / (sqrt(v) + damping * rms(sqrt v))``, zero where v is."""
    root = xp.sqrt(v) + damping * xp.sqrt(xp.sum(v) / max(math.prod(v.shape), 1))
    return xp.where(root > 0, 1 / xp.where(root > 0, root, 1.0), 0 * root)


def _clipped(xp: Any, operator: Operator, a: Any, alpha: Any, d: float) -> Operator:
    """Return the operator divided by ``max(1, rms(update) / d)``, where the update is its answer to a, less alpha."""
    update = operator.apply(a) / alpha
    size = xp.sqrt(xp.sum(update * update) / max(math.prod(a.shape), 1)) / d  # ()
    clip = xp.where(size > 1, size, 1.0)
    if isinstance(operator, Kronecker):
        return Kronecker(operator.left / clip, operator.right)
    return Diagonal(operator.values / clip) if isinstance(operator, Diagonal) else operator


def _least(xp: Any, a: Any, b: Any, like: Any) -> Any:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return min(a, b)
    less = scalar_like(a, like) < scalar_like(b, like)
    return pick(xp, less, a, b, like)
