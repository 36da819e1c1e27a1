"""Rules whose response to a matrix is not entry by entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ftw_conformance.verify.cases.explicit import polar

from .common import decayed
from .moments import adam

__all__ = ["adafactor", "hf_adafactor", "muon", "soap"]

Array = Any
State = dict[str, Any]


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


def hf_adafactor(
    g: Array,
    s: State,
    step: int,
    a: Any,
    damping: float,
    *,
    lr: float,
    param: Array,
    beta1: float | None = None,
    decay_rate: float = -0.8,
    eps: Any = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
) -> Array:
    """Adafactor as transformers has it; a parameter whose moments are at their floor has had no gradient."""
    t = step + 1
    if relative_step:
        lr = min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t))
    if scale_parameter:
        lr *= max(eps[1], float(np.sqrt(np.mean(param**2))))
    keep = 1 - t**decay_rate

    def moment(v: Array, axis: Any) -> Array:
        if a is None:
            return v
        square = a * a + eps[0]
        return keep * v + (1 - keep) * (square if axis is None else np.mean(square, axis=axis))

    def inverse(v: Array) -> Array:
        root = np.sqrt(v) + damping * np.sqrt(np.mean(v))
        return np.where(root > 0, 1 / np.where(root > 0, root, 1.0), 0.0)

    if step == 0 and a is None:
        unclipped = np.ones(g.shape)
    elif g.ndim < 2:
        v = moment(s["variance"], None)
        unclipped = inverse(v) * (np.max(v) > 2 * eps[0])
    else:
        r, c = moment(s["exp_avg_sq_row"], -1), moment(s["exp_avg_sq_col"], -2)
        mean = np.mean(r, axis=-1, keepdims=True)
        here = np.max(r) > 2 * eps[0]
        unclipped = inverse(r / np.where(mean == 0, 1.0, mean))[..., :, None] * inverse(c)[..., None, :] * here
    clip = 1.0 if a is None else max(1.0, float(np.sqrt(np.mean((a * unclipped) ** 2))) / clip_threshold)
    update = lr * unclipped * g / clip
    if beta1 is not None:
        update = beta1 * s["exp_avg"] + (1 - beta1) * update
    return -update - lr * weight_decay * param
