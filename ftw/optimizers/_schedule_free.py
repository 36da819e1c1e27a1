"""Schedule-free rules (Defazio et al. 2024): a base sequence z, and the point y between it and its weighted average.

Gradients are taken at y, the parameter in training. With c the share of z in the average after this step, the next y is

    (1 - c) y + c z - gamma (1 - beta (1 - c)) (d + weight_decay y),

d the gradient, in AdamW divided by the root of its second moment.
"""

from __future__ import annotations

from typing import Any

from ftw import _array
from ftw._array import Array, scalar_like, widen
from ftw.geometry import Scale

from ._update import LinearUpdate, correction, inverse_root, larger, number, pick, rule, smaller

__all__ = ["schedule_free_adamw", "schedule_free_sgd"]


@rule
def schedule_free_adamw(
    z: Array,
    exp_avg_sq: Array,
    step: Any,
    *,
    lr: Any,
    param: Array,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    weight_sum: Any = 0.0,
    lr_max: Any = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Schedule-free AdamW, ``gamma (1 - b1 (1 - c)) / (sqrt(vhat) + eps + damping * rms(sqrt(vhat)))``.

    Parameters
    ----------
    z : array, shaped like the parameter
        The base sequence; before the first step the parameter itself.
    exp_avg_sq : array, shaped like the parameter
        Second moment, corrected as in `adam`.
    step : int or 0-d array
        Steps already taken.
    lr : float or 0-d array
        Before the warm-up, which multiplies it by ``min(1, (step + 1) / warmup_steps)`` to gamma.
    param : array
        y, the parameter in the optimizer's training mode.
    betas : (float, float)
        b1 sets y between z and the average.
    weight_decay : float
        Taken at y, with the gradient's own rate.
    weight_sum, lr_max : float or 0-d array
        Sum of the weights of the steps taken, and their largest gamma. The next weight is
        ``(step + 1)^r * max(gamma, lr_max)^weight_lr_power``, and c its share of the sum.
    eps, anticipate, damping
        As in `adam`.
    """
    xp = _array.namespace(z, exp_avg_sq, param, anticipate, what="schedule_free_adamw")
    y, v = widen(xp, param), widen(xp, exp_avg_sq)
    step, lr = number(step, y), number(lr, y)
    share, rate = _shares(xp, step, lr, betas[0], warmup_steps, weight_sum, lr_max, r, weight_lr_power, y)
    start: Any = False
    if anticipate is not None:
        a = widen(xp, anticipate)
        v = (betas[1] * v + (1 - betas[1]) * a * a) / correction(betas[1], step + 1)
    else:
        start = step == 0
        v = v / pick(xp, start, 1.0, correction(betas[1], step), v)
    operator = inverse_root(xp, v, rate, eps, damping, start=start, at_start=rate)
    return LinearUpdate(_drift(xp, share, rate, weight_decay, y, z), operator)


@rule
def schedule_free_sgd(
    z: Array,
    step: Any,
    *,
    lr: Any,
    param: Array,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    weight_sum: Any = 0.0,
    lr_max: Any = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    anticipate: Array | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Schedule-free SGD, ``gamma (1 - momentum (1 - c))`` times the identity.

    Parameters
    ----------
    momentum : float
        Sets y between z and the average.
    z, step, lr, param, weight_decay, warmup_steps, weight_sum, lr_max, r, weight_lr_power
        As in `schedule_free_adamw`.
    anticipate, damping
        Taken for the sake of a common form; not used.
    """
    del anticipate, damping
    xp = _array.namespace(z, param, what="schedule_free_sgd")
    y = widen(xp, param)
    step, lr = number(step, y), number(lr, y)
    share, rate = _shares(xp, step, lr, momentum, warmup_steps, weight_sum, lr_max, r, weight_lr_power, y)
    return LinearUpdate(_drift(xp, share, rate, weight_decay, y, z), Scale(rate))


def _shares(
    xp: Any,
    step: Any,
    lr: Any,
    beta: float,
    warmup_steps: int,
    weight_sum: Any,
    lr_max: Any,
    r: float,
    power: float,
    like: Any,
) -> tuple[Any, Any]:
    """Return the share c of z in the average, and the rate of the gradient in y."""
    gamma = lr * smaller(xp, 1.0, (step + 1) / warmup_steps, like) if warmup_steps else lr
    before, largest = number(weight_sum, like), number(lr_max, like)
    weight = (step + 1) ** r * larger(xp, gamma, largest, like) ** power
    both = before + weight
    some = both > 0
    share = pick(xp, some, weight / pick(xp, some, both, 1.0, like), 0.0, like)
    return share, gamma * (1 - beta * (1 - share))


def _drift(xp: Any, share: Any, rate: Any, weight_decay: float, y: Any, z: Any) -> Any:
    """Return what y moves by whatever the gradient: toward z, and by its decay."""
    offset = scalar_like(share, y) * (y - widen(xp, z))
    return offset + scalar_like(rate, y) * weight_decay * y if weight_decay else offset
