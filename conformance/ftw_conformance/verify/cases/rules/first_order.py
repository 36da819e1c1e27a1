"""SGD and its kin, Lion, and the schedule-free rules."""

from __future__ import annotations

from typing import Any

import numpy as np

from .common import damped, decayed, over, second

__all__ = ["asgd", "lion", "schedule_free_adamw", "schedule_free_sgd", "sgd"]

Array = Any
State = dict[str, Any]


def sgd(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    param: Any = None,
) -> Array:
    """SGD as torch.optim has it."""
    if weight_decay:
        g = g + weight_decay * param
    if momentum:
        old = s["momentum_buffer"]
        buffer = g if old is None or step == 0 else momentum * old + (1 - dampening) * g
        g = g + momentum * buffer if nesterov else buffer
    return -lr * g


def lion(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    betas: Any = (0.9, 0.99),
    weight_decay: float = 0.0,
    param: Any = None,
) -> Array:
    """Lion with ``sign(c) = c / |c|``, the denominator frozen."""
    b1 = betas[0]
    c = b1 * s["exp_avg"] + (1 - b1) * g
    frozen = b1 * s["exp_avg"] + (1 - b1) * (0.0 if a is None else a)
    if step == 0 and a is None:
        change = -lr * c / (1 - b1)
    else:
        size = np.abs(frozen)
        change = -lr * over(c, size, size + damping * np.sqrt(np.mean(size**2)))
    return decayed(change, lr, weight_decay, param) if weight_decay else change


def asgd(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    lambd: float = 1e-4,
    weight_decay: float = 0.0,
    param: Any = None,
) -> Array:
    """Averaged SGD as torch.optim has it: the parameter is shrunk, then moved."""
    eta = lr if s.get("eta") is None else float(s["eta"])
    if param is None:
        return -eta * g
    g = g + weight_decay * param
    return (param * (1 - lambd * eta) - eta * g) - param


def schedule_free_sgd(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    param: Array,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    **schedule: Any,
) -> Array:
    """Schedule-free SGD from the sequences of its paper."""
    return _averaged(g + weight_decay * param, s, step, lr, momentum, param, **schedule)


def schedule_free_adamw(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    param: Array,
    betas: Any = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    **schedule: Any,
) -> Array:
    """Schedule-free AdamW from the sequences of its paper."""
    v, own = second(s["exp_avg_sq"], step, betas[1], a)
    scaled = g if step == 0 and a is None else over(g, v, damped(v / own, eps, damping))
    return _averaged(scaled + weight_decay * param, s, step, lr, betas[0], param, **schedule)


def _averaged(
    direction: Array,
    s: State,
    step: int,
    lr: float,
    beta: float,
    y: Array,
    *,
    warmup_steps: int = 0,
    weight_sum: float = 0.0,
    lr_max: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> Array:
    """Step z, average it into x, and return the change of the point between them; x is read off from y and z."""
    z, gamma = s["z"], lr * min(1.0, (step + 1) / max(warmup_steps, 1))
    x = (y - (1 - beta) * z) / beta
    weight = (step + 1) ** r * max(gamma, lr_max) ** weight_lr_power
    c = weight / (weight_sum + weight)
    z = z - gamma * direction
    x = (1 - c) * x + c * z
    return (1 - beta) * z + beta * x - y
