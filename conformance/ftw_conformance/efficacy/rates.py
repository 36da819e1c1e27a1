"""The learning rate of each method where runs have a budget, tuned on seeds that are not reported.

``python -m ftw_conformance efficacy --task sentiment --tune`` prints this table: for each method the rate of the grid
with the lowest mean test loss over four seeds from 1000 on.
"""

from __future__ import annotations

__all__ = ["GRID", "RATES", "TUNING", "rate"]

GRID = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
TUNING = range(1000, 1004)  # seeds
USUAL = 0.008  # of a method that nobody has tuned

RATES: dict[str, dict[str, float]] = {
    "sentiment-48": {
        "random": 0.0005,
        "rand+T, 1/3": 0.0005,
        "rand+T, 1/2": 0.00025,
        "target alone": 0.00025,
        "whole + T": 0.001,
        "small loss": 0.00025,
        "forward top-k": 0.002,
        "whole pool": 0.001,
        "LESS-like top-k": 0.002,
        "Filter-then-Weight": 0.002,
        "ridge by use": 0.002,
        "without guard": 0.002,
        "oracle": 0.001,
    },
    "sentiment-1500": {
        "random": 0.0005,
        "rand+T, 1/3": 0.001,
        "rand+T, 1/2": 0.001,
        "target alone": 0.0005,
        "whole + T": 0.002,
        "small loss": 0.00025,
        "forward top-k": 0.004,
        "whole pool": 0.001,
        "LESS-like top-k": 0.002,
        "Filter-then-Weight": 0.004,
        "ridge by use": 0.004,
        "without guard": 0.002,
        "oracle": 0.001,
    },
    "sentiment-useful": {
        "random": 0.001,
        "rand+T, 1/3": 0.0005,
        "rand+T, 1/2": 0.0005,
        "target alone": 0.00025,
        "whole + T": 0.002,
        "small loss": 0.00025,
        "forward top-k": 0.002,
        "whole pool": 0.002,
        "LESS-like top-k": 0.002,
        "Filter-then-Weight": 0.002,
        "ridge by use": 0.002,
        "without guard": 0.002,
        "oracle": 0.001,
    },
}


def rate(scenario: str, method: str) -> float:
    """Return the tuned rate, or a usual one."""
    return RATES.get(scenario, {}).get(method, USUAL)
