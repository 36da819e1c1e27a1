"""Adagrad, RMSprop and Adadelta: a second moment without bias correction."""

from __future__ import annotations

from typing import Any

from ftw import _array
from ftw._array import Array, scalar_like, widen

from ._update import LinearUpdate, coupled, inverse_root, number, rule

__all__ = ["adadelta", "adagrad", "rmsprop"]


@rule
def adagrad(
    sum: Array,
    step: Any,
    *,
    lr: Any,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Adagrad (Duchi et al. 2011), ``lr / (1 + (t - 1) lr_decay) / (sqrt(sum) + eps)``, coupled weight decay.

    Parameters
    ----------
    sum : array, shaped like the parameter
        Sum of the squared gradients; ``anticipate`` adds its square. At step 0, all zero and nothing anticipated, P is
        the learning rate times the identity.
    step : int or 0-d array
        Steps already taken.
    lr : float or 0-d array
    lr_decay, eps, weight_decay : float
    eps_root : float
        Added under the root, as some implementations do in place of ``eps``.
    param : array, optional
        Needed with weight decay.
    anticipate, damping
        See the module.
    """
    xp = _array.namespace(sum, anticipate, param, what="adagrad")
    v = widen(xp, sum)
    step, lr = number(step, v), number(lr, v)
    rate = lr / (1 + step * lr_decay)
    start: Any = False
    if anticipate is not None:
        v = v + widen(xp, anticipate) ** 2
    elif step is not False and not (isinstance(step, (int, float)) and step > 0):
        start = ~xp.any(v > 0) if isinstance(step, (int, float)) else (step == 0) & ~xp.any(v > 0)
        known = _array.known(start)
        start = start if known is None else known
    operator = inverse_root(xp, v, rate, eps, damping, eps_root=eps_root, start=start, at_start=rate)
    return LinearUpdate(coupled(0.0, operator, weight_decay, param, "adagrad"), operator)


@rule
def rmsprop(
    square_avg: Array,
    step: Any,
    *,
    lr: Any,
    alpha: float = 0.99,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    grad_avg: Array | None = None,
    momentum_buffer: Array | None = None,
    weight_decay: float = 0.0,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """RMSprop (Tieleman & Hinton 2012; centered: Graves 2013), ``lr / (sqrt(v) + eps)``, coupled weight decay.

    Parameters
    ----------
    square_avg : array, shaped like the parameter
        Running mean of the squared gradients.
    step : int or 0-d array
        Steps already taken. At step 0, nothing anticipated, P is lr times the identity.
    lr : float or 0-d array
    alpha, eps, momentum, weight_decay : float
    eps_root : float
        Added under the root, as some implementations do in place of ``eps``.
    centered : bool
        v less the square of ``grad_avg``, which is then needed.
    grad_avg, momentum_buffer : array, optional
        Running mean of the gradients, and of the updates.
    param : array, optional
        Needed with weight decay.
    anticipate, damping
        See the module.
    """
    xp = _array.namespace(square_avg, grad_avg, momentum_buffer, anticipate, param, what="rmsprop")
    v = widen(xp, square_avg)
    step, lr = number(step, v), number(lr, v)
    if centered and grad_avg is None:
        raise ValueError("rmsprop: centered=True needs grad_avg=, the running mean of the gradients")
    mean = widen(xp, grad_avg) if centered else None
    if anticipate is not None:
        a = widen(xp, anticipate)
        v = alpha * v + (1 - alpha) * a**2
        mean = None if mean is None else alpha * mean + (1 - alpha) * a
    if mean is not None:
        v = v - mean**2
        v = xp.where(v < 0, 0.0, v)  # rounding
    start = False if anticipate is not None else step == 0
    operator = inverse_root(xp, v, lr, eps, damping, eps_root=eps_root, start=start, at_start=lr)
    offset: Any = 0.0
    if momentum and momentum_buffer is not None:
        offset = scalar_like(lr, v) * momentum * widen(xp, momentum_buffer)
    return LinearUpdate(coupled(offset, operator, weight_decay, param, "rmsprop"), operator)


@rule
def adadelta(
    square_avg: Array,
    acc_delta: Array,
    step: Any,
    *,
    lr: Any,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Adadelta (Zeiler 2012), ``lr sqrt(u + eps) / (sqrt(v + eps) + damping * rms(sqrt v))``, coupled weight decay.

    Parameters
    ----------
    square_avg, acc_delta : array, shaped like the parameter
        Running means of the squared gradients, v, and of the squared updates, u.
    step : int or 0-d array
        Steps already taken. At step 0, nothing anticipated, P is lr times the identity.
    lr : float or 0-d array
    rho, eps, weight_decay : float
    param : array, optional
        Needed with weight decay.
    anticipate, damping
        See the module.
    """
    xp = _array.namespace(square_avg, acc_delta, anticipate, param, what="adadelta")
    v, u = widen(xp, square_avg), widen(xp, acc_delta)
    step, lr = number(step, v), number(lr, v)
    start: Any = False
    if anticipate is not None:
        v = rho * v + (1 - rho) * widen(xp, anticipate) ** 2
    else:
        start = step == 0
    numerator = scalar_like(lr, u) * xp.sqrt(u + eps)
    operator = inverse_root(xp, v, numerator, 0.0, damping, eps_root=eps, start=start, at_start=lr)
    return LinearUpdate(coupled(0.0, operator, weight_decay, param, "adadelta"), operator)
