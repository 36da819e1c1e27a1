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

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ftw
from ftw import Selection, Status
from ftw.choice import Products, choose, strata
from ftw.geometry import Operator
from ftw.gradients import Record
from ftw.inner_products import cross_gram, squared_norms
from ftw_torch import batches
from ftw_torch.amp import Ambient
from ftw_torch.capture.backward import accumulate
from ftw_torch.capture.discovery import refuse_coupled_layers, trainable
from ftw_torch.capture.passes import Passes, uncompiled
from ftw_torch.fsdp import cut_as, part_bytes, refuse_offloaded, refuse_sharded, whole
from ftw_torch.optim.geometry import geometry, unwrapped
from ftw_torch.records.blocks import add_sketches
from ftw_torch.records.join import join, seen
from ftw_torch.selector import FilterThenWeight
from ftw_torch.step.audit import audit
from ftw_torch.step.target import refuse_nonfinite

from .collectives import Exchange, Layouts

__all__ = ["DistributedFilterThenWeight"]


class Local(NamedTuple):
    """What one rank found by itself."""

    candidates: dict[str, Record]
    losses: Tensor  # (n,)
    samples: dict[str, Record] | None  # of the target
    total: dict[str, Tensor]  # sum of the target's gradients
    target_losses: Tensor  # (m,)


