"""Adam and its kin: a bias-corrected second moment under a momentum."""

from __future__ import annotations

from typing import Any

from ftw import _array
from ftw._array import Array, widen
from ftw.geometry import Operator

from ._update import LinearUpdate, correction, coupled, decoupled, inverse_root, number, pick, rule

__all__ = ["adam", "adamax", "adamw", "nadam", "radam"]


@rule
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
    eps_root: float = 0.0,
    nesterov: bool = False,
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
        Coupled: the gradient becomes ``g + weight_decay * param``, and so should ``anticipate``.
    param : array, optional
        Needed with weight decay.
    max_exp_avg_sq : array, optional
        AMSGrad's running maximum of the (uncorrected) second moment (Reddi et al. 2018).
    eps_root : float
        Added under the root.
    nesterov : bool
        ``b1 m^ / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)`` in place of ``m^ / (1 - b1^t)``, m^ the next first moment:
        Dozat's NAdam without a schedule of momenta (`nadam` has one).

    Returns
    -------
    LinearUpdate
        The operator is a `Diagonal`; ``Scale(0.0)`` where the second moment is zero everywhere (an untouched
        parameter).
    """
    offset, operator = _adam(
        exp_avg, exp_avg_sq, step, lr, betas, eps, anticipate, damping, max_exp_avg_sq, eps_root, nesterov
    )
    return LinearUpdate(coupled(offset, operator, weight_decay, param, "adam"), operator)


@rule
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
    eps_root: float = 0.0,
    nesterov: bool = False,
) -> LinearUpdate:
    """AdamW (Loshchilov & Hutter 2019): `adam` with decoupled decay, ``lr * weight_decay * param`` in the offset.

    Without ``param`` the offset leaves the decay out; the operator is not concerned.
    """
    offset, operator = _adam(
        exp_avg, exp_avg_sq, step, lr, betas, eps, anticipate, damping, max_exp_avg_sq, eps_root, nesterov
    )
    return LinearUpdate(decoupled(offset, lr, weight_decay, param), operator)


@rule
def nadam(
    exp_avg: Array,
    exp_avg_sq: Array,
    mu_product: Any,
    step: Any,
    *,
    lr: Any,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    anticipate: Array | None = None,
    damping: float = 0.0,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    param: Array | None = None,
) -> LinearUpdate:
    """NAdam (Dozat 2016), with momenta ``mu_t = b1 (1 - 0.96^(t * momentum_decay) / 2)``.

    Parameters
    ----------
    exp_avg, exp_avg_sq : array, shaped like the parameter
    mu_product : float or 0-d array
        Product of the momenta of the steps taken, 1 before the first.
    step, lr, betas, eps, anticipate, damping, weight_decay, param
        As in `adam`.
    momentum_decay : float
    decoupled_weight_decay : bool
        Whether the decay is that of `adamw`.
    """
    xp = _array.namespace(exp_avg, exp_avg_sq, anticipate, param, what="nadam")
    m, v = widen(xp, exp_avg), widen(xp, exp_avg_sq)
    step, lr, product = number(step, v), number(lr, v), number(mu_product, v)
    b1 = betas[0]
    t = step + 1
    mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
    now = mu_next / (1 - product * mu * mu_next)  # of the next first moment
    of_gradient = (1 - mu) / (1 - product * mu) + now * (1 - b1)
    v, start = _second_moment(xp, v, step, betas[1], anticipate)
    operator = inverse_root(xp, v, lr * of_gradient, eps, damping, start=start, at_start=lr)
    offset = operator.apply(m * _array.scalar_like(now * b1 / of_gradient, m))
    if decoupled_weight_decay:
        return LinearUpdate(decoupled(offset, lr, weight_decay, param), operator)
    return LinearUpdate(coupled(offset, operator, weight_decay, param, "nadam"), operator)


@rule
def radam(
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
    decoupled_weight_decay: bool = False,
    param: Array | None = None,
) -> LinearUpdate:
    """RAdam (Liu et al. 2020): Adam without, then with a rectified second moment.

    P is ``lr (1 - b1) / (1 - b1^t)``, and later that times ``r_t sqrt(1 - b2^t) / (sqrt(v) + eps)``. The second
    moment enters once ``rho_t = rho - 2 t b2^t / (1 - b2^t)`` exceeds 5, where ``rho = 2 / (1 - b2) - 1``.

    Parameters
    ----------
    exp_avg, exp_avg_sq : array, shaped like the parameter
    step, lr, betas, eps, anticipate, damping, weight_decay, param
        As in `adam`; eps is added to the uncorrected root.
    decoupled_weight_decay : bool
        Whether the decay is that of `adamw`.

    Returns
    -------
    LinearUpdate
        The operator is a `Scale` while the second moment is left out, a `Diagonal` afterwards; always a `Diagonal`
        where ``step`` is traced.
    """
    xp = _array.namespace(exp_avg, exp_avg_sq, anticipate, param, what="radam")
    m, v = widen(xp, exp_avg), widen(xp, exp_avg_sq)
    step, lr = number(step, v), number(lr, v)
    b1, b2 = betas
    t = step + 1
    after = correction(b2, t)
    rho = 2 / (1 - b2) - 1
    rho_t = rho - 2 * t * (1 - after) / after
    early = rho_t <= 5
    safe = pick(xp, early, 6.0, rho_t, v)
    rectified = ((safe - 4) * (safe - 2) * rho / ((rho - 4) * (rho - 2) * safe)) ** 0.5 if rho > 4 else 1.0
    plain = lr * (1 - b1) / correction(b1, t)
    if anticipate is not None:
        v, own = b2 * v + (1 - b2) * widen(xp, anticipate) ** 2, after
    else:
        own = pick(xp, step == 0, 1.0, correction(b2, step), v)
    operator = inverse_root(xp, v, plain * rectified * own**0.5, eps, damping, start=early, at_start=plain)
    offset = operator.apply(m * (b1 / (1 - b1)))
    if decoupled_weight_decay:
        return LinearUpdate(decoupled(offset, lr, weight_decay, param), operator)
    return LinearUpdate(coupled(offset, operator, weight_decay, param, "radam"), operator)


@rule
def adamax(
    exp_avg: Array,
    exp_inf: Array,
    step: Any,
    *,
    lr: Any,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    anticipate: Array | None = None,
    damping: float = 0.0,
    weight_decay: float = 0.0,
    param: Array | None = None,
) -> LinearUpdate:
    """Adamax (Kingma & Ba 2015), ``lr (1 - b1) / (1 - b1^t) / u`` with ``u = max(b2 u, abs(a) + eps)``.

    Parameters
    ----------
    exp_avg, exp_inf : array, shaped like the parameter
        First moment, and the running maximum u.
    step, lr, betas, eps, anticipate, damping, weight_decay, param
        As in `adam`; the damping is relative to the rms of u.
    """
    xp = _array.namespace(exp_avg, exp_inf, anticipate, param, what="adamax")
    m, u = widen(xp, exp_avg), widen(xp, exp_inf)
    step, lr = number(step, u), number(lr, u)
    b1, b2 = betas
    start: Any = False
    if anticipate is not None:
        a = widen(xp, anticipate)
        untouched = ~xp.any(u > 0) & ~xp.any(a != 0)
        u = xp.where(untouched, 0.0, xp.maximum(b2 * u, xp.abs(a) + eps))
    else:
        start = step == 0
    operator = inverse_root(xp, u * u, lr * (1 - b1) / correction(b1, step + 1), 0.0, damping, start=start, at_start=lr)
    offset = operator.apply(m * (b1 / (1 - b1)))
    return LinearUpdate(coupled(offset, operator, weight_decay, param, "adamax"), operator)


def _second_moment(xp: Any, v: Any, step: Any, b2: Any, anticipate: Any, v_max: Any = None) -> tuple[Any, Any]:
    """Return the corrected second moment, and whether there is none yet."""
    start: Any = False
    if anticipate is not None:
        own = correction(b2, step + 1)
        a = widen(xp, anticipate)
        if v_max is None:
            return v * (b2 / own) + (a * a) * ((1 - b2) / own), start
        v = b2 * v + (1 - b2) * (a * a)
    else:
        start = step == 0
        own = pick(xp, start, 1.0, correction(b2, step), v)
    if v_max is not None:
        v = xp.maximum(v, widen(xp, v_max))
    return v / own, start


def _adam(
    m: Any,
    v: Any,
    step: Any,
    lr: Any,
    betas: Any,
    eps: float,
    anticipate: Any,
    damping: float,
    v_max: Any,
    eps_root: float,
    nesterov: bool,
) -> tuple[Any, Operator]:
    """Return the offset of the momentum, and P."""
    xp = _array.namespace(m, v, anticipate, v_max, what="adam")
    m, v = widen(xp, m), widen(xp, v)
    step, lr = number(step, v), number(lr, v)
    b1, b2 = betas
    now = 1 / correction(b1, step + 1)  # of the next first moment
    of_gradient, of_moment = now * (1 - b1), now * b1
    if nesterov:
        later = b1 / correction(b1, step + 2)
        of_gradient, of_moment = of_gradient + later * (1 - b1), later * b1
    v, start = _second_moment(xp, v, step, b2, anticipate, v_max)
    operator = inverse_root(xp, v, lr * of_gradient, eps, damping, eps_root=eps_root, start=start, at_start=lr)
    return operator.apply(m * _array.scalar_like(of_moment / of_gradient, m)), operator
