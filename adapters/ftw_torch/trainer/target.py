"""A trainer's target: the batch of each step, copies of it among the picks, and a second split that is watched."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ftw.spi import GuardWatch, SplitWatch
from ftw_torch import batches

from .documents import Documents
from .ragged import Part
from .run_log import fingerprint
from .step import Ranks

__all__ = ["Collated", "Leaks", "TargetBatches", "WatchedSplit", "guard_watch", "row_keys"]

logger = logging.getLogger(__name__)


class TargetBatches:
    """The target batch of a step: a function of the step's number and the seed alone.

    Over several processes each takes its part of the batch, which is as many times as large.

    Parameters
    ----------
    samples : Collated
    refresh : int
        Take another batch after this many steps; 0 keeps the first.
    """

    def __init__(self, samples: Collated, refresh: int) -> None:
        self.refresh, self._samples = refresh, samples
        self._turn: int | None = None
        self._batch: Any = None

    def at(self, trainer: Any, step: int) -> Any:
        """Return this process's batch of a step."""
        turn = 0 if self.refresh == 0 else step // self.refresh
        if self._turn != turn:
            total, world = len(self._samples.data), trainer.accelerator.num_processes
            size = min(total, trainer.args.eval_batch_size * world)
            a_pass, place = divmod(turn, total // size)
            generator = torch.Generator().manual_seed(trainer.args.seed + a_pass)
            order = list(range(total)) if size == total else torch.randperm(total, generator=generator).tolist()
            some = order[place * size : (place + 1) * size]
            self._batch = self._samples(trainer, some[trainer.accelerator.process_index :: world])
            self._turn = turn
        return self._batch


def guard_watch(data: Any, refresh: int) -> GuardWatch:
    """Return the watch over a target of this data set; batches of a large one that take turns are not few samples."""
    watch = GuardWatch()
    return GuardWatch(few=0) if refresh and data is not None and len(data) >= watch.few else watch


class Collated:
    """A dataset's samples as the batches that the trainer's evaluation would make of them.

    The loader is made once: the trainer keeps each one that it prepares. An entry ``without`` which the model goes, for
    it is not its own, is left out.
    """

    def __init__(self, data: Any, without: str | None = None) -> None:
        self.data, self.without = data, without
        self._loader: Any = None

    def __call__(self, trainer: Any, indices: Iterable[int]) -> Any:
        """Return some samples, on the trainer's device."""
        if self._loader is None:
            args = trainer.args
            persistent, args.dataloader_persistent_workers = args.dataloader_persistent_workers, False
            try:  # or else the trainer might answer with the loader of its own evaluation data
                self._loader = trainer.get_eval_dataloader(self.data)
            finally:
                args.dataloader_persistent_workers = persistent
        batch = dict(self._loader.collate_fn([self._loader.dataset[i] for i in indices]))
        batch.pop(self.without, None)
        return trainer._ftw_loss.cut(batches.map_tensors(lambda x: x.to(trainer.args.device), batch))


class Leaks:
    """Finds target samples among those picked from a pool: a copy of the target always wins."""

    def __init__(self) -> None:
        self._targets: dict[str, None] = {}  # digests, in the order met
        self._last: Any = None
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep; the targets go on growing."""
        return {"targets": self._targets, "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._targets, self._warned = dict(state["targets"]), bool(state["warned"])

    def among(self, picked: Tensor, pool: Any, target: Any, step: int, ranks: Ranks) -> list[int]:
        """Return which of the samples picked stand in a target batch of this step or an earlier one.

        Parameters
        ----------
        picked : tensor of int (k,)
            Numbered through the pools of all processes.
        pool, target : mapping of str to tensor, or Documents
            This process's own.
        step : int
            For the warning.
        ranks : Ranks
        """
        fresh = [] if target is self._last else row_keys(target)
        self._last = target
        mine = ranks.mine(picked)
        keys = row_keys(batches.take(pool, mine))
        own = {"target": fresh, "picked": list(zip((mine + ranks.start).tolist(), keys, strict=True))}
        every = [json.loads(text) for text in ranks.texts(json.dumps(own))]
        for one in every:
            self._targets.update(dict.fromkeys(one["target"]))
        found = [i for one in every for i, key in one["picked"] if key in self._targets]
        if found and not self._warned:
            self._warned = True
            logger.warning(
                "step %d: sample %d of the pool is a target sample too: a copy of the target always wins; take it out "
                "of one of them (said once)",
                step,
                found[0],
            )
        return found


def row_keys(batch: Any) -> list[str]:
    """Return a digest of each sample of a batch, whatever its padding, and its place in a row of documents."""
    if isinstance(batch, Documents):
        of_tokens = {name: batch.rows(x) for name, x in batch.tensors.items() if batch.is_of_tokens(x)}
        own = {name: rows for name, rows in of_tokens.items() if name not in ("position_ids", "seq_idx")}
        return [row_keys({name: rows[i][None] for name, rows in own.items()})[0] for i in range(batch.n)]
    tensors = {name: x.detach().cpu() for name, x in sorted(batch.items()) if isinstance(x, Tensor) and x.ndim}
    mask = tensors.pop("attention_mask", None)
    parts = {name: x for name, x in sorted(batch.items()) if isinstance(x, list) and x and isinstance(x[0], Part)}
    keys = []
    for i in range(min((len(x) for x in tensors.values()), default=0)):
        digest = hashlib.sha256()
        rows = {
            name: x[i] if mask is None or x.shape != mask.shape else x[i][mask[i].bool()] for name, x in tensors.items()
        }
        for name, row in (rows | {name: x[i].rows.detach().cpu() for name, x in parts.items()}).items():
            row = row.float() if row.dtype == torch.bfloat16 else row
            digest.update(f"{name}{tuple(row.shape)}".encode() + row.contiguous().numpy().tobytes())
        keys.append(digest.hexdigest()[:16])
    return keys


class WatchedSplit:
    """The loss on a second target split, measured whole now and then, and the warning when it turns up.

    Parameters
    ----------
    samples : Collated
    every : int
        Optimizer steps between two measurements.
    """

    def __init__(self, samples: Collated, every: int) -> None:
        self.every, self._samples = every, samples
        self._name = fingerprint(samples.data)
        self._watch = SplitWatch()
        self._measured: int | None = None
        self._first: list[float] = []  # losses of the first split since the last measurement

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep; the lists go on growing."""
        return {"data": self._name, "measured": self._measured, "since": self._first, **self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, unless it is that of another split."""
        if state["data"] == self._name:
            self._measured, self._first = state["measured"], list(state["since"])
            self._watch.load_state_dict(state)

    def due(self, step: int, after: int, between: int) -> bool:
        """Return whether to measure in a step; selections begin ``after`` steps and are ``between`` steps apart."""
        if step == self._measured:  # another pool of the same step
            return False
        return step == after or step // self.every != (step - between) // self.every

    @torch.no_grad()
    def loss(self, trainer: Any, model: nn.Module, step: int) -> float:
        """Return the mean loss of the split's samples, with dropout off."""
        self._measured = step
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        mine = range(rank, len(self._samples.data), world)
        sums = torch.zeros(2, dtype=torch.float64)  # of losses, of samples
        model.eval()
        try:
            size, most = trainer.args.eval_batch_size, -(-len(self._samples.data) // world)
            for start in range(0, most, size):  # as many forwards on each process: one may wait for the others in it
                rows = mine[start : start + size]
                batch = self._samples(trainer, rows or range(1))
                with trainer.accelerator.autocast():
                    losses = trainer.per_sample_loss(model, batch)[: len(rows)]
                sums += torch.tensor([float(losses.double().sum()), len(losses)], dtype=torch.float64)
        finally:
            model.train()
        total, count = trainer.accelerator.reduce(sums.to(torch.float32).to(trainer.args.device), "sum").tolist()
        return float(total / count)

    def add(self, step: int, target_loss: float, watch_loss: float | None) -> None:
        """Take in the first split's loss in a step and, where it was measured, the second's; warn if it turned up."""
        self._first.append(target_loss)
        if watch_loss is None:
            return
        first = sum(self._first) / len(self._first)
        self._first = []
        if self._watch.add(first, watch_loss):
            logger.warning(
                "step %d: the loss on watch_dataset rose from %.4g to %.4g while the loss on target_dataset kept "
                "falling: the lead is on the target samples only; stop here, bring more target samples, or raise guard",
                step,
                min(self._watch.second),
                watch_loss,
            )
