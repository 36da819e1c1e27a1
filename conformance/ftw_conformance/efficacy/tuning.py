"""The learning rates of runs that have a budget: each method over a grid, on seeds that are not reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .budget import Job
from .rates import GRID, TUNING
from .runs import key, run_all
from .scenarios import Scenario

__all__ = ["tune"]


def tune(
    scenarios: Mapping[str, Scenario],
    methods: Sequence[str],
    path: Path,
    processes: int,
    progress: Callable[[int], Any] = lambda n: None,
    config: dict[str, Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Return the rate of the lowest mean test loss for each scenario and method."""
    jobs = {
        (name, method, lr): [Job(name, scenario, method, seed, None, lr) for seed in TUNING]
        for name, scenario in scenarios.items()
        for method in methods
        for lr in GRID
    }
    records = run_all([job for group in jobs.values() for job in group], path, processes, progress, config)

    def loss(name: str, method: str, lr: float) -> float:
        return float(np.mean([records[key(job)]["final"] for job in jobs[name, method, lr]]))

    return {
        name: {method: min(GRID, key=lambda lr: loss(name, method, lr)) for method in methods} for name in scenarios
    }
