"""Filter-then-Weight in Hugging Face trainers: a mixin over their public methods.

    class MyTrainer(FilterThenWeightMixin, SFTTrainer): ...

``training_step`` is replaced by a selection over the batch at hand, which is the pool; ``log`` carries what the
selection said. Everything else (data, accumulation, clipping, schedules, checkpoints, callbacks) stays the trainer's
own. Which target samples a step sees, and whether it selects at all, depends on the step's number and the seed alone:
a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

import ftw
from ftw import Quota, Selection
from ftw.constraints import Constraint
from ftw.spi import as_count
from ftw_torch import batches
from ftw_torch.distributed import DistributedFilterThenWeight
from ftw_torch.options import CaptureName, Fill, Mode, OnNonfinite, Options, Score, Weight
from ftw_torch.selector import FilterThenWeight

from .callback import Between, Part
from .columns import WithColumns, column_of, mixture
from .documents import replaced
from .ragged import Counts
from .run_log import RunLog, fingerprint, weighted_loss
from .sample_record import about, decoder
from .selected_loss import SelectedLoss, numbered
from .setup import check, offer, refuse, refuse_order, whole
from .step import Ranks, Selector, backward, train_on
from .target import Collated, Leaks, TargetBatches, WatchedSplit, guard_watch
from .turns import Repeats, Turns

__all__ = ["FilterThenWeightMixin", "FilterThenWeightTrainer"]

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


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
    steps_per_pool : int
        Optimizer steps R on each pool, which the loader gives R times: it is scored once, each step trains a selection
        that is disjoint of those before it by a plain backward. ``max_steps`` counts optimizer steps, an epoch has R
        times as many.
    sources : str, optional
        The column of the data set that says where samples come from, texts or integers: for ``quota``, for
        `ftw.SourceShares` as ``constraint``, for the log and the record. The model does not see it.
    quota, fill, explain
        See `FilterThenWeight`. With ``explain=True`` the record has the reasons of every candidate.
    micro_batch, on_nonfinite, damping, shortlist, filter, weight, constraint, ridge, guard, solver
        See `FilterThenWeight`.
    train_on_target, gram_sketch
        See `FilterThenWeight`.
    score, score_step
        See `FilterThenWeight`, and over several processes `DistributedFilterThenWeight`. Under FSDP2 (``fsdp=True``) it
        is "forward" with ``filter="top_k"`` and ``weight="uniform"``.
    mode, memory_budget, capture
        See `FilterThenWeight`; for one process.
    ragged : callable, optional
        ``(inputs) -> {entry: counts (n,)}``: how many rows each sample has in entries of a batch that are laid end to
        end (patches, images). Qwen-VL's layout is known.
    record : path, optional
        Append the run's record here, one JSON line an optimizer step; ``python -m ftw.report`` makes a page of it.
    record_text : bool
        Keep the samples' text in the record, as the trainer's ``processing_class`` decodes it.
    record_source : str, optional
        The column for the record, where there are no ``sources``.

    Notes
    -----
    Logged with the trainer's loss, as means since its last log: ``match``, ``effective_size``, ``picked_share``,
    ``target_loss``, ``watch_loss``, ``shrinkage`` and ``selection_seconds`` (target, pool, choice and gradient of one
    pool), and the totals ``dropped``, ``leaked`` and ``nothing_useful`` if they are not zero. With ``sources`` the
    share of picks from each, ``picked/SOURCE``, and ``floors_bound``, how many floors were just met; with
    ``explain=True`` how many candidates were refused for each reason. The ``loss`` logged in a step that selects is
    the weighted one of the samples trained on. A sample that was picked and stands in the target too is warned of
    once, and counted as ``leaked``.
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
        on_nonfinite: OnNonfinite = "raise",
        damping: float = 0.1,
        shortlist: int | float | None = 0.5,
        filter: Any = "matching",
        weight: Weight = "qp",
        constraint: Constraint = ftw.Simplex(1.0),  # noqa: B008
        ridge: float = 0.05,
        guard: float = 0.3,
        solver: Callable[..., Any] | None = None,
        score: Score = "exact",
        score_step: float | None = None,
        train_on_target: float = 0.0,
        steps_per_pool: int = 1,
        sources: str | None = None,
        quota: Quota | None = None,
        fill: Fill = "raise",
        explain: bool = False,
        mode: Mode = "auto",
        memory_budget: int | None = None,
        gram_sketch: int | None = None,
        capture: CaptureName = Options.capture,
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
        counts["steps_per_pool"] = (steps_per_pool, 1)
        check(keep, counts, loss_unit, nothing_useful, splits)
        self._ftw_options = Options(
            keep=1,
            filter=filter,
            weight=weight,
            constraint=constraint,
            ridge=ridge,
            shortlist=shortlist,
            solver=solver,
            guard=guard,
            damping=damping,
            micro_batch=micro_batch,
            on_nonfinite=on_nonfinite,
            mode=mode,
            memory_budget=memory_budget,
            gram_sketch=gram_sketch,
            score=score,
            score_step=score_step,
            train_on_target=train_on_target,
            sources=sources,
            quota=quota,
            fill=fill,
            explain=explain,
            capture=capture,
        )
        self._ftw_keep, self._ftw_every, self._ftw_after = keep, select_every, select_after
        self._ftw_policy, self._ftw_repeats, self._ftw_turns = nothing_useful, steps_per_pool, Turns()
        self._ftw_loss = SelectedLoss(self, per_sample_loss, loss_unit, ragged)
        self._ftw_selector: Selector | None = None
        self._ftw_sampler: Repeats | None = None
        self._ftw_quiet: Any = None  # where the notes of a loss go that is computed for a selection
        self._ftw_source = sources if sources is not None else record_source
        if splits:
            args, kwargs, restore = offer(super().__init__, args, kwargs, splits)
            super().__init__(*args, **kwargs)
            splits, self.eval_dataset = restore(self.eval_dataset)
        else:
            super().__init__(*args, **kwargs)
        target = splits.get("target")
        samples = {name: Collated(data, self._ftw_source) for name, data in splits.items()}
        self._ftw_target = TargetBatches(samples["target"], target_refresh) if "target" in samples else None
        self._ftw_watch = WatchedSplit(samples["watch"], watch_every) if "watch" in samples else None
        self._ftw_leaks = Leaks()
        refuse(self)
        if self._ftw_source is not None:
            self.data_collator = WithColumns(self.data_collator, [self._ftw_source])
        decode = decoder(getattr(self, "processing_class", None)) if record_text else None
        self._ftw_decode, self._ftw_recorded = decode, record is not None
        self._ftw_log = RunLog(
            record if self.is_world_process_zero() else None,
            str(getattr(self.args, "run_name", None) or "run"),
            seed=self.args.seed,
            text=record_text,
            title="Filter-then-Weight in a trainer",
            data={"train": fingerprint(self.train_dataset), "target": fingerprint(target)}
            | ({"watch": fingerprint(splits["watch"])} if "watch" in splits else {}),
        )
        self._ftw_guard = guard_watch(target, target_refresh)
        parts: dict[str, Part] = {"guard": self._ftw_guard, "leaks": self._ftw_leaks, "turns": self._ftw_turns}
        self.add_callback(Between(self._ftw_log, parts | ({"watch": self._ftw_watch} if self._ftw_watch else {})))

    # ------------------------------------------------------------------------------------------------------------------
    # What the trainer calls

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Fill ``.grad`` from the chosen samples of the batch; return their weighted loss."""
        step = self.state.global_step
        inputs = dict(inputs)
        column = None if self._ftw_source is None else inputs.pop(self._ftw_source, None)
        if step < self._ftw_after or (step - self._ftw_after) % self._ftw_every:
            plain: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return plain
        start = time.perf_counter()
        model.train()
        switch = getattr(self.optimizer, "train", None)
        if callable(switch):  # schedule-free optimizers
            switch()
        loss = self._ftw_loss
        pool = loss.cut(batches.map_tensors(lambda x: x.to(self.args.device), dict(inputs)))
        ranks = Ranks(batches.size(pool, "pool"), several=self.accelerator.num_processes > 1)
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        overridden = type(self).per_sample_loss is not FilterThenWeightMixin.per_sample_loss
        loss.compare(self.accelerator.unwrap_model(model), pool, ranks, overridden=overridden)
        counts = loss.counts(pool)
        lengths = None if counts is None else ranks.rows(counts)
        turn = None if self._ftw_sampler is None else self._ftw_sampler.turn(step)
        target = None if self._ftw_target is None else self._ftw_target.at(self, step - (turn or 0))
        given, goal = pool, target
        pool, target = loss.scaled(pool, num_items_in_batch, steps), loss.scaled(target, None, 1)
        if self._ftw_options.sources is not None and column is not None:
            pool = replaced(pool, **{self._ftw_options.sources: column})
        selector = self._ftw_prepared(model)
        watch = self._ftw_watch
        measures = watch is not None and watch.due(step, self._ftw_after, self._ftw_every)
        watched = watch.loss(self, selector.model, step) if watch is not None and measures else None
        loss.begin()
        choose: Callable[[], Selection]
        keep = sum(map(self._ftw_kept, ranks.sizes))
        if turn is None:
            choose = functools.partial(selector.backward, numbered(pool, ranks.n), target, keep=keep)
        else:
            choose = functools.partial(self._ftw_turn, selector, turn, pool, target, keep)
        autocast: Any = self.accelerator.autocast
        selection, shared = backward(
            selector,
            ranks,
            pool,
            choose,
            steps=steps,
            policy=self._ftw_policy,
            autocast=autocast,
            shared=loss.shared,
        )
        for logs, args, kwargs in loss.notes.write(self, ranks.sum):
            super().log(logs, *args, **kwargs)
        leaked = [] if goal is None else self._ftw_leaks.among(selection.indices, given, goal, step + 1, ranks)
        seconds = time.perf_counter() - start
        sources = column_of(column, ranks)
        columns = about(given, self._ftw_decode, ranks) if self._ftw_recorded else {}
        if self._ftw_recorded and sources is not None:
            columns["source"] = list(map(str, sources))
        more = mixture(selection, sources if self._ftw_options.sources else None, self._ftw_options.quota)
        said = (step + 1, selection, ranks.total, seconds, lengths)
        dropped = self._ftw_log.add(*said, leaked=leaked, watch_loss=watched, about=columns, more=more)
        if watch is not None:
            watch.add(step + 1, float(selection.target_loss), watched)
        if dropped:
            logger.warning("step %d: samples %s of the pool are not finite and were dropped", step + 1, dropped)
        mean = weighted_loss(selection).to(self.args.device)
        return (mean if shared is None else mean + shared) / steps

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
        return self._ftw_loss(model, inputs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trainer's sampler, which gives each pool as often as it is trained on."""
        inner = super()._get_train_sampler(*args, **kwargs)
        if self._ftw_repeats == 1:
            return inner
        refuse_order(inner)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size, drop_last = self._train_batch_size, self.args.dataloader_drop_last
        group = size * self.args.gradient_accumulation_steps
        self._ftw_sampler = Repeats(inner, group, self._ftw_repeats, seed, size, drop_last=drop_last)
        return self._ftw_sampler

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column of sources in the data."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self._ftw_source is not None and self._ftw_source not in columns:
            columns.append(self._ftw_source)

    # ------------------------------------------------------------------------------------------------------------------
    # Parts

    def _ftw_prepared(self, model: nn.Module) -> Selector:
        """Return the selector; train() may bring another optimizer or model."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        plain = self.accelerator.unwrap_model(model)
        old, several = self._ftw_selector, self.accelerator.num_processes > 1
        if old is None or old.optimizer is not optimizer or old.model is not plain:
            names = inspect.signature(DistributedFilterThenWeight if several else FilterThenWeight).parameters
            options = {name: x for name, x in vars(self._ftw_options).items() if name in names}
            kind = DistributedFilterThenWeight if several else FilterThenWeight
            self._ftw_selector = kind(plain, optimizer, self.per_sample_loss, **options)
            self._ftw_selector.memory.guard_watch = self._ftw_guard
        assert self._ftw_selector is not None
        return self._ftw_selector

    def _ftw_turn(self, selector: Any, turn: int, pool: Any, target: Any, keep: int) -> Selection:
        """Train on the selection whose turn it is of a pool that comes several times; the first turn makes them."""
        turns = self._ftw_turns
        slot = turns.slot(self.state.global_step, turn)
        if turn == 0:
            n = batches.size(pool, "pool")
            times = min(self._ftw_repeats, n)
            found = selector.batches(numbered(pool, n), target, steps=times, keep=min(keep, n // times))
            turns.keep(found, pool, target)
        else:
            pool, target = turns.pool(slot) or (pool, target)
        return train_on(selector, pool, target, turns.selection(slot, turn))

    def _ftw_kept(self, n: int) -> int:
        return min(n, max(1, as_count(self._ftw_keep, n, up=True)))


class FilterThenWeightTrainer(FilterThenWeightMixin, Trainer):
    """`transformers.Trainer` with selection; see `FilterThenWeightMixin`."""
