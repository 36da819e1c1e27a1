"""From runs to figures: paired differences and what they are worth."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .baselines import LESS, METHOD, NO_GUARD, ORACLE, RANDOM, WHOLE
from .rivals import RAND_T

__all__ = ["Cell", "Paired", "paired", "summarise"]


class Paired(NamedTuple):
    """Mean of paired differences, its standard error, a 95 % confidence interval, p (two-sided t), pairs.

    All but ``mean`` and ``count`` are NaN for fewer than two pairs.
    """

    mean: float
    error: float
    low: float
    high: float
    p: float
    count: int  # type: ignore[assignment]  # hides tuple.count


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Paired:
    """Compare two methods over the seeds that both have run."""
    gaps = np.array([one[seed] - other[seed] for seed in one if seed in other])
    n, nan = len(gaps), math.nan
    if n < 2:
        return Paired(float(gaps.mean()) if n else nan, nan, nan, nan, nan, n)
    mean, error = float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(n))
    if error == 0:
        return Paired(mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0, n)
    t: Any = importlib.import_module("scipy.stats").t
    half = float(t.ppf(0.975, n - 1)) * error
    return Paired(mean, error, mean - half, mean + half, 2 * float(t.sf(abs(mean) / error, n - 1)), n)


class Cell(NamedTuple):
    """One method on one scenario, means over seeds.

    Attributes
    ----------
    final, area : float
        Test loss after the last step, and its mean over the curve.
    against : dict of str to Paired
        Differences of the final loss to random, LESS-like top-k, the default, the default without guard and whole
        pool; and at equal compute, to random and whole pool that have gone on for as long as the default method's
        arithmetic takes.
    speedup : float or None
        The last step over the step at which the mean curve reaches random's final loss; None if it never does.
    share : float or None
        Share of the gap from random to the oracle that is closed; None where the oracle is not the better of the two.
    effective_size, good, shrinkage, signal, seconds, target_loss : float or None
        Effective number of samples; share of good picks; the guard's a and F; CPU seconds a run, without evaluation;
        final loss on the target samples.
    accuracy, steps, lr : float or None
        Accuracy on the test set, steps and learning rate, where runs have a budget.
    flops : float
        Arithmetic of a step, in whole-pool steps.
    curve : list of (step, mean, standard error)
    """

    scenario: str
    method: str
    seeds: int
    final: float
    area: float
    equal_compute: float
    against: dict[str, Paired]
    speedup: float | None
    share: float | None
    effective_size: float | None
    good: float | None
    shrinkage: float | None
    signal: float | None
    seconds: float | None
    target_loss: float | None
    accuracy: float | None
    steps: float | None
    lr: float | None
    flops: float
    curve: list[tuple[int, float, float]]


def summarise(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Return a cell for each scenario and method, in order of appearance."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["scenario"], record["method"]), []).append(record)

    def values(scenario: str, method: str, field: str) -> dict[int, float]:
        return {r["seed"]: r[field] for r in groups.get((scenario, method), [])}

    def mean(runs: Sequence[Mapping[str, Any]], field: str) -> float | None:
        found = [r[field] for r in runs if r.get(field) is not None]
        return float(np.mean(found)) if found else None

    cells = []
    for (scenario, method), runs in groups.items():
        final, area = values(scenario, method, "final"), values(scenario, method, "area")
        curve = _curve(runs)
        random, oracle = (_mean(values(scenario, name, "final")) for name in (RANDOM, ORACLE))
        gap = random - oracle
        against = {
            name: paired(final, values(scenario, name, "final"))
            for name in (RANDOM, RAND_T, LESS, METHOD, NO_GUARD, WHOLE)
        }
        for name in (RANDOM, WHOLE):
            against[f"{name}, equal compute"] = paired(final, values(scenario, name, "equal_compute"))
        cells.append(
            Cell(
                scenario,
                method,
                len(runs),
                _mean(final),
                _mean(area),
                _mean(values(scenario, method, "equal_compute")),
                {name: pair for name, pair in against.items() if pair.count},
                _speedup(curve, random),
                (random - _mean(final)) / gap if gap > 0 else None,
                mean(runs, "effective_size"),
                mean(runs, "good"),
                mean(runs, "shrinkage"),
                mean(runs, "signal"),
                mean(runs, "seconds"),
                mean(runs, "target_loss"),
                mean(runs, "accuracy"),
                mean(runs, "steps"),
                mean(runs, "lr"),
                runs[0]["flops"] / runs[0]["whole_flops"],
                curve,
            )
        )
    return cells


def _mean(values: Mapping[int, float]) -> float:
    return float(np.mean(list(values.values()))) if values else math.nan


def _curve(runs: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    curves = np.array([r["curve"] for r in runs])  # (seeds, points, 2)
    loss = curves[:, :, 1]
    error = loss.std(axis=0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else np.zeros(loss.shape[1])
    return [(int(i), float(m), float(e)) for i, m, e in zip(curves[0, :, 0], loss.mean(axis=0), error, strict=True)]


def _speedup(curve: Sequence[tuple[int, float, float]], goal: float) -> float | None:
    """Return the last step over the first at which the curve, straight between its points, is at the goal."""
    for (i, a, _), (j, b, _) in itertools.pairwise(curve):
        if b <= goal:
            reached = j if a <= goal or a == b else i + (j - i) * (a - goal) / (a - b)
            return curve[-1][0] / max(reached, 1e-9)
    return None
