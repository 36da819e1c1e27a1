"""Filter-then-Weight in Hugging Face trainers: a mixin over their public methods.

    class MyTrainer(FilterThenWeightMixin, SFTTrainer): ...

``training_step`` is replaced by a selection over the batch at hand, which is the pool; ``log`` carries what the
selection said. Everything else (data, accumulation, clipping, schedules, checkpoints, callbacks) stays the trainer's
own. Which target samples a step sees, and whether it selects at all, depends on the step's number and the seed alone:
a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

import ftw
from ftw.constraints import Constraint
from ftw.spi import GuardWatch
from ftw_torch import batches
from ftw_torch.distributed import DistributedFilterThenWeight
from ftw_torch.errors import SelectionError
from ftw_torch.packing import PackedBatch
from ftw_torch.selector import FilterThenWeight

from .callback import Between, Part
from .documents import entries, in_one_row, replaced
from .losses import token_counts
from .notes import PoolNotes
from .own_loss import causal, own_losses, quiet, refuse_another_loss, smoothing_shifts
from .pairs import pairs, takes_pairs
from .ragged import Counts, cut, joined, known_counts
from .run_log import RunLog, fingerprint, weighted_loss
from .sample_record import about, decoder
from .setup import check, offer, refuse, whole
from .step import Ranks, Selector, backward
from .target import Collated, Leaks, TargetBatches, WatchedSplit

__all__ = ["FilterThenWeightMixin", "FilterThenWeightTrainer"]

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

_SCALE = "_ftw_scale"  # (n,), travels with a batch whose losses are sums over tokens
_ROWS = "_ftw_rows"  # a list of ints, travels with the pool: which of its samples these are


class FilterThenWeightMixin(_Base):
    """Selects and weighs the samples of each batch; stands before the trainer in the list of bases.

    Parameters
    ----------
    *args, **kwargs
        Of the trainer. ``per_device_train_batch_size`` is the pool, ``per_device_eval_batch_size`` the target batch.
        Over several processes (DDP) both are those of each, and one choice is made of all pools together.
    target_dataset : dataset, or None
        What the model should get better at. Prepared like an evaluation data set; a stream (``stream.take(n)``) is read
        to its end. None: each pool is its own target.
    keep : int or float
        How many samples of a pool to train on, or which fraction of them; of a smaller pool all if need be. The choice
        of several processes keeps as many as they would one by one.
    select_every : int
        Select in every n-th optimizer step; the others train on the whole pool, as the trainer does.
    select_after : int
        Optimizer steps before the first selection, on whole pools.
    target_refresh : int
        Take another target batch after this many optimizer steps; 0 keeps the first for good.
    watch_dataset : dataset, or None
        A second target split, never selected for: its loss is measured (without gradients, dropout off), and a warning
        given once if it turns up while the loss on the first split keeps falling.
    watch_every : int
        Optimizer steps between two measurements of it.
    per_sample_loss : callable, optional
        ``(model, inputs) -> (n,)``. The default is what the trainer's own ``compute_loss`` returns for each sample
        alone: the model's loss, with the trainer's label smoothing, ``compute_loss_func`` or override. The first step
        that selects compares some samples with it. A term that belongs to the batch as a whole (a router's balance
        loss) is added to the loss of the samples trained on, after the selection.
    loss_unit : {"sample", "token"}
        The loss of a sequence is the mean over its own tokens; or their sum over the mean number of tokens a sample, so
        that uniform weights give the trainer's own loss (``num_items_in_batch``).
    nothing_useful : {"best", "uniform", "skip", "raise"}
        What to do with a pool in which no sample helps: train on the best scores, on the whole pool, on none, or raise.
    micro_batch, on_nonfinite, damping, shortlist, filter, weight, constraint, ridge, guard, solver, train_on_target
        See `FilterThenWeight`.
    score : {"exact", "forward"}
        See `FilterThenWeight`; "forward" is for one process.
    ragged : callable, optional
        ``(inputs) -> {entry: counts (n,)}``: how many rows each sample has in entries of a batch that are laid end to
        end (patches, images). Qwen-VL's layout is known.
    record : path, optional
        Append the run's record here, one JSON line an optimizer step; ``python -m ftw.report`` makes a page of it.
    record_text : bool
        Keep the samples' text in the record, as the trainer's ``processing_class`` decodes it.
    record_source : str, optional
        The entry (n,) of a batch that says where its samples come from, for the record; taken out of the batch before
        the model sees it. Needs ``remove_unused_columns=False``.

    Notes
    -----
    Logged with the trainer's loss, as means since its last log: ``match``, ``effective_size``, ``picked_share``,
    ``target_loss``, ``watch_loss``, ``shrinkage`` and ``selection_seconds`` (target, pool, choice and gradient of one
    pool), and the totals ``dropped``, ``leaked`` and ``nothing_useful`` if they are not zero. The ``loss`` logged in a
    step that selects is the weighted one of the samples trained on. A sample that was picked and stands in the target
    too is warned of once, and counted as ``leaked``.
    """

    def __init__(
        self,
        *args: Any,
        target_dataset: Any,
        keep: int | float,
        select_every: int = 1,
        select_after: int = 0,
        target_refresh: int = 1,
        watch_dataset: Any = None,
        watch_every: int = 10,
        per_sample_loss: Callable[[nn.Module, Any], Tensor] | None = None,
        loss_unit: str = "sample",
        nothing_useful: str = "best",
        micro_batch: int | None = None,
        on_nonfinite: str = "raise",
        damping: float = 0.1,
        shortlist: int | float | None = 0.5,
        filter: Any = "matching",
        weight: str = "qp",
        constraint: Constraint = ftw.Simplex(1.0),  # noqa: B008
        ridge: float = 0.05,
        guard: float = 0.3,
        solver: Callable[..., Any] | None = None,
        score: str = "exact",
        train_on_target: float = 0.0,
        ragged: Counts | None = None,
        record: str | os.PathLike[str] | None = None,
        record_text: bool = False,
        record_source: str | None = None,
        **kwargs: Any,
    ) -> None:
        splits = {"target": target_dataset, "watch": watch_dataset}
        splits = {name: whole(name, data) for name, data in splits.items() if data is not None}
        counts = {"select_every": (select_every, 1), "select_after": (select_after, 0)}
        counts |= {"target_refresh": (target_refresh, 0), "watch_every": (watch_every, 1)}
        check(keep, counts, loss_unit, nothing_useful, splits)
        options = {"filter": filter, "weight": weight, "constraint": constraint, "ridge": ridge, "guard": guard}
        passed = {"micro_batch": micro_batch, "on_nonfinite": on_nonfinite, "damping": damping, "shortlist": shortlist}
        passed["train_on_target"] = train_on_target
        passed |= {} if score == "exact" else {"score": score}
        self._ftw_options: dict[str, Any] = options | passed | ({} if solver is None else {"solver": solver})
        self._ftw_keep, self._ftw_every, self._ftw_after = keep, select_every, select_after
        self._ftw_unit, self._ftw_policy = loss_unit, nothing_useful
        self._ftw_loss, self._ftw_ragged = per_sample_loss, ragged
        self._ftw_selector: Selector | None = None
        self._ftw_quiet: Any = None  # where the notes of a loss go that is computed for a selection
        self._ftw_notes = PoolNotes()
        self._ftw_shared = False  # whether the loss has a term of the whole batch
        self._ftw_compared: nn.Module | None = None  # whose losses were compared with the trainer's own
        self._ftw_shift: bool | None = None  # whether its loss shifts the labels
        if splits:
            args, kwargs, restore = offer(super().__init__, args, kwargs, splits)
            super().__init__(*args, **kwargs)
            splits, self.eval_dataset = restore(self.eval_dataset)
        else:
            super().__init__(*args, **kwargs)
        target = splits.get("target")
        self._ftw_target = None if target is None else TargetBatches(Collated(target, record_source), target_refresh)
        self._ftw_watch = (
            WatchedSplit(Collated(splits["watch"], record_source), watch_every) if "watch" in splits else None
        )
        self._ftw_leaks = Leaks()
        refuse(self)
        decode = decoder(getattr(self, "processing_class", None)) if record_text else None
        self._ftw_source, self._ftw_decode, self._ftw_recorded = record_source, decode, record is not None
        self._ftw_log = RunLog(
            record if self.is_world_process_zero() else None,
            str(getattr(self.args, "run_name", None) or "run"),
            seed=self.args.seed,
            text=record_text,
            title="Filter-then-Weight in a trainer",
            data={"train": fingerprint(self.train_dataset), "target": fingerprint(target)}
            | ({"watch": fingerprint(splits["watch"])} if "watch" in splits else {}),
        )
        self._ftw_guard = GuardWatch()
        parts: dict[str, Part] = {"guard": self._ftw_guard, "leaks": self._ftw_leaks}
        self.add_callback(Between(self._ftw_log, parts | ({"watch": self._ftw_watch} if self._ftw_watch else {})))

    # ------------------------------------------------------------------------------------------------------------------
    # What the trainer calls

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Fill ``.grad`` from the chosen samples of the batch; return their weighted loss."""
        step = self.state.global_step
        inputs = dict(inputs)
        source = None if self._ftw_source is None else inputs.pop(self._ftw_source, None)
        if step < self._ftw_after or (step - self._ftw_after) % self._ftw_every:
            plain: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return plain
        start = time.perf_counter()
        model.train()
        switch = getattr(self.optimizer, "train", None)
        if callable(switch):  # schedule-free optimizers
            switch()
        pool = self._ftw_cut(batches.map_tensors(lambda x: x.to(self.args.device), dict(inputs)))
        ranks = Ranks(batches.size(pool, "pool"), several=self.accelerator.num_processes > 1)
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        self._ftw_compare(self.accelerator.unwrap_model(model), pool, ranks)
        counts = self._ftw_counts(pool)
        lengths = None if counts is None else ranks.rows(counts)
        target = None if self._ftw_target is None else self._ftw_target.at(self, step)
        given, goal = pool, target
        if self._ftw_unit == "token":
            pool = self._ftw_scaled(pool, num_items_in_batch, steps)
            target = None if target is None else self._ftw_scaled(target, None, 1)
        selector = self._ftw_prepared(model)
        watched = self._ftw_watched(selector.model, step)
        self._ftw_shared = False
        autocast: Any = self.accelerator.autocast
        selection, shared = backward(
            selector,
            ranks,
            replaced(pool, **{_ROWS: list(range(ranks.n))}),
            target,
            keep=sum(map(self._ftw_kept, ranks.sizes)),
            steps=steps,
            policy=self._ftw_policy,
            autocast=autocast,
            shared=lambda: self._ftw_shared_term if self._ftw_shared else None,
        )
        for logs, args, kwargs in self._ftw_notes.write(self, ranks.sum):
            super().log(logs, *args, **kwargs)
        leaked = [] if goal is None else self._ftw_leaks.among(selection.indices, given, goal, step + 1, ranks)
        seconds = time.perf_counter() - start
        add = self._ftw_log.add
        columns = about(given, source, self._ftw_decode, ranks) if self._ftw_recorded else None
        said = (step + 1, selection, ranks.total, seconds, lengths)
        dropped = add(*said, leaked=leaked, watch_loss=watched, about=columns)
        if self._ftw_watch is not None:
            self._ftw_watch.add(step + 1, float(selection.target_loss), watched)
        if dropped:
            logger.warning("step %d: samples %s of the pool are not finite and were dropped", step + 1, dropped)
        loss = weighted_loss(selection).to(self.args.device)
        return (loss if shared is None else loss + shared) / steps

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch without the entry that is for the record."""
        inputs = {name: x for name, x in inputs.items() if name != self._ftw_source}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what the selections said to the trainer's own log."""
        if self._ftw_quiet is not None:
            self._ftw_quiet.logs.append((logs, args, kwargs))
            return
        if "loss" in logs:
            logs.update(self._ftw_log.means())
            self._ftw_log.write(**{name: logs[name] for name in ("grad_norm",) if name in logs})
        super().log(logs, *args, **kwargs)

    def per_sample_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the losses (n,) of a batch, a mapping or a `PackedBatch`: yours to override."""
        scale, rows = (entries(inputs).get(name) for name in (_SCALE, _ROWS))
        inputs = replaced(inputs, **{_SCALE: None, _ROWS: None})
        counts = None if scale is None else self._ftw_counts(inputs)
        with self.compute_loss_context_manager():
            if self._ftw_loss is not None:
                packed = isinstance(inputs, PackedBatch)
                own: Tensor = self._ftw_loss(model, inputs if packed else joined(inputs))
                return own
            with quiet(self) as wrote:
                found, _ = own_losses(self, model, inputs)
        if rows is not None:
            self._ftw_notes.add(rows, wrote)
            self._ftw_shared = self._ftw_shared or found.shared is not None
        return found.rows if scale is None or counts is None else found.rows * (scale * counts).to(found.rows.dtype)

    # ------------------------------------------------------------------------------------------------------------------
    # Parts

    def _ftw_prepared(self, model: nn.Module) -> Selector:
        """Return the selector; train() may bring another optimizer or model."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        plain = self.accelerator.unwrap_model(model)
        old = self._ftw_selector
        if old is None or old.optimizer is not optimizer or old.model is not plain:
            kind = DistributedFilterThenWeight if self.accelerator.num_processes > 1 else FilterThenWeight
            self._ftw_selector = kind(plain, optimizer, self.per_sample_loss, keep=1, **self._ftw_options)
            self._ftw_selector.memory.guard_watch = self._ftw_guard
        assert self._ftw_selector is not None
        return self._ftw_selector

    def _ftw_cut(self, inputs: Mapping[str, Any]) -> Any:
        """Return a batch of samples: documents of a row, pairs, or with the rows of an entry cut by sample."""
        if takes_pairs(self):
            return pairs(inputs)
        if (found := in_one_row(inputs)) is not None:
            return found
        counts = self._ftw_ragged
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        return cut(inputs, known_counts(inputs, config) if counts is None else counts(inputs))

    def _ftw_kept(self, n: int) -> int:
        keep = self._ftw_keep
        return min(n, keep if isinstance(keep, int) else max(1, math.ceil(keep * n - 1e-9)))

    def _ftw_watched(self, model: nn.Module, step: int) -> float | None:
        """Return the loss on the watched split in the steps that measure it."""
        watch = self._ftw_watch
        if watch is None or not watch.due(step, self._ftw_after, self._ftw_every):
            return None
        return watch.loss(self, model, step)

    def _ftw_compare(self, model: nn.Module, pool: Any, ranks: Ranks) -> None:
        """Raise if the losses selected on are not the trainer's own; see `refuse_another_loss`."""
        home = FilterThenWeightMixin.per_sample_loss
        own = self._ftw_loss is not None or type(self).per_sample_loss is not home
        if self._ftw_compared is model:
            return
        self._ftw_shift, wrong = causal(model), None
        if self._ftw_shift and not own and self.label_smoother is not None and not smoothing_shifts(self, model):
            logger.warning(
                "label smoothing does not shift the labels of %s, which is not among transformers' causal language "
                "models: the model learns to repeat its input; shift them yourself, or train without smoothing",
                type(model).__name__,
            )
        if not own:
            try:
                some, counts = refuse_another_loss(self, model, pool)
                shifted, full = (token_counts(some, shift=shift) for shift in (True, False))
                known = counts is not None and shifted is not None and full is not None
                if known and not torch.equal(shifted, full):  # type: ignore[arg-type]
                    self._ftw_shift = torch.equal(counts, shifted)  # type: ignore[arg-type]
            except Exception as error:  # of which the other processes must hear
                wrong = error
        if ranks.exchange is not None:
            every = [text for text in ranks.texts("" if wrong is None else str(wrong)) if text]
            if every and wrong is None:
                wrong = SelectionError(f"another process failed: {every[0]}")
        if wrong is not None:
            raise wrong
        self._ftw_compared = model

    def _ftw_shared_term(self, inputs: Any) -> Tensor | None:
        """Return the term of a batch's loss that belongs to none of its samples."""
        inputs = replaced(inputs, **{_SCALE: None, _ROWS: None})
        with self.compute_loss_context_manager(), quiet(self), torch.enable_grad():
            return own_losses(self, self.accelerator.unwrap_model(self.model), inputs)[0].shared

    def _ftw_counts(self, inputs: Any) -> Tensor | None:
        """Return the number of labels of each sample (n,), if they are tokens."""
        return token_counts(inputs, shift=bool(self._ftw_shift))

    def _ftw_scaled(self, inputs: Any, items: Tensor | int | None, steps: int) -> Any:
        """Return the batch with the factor (n,) that makes sums over tokens a loss of about one sample."""
        counts = self._ftw_counts(inputs)
        if counts is None:
            raise ValueError("loss_unit='token' needs labels (n, t) of ints; use loss_unit='sample'")
        n = len(counts)
        total = counts.sum() if items is None else torch.as_tensor(items, device=counts.device) / steps
        if items is not None and getattr(self.args, "average_tokens_across_devices", False):
            total = total / self.accelerator.num_processes
        return replaced(inputs, **{_SCALE: (n / total.clamp(min=1)).to(torch.float32).expand(n)})


class FilterThenWeightTrainer(FilterThenWeightMixin, Trainer):
    """`transformers.Trainer` with selection; see `FilterThenWeightMixin`."""
