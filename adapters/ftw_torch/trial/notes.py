"""What to know beside a trial's table: what was left out, failed, too short, or on the edge."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .plan import FEW_STEPS, Measured
from .race import Outcome, Task

__all__ = ["notes_on"]


def notes_on(task: Task, found: Measured, outcomes: Sequence[Outcome]) -> list[str]:
    """Return what to know beside the table."""
    notes = [f"{name} is left out, it cannot be run here: {why}" for name, why in found.failures.items()]
    if repeats := len(task.target) - len(task.target_numbers):
        notes.append(f"{repeats} target samples that repeat others are left out.")
    if task.test is not None and len(task.test_numbers) < len(task.test):
        notes.append(f"The test loss is of a random {len(task.test_numbers)} of {len(task.test)} test samples.")
    compared = [outcome for outcome in outcomes if outcome.seed > 0]
    for name in found.costs:
        own = [outcome for outcome in compared if outcome.arm == name]
        tried = sorted({outcome.rate for outcome in outcomes if outcome.arm == name})
        if own and own[0].rate in (tried[0], tried[-1]) and len(tried) > 1:
            notes.append(
                f"{name}: the {'smallest' if own[0].rate == tried[0] else 'largest'} learning rate, {own[0].rate:.3g}, "
                "was the best; one beyond it may be better."
            )
        for failure in dict.fromkeys(outcome.failure for outcome in own if outcome.failure):
            notes.append(f"{name}: {sum(o.failure == failure for o in own)} of {len(own)} runs failed: {failure}")
    fewest = min((outcome for outcome in compared if not outcome.failure), key=lambda o: o.steps, default=None)
    if fewest is not None and fewest.steps < FEW_STEPS:
        steps = "1 step" if fewest.steps == 1 else f"{fewest.steps} steps"
        notes.append(f"Short runs: {fewest.arm} took {steps} in one; with more minutes the verdict may differ.")
    sound = [outcome for outcome in compared if not outcome.failure]
    if sound:
        ends = {name: [o.validation for o in sound if o.arm == name] for name in found.costs}
        lowest = min(statistics.fmean(values) for values in ends.values() if values)
        if lowest >= statistics.fmean(outcome.curve[0.0] for outcome in sound):
            notes.append(
                "No arm ends below the loss it started with: training on this pool does not help, at these rates."
            )
    return notes
