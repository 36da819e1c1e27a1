"""What a trainer's mixin does between steps: the record's lines, and what its warnings need kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from transformers import TrainerCallback

from .run_log import RunLog

__all__ = ["Between", "Part"]

_KEY = "FilterThenWeight"  # among the callbacks' states in the trainer's own


class Part(Protocol):
    """Has a history that a resumed run goes on from."""

    def state_dict(self) -> dict[str, Any]:
        """Return it, as what JSON can hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it."""
        ...


class Between(TrainerCallback):
    """Writes the record's line of a step that the trainer does not log, and keeps histories in the trainer's state.

    Parameters
    ----------
    log : RunLog
    parts : mapping of str to Part
        Saved in each checkpoint's ``trainer_state.json``, and restored from that which a run resumes from.
    """

    def __init__(self, log: RunLog, parts: Mapping[str, Part]) -> None:
        self.log, self.parts = log, parts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint's histories."""
        saved = state.stateful_callbacks.get(_KEY, {}).get("attributes", {})
        for name, part in self.parts.items():
            if name in saved:
                part.load_state_dict(saved[name])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the histories where a checkpoint finds them, and write the record."""
        found = {name: part.state_dict() for name, part in self.parts.items()}
        state.stateful_callbacks[_KEY] = {"args": {}, "attributes": found}
        if not control.should_log:
            self.log.write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the record."""
        self.log.close()
