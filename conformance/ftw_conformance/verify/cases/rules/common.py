"""What the update rules share: denominators, corrections, decay."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["damped", "decayed", "over", "second"]

Array = Any


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
