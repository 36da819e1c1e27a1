"""What a trainer's ``compute_loss`` writes down in a step, once for each sample of the pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__all__ = ["PoolNotes"]


class PoolNotes:
    """The notes of a step's passes, of which those stay that cover the pool.

    A step passes the target and the pool through the loss, some samples more than once: the audit's, the shortlist's.
    A run of neighbouring samples that begins where the last one ended belongs to the pool pass.
    """

    def __init__(self) -> None:
        self._notes: dict[int, tuple[int, SimpleNamespace]] = {}  # first sample: (samples, notes)

    def add(self, rows: list[int], wrote: SimpleNamespace) -> None:
        """Take the notes of a pass over some samples of the pool."""
        first, size = rows[0], len(rows)
        if rows == list(range(first, first + size)) and size > self._notes.get(first, (0, None))[0]:
            self._notes[first] = (size, wrote)

    def take(self) -> list[SimpleNamespace]:
        """Return the notes that cover the pool, in order, and forget all."""
        covering, place = [], 0
        while place in self._notes:
            size, wrote = self._notes[place]
            covering.append(wrote)
            place += size
        self._notes = {}
        return covering

    def write(self, trainer: Any, total: Any) -> list[Any]:
        """Write the notes of a step where the trainer keeps its own; return what it would have logged.

        ``total`` adds a number up over the processes.
        """
        logs: list[Any] = []
        tokens = 0
        covering = self.take()
        for wrote in covering:
            logs += wrote.logs
            tokens += wrote.tokens
            for mode, found in (wrote.metrics or {}).items():
                for name, values in found.items():
                    trainer._metrics[mode][name].extend(values)
        if any(wrote.metrics for wrote in covering) and hasattr(trainer, "_total_train_tokens"):
            trainer._total_train_tokens += total(tokens)
            trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
        return logs
