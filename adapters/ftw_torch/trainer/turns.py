"""Several optimizer steps on one pool: the loader's order, and the selections that wait for their turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler

import ftw
from ftw import Reasons, Selection

__all__ = ["Repeats", "Turns"]


class Repeats(Sampler[int]):
    """Gives the samples of one optimizer step after the other, each group ``repeats`` times.

    What is left at the end of an epoch and does not fill a group is given once.

    Parameters
    ----------
    inner : Sampler
        The trainer's own. A random one draws by ``seed`` and epoch, so that a resumed run finds its place.
    group : int
        Samples of an optimizer step.
    repeats : int
    seed : int
    batch : int
        Samples of a batch of all processes.
    drop_last : bool
        Whether the loader leaves out an incomplete batch.
    """

    def __init__(self, inner: Any, group: int, repeats: int, seed: int, batch: int, *, drop_last: bool) -> None:
        self.inner, self.group, self.repeats, self.seed = inner, group, repeats, seed
        self.epoch = 0
        full, rest = divmod(len(inner), group)
        left = rest // batch if drop_last else rest  # batches or samples, whichever says that there is a last step
        self.repeated = full * repeats  # optimizer steps of an epoch whose pools come back
        self.steps = self.repeated + (left > 0)
        self._length = full * repeats * group + rest

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        order = list(self.inner)
        if isinstance(self.inner, RandomSampler):
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        for start in range(0, len(order), self.group):
            some = order[start : start + self.group]
            for _ in range(self.repeats if len(some) == self.group else 1):
                yield from some

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch."""
        self.epoch = epoch

    def turn(self, step: int) -> int | None:
        """Return which of the steps on its pool an optimizer step is; None if the pool does not come back."""
        place = step % self.steps
        return place % self.repeats if place < self.repeated else None


class Turns:
    """The pools of an optimizer step with their selections, kept for the steps after it.

    Pools are kept in memory alone: in a run that resumes between two steps on a pool, the loader gives it again.
    """

    def __init__(self) -> None:
        self._selections: list[list[Selection]] = []  # of each pool, one a step
        self._pools: list[tuple[Any, Any]] = []
        self._step, self._slot = -1, -1

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        return {"selections": [[_listed(selection) for selection in some] for some in self._selections]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._selections = [[_selection(fields) for fields in some] for some in state["selections"]]

    def slot(self, step: int, turn: int) -> int:
        """Return which pool of an optimizer step this is, counting them; a first turn begins anew."""
        if step != self._step:
            self._step, self._slot = step, -1
            if turn == 0:
                self._selections, self._pools = [], []
        self._slot += 1
        return self._slot

    def keep(self, selections: list[Selection], pool: Any, target: Any) -> None:
        """Take the next pool of a step, with its target and a selection for each step."""
        self._selections.append(selections)
        self._pools.append((pool, target))

    def pool(self, slot: int) -> tuple[Any, Any] | None:
        """Return a pool and its target; None in a run that has resumed."""
        return self._pools[slot] if slot < len(self._pools) else None

    def selection(self, slot: int, turn: int) -> Selection:
        """Return the selection of a pool for a turn; of no weight where dropped samples left none to select."""
        some = self._selections[slot]
        last = some[-1]
        return some[turn] if turn < len(some) else last._replace(weights=torch.zeros_like(last.weights))


def _listed(values: Any) -> Any:
    if isinstance(values, Tensor):
        return {"dtype": str(values.dtype).removeprefix("torch."), "values": values.tolist()}
    return [_listed(x) for x in values] if isinstance(values, tuple) else values


def _tensors(fields: Any) -> Any:
    if isinstance(fields, dict):
        return torch.tensor(fields["values"], dtype=getattr(torch, fields["dtype"]))
    return [_tensors(x) for x in fields] if isinstance(fields, list) else fields


def _selection(fields: Any) -> Selection:
    found = ftw.Selection(*_tensors(fields))
    return found if found.reasons is None else found._replace(reasons=Reasons(*found.reasons))
