"""Whether the lead is on the target samples only: a second target split, watched while the first is matched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["SplitWatch"]


class SplitWatch:
    """Tells, once, that the second split's loss turned up while the first split's kept falling.

    The second loss has turned up when its last ``patience`` measurements all lie above its lowest by more than
    ``share`` of what it had fallen from its first; the first loss keeps falling when its mean over those measurements
    is below the mean over as many up to the lowest. Both rules are the same for a loss moved or scaled.

    Parameters
    ----------
    patience : int
        Measurements in a row.
    share : float
        Of the fall so far.
    """

    def __init__(self, patience: int = 3, share: float = 0.1) -> None:
        self.patience, self.share = patience, share
        self.first: list[float] = []
        self.second: list[float] = []
        self.told = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that is stopped must keep; the lists go on growing."""
        return {"first": self.first, "second": self.second, "told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.first, self.second, self.told = list(state["first"]), list(state["second"]), bool(state["told"])

    def add(self, first: float, second: float) -> bool:
        """Take in a measurement of both losses; True the first time that the second has turned up.

        Parameters
        ----------
        first, second : float
            Losses on the split that is matched and on the one that is not. What is not finite is passed over.
        """
        if not (math.isfinite(first) and math.isfinite(second)):
            return False
        self.first.append(first)
        self.second.append(second)
        lowest = min(range(len(self.second)), key=self.second.__getitem__)
        if self.told or len(self.second) - 1 - lowest < self.patience:
            return False
        bottom = self.second[lowest]
        up = min(self.second[-self.patience :]) - bottom > self.share * (self.second[0] - bottom)
        before = self.first[max(0, lowest + 1 - self.patience) : lowest + 1]
        falls = sum(self.first[-self.patience :]) / self.patience < sum(before) / len(before)
        self.told = up and falls
        return self.told
