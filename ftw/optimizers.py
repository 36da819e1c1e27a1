"""From the state of an optimizer to its next update, as an affine function of the next gradient.

With the second moment fixed, the next change of a parameter is ``-(offset + operator(g))``. The operator is P, the geometry of
the selection; the offset (momentum, decoupled weight decay) does not depend on the choice of samples.

``step`` is the number of steps already taken, t = step + 1 the next one. ``anticipate=a`` folds a gradient, usually the
target's, into the second moment before it is used; without it P explodes on entries that were never touched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array
from ._array import Array, scalar_like
from .geometry import Diagonal, Operator, Scale

__all__ = ["LinearUpdate", "adam", "adamw", "sgd"]


class LinearUpdate(NamedTuple):
    """The next change of a parameter, ``-(offset + operator.apply(g))``.

    Attributes
    ----------
    offset : array shaped like the parameter, or 0.0
        What happens whatever is chosen: momentum and decoupled weight decay.
    operator : operator
        P, the response to the gradient.
    """

    offset: Any
    operator: Operator


def sgd(
    momentum_buffer: Array | None = None,
    *,
    lr: Any,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    param: Array | None = None,
) -> LinearUpdate:
    """SGD, with momentum and Nesterov's variant (Sutskever et al. 2013), coupled weight decay.

    Parameters
    ----------
    momentum_buffer : array, optional
        None before the first step: the buffer then becomes the gradient itself, without dampening.
    lr : float or 0-d array
    momentum, dampening, weight_decay : float
    nesterov : bool
    param : array, optional
        Needed with weight decay.
    """
    first = momentum_buffer is None
    share = 1.0 if first or not momentum else 1.0 - dampening
    response = 1.0 + momentum * share if nesterov and momentum else share
    offset: Any = 0.0
    if momentum_buffer is not None and momentum:
        offset = scalar_like(lr, momentum_buffer) * (momentum * (momentum if nesterov else 1.0)) * momentum_buffer
    value = lr * response
    if weight_decay:
        p = _needed(param, "sgd", "weight_decay")
        offset = offset + scalar_like(value, p) * weight_decay * p
    return LinearUpdate(offset, Scale(value))


def adam(
    exp_avg: Array,
    exp_avg_sq: Array,
    step: Any,
    *,
    lr: Any,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    anticipate: Array | None = None,
    damping: float = 0.0,
    weight_decay: float = 0.0,
    param: Array | None = None,
    max_exp_avg_sq: Array | None = None,
) -> LinearUpdate:
    """Adam (Kingma & Ba 2015), ``lr (1 - b1) / (1 - b1^t) / (sqrt(vhat) + eps + damping * rms(sqrt(vhat)))``.

    Parameters
    ----------
    exp_avg, exp_avg_sq : array, shaped like the parameter
        First and second moment.
    step : int or 0-d array
        Steps already taken.
    lr : float or 0-d array
    betas : (float, float)
    eps : float
    anticipate : array, optional
        A gradient a to fold into the second moment: ``vhat = (b2 v + (1 - b2) a^2) / (1 - b2^(step + 1))``. Without it
        ``vhat = v / (1 - b2^step)``, and at step 0, where there is none, P is lr times the identity.
    damping : float
        Added to the denominator as a multiple of ``rms(sqrt(vhat))`` over the parameter.
    weight_decay : float
        Coupled: the gradient becomes ``g + weight_decay * param``.
    param : array, optional
        Needed with weight decay.
    max_exp_avg_sq : array, optional
        AMSGrad's running maximum of the (uncorrected) second moment (Reddi et al. 2018).

    Returns
    -------
    LinearUpdate
        The operator is a `Diagonal`; ``Scale(0.0)`` where the second moment is zero everywhere (an untouched parameter).
    """
    m, operator = _adam(exp_avg, exp_avg_sq, step, lr, betas, eps, anticipate, damping, max_exp_avg_sq)
    offset = operator.apply(m)
    if weight_decay:
        offset = offset + operator.apply(weight_decay * _needed(param, "adam", "weight_decay"))
    return LinearUpdate(offset, operator)


def adamw(
    exp_avg: Array,
    exp_avg_sq: Array,
    step: Any,
    *,
    lr: Any,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    anticipate: Array | None = None,
    damping: float = 0.0,
    weight_decay: float = 1e-2,
    param: Array | None = None,
    max_exp_avg_sq: Array | None = None,
) -> LinearUpdate:
    """AdamW (Loshchilov & Hutter 2019): `adam` with decoupled weight decay, ``lr * weight_decay * param`` in the offset.

    Without ``param`` the offset leaves the decay out; the operator is not concerned.
    """
    m, operator = _adam(exp_avg, exp_avg_sq, step, lr, betas, eps, anticipate, damping, max_exp_avg_sq)
    offset = operator.apply(m)
    if weight_decay and param is not None:
        offset = offset + scalar_like(lr, param) * weight_decay * param
    return LinearUpdate(offset, operator)


def _adam(
    exp_avg: Any, v: Any, step: Any, lr: Any, betas: Any, eps: float, anticipate: Any, damping: float, v_max: Any
) -> tuple[Any, Operator]:
    """Return what multiplies P in the offset, and P."""
    xp = _array.namespace(exp_avg, v, anticipate, v_max, what="adam")
    b1, b2 = betas
    exp_avg, v = _array.widen(xp, exp_avg), _array.widen(xp, v)
    step, lr = scalar_like(step, v), scalar_like(lr, v)
    after = 1 - b1 ** (step + 1)
    if anticipate is not None:
        v = b2 * v + (1 - b2) * _array.widen(xp, anticipate) ** 2
        correction = 1 - b2 ** (step + 1)
    else:
        correction = 1 - b2**step
    if v_max is not None:
        v = xp.maximum(v, _array.widen(xp, v_max))
    m = exp_avg * (b1 / (1 - b1))
    start = anticipate is None and step == 0
    if start is True:
        return m, Scale(lr)
    correction = _where(xp, start, 1.0, correction)
    operator = preconditioner(xp, v / correction, lr * (1 - b1) / after, eps, damping)
    if start is not False and isinstance(operator, (Diagonal, Scale)):  # step is an array: both cases, same shape
        values = operator.values if isinstance(operator, Diagonal) else xp.zeros_like(v)
        operator = Diagonal(_where(xp, start, lr * xp.ones_like(v), values))
    return m, operator


def preconditioner(xp: Any, v: Any, numerator: Any, eps: float, damping: float) -> Operator:
    """Return ``numerator / (sqrt(v) + eps + damping * rms(sqrt v))``, and zero where v is zero everywhere."""
    touched = xp.any(v != 0)
    if _array.known(touched) is False:
        return Scale(0.0)
    denominator = xp.sqrt(v) + eps  # the parameter's shape
    if damping:
        denominator = denominator + damping * xp.sqrt(xp.mean(v))
    safe = xp.where(denominator > 0, denominator, xp.ones_like(denominator))
    return Diagonal(xp.where(touched, numerator / safe, xp.zeros_like(v)))


def _where(xp: Any, condition: Any, a: Any, b: Any) -> Any:
    """Return a or b; both become arrays only if the condition is one."""
    if isinstance(condition, bool):
        return a if condition else b
    like = b if hasattr(b, "dtype") else a
    return xp.where(condition, xp.asarray(a, dtype=like.dtype, device=_array.device(like)), b)


def _needed(param: Any, what: str, why: str) -> Any:
    if param is None:
        raise ValueError(f"{what}: {why} needs param=, the parameter's current value")
    return param