class DistributedFilterThenWeight(FilterThenWeight):
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
        The default one unless told.
    max_bytes : int
        Of the records that are on one rank at a time while the Gram matrix is formed.
    **options
        The other arguments of `FilterThenWeight`, but for two passes, ``memory_budget``, ``score_rank`` and ``scaler``.
        With ``gram_sketch`` processes exchange sketches in place of records.

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
        group: Any = None,
        max_bytes: int = 1 << 26,
        **options: Any,
    ) -> None:
        alone = [name for name in ("memory_budget", "score_rank", "scaler") if options.get(name) is not None]
        alone += ["mode"] * (options.get("mode") == "two_pass")
        if alone:
            raise ValueError(f"{', '.join(alone)}: not for several processes, which keep records and score exactly")
        super().__init__(model, optimizer, per_sample_loss, keep=keep, **options)
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "no process group: call torch.distributed.init_process_group first, or use FilterThenWeight"
            )
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r} must be an int >= 1")
        self.group, self.max_bytes = group, max_bytes
        self.sent: dict[str, int] = {}

    def backward(self, pool: Any, target: Any) -> Selection:
        """Add the update to ``.grad``, the same on every rank; see `FilterThenWeight.backward`."""
        ambient = Ambient()
        with torch.no_grad(), uncompiled(), ambient.off():
            step = self._step(pool, target, ambient)
            selection = step.choice()
            update = step.reduced(selection.indices, selection.weights, "update")
            for name, p in step.parameters.items():
                if step.layouts.used(name):
                    accumulate(p, cut_as(update[name].reshape(p.shape).to(p.dtype), p))
        return selection

    def select(self, pool: Any, target: Any) -> Selection:
        """Return the choice of all ranks and its weights; ``.grad`` stays untouched."""
        ambient = Ambient()
        with torch.no_grad(), uncompiled(), ambient.off():
            return self._step(pool, target, ambient).choice()

    def mine(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return the places in this rank's pool of those chosen, and their weights."""
        here = (selection.indices >= self._start) & (selection.indices < self._start + self._size)
        return selection.indices[here] - self._start, selection.weights[here]

    def _step(self, pool: Any, target: Any, ambient: Ambient) -> Step:
        exchange = Exchange(self.group)
        passes = Passes(self.model, self.per_sample_loss, self._slow, ambient)
        self.sent = exchange.sent
        with whole(self.model):
            parameters = trainable(self.model)
            refuse_sharded(parameters, "tensor parallelism is not supported; use fully_shard or DDP in its place")
            local = exchange.together("the pass over its pool", lambda: self._local(passes, parameters, pool, target))
            used = {name: (p.dtype, p.device) for name, p in parameters.items()}
        parameters = trainable(self.model)  # where they are sharded, the parts again
        refuse_offloaded(parameters, {name: device for name, (_, device) in used.items()})
        exchange.count("parameters", sum(part_bytes(p, used[name][0]) for name, p in parameters.items()))
        step = Step(self, exchange, parameters, local)
        self._start, self._size = step.start, len(local.losses)
        return step

    def _local(self, passes: Passes, parameters: dict[str, nn.Parameter], pool: Any, target: Any) -> Local:
        """Capture this rank's pool and target."""
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
        refuse_coupled_layers(self.model)
        if self._audits.due(parameters):
            buffers = list(self.model.buffers())
            self._audits.note(audit(passes.capture, passes.losses, parameters, self._slow, pool, target, buffers))
        none: tuple[dict[str, Record], Tensor] = {}, next(iter(parameters.values())).new_zeros(0)
        candidates, losses = none if pool is None else self._all(passes, parameters, pool, "pool")
        samples, found = (candidates, losses) if target is None else self._all(passes, parameters, target, "target")
        total = ftw.combine(samples, torch.ones_like(found)) if len(found) else {}
        total = {name: total[name] if name in total else p.new_zeros(seen(p.shape)) for name, p in parameters.items()}
        if target is not None:
            refuse_nonfinite(found, None, "target")
        guarded = target is not None and self.options.get("guard", 0.3) != 0
        return Local(candidates, losses, samples if guarded else None, total, found)

    def _all(
        self, passes: Passes, parameters: Mapping[str, nn.Parameter], batch: Any, what: str
    ) -> tuple[dict[str, Record], Tensor]:
        n = batches.size(batch, what)
        found = [passes.capture(parameters, piece, what) for piece in batches.split(batch, n, self.micro_batch)]
        records = join([records for _, records in found], [len(losses) for losses, _ in found], parameters)
        return records, torch.cat([losses for losses, _ in found])


class Step:
    """One step, from the ranks' own findings on; every rank goes through the same collectives."""

    def __init__(
        self,
        selector: DistributedFilterThenWeight,
        exchange: Exchange,
        parameters: dict[str, nn.Parameter],
        local: Local,
    ) -> None:
        self.selector, self.exchange, self.parameters, self.local = selector, exchange, parameters, local
        n, m = len(local.losses), len(local.target_losses)
        sizes = exchange.counts([n, m])
        self.sizes, targets = [size for size, _ in sizes], sum(size for _, size in sizes)
        self.start, self.n = sum(self.sizes[: exchange.rank]), sum(self.sizes)
        if not 1 <= selector.keep <= self.n or targets == 0:
            raise ValueError(
                f"keep={selector.keep} of {self.n} candidates on all ranks, with {targets} target samples; offer more"
            )
        self.layouts = Layouts(exchange, local.candidates, parameters)
        self.targets = targets if local.samples is not None else 0
        loss = local.target_losses.sum()
        *found, loss = exchange.add([*local.total.values(), loss], "target")
        self.target_loss = loss / targets
        self.goal = {name: g / targets for name, g in zip(local.total, found, strict=True)}
        self.operators = self._geometry()
        own, norms = exchange.together("scoring its pool", self._scored)
        norms = exchange.add([norms], "target")[0]
        self.samples = norms / targets if self.targets > 1 else None
        both = exchange.rows(torch.stack([local.losses.to(own.dtype), own], 1), self.sizes, "scores")
        self.losses, self.scores = both[:, 0], both[:, 1]  # (N,), (N,)

    def _geometry(self) -> dict[str, Operator]:
        """Return P, the same on every rank: from the same state, or from that of all where it is sharded."""
        optimizers = unwrapped(self.selector.optimizer)
        for p in self.parameters.values():
            if hasattr(p, "placements"):
                state = [one.state.get(p, {}) for one in optimizers]
                self.exchange.count("state", sum(map(part_bytes, tree_leaves([p, state]))))
        return geometry(optimizers, self.parameters, self.goal, damping=self.selector.damping)

    def _scored(self) -> tuple[Tensor, Tensor]:
        local = self.local
        own = ftw.scores(local.candidates, self.goal, self.operators) if len(local.losses) else local.losses
        norms = own.new_zeros(())
        if local.samples is not None and len(local.target_losses):
            norms = squared_norms(local.samples, self.operators).sum()
        return own, norms

    def choice(self) -> Selection:
        """Return the selection; a status that leaves no usable weights becomes an exception, on every rank."""
        bad = ~(torch.isfinite(self.losses) & torch.isfinite(self.scores))
        if bool((self.scores == 0).all()):
            raise RuntimeError("the scores of all candidates on all ranks are exactly zero")
        good = None
        keep = self.selector.keep
        if bool(bad.any()):
            if self.selector.on_nonfinite == "raise" or bool(bad.all()):
                raise FloatingPointError(f"the loss or gradient of {self._named(bad)} is not finite")
            good = torch.nonzero(~bad)[:, 0]
            keep = min(keep, len(good))

        def place(indices: Tensor | None) -> Tensor:
            if indices is None:
                return torch.arange(self.n, device=self.scores.device) if good is None else good
            return indices if good is None else good[indices]

        def length(indices: Tensor, weights: Tensor) -> Tensor:
            return self._inner(self.reduced(place(indices), weights, "length"))

        def pool(order: Tensor, short: Tensor | None) -> tuple[Tensor, Tensor]:
            places, shares = strata(len(order), len(order) if short is None else len(short))
            some = order[torch.tensor(places, device=order.device)]
            weights = torch.tensor(shares, dtype=self.scores.dtype, device=self.scores.device)
            mean = self.reduced(place(some), weights, "guard")
            local = self.local
            own = ftw.scores(local.candidates, mean, self.operators) if len(local.losses) else self.scores[:0]
            every = self.exchange.rows(own.to(self.scores.dtype)[:, None], self.sizes, "guard")[:, 0]
            return self._inner({name: g - mean[name] for name, g in self.goal.items()}), every[place(short)]

        products = Products(lambda i: self.gram(place(i)), length, self._inner(self.goal), self.samples, pool)
        scores = self.scores if good is None else self.scores[good]
        options = {"shortlist": self.selector.shortlist, **self.selector.options}
        chosen = choose(scores, products, keep=keep, targets=self.targets, **options)
        status = Status(int(chosen.status))
        if status in (Status.NOT_FINITE, Status.INFEASIBLE, Status.NOT_PSD):
            raise RuntimeError(f"no weights for this pool: {status.message} ({status.name})")
        if self.exchange.rank == 0:
            self.selector._note(chosen, self.targets)
        full = torch.where(bad, torch.nan, self.scores)
        chosen = chosen._replace(indices=place(chosen.indices), scores=full)
        return chosen._replace(losses=self.losses, target_loss=self.target_loss)

    def gram(self, indices: Tensor) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s) of candidates of all ranks, exactly or from sketches."""
        wanted = indices.tolist()
        starts = [sum(self.sizes[:r]) for r in range(len(self.sizes))]
        owned = [
            [(at, i - start) for at, i in enumerate(wanted) if start <= i < start + size]
            for start, size in zip(starts, self.sizes, strict=True)
        ]  # by rank: (place in the matrix, place in the rank's pool)
        counts = [len(some) for some in owned]
        mine = torch.tensor([i for _, i in owned[self.exchange.rank]], dtype=torch.int64, device=indices.device)
        rows = self.scores.new_zeros(len(mine), len(wanted))  # (s_r, s)
        own = ftw.take(self.local.candidates, mine) if len(mine) else {}
        order = torch.tensor([at for some in owned for at, _ in some], device=indices.device)  # (s,)
        m = self.selector.gram_sketch
        if m is not None:
            x = self.scores.new_zeros(len(mine), m)  # (s_r, m)
            for name, record in own.items() if len(mine) else ():
                x += add_sketches(name, [record], self.operators[name], m).to(x.dtype)
            x = self.exchange.rows(x, counts, "gram")[order.argsort()]  # (s, m), as asked
            return x @ x.T
        for name, operator in self.operators.items():
            if not self.layouts.used(name):
                continue
            size = self.layouts.chunk(name, self.selector.max_bytes)
            for begin in range(0, max(counts), size):
                places = [at for some in owned for at, _ in some[begin : begin + size]]
                here = ftw.take({name: own[name]}, torch.arange(len(mine), device=indices.device)[begin : begin + size])[name] if begin < len(mine) else None  # fmt: skip  # noqa: E501
                others = self.layouts.gather(name, here, [max(0, min(size, c - begin)) for c in counts], size)
                if len(mine):
                    found = cross_gram({name: own[name]}, {name: others}, {name: operator})
                    rows[:, torch.tensor(places, device=indices.device)] += found.to(rows.dtype)
        every = self.exchange.rows(rows, counts, "gram")  # (s, s), by rank
        full = torch.empty_like(every)
        full[order] = every
        return (full + full.T) / 2

    def reduced(self, indices: Tensor, weights: Tensor, what: str) -> dict[str, Tensor]:
        """Return ``{name: sum_i w_i g_i}`` over candidates of all ranks."""
        here = (indices >= self.start) & (indices < self.start + len(self.local.losses)) & (weights != 0)
        own = {name: torch.zeros_like(g) for name, g in self.goal.items()}
        if bool(here.any()):
            chosen = ftw.take(self.local.candidates, indices[here] - self.start)
            own |= ftw.combine(chosen, weights[here])
        return dict(zip(own, self.exchange.add(list(own.values()), what), strict=True))

    def _inner(self, g: Mapping[str, Tensor]) -> Tensor:
        total: Any = sum(operator.inner(g[name], g[name]) for name, operator in self.operators.items())
        return torch.as_tensor(total, dtype=self.scores.dtype, device=self.scores.device)

    def _named(self, bad: Tensor) -> str:
        out, start = [], 0
        for rank, size in enumerate(self.sizes):
            places = torch.nonzero(bad[start : start + size])[:, 0].tolist()
            start += size
            if places:
                out.append(f"sample {', '.join(map(str, places[:8]))} of rank {rank}'s pool")
        return " and ".join(out)
