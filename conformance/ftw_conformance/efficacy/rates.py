"""The learning rate of each method where runs have a budget, tuned on seeds that are not reported.

``python -m ftw_conformance efficacy --task sentiment --tune`` prints this table: for each method the rate of the grid
with the lowest mean test loss over four seeds from 1000 on.
"""

from __future__ import annotations

__all__ = ["GRID", "RATES", "TUNING", "rate"]

GRID = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
TUNING = range(1000, 1004)  # seeds
USUAL = 0.008  # of a method that nobody has tuned

RATES: dict[str, dict[str, float]] = {}


def rate(scenario: str, method: str) -> float:
    """Return the tuned rate, or a usual one."""
    return RATES.get(scenario, {}).get(method, USUAL)
