"""Says, once, that a target is too small or looks memorised: numbers in, a sentence out.

F compares the squared length of the target's mean gradient with the variance of that mean (``guard.py``). It is at
least 1, in expectation, for samples drawn afresh. It stays below for two reasons: the samples are memorised, or they
were balanced by hand, so that their gradients cancel more than chance would have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["GuardWatch"]


class GuardWatch:
    """Watches F and the number of target samples over a run.

    Parameters
    ----------
    patience : int
        Steps in a row with F below 1 before there is a warning.
    few : int
        Fewer target samples than this are warned of at the first step.
    """

    def __init__(self, patience: int = 20, few: int = 40) -> None:
        if patience < 1 or few < 0:
            raise ValueError(f"GuardWatch: patience={patience} must be at least 1 and few={few} not negative")
        self.patience, self.few = patience, few
        self._low = 0
        self._said_few = self._said_low = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that is stopped must keep."""
        return {"low": self._low, "said_few": self._said_few, "said_low": self._said_low}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._low, self._said_few, self._said_low = int(state["low"]), bool(state["said_few"]), bool(state["said_low"])

    def note(self, signal: float, m: int) -> list[str]:
        """Return what there is to say after a step with this F and m target samples; each thing only once.

        An F that is not finite (the guard is off, or had nothing to judge by) counts as no step at all.
        """
        out = []
        if m < self.few and not self._said_few:
            self._said_few = True
            out.append(
                f"the target has {m} sample{'s' * (m != 1)}: the same few are matched at every step and may be "
                f"memorised; give {self.few} or more, or watch the loss on others of their kind"
            )
        if math.isfinite(signal):
            self._low = self._low + 1 if signal < 1 else 0
        if self._low >= self.patience and not self._said_low:
            self._said_low = True
            out.append(
                f"the target's gradient has been shorter than its own error for {self.patience} steps (F = "
                f"{signal:.2f}): its samples are memorised, or balanced by hand; more or fresh ones would help"
            )
        return out
