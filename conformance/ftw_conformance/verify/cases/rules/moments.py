"""Adam and its kin, Adagrad, RMSprop, Adadelta."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .common import damped, decayed, over, second

__all__ = ["adadelta", "adagrad", "adam", "adamax", "nadam", "radam", "rmsprop"]

Array = Any
State = dict[str, Any]


def adam(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    betas: Any = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    param: Any = None,
    eps_root: float = 0.0,
    nesterov: bool = False,
    decoupled: bool = False,
) -> Array:
    """Adam, AdamW, AMSGrad, and optax's Nesterov variant."""
    b1, b2 = betas
    t = step + 1
    if weight_decay and not decoupled:
        g = g + weight_decay * param
    m = b1 * s["exp_avg"] + (1 - b1) * g
    v, own = second(s["exp_avg_sq"], step, b2, a)
    if s.get("max_exp_avg_sq") is not None:
        v = np.maximum(v, s["max_exp_avg_sq"])
    hat = m / (1 - b1**t)
    if nesterov:
        hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    if step == 0 and a is None:  # no second moment yet: the identity in place of the momentum's own coefficient
        factor = (
            (1 - b1) / (1 - b1**t) if not nesterov else b1 * (1 - b1) / (1 - b1 ** (t + 1)) + (1 - b1) / (1 - b1**t)
        )
        change = -lr * hat / factor
    else:
        change = -lr * over(hat, v, damped(v / own, eps, damping, eps_root))
    return decayed(change, lr, weight_decay, param) if decoupled and weight_decay else change


def nadam(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    betas: Any = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    param: Any = None,
) -> Array:
    """NAdam as torch.optim has it."""
    b1, b2 = betas
    t = step + 1
    if weight_decay and not decoupled_weight_decay:
        g = g + weight_decay * param
    mu = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    later = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = float(s["mu_product"]) * mu
    m = b1 * s["exp_avg"] + (1 - b1) * g
    v, own = second(s["exp_avg_sq"], step, b2, a)
    sums = g * (1 - mu) / (1 - product) + m * later / (1 - product * later)
    if step == 0 and a is None:
        change = -lr * sums / ((1 - mu) / (1 - product) + (1 - b1) * later / (1 - product * later))
    else:
        change = -lr * over(sums, v, damped(v / own, eps, damping))
    return decayed(change, lr, weight_decay, param) if decoupled_weight_decay and weight_decay else change


def radam(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    betas: Any = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    param: Any = None,
) -> Array:
    """RAdam as torch.optim has it; the second moment is uncorrected there, and corrected with the step it is of."""
    b1, b2 = betas
    t = step + 1
    if weight_decay and not decoupled_weight_decay:
        g = g + weight_decay * param
    hat = (b1 * s["exp_avg"] + (1 - b1) * g) / (1 - b1**t)
    rho = 2 / (1 - b2) - 1
    rho_t = rho - 2 * t * b2**t / (1 - b2**t)
    if rho_t > 5:
        v, own = second(s["exp_avg_sq"], step, b2, a)
        rectify = math.sqrt((rho_t - 4) * (rho_t - 2) * rho / ((rho - 4) * (rho - 2) * rho_t))
        change = -lr * over(hat * rectify * math.sqrt(own), v, damped(v, eps, damping))
    else:
        change = -lr * hat
    return decayed(change, lr, weight_decay, param) if decoupled_weight_decay and weight_decay else change


def adamax(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    betas: Any = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    param: Any = None,
) -> Array:
    """Adamax as torch.optim has it."""
    b1, b2 = betas
    if weight_decay:
        g = g + weight_decay * param
    u = s["exp_inf"]
    if a is not None:
        u = np.maximum(b2 * u, np.abs(a) + eps) if np.any(u > 0) or np.any(a != 0) else 0 * u
    hat = (b1 * s["exp_avg"] + (1 - b1) * g) / (1 - b1 ** (step + 1))
    if step == 0 and a is None:
        return -lr * hat
    return -lr * over(hat, u, u + damping * np.sqrt(np.mean(u * u)))


def adagrad(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
    param: Any = None,
) -> Array:
    """Adagrad as torch.optim has it."""
    if weight_decay:
        g = g + weight_decay * param
    v = s["sum"] if a is None else s["sum"] + a * a
    rate = lr / (1 + step * lr_decay)
    if step == 0 and a is None and not np.any(v > 0):
        return -rate * g
    return -rate * over(g, v, damped(v, eps, damping, eps_root))


def rmsprop(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
    param: Any = None,
) -> Array:
    """RMSprop as torch.optim has it."""
    if weight_decay:
        g = g + weight_decay * param
    v = s["square_avg"] if a is None else alpha * s["square_avg"] + (1 - alpha) * a * a
    if centered:
        mean = s["grad_avg"] if a is None else alpha * s["grad_avg"] + (1 - alpha) * a
        v = np.maximum(v - mean * mean, 0.0)
    update = g * 1.0 if step == 0 and a is None else over(g, v, damped(v, eps, damping, eps_root))
    if momentum and s.get("momentum_buffer") is not None:
        update = momentum * s["momentum_buffer"] + update
    return -lr * update


def adadelta(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    param: Any = None,
) -> Array:
    """Adadelta as torch.optim has it."""
    if weight_decay:
        g = g + weight_decay * param
    if step == 0 and a is None:
        return -lr * g
    v = s["square_avg"] if a is None else rho * s["square_avg"] + (1 - rho) * a * a
    return -lr * over(g * np.sqrt(s["acc_delta"] + eps), v, damped(v, 0.0, damping, eps))
