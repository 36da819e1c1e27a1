"""Units of gradients: a power of two that brings inner products into the range of their dtype, and exactly back.

Products of gradients square their units: in float32 those of 1e-22 vanish, those of 1e20 overflow. The choice does not
depend on units: candidates and target may both be multiplied by one c = 2^-e, which changes no digit. Scores, the Gram
matrix and the squared lengths are then c^2 times as large, and the weights the same. While all sizes are ordinary, c is
one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import _array
from .gradients import Dense, Record, Sum

__all__ = ["common_factor", "is_one", "scaled", "smallest_square", "times"]


def smallest_square(xp: Any, dtype: Any) -> float:
    """Return the squared length below which too few digits are left: its terms are smaller yet, and round to zero."""
    info = xp.finfo(dtype)
    out: float = float(info.smallest_normal) / float(info.eps) ** 0.5
    return out


def common_factor(xp: Any, records: list[Mapping[str, Record]], targets: list[Any], dtype: Any) -> Any:
    """Return c, a Python float or, in JAX, a 0-d array: 1 where no size is extreme.

    Parameters
    ----------
    records : list of mappings
        Candidates and target samples; the largest entry of each factor counts.
    targets : list of arrays
        The target's gradients.
    dtype
        In which inner products are taken.

    Notes
    -----
    Two passes over the factors, without a temporary of their size.
    """
    like = targets[0]
    limit = math.floor(math.log2(float(xp.finfo(dtype).max))) // 3  # squares, and sums of many of them, stay in range
    factors = [_exponents(xp, r) for model in records for record in model.values() for r in _parts(record)]
    sides = [e for each in factors for e in each] + [_exponent(xp, g) for g in targets]
    gradients = _largest(xp, [sum(each[1:], each[0]) for each in factors], like)
    target = _largest(xp, sides[len(sides) - len(targets) :], like)
    gradients = xp.where(xp.isfinite(gradients), gradients, target)  # all of them zero: the other side decides
    target = xp.where(xp.isfinite(target), target, gradients)
    e = xp.round((gradients + target) / 2)
    every = xp.stack(sides)
    extreme = xp.any((xp.abs(every) > limit) & xp.isfinite(every))
    e = xp.where(extreme & xp.isfinite(e), e, xp.zeros_like(e))
    return _power(xp, -e, 3 * limit - 1)


def is_one(factor: Any) -> bool:
    """Return whether a factor of `common_factor` is known to be one."""
    return isinstance(factor, float) and factor == 1.0


def scaled(xp: Any, record: Record, factor: Any) -> Record:
    """Return the record of ``factor * G_i``; the inputs of outer products are brought to about one on the way."""
    if is_one(factor):
        return record
    if isinstance(record, Sum):
        return Sum(tuple(scaled(xp, part, factor) for part in record.parts))
    if isinstance(record, Dense):
        return Dense(times(xp, record.grads, factor))
    if not hasattr(record, "inputs"):
        return replace(record, output_grads=times(xp, record.output_grads, factor))
    inputs: Any = getattr(record, "inputs")  # noqa: B009  # of outer products, side by side or packed
    a = _array.widen(xp, inputs)
    e = _exponent(xp, a)
    largest = math.floor(math.log2(float(xp.finfo(a.dtype).max))) - 1
    active = xp.isfinite(e) & (factor != 1)
    down = _power(xp, xp.where(active, -e, xp.zeros_like(e)), largest)
    grads = times(xp, times(xp, record.output_grads, 1 / down), factor)  # in this order: neither leaves the range
    return replace(record, inputs=times(xp, a, down), output_grads=grads)


def _exponents(xp: Any, record: Record) -> list[Any]:
    """Return the exponent of each factor whose product is the gradient, 0-d floats; -inf for zero."""
    names = ("grads", "inputs", "output_grads")
    return [_exponent(xp, getattr(record, name)) for name in names if hasattr(record, name)]


def _parts(record: Record) -> list[Record]:
    return [r for part in record.parts for r in _parts(part)] if isinstance(record, Sum) else [record]


def _exponent(xp: Any, x: Any) -> Any:
    """Return e with ``2^e <= max |x| < 2^(e+1)``, give or take one; -inf where all is zero, 0 where not finite."""
    if not math.prod(x.shape):
        x = xp.zeros((1,), dtype=x.dtype, device=_array.device(x))
    high, low = xp.max(x), xp.min(x)  # no copy of |x|
    size = xp.astype(xp.where(high > -low, high, -low), xp.float32 if xp.finfo(x.dtype).bits < 32 else x.dtype)
    size = xp.where(xp.isfinite(high) & xp.isfinite(low), size, xp.ones_like(size))
    e = xp.floor(xp.log2(xp.where(size > 0, size, xp.ones_like(size))))
    return xp.where(size > 0, e, xp.full_like(e, -xp.inf))


def _largest(xp: Any, exponents: list[Any], like: Any) -> Any:
    return xp.max(xp.stack([xp.astype(e, _array.widen(xp, like).dtype) for e in exponents]))


def _power(xp: Any, e: Any, largest: int) -> Any:
    """Return 2^e for |e| up to ``largest``, exactly."""
    e = xp.where(e > largest, xp.full_like(e, largest), xp.where(e < -largest, xp.full_like(e, -largest), e))
    return _array.power_of_two(e)


def times(xp: Any, x: Any, factor: Any) -> Any:
    """Return ``factor * x``, widened; x itself for a factor that is known to be one."""
    if is_one(factor):
        return x
    x = _array.widen(xp, x)
    return x * _array.scalar_like(factor, x)
