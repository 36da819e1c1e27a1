"""How far from the reference a result may lie: every tolerance of the suite, with its reason.

A result x that should be y is measured as ``max |x - y| / scale``. The scale is the size of what was *added up*, not
of what is left after cancellation: for an inner product ``sum |a_i b_i|`` or its bound ``|a| |b|``. Rounding then
explains an error of a few ``eps`` times the root of the number of terms, whatever the data, and nothing more:

    tolerance = factor(rule) * eps(dtype) * condition

eps is that of the dtype in which sums are taken: 16-bit inputs are widened to float32 first. ``condition`` is given
by the case: the root of the number of terms of a sum, or the condition number of a linear system. A result that is
not a number must be the same NaN or infinity as expected; integers and statuses must be equal.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EPS", "RULES", "Rule", "tolerance"]

EPS = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-23,
    "bfloat16": 2.0**-23,
}


class Rule(NamedTuple):
    """A multiple of eps, and why it is what it is."""

    factor: float
    why: str


RULES = {
    "exact": Rule(0.0, "integers, statuses, copies: nothing is rounded"),
    "rounded": Rule(32.0, "a formula of a few operations an element, none of them a cancellation"),
    "summed": Rule(8.0, "inner products: each of the terms rounds once, the errors add up like a random walk"),
    "solved": Rule(128.0, "a linear system on the free weights: backward stable, so the condition number multiplies"),
    "power": Rule(
        256.0, "powers and logarithms, whose last digits differ between math libraries, and their differences"
    ),
    "certified": Rule(
        1e4, "the stopping rule of solve_qp: what a residual or a duality gap may be when a solution is called one"
    ),
}


def tolerance(rule: str, dtype: str, condition: float = 1.0) -> float:
    """Return the largest error that rounding explains."""
    return RULES[rule].factor * EPS[dtype] * max(condition, 1.0)
