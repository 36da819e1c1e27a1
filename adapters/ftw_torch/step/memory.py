"""What a selector learns of its model in one step and keeps for the next."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftw import Selection
from ftw.spi import GuardWatch

from .audit import Audits
from .learned import Learned

__all__ = ["Memory"]

# the same words once a process, whatever the number of selectors
_warn_once = functools.cache(logging.getLogger("ftw_torch").warning)


@dataclass
class Memory:
    """What one step leaves for the next.

    Attributes
    ----------
    slow : dict of str to str
        Parameters left to per-sample autograd, and why.
    reused : set of str
        Parameters used more than once.
    two_passes : bool
        Whether records are no longer kept.
    audits : Audits
        Of captured gradients against autograd's.
    learned : Learned
        The plan of the model, if it has one.
    guard_watch : GuardWatch
        The guard's statistics over the steps.
    """

    slow: dict[str, str] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    two_passes: bool = False
    audits: Audits = field(default_factory=Audits)
    learned: Learned = field(default_factory=Learned)
    guard_watch: GuardWatch = field(default_factory=GuardWatch)
    warned_of_one_target: bool = False

    def note_guard(self, selection: Selection, targets: int) -> None:
        """Warn of what the guard's statistics say over the steps, if it had target samples to judge by."""
        if targets:
            for words in self.guard_watch.note(float(selection.signal), targets):
                _warn_once(words)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that is stopped must keep: what was found out about the model is found out again."""
        return {"two_passes": self.two_passes, "guard_watch": self.guard_watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.two_passes = bool(state["two_passes"])
        self.guard_watch.load_state_dict(state["guard_watch"])
