"""Counts how often each target sample was matched: keys in, a mean out (`ftw.wear`)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

__all__ = ["Uses"]


class Uses:
    """Counts over a run.

    Parameters
    ----------
    limit : int
        How many samples are remembered; beyond it those that have not come for longest are forgotten.
    """

    def __init__(self, limit: int = 100_000) -> None:
        if limit < 1:
            raise ValueError(f"Uses: limit={limit} must be at least 1")
        self.limit = limit
        self._counts: dict[Hashable, int] = {}

    def note(self, keys: Sequence[Hashable]) -> float:
        """Return how often these samples were matched before, in the mean, and count them once more."""
        before = [self._counts.get(key, 0) for key in keys]
        for key, count in zip(keys, before, strict=True):
            self._counts.pop(key, None)  # to the end of the order
            self._counts[key] = count + 1
        while len(self._counts) > self.limit:
            del self._counts[next(iter(self._counts))]
        return sum(before) / len(before) if before else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that is stopped must keep."""
        return {"keys": list(self._counts), "counts": list(self._counts.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._counts = dict(zip(state["keys"], map(int, state["counts"]), strict=True))
