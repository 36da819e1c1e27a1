"""Rules without a second moment: SGD, averaged SGD, and Lion, whose sign needs a surrogate."""

from __future__ import annotations

from typing import Any

from ftw import _array
from ftw._array import Array, scalar_like
from ftw.geometry import Scale

from ._update import LinearUpdate, coupled, decoupled, inverse_root, number, rule

__all__ = ["asgd", "lion", "sgd"]


@rule
def sgd(
    momentum_buffer: Array | None = None,
    step: Any = None,
    *,
    lr: Any,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
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
    step, anticipate, damping
        Taken for the sake of a common form; not used.
    """
    del step, anticipate, damping
    share = 1.0 if momentum_buffer is None or not momentum else 1.0 - dampening
    operator = Scale(lr * (1.0 + momentum * share if nesterov and momentum else share))
    offset: Any = 0.0
    if momentum_buffer is not None and momentum:
        offset = scalar_like(lr, momentum_buffer) * (momentum * (momentum if nesterov else 1.0)) * momentum_buffer
    return LinearUpdate(coupled(offset, operator, weight_decay, param, "sgd"), operator)


@rule
def asgd(
    step: Any = None,
    *,
    lr: Any,
    eta: Any = None,
    lambd: float = 1e-4,
    weight_decay: float = 0.0,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Averaged SGD (Polyak & Juditsky 1992): the step is that of SGD; the average is kept on the side.

    Parameters
    ----------
    lr : float or 0-d array
    eta : float or 0-d array, optional
        The rate of the next step, as the last one left it; before the first step it is ``lr``.
    lambd : float
        Decay of the parameter, ``eta * lambd * param``; left out of the offset without ``param``.
    weight_decay : float
        Coupled.
    param : array, optional
        Needed with weight decay.
    step, anticipate, damping
        Taken for the sake of a common form; not used.
    """
    del step, anticipate, damping
    rate = lr if eta is None else eta
    operator = Scale(rate)
    offset = coupled(0.0, operator, weight_decay, param, "asgd")
    return LinearUpdate(decoupled(offset, rate, lambd, param), operator)


@rule
def lion(
    exp_avg: Array,
    step: Any,
    *,
    lr: Any,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    param: Array | None = None,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Lion (Chen et al. 2023), ``lr * sign(c)`` with ``c = b1 m + (1 - b1) g``, by a surrogate.

    The derivative of a sign is zero almost everywhere, so that no linearisation says how the samples compare. The
    surrogate writes ``sign(c) = c / abs(c)`` and holds the denominator fixed at the anticipated gradient, as Adam's
    second moment is held fixed:

        P = lr (1 - b1) / (abs(c) + damping * rms(c)),    c = b1 m + (1 - b1) a

    At g = a, without damping, the predicted change is the real one. Give a damping (0.1 is the house's default) for
    anything else: where c happens to be near zero P is large.

    Parameters
    ----------
    exp_avg : array, shaped like the parameter
        The momentum m.
    step : int or 0-d array
        Steps already taken. At step 0 without ``anticipate`` c is zero, and P is lr times the identity.
    lr : float or 0-d array
    betas : (float, float)
        Only the first enters the next change.
    weight_decay : float
        Decoupled; left out of the offset without ``param``.
    """
    xp = _array.namespace(exp_avg, anticipate, param, what="lion")
    b1 = betas[0]
    m = _array.widen(xp, exp_avg)
    step, lr = number(step, m), number(lr, m)
    c = b1 * m if anticipate is None else b1 * m + (1 - b1) * _array.widen(xp, anticipate)
    start = False if anticipate is not None else step == 0
    operator = inverse_root(xp, c * c, lr * (1 - b1), 0.0, damping, start=start, at_start=lr)
    return LinearUpdate(decoupled(operator.apply(m * (b1 / (1 - b1))), lr, weight_decay, param), operator)
