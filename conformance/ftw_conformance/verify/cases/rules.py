"""Update rules written out from their papers and from ``torch.optim``, in float64 NumPy, one step at a time.

Each returns the *next change of the parameter* as a function of the next gradient g, with the second moment frozen
where the selection freezes it: at the anticipated gradient a, or as the last step left it. The change is affine in g,
so that two calls give both the offset and the response, whatever way the core arrives at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["RULES", "Rule"]

Array = Any
State = dict[str, Any]
Rule = Callable[..., Array]
"""``rule(g, state, step, a, damping, **options) -> change``; ``step`` counts the steps taken, ``a`` may be None."""


def damped(v: Array, eps: float, damping: float, eps_root: float = 0.0) -> Array:
    """Return ``sqrt(v + eps_root) + eps + damping * rms(sqrt v)``."""
    return np.sqrt(v + eps_root) + eps + damping * np.sqrt(np.mean(v))


def over(numerator: Array, v: Array, denominator: Array) -> Array:
    """Divide; zero where the second moment is zero everywhere or the denominator is."""
    if not np.any(v != 0):
        return np.zeros_like(numerator * np.ones_like(v))
    return np.where(denominator == 0, 0.0, numerator / np.where(denominator == 0, 1.0, denominator))


def second(v: Array, step: int, b2: float, a: Array | None) -> tuple[Array, float]:
    """Return the frozen second moment, uncorrected, and its correction."""
    if a is not None:
        return b2 * v + (1 - b2) * a * a, 1 - b2 ** (step + 1)
    return v, 1 - b2**step if step else 1.0


def decayed(change: Array, lr: float, decay: float, param: Array | None) -> Array:
    """Return the change with a decoupled decay."""
    return change if param is None else change - lr * decay * param


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


def adafactor(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    param: Array,
    beta2_decay: float = -0.8,
    eps: Any = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
) -> Array:
    """Adafactor as torch.optim has it, ``eps[0]`` given."""
    t = step + 1
    keep = 1 - t**beta2_decay
    rho = min(lr, 1 / math.sqrt(t))
    alpha = max(eps[1], np.sqrt(np.mean(param**2))) * rho
    if step == 0 and a is None:
        return decayed(-alpha * g, lr, weight_decay, param)
    if g.ndim < 2:
        v = s["variance"] if a is None else keep * s["variance"] + (1 - keep) * a * a
        floored = np.maximum(v, eps[0] ** 2)
        divisor = np.sqrt(floored) + damping * np.sqrt(np.mean(floored))
    else:
        r, c = s["row_var"], s["col_var"]
        if a is not None:
            r = keep * r + (1 - keep) * np.mean(a * a, axis=-1, keepdims=True)
            c = keep * c + (1 - keep) * np.mean(a * a, axis=-2, keepdims=True)
        r = r / np.maximum(np.mean(r, axis=-2, keepdims=True), eps[0])
        divisor = (np.sqrt(r) + damping * np.sqrt(np.mean(r))) * (np.sqrt(c) + damping * np.sqrt(np.mean(c)))
    unclipped = np.where(divisor > 0, 1 / np.where(divisor > 0, divisor, 1.0), 0.0)
    clip = 1.0 if a is None else max(1.0, float(np.sqrt(np.mean((a * unclipped) ** 2))) / d)
    return decayed(-alpha * g * unclipped / clip, lr, weight_decay, param)


def soap(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    betas: Any = (0.95, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    param: Any = None,
) -> Array:
    """Adam in the eigenbases, rotated back."""
    rows, columns = g.shape
    U = np.eye(rows) if s["left"] is None else s["left"]
    V = np.eye(columns) if s["right"] is None else s["right"]
    inner = None if a is None else U.T @ a @ V
    change = U @ adam(U.T @ g @ V, s, step, inner, damping, lr=lr, betas=betas, eps=eps) @ V.T
    return decayed(change, lr, weight_decay, param) if weight_decay else change


def muon(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    adjust_lr_fn: Any = None,
    ns_coefficients: Any = (3.4445, -4.7750, 2.0315),
    ns_steps: int = 5,
    param: Any = None,
) -> Array:
    """Return the Newton-Schulz steps of the momentum, and their derivative there without its negative part."""
    from .explicit import polar

    mine, theirs = (1 - momentum**2, momentum**2) if nesterov else (1 - momentum, momentum)
    M = np.zeros(g.shape)
    M = M if s["momentum_buffer"] is None else M + theirs * s["momentum_buffer"]
    M = M if a is None else M + mine * a
    rows, columns = g.shape
    rate = lr * {"match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)), "none": 1.0}.get(
        adjust_lr_fn, math.sqrt(max(1, rows / columns))
    )
    if not np.any(M):
        change = -rate * mine * g
    else:
        odd = np.zeros((6, ns_steps))
        odd[1::2] = np.asarray(ns_coefficients, dtype=float).reshape(-1, 3).T
        steps = [np.polynomial.Polynomial(c) for c in odd.T]

        def f(x: Array) -> Array:
            for step in steps:
                x = step(x)
            return x

        def slope(x: Array) -> Array:
            out = np.ones_like(x)
            for step in steps:
                out, x = out * step.deriv()(x), step(x)
            return out

        u, values, vt = np.linalg.svd(M, full_matrices=False)
        least = damping * np.sqrt(np.mean(values**2))
        length = np.linalg.norm(np.sqrt(values**2 + least**2))
        x, raised = values / length, np.sqrt(values**2 + least**2) / length
        h = x * f(raised) / raised
        steep = (least / length) ** 2 * f(raised) / raised**3 + x**2 * slope(raised) / raised**2  # h'
        apart = x[:, None] - x + np.eye(len(x))
        both = np.where(np.eye(len(x)) > 0, steep, (h[:, None] - h) / apart)
        gains = [both, (h[:, None] + h) / (x[:, None] + x), h / x]
        gains = [np.maximum(gain, 0) / length for gain in gains]
        here = np.zeros(g.shape) if a is None else a
        there = u @ np.diag(f(values / np.linalg.norm(values))) @ vt
        change = -rate * (there + mine * polar(u, values, vt, g - here, gains))
    return decayed(change, lr, weight_decay, param) if weight_decay else change


RULES: dict[str, Rule] = {
    "adafactor": adafactor,
    "adagrad": adagrad,
    "adam": adam,
    "adamax": adamax,
    "adamw": lambda *args, weight_decay=1e-2, **options: adam(
        *args, weight_decay=weight_decay, decoupled=True, **options
    ),
    "lion": lion,
    "muon": muon,
    "nadam": nadam,
    "radam": radam,
    "rmsprop": rmsprop,
    "sgd": sgd,
    "soap": soap,
}
