"""What a trial comes to: a row an arm, the verdict, notes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .arms import MEANING, RANDOM
from .plan import Measured, Plan
from .race import Outcome
from .verdict import Difference, Verdict, decide

__all__ = ["Result", "Row", "summarise"]


@dataclass(frozen=True)
class Row:
    """An arm over the seeds it was compared with: means, and its difference to random; None where there is none."""

    arm: str
    rate: float
    steps: float
    step_seconds: float
    start: float
    validation: float
    spread: float | None
    test: float | None
    difference: Difference | None


@dataclass(frozen=True)
class Result:
    """A trial's outcome.

    Attributes
    ----------
    arm : str or None
        The arm to use; None where none can be told from random.
    sentence : str
        The same, in a sentence with its evidence.
    rows : tuple of Row
        An arm each.
    outcomes : tuple of Outcome
        Every run: those that chose the rates have seed 0.
    seconds : float
        Training time of each run.
    notes : tuple of str
        What to know beside.
    """

    arm: str | None
    sentence: str
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    seconds: float
    notes: tuple[str, ...]

    def table(self) -> list[list[str]]:
        """Return the table as text: a row of headings, then a row an arm."""
        tested = any(row.test is not None for row in self.rows)
        head = ["arm", "lr", "steps", "s a step", "validation", "against random", "95 % interval"]
        rows = [head + (["test"] if tested else [])]
        for row in self.rows:
            spread = "" if row.spread is None else f" ± {row.spread:.3f}"
            gap = row.difference
            mean = "" if gap is None or math.isnan(gap.mean) else f"{gap.mean:+.3f}"
            ends = "" if gap is None or math.isnan(gap.low) else f"{gap.low:+.3f} to {gap.high:+.3f}"
            end = "failed" if math.isinf(row.validation) else f"{row.validation:.3f}{spread}"
            cells = [row.arm, f"{row.rate:.2g}", f"{row.steps:.0f}", f"{row.step_seconds:.3g}", end, mean, ends]
            rows.append(cells + (["" if row.test is None else f"{row.test:.3f}"] if tested else []))
        return rows


def summarise(outcomes: Sequence[Outcome], planned: Plan, found: Measured, notes: Sequence[str]) -> Result:
    """Return the result; the verdict is made of validation losses alone."""
    names = [*found.costs]
    compared = {name: [outcome for outcome in outcomes if outcome.arm == name and outcome.seed > 0] for name in names}
    losses = {name: {outcome.seed: outcome.validation for outcome in runs} for name, runs in compared.items()}
    verdict = decide(losses, RANDOM, MEANING)
    rows = tuple(_row(name, runs, found, verdict) for name, runs in compared.items())
    return Result(verdict.arm, verdict.sentence, rows, tuple(outcomes), planned.seconds, tuple(notes))


def _row(name: str, runs: Sequence[Outcome], found: Measured, verdict: Verdict) -> Row:
    sound = [outcome for outcome in runs if not outcome.failure]
    steps = sum(outcome.steps for outcome in runs)
    ends = [outcome.validation for outcome in sound]
    tests = [outcome.test for outcome in sound if outcome.test is not None]
    return Row(
        name,
        runs[0].rate,
        steps / len(runs),
        sum(outcome.seconds for outcome in runs) / steps if steps else found.costs[name].step,
        statistics.fmean(outcome.curve[0.0] for outcome in sound) if sound else math.nan,
        statistics.fmean(ends) if ends else math.inf,
        statistics.stdev(ends) if len(ends) > 1 else None,
        statistics.fmean(tests) if tests else None,
        verdict.differences.get(name),
    )
