"""Selection over several processes: each captures and scores its own candidates, and all make one choice together.

    1. g_T        sum over the ranks' target samples                        one all-reduce of p numbers
    2. scores     of every rank's own candidates                            one all-gather of 2 n numbers a rank
    3. Gram       of the shortlist: its records go round in blocks, and     one all-gather of the shortlist's records,
                  each rank forms the rows of its own candidates            and one of s^2 numbers
    4. choice     from the same numbers on every rank
    5. update     of every rank's own picks, added up                       one all-reduce of p numbers

n candidates a rank, s on the shortlist, p parameters. A record goes round as its factors, or written out where that is
smaller. Where ``fully_shard`` holds parameters in parts, these and the optimizer's state are gathered too
(``fsdp.py``). `DistributedFilterThenWeight.sent` counts the bytes of a step. A rank that fails while it captures or
scores makes all ranks raise; one that dies is noticed by the process group's own timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ftw
from ftw import Quota, Selection, Simplex
from ftw.gradients import Record
from ftw.spi import Constraint, Filter
from ftw_torch import batches
from ftw_torch.capture.amp import Ambient
from ftw_torch.capture.backward import accumulate
from ftw_torch.capture.coupling import refuse_coupled_layers
from ftw_torch.capture.discovery import trainable
from ftw_torch.capture.fsdp import cut_as, part_bytes, refuse_offloaded, refuse_sharded, whole
from ftw_torch.capture.passes import Passes, uncompiled
from ftw_torch.options import Fill, FilterName, OnNonfinite, Options, Score, Weight, check_count
from ftw_torch.packing import PackedBatch
from ftw_torch.records.join import join, seen
from ftw_torch.step.audit import audit
from ftw_torch.step.checks import check_keep, check_parts
from ftw_torch.step.decide import decide_batches
from ftw_torch.step.memory import Memory
from ftw_torch.step.solver import best_solver
from ftw_torch.step.target import refuse_nonfinite

from .candidates import AllCandidates, Local, gather_candidates
from .collectives import Exchange
from .forward import ForwardCandidates, forward_candidates
from .rank_loss import weighted_loss_of_rank
from .sharding import Sharding, free, fsdp_modules

__all__ = ["DistributedFilterThenWeight"]


class DistributedFilterThenWeight:
    """`FilterThenWeight` over the pools of all processes of a group.

    Parameters
    ----------
    model, optimizer, per_sample_loss
        As in `FilterThenWeight`; the plain model, not the one that DistributedDataParallel wraps around it. Parameters
        and the optimizer's state must be the same on all ranks: whole, or in the parts of FSDP2's ``fully_shard``. Then
        the pass gathers the parameters, the state is gathered one parameter at a time, and the update is left in
        ``.grad`` in parts.
    keep : int
        How many samples to train on, of the pools of all ranks together.
    group : torch.distributed.ProcessGroup, optional
        The ranks with pools of their own. By default all; with ``score="forward"`` those over which ``fully_shard``
        shards, and under tensor parallelism alone each rank for itself.
    max_bytes : int
        Of the records that are on one rank at a time while the Gram matrix is formed.
    filter, weight, constraint, ridge, shortlist, solver, guard, damping, micro_batch, on_nonfinite
        As in `FilterThenWeight`.
    gram_sketch, sources, quota, fill, explain
        As in `FilterThenWeight`. With ``gram_sketch`` processes exchange sketches in place of records. A quota counts
        the samples of all ranks together; its sources are a column of every rank's pool.
    train_on_target, score_step
        As in `FilterThenWeight`.
    score : {"exact", "forward"}
        "forward" takes the scores from forward passes, as in `FilterThenWeight`. Then ``fully_shard`` gathers and frees
        layer by layer, g_T and the update are reduce-scattered by an ordinary backward, each rank applies P to its own
        shard of the optimizer's state, and its shards move along P g_T in place: no rank holds the model. Models under
        tensor parallelism work too; ranks that share a sample bring the same pool. Sharded parameters require
        ``filter="top_k"`` with ``weight="uniform"``. Each rank then brings a target sample or a candidate.

    Attributes
    ----------
    sent : dict of str to int
        Bytes that this rank put into collectives in its last step, by purpose.

    Notes
    -----
    Candidates are numbered through the ranks: those of rank 0 first. The gradient is the whole update on every rank, as
    after the all-reduce of DistributedDataParallel, and needs no further reduction. Pools may differ in size; a rank
    without candidates passes ``pool=None``. Every rank brings target samples of its own; ``target=None`` on all ranks
    takes the mean of all pools.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        per_sample_loss: Callable[[nn.Module, Any], Tensor],
        *,
        keep: int,
        filter: FilterName | Filter = "matching",
        weight: Weight = "qp",
        constraint: Constraint = Simplex(1.0),  # noqa: B008
        ridge: float = 0.05,
        shortlist: int | float | None = 0.5,
        solver: Callable[..., Any] | None = None,
        guard: float = 0.3,
        damping: float = 0.1,
        micro_batch: int | None = None,
        on_nonfinite: OnNonfinite = "raise",
        gram_sketch: int | None = None,
        sources: str | None = None,
        quota: Quota | None = None,
        fill: Fill = "raise",
        explain: bool = False,
        train_on_target: float = 0.0,
        score: Score = "exact",
        score_step: float | None = None,
        group: Any = None,
        max_bytes: int = 1 << 26,
    ) -> None:
        check_parts(model, per_sample_loss)
        self.options = Options(
            keep=keep,
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
            gram_sketch=gram_sketch,
            sources=sources,
            quota=quota,
            fill=fill,
            explain=explain,
            train_on_target=train_on_target,
            score=score,
            score_step=score_step,
        )
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "no process group: call torch.distributed.init_process_group first, or use FilterThenWeight"
            )
        check_count(max_bytes, "max_bytes")
        self.model, self.optimizer, self.per_sample_loss = model, optimizer, per_sample_loss
        self.memory = Memory()
        self.group, self.max_bytes = group, max_bytes
        self.sent: dict[str, int] = {}
        self._sharding: Sharding | None = None
        self._start, self._size = 0, 0  # of this rank's pool in the last step

    def backward(self, pool: Any, target: Any, *, keep: int | None = None) -> Selection[Tensor]:
        """Add the update to ``.grad``, the same on every rank; see `FilterThenWeight.backward`."""
        with self._stage() as ambient:
            candidates, (selection,) = self._choose(pool, target, keep, ambient)
            if isinstance(candidates, ForwardCandidates):
                parameters, update = candidates.parameters, candidates.update(selection.indices, selection.weights)
            else:
                parameters, update = candidates.parameters, self._update(candidates, selection)
            for name, g in update.items():
                p = parameters[name]
                g = g.reshape(p.shape).to(p.dtype)
                accumulate(p, g if hasattr(g, "placements") else cut_as(g, p))
        return selection

    def select(self, pool: Any, target: Any, *, keep: int | None = None) -> Selection[Tensor]:
        """Return the choice of all ranks and its weights; ``.grad`` stays untouched."""
        with self._stage() as ambient:
            return self._choose(pool, target, keep, ambient)[1][0]

    def batches(self, pool: Any, target: Any, *, steps: int, keep: int | None = None) -> list[Selection]:
        """Return ``steps`` disjoint selections of all ranks' pools, scored once; see `FilterThenWeight.batches`.

        ``steps * keep`` samples must be in the pools of all ranks together.
        """
        check_count(steps, "steps")
        with self._stage() as ambient:
            return self._choose(pool, target, keep, ambient, steps=steps)[1]

    def weighted_loss(
        self, pool: Any, selection: Selection, target: Any = None, *, model: nn.Module | None = None
    ) -> Tensor:
        """Return this rank's loss (), such that the mean of the ranks' gradients is the selection's update.

        Data-parallel engines take that mean in an ordinary backward: ``fully_shard`` in its hooks, and
        DistributedDataParallel if its wrapper is given as ``model``. All ranks call it and its backward; one without
        selected samples takes one at weight zero. With ``train_on_target`` the target of this rank is required.
        """
        exchange = self.ranks()
        if model is None and not fsdp_modules(self.model) and exchange.world > 1:
            raise ValueError(
                "nothing averages the gradients of the plain model over the ranks: give the DistributedDataParallel "
                "wrapper, weighted_loss(..., model=ddp)"
            )
        model = self.model if model is None else model
        share, (rows, weights) = self.options.train_on_target, self.mine(selection)
        return weighted_loss_of_rank(exchange, model, self.per_sample_loss, pool, rows, weights, target, share)

    def mine(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return the selected samples of this rank's pool, as numbers in it, and their weights."""
        here = (selection.indices >= self._start) & (selection.indices < self._start + self._size)
        return selection.indices[here] - self._start, selection.weights[here]

    def ranks(self) -> Exchange:
        """Return the collectives of the ranks that have pools of their own."""
        return Exchange(self.group if self._sharding is None else self._sharding.group)

    @contextmanager
    def _stage(self) -> Iterator[Ambient]:
        """Leave autograd, autocast and, where records are captured, compiled graphs for a step."""
        ambient = Ambient()
        compiled = nullcontext() if self.options.score == "forward" else uncompiled()
        with torch.no_grad(), compiled, ambient.off():
            yield ambient

    def _update(self, candidates: AllCandidates, selection: Selection) -> dict[str, Tensor]:
        update = candidates.reduced(selection.indices, selection.weights, "update")
        if share := self.options.train_on_target:
            update = {name: g * (1 - share) + candidates.scored.mean[name] * share for name, g in update.items()}
        return {name: g for name, g in update.items() if candidates.layouts.used(name)}

    def _choose(
        self, pool: Any, target: Any, keep: int | None, ambient: Ambient, steps: int | None = None
    ) -> tuple[AllCandidates | ForwardCandidates, list[Selection]]:
        """Return the candidates of all ranks and the selections; ``steps`` None asks for one, with its length."""
        options = self.options
        keep = options.keep if keep is None else check_keep(keep)
        passes = Passes(self.model, self.per_sample_loss, self.memory.slow, ambient)
        score = self._forward if options.score == "forward" else self._exact
        exchange, candidates = score(passes, pool, target, keep, steps or 1)
        candidates.measured = steps is None
        n = candidates.sizes[exchange.rank]
        self._start, self._size = candidates.start, n
        own = exchange.together("the sources of its pool", lambda: options.grouped(pool, n))
        grouped = None
        if own is not None:
            grouped = own.with_sources(lambda x: exchange.rows(x[:, None], candidates.sizes, "scores")[:, 0])
        solver = best_solver() if options.solver is None else options.solver
        selections = decide_batches(candidates, options, keep, solver, steps or 1, grouped=grouped)
        if exchange.rank == 0:
            self.memory.note_guard(selections[0], candidates.targets)
        return candidates, selections

    def _forward(
        self, passes: Passes, pool: Any, target: Any, keep: int, steps: int
    ) -> tuple[Exchange, ForwardCandidates]:
        """Score all pools by forward passes."""
        free(self.model)
        parameters = trainable(self.model)
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
        old = self._sharding
        if old is None or [id(p) for p in old.parameters.values()] != [id(p) for p in parameters.values()]:
            self._sharding = Sharding(self.model, parameters, self.group)
        assert self._sharding is not None
        refuse_coupled_layers(self.model)
        self._sharding.settle()
        exchange = Exchange(self._sharding.group)
        self.sent = self._sharding.sent = exchange.sent
        if not self._sharding.sharded and self.options.gram_of(max(keep, 2), keep):
            exchange.together("the audit of its capture", lambda: self._audit(passes, parameters, pool, target))
        candidates = forward_candidates(
            exchange,
            self._sharding,
            passes,
            pool,
            target,
            keep=keep,
            steps=steps,
            optimizer=self.optimizer,
            options=self.options,
            max_bytes=self.max_bytes,
        )
        return exchange, candidates

    def _exact(self, passes: Passes, pool: Any, target: Any, keep: int, steps: int) -> tuple[Exchange, AllCandidates]:
        """Capture this rank's candidates, and score all pools."""
        exchange, options = Exchange(self.group), self.options
        self.sent = exchange.sent
        with whole(self.model):
            parameters = trainable(self.model)
            refuse_sharded(parameters, "tensor parallelism is not supported; use fully_shard or DDP in its place")
            local = exchange.together("the pass over its pool", lambda: self._local(passes, parameters, pool, target))
            used = {name: (p.dtype, p.device) for name, p in parameters.items()}
        parameters = trainable(self.model)  # where they are sharded, the parts again
        refuse_offloaded(parameters, {name: device for name, (_, device) in used.items()})
        exchange.count("parameters", sum(part_bytes(p, used[name][0]) for name, p in parameters.items()))
        candidates = gather_candidates(
            exchange,
            parameters,
            local,
            keep=keep * steps,
            optimizer=self.optimizer,
            damping=options.damping,
            sketch=options.gram_sketch,
            max_bytes=self.max_bytes,
        )
        return exchange, candidates

    def _local(self, passes: Passes, parameters: dict[str, nn.Parameter], pool: Any, target: Any) -> Local:
        """Capture this rank's pool and target."""
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
        refuse_coupled_layers(self.model)
        self._audit(passes, parameters, pool, target)
        none: tuple[dict[str, Record], Tensor] = {}, next(iter(parameters.values())).new_zeros(0)
        candidates, losses = none if pool is None else self._all(passes, parameters, pool, "pool")
        samples, found = (candidates, losses) if target is None else self._all(passes, parameters, target, "target")
        total = ftw.combine(samples, torch.ones_like(found)) if len(found) else {}
        total = {name: total[name] if name in total else p.new_zeros(seen(p.shape)) for name, p in parameters.items()}
        if target is not None:
            refuse_nonfinite(found, None, "target")
        guarded = target is not None and self.options.guard != 0
        return Local(candidates, losses, samples if guarded else None, total, found)

    def _audit(self, passes: Passes, parameters: dict[str, nn.Parameter], pool: Any, target: Any) -> None:
        """Compare captured gradients with autograd's where that is due."""
        memory = self.memory
        if memory.audits.due(parameters):
            buffers = list(self.model.buffers())
            memory.audits.note(audit(passes.capture, passes.losses, parameters, memory.slow, pool, target, buffers))

    def _all(
        self, passes: Passes, parameters: Mapping[str, nn.Parameter], batch: Any, what: str
    ) -> tuple[dict[str, Record], Tensor]:
        if isinstance(batch, PackedBatch):
            raise TypeError(
                f"the {what} is a PackedBatch, which several processes do not share yet; use FilterThenWeight"
            )
        n = batches.size(batch, what)
        found = [passes.capture(parameters, piece, what) for piece in batches.split(batch, n, self.options.micro_batch)]
        records = join([records for _, records in found], [len(losses) for losses, _ in found], parameters)
        return records, torch.cat([losses for losses, _ in found])
