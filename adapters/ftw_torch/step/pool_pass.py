"""The pool pass, and what can be asked after it, whether its records were kept or not.

*Kept* (one pass): the update is composed from the records of those chosen. *Not kept* (two passes): scores and Gram
matrix are added up while the backward runs, every record is forgotten at once, and the gradient of those chosen comes
from going back to them with their weights. The Gram matrix of a pool in several micro-batches needs records
of different micro-batches side by side; then the second pass captures the shortlist and keeps its records.

A second pass draws the random numbers of the first: the dropout mask that was scored is the one that is applied.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftw.geometry import Operator
from ftw.gradients import Record
from ftw.spi import namespace
from ftw_torch import batches
from ftw_torch.capture.discovery import Sink
from ftw_torch.capture.passes import Passes, Randomness, as_seen
from ftw_torch.records.dtypes import promoted
from ftw_torch.records.pool import Pool, inner

from .stream import Stream

__all__ = ["PoolPass", "PoolPlan"]

log = logging.getLogger("ftw_torch")


class PoolPlan(NamedTuple):
    """How a pool pass is run."""

    shortlist: int  # candidates whose Gram matrix may be asked for, 0 for none
    keep: bool = True
    micro_batch: int | None = None
    budget: int | None = None  # bytes of records
    sketch: int | None = None  # size of the count sketches that stand in for the Gram matrix


class _ReusedParameterError(Exception):
    """A parameter was used again after its record was forgotten."""


class PoolPass:
    """The pool as seen by one target and one geometry.

    Parameters
    ----------
    passes : Passes
    parameters : mapping of str to Parameter
    pool : batch
    target, operators : mapping by parameter name
        g_T and P.
    plan : PoolPlan
    several : set of str
        Parameters known to be used more than once; grows.
    captured : (tensor (n,), Pool), optional
        Losses and records, if the pool was captured already.
    """

    def __init__(
        self,
        passes: Passes,
        parameters: Mapping[str, nn.Parameter],
        pool: Any,
        target: Mapping[str, Tensor],
        operators: Mapping[str, Operator],
        plan: PoolPlan,
        several: set[str],
        captured: tuple[Tensor, Pool] | None = None,
    ) -> None:
        self.passes, self.parameters, self.batch = passes, parameters, pool
        self.target, self.operators, self.plan, self.several = target, operators, plan, several
        n = batches.size(pool, "pool")
        self.batches = list(batches.split(pool, n, plan.micro_batch))
        self.sizes = [batches.size(piece, "pool") for piece in self.batches]
        self.randomness = Randomness(parameters)
        self.kept = plan.keep
        self._members: tuple[list[int], Pool] | None = None
        self._sketches: Tensor | None = None
        self.captured = captured

    def run(self) -> None:
        """Run the forward and the backward of the pool; afterwards ``losses`` and ``scores`` (n,) are there."""
        if self.captured is not None:
            self.kept = True
            self.losses, self.pool = self.captured
            direction: dict[str, Any] = {name: self.operators[name].apply(g) for name, g in self.target.items()}
            self.scores = self.unscaled(self.pool.scores(direction))
            return
        try:
            self._first()
        except _ReusedParameterError:  # known by now: its records are kept
            self._first(again=True)

    def _first(self, *, again: bool = False) -> None:
        """Capture the pool, one micro-batch after another; ``again`` with the random numbers of the first time."""
        losses, scores, pieces, sketches, grams, left = [], [], [], [], {}, self.plan.budget
        sketch = self.plan.sketch if self.plan.shortlist and not (self.kept and left is None) else None
        for i, batch in enumerate(self.batches):
            stream = Stream(
                self.target,
                self.operators,
                shortlist=self.plan.shortlist,
                whole=len(self.sizes) == 1,
                keep=self.kept,
                several=self.several,
                budget=left,
                sketch=sketch,
            )
            if again:
                with self.randomness.again(i):
                    found, records = self.passes.capture(self.parameters, batch, "pool", sink=stream)
            else:
                found, records = self.passes.capture(self.parameters, batch, "pool", sink=stream)
                self.randomness.mark()
            if stream.conflict and not again:
                for rest in self.batches[i + 1 :]:  # the generators move on as in a whole pass
                    self.passes.capture(self.parameters, rest, "pool", sink=lambda name, record: None)
                    self.randomness.mark()
                raise _ReusedParameterError
            if self.kept and not stream.keep:
                self.kept = False
                log.info("the records of this pool exceed the budget of %d bytes: two passes", self.plan.budget)
            left = None if left is None else max(left - stream.kept, 0)
            losses.append(found)
            own = stream.scores
            scores.append(torch.zeros_like(found) if own is None else own)
            pieces.append(records)
            grams = stream.grams
            if sketch:
                own = stream.sketches
                sketches.append(found.new_zeros(len(found), sketch) if own is None else own)
        self.losses, self.scores = torch.cat(losses), self.unscaled(torch.cat(scores))  # (n,), (n,)
        self.pool = Pool(self.parameters, pieces, self.sizes, grams)
        self._sketches = torch.cat(sketches) if sketch else None  # (n, m)

    # ------------------------------------------------------------------------------------------------------------------
    # What can be asked

    def gram(self, indices: Tensor | None) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s)."""
        if self.plan.sketch:
            x = self._sketches  # (n, m)
            if x is None:
                x = self.pool.sketches(self.operators, self.plan.sketch, indices)  # (s, m)
            elif indices is not None:
                x = x[indices]
            return self.unscaled(x @ x.T, 2)
        if self.kept or len(self.sizes) == 1:
            return self.unscaled(self.pool.gram(self.operators, indices), 2)
        every = list(range(len(self.losses))) if indices is None else indices.tolist()
        places, pool = self._captured(every)
        return self.unscaled(pool.gram(self.operators, self._index([places.index(i) for i in every])), 2)

    def unscaled(self, x: Tensor, power: int = 1) -> Tensor:
        """Return a product of the pool's gradients without a GradScaler's scale, which `combine` keeps."""
        return self.passes.unscaled(x, power)

    def combine(self, indices: Sequence[int], weights: Sequence[float]) -> dict[str, Tensor]:
        """Return ``{name: sum_i w_i g_i}`` of parameters that were used."""
        if self.kept:
            return self.pool.combine(indices, weights)
        chosen = [(i, w) for i, w in zip(indices, weights, strict=True) if w != 0]
        if self._members is not None and all(i in self._members[0] for i, _ in chosen):
            places, pool = self._members
            return pool.combine([places.index(i) for i, _ in chosen], [w for _, w in chosen])
        return self._second(chosen)

    @property
    def square(self) -> Tensor:
        """``|g_T|^2`` ()."""
        return self.length(self.target)

    def length(self, g: Mapping[str, Tensor]) -> Tensor:
        """Return ``<g, P g>`` ()."""
        terms = [inner(x, self.operators[name], x) for name, x in g.items()]
        wide = reduce(promoted, (x.dtype for x in terms))
        return torch.stack([x.to(wide) for x in terms]).sum()

    def against_mean(self, short: Tensor, which: Sequence[int], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return ``|g_T - g_P|^2`` () and ``<g_i, P g_P>`` (s,) of some, for ``g_P`` a sum of kept records."""
        mean = {name: self.unscaled(g) for name, g in self.pool.combine(which, shares).items()}
        apart = {name: g - mean[name] if name in mean else g for name, g in self.target.items()}
        distance = self.length(apart)
        direction: dict[str, Any] = {name: self.operators[name].apply(g) for name, g in mean.items()}
        return distance, self.unscaled(self.pool.scores(direction, short))

    # ------------------------------------------------------------------------------------------------------------------
    # The second pass

    def _second(self, chosen: list[tuple[int, float]]) -> dict[str, Tensor]:
        """Return the gradient of those chosen, by plain autograd where nothing is drawn at random."""
        if self.randomness.used:  # masks are drawn for whole micro-batches
            places, pool = self._captured([i for i, _ in chosen])
            return pool.combine([places.index(i) for i, _ in chosen], [w for _, w in chosen])
        total: dict[str, Tensor] = {}
        step = self.plan.micro_batch or len(chosen)
        for start in range(0, len(chosen), max(step, 1)):
            part = chosen[start : start + step]
            batch = batches.take(self.batch, self._index([i for i, _ in part]))
            self.passes.gradient(self.parameters, batch, "pool", self._weights([w for _, w in part]), total=total)
        return as_seen(total)

    def _captured(self, wanted: Sequence[int]) -> tuple[list[int], Pool]:
        """Return samples in order with their records, captured anew unless they are there."""
        if self._members is not None and set(wanted) <= set(self._members[0]):
            return self._members
        places = sorted(set(wanted))
        found: list[dict[str, Record]] = []
        sizes = []
        for i, here in self._by_micro_batch(places):
            start = sum(self.sizes[:i])
            if self.randomness.used:
                rows = self._index([j - start for j in here])
                with self.randomness.again(i):
                    _, records = self.passes.capture(self.parameters, self.batches[i], "pool", sink=_taking(rows))
            else:
                _, records = self.passes.capture(self.parameters, batches.take(self.batch, self._index(here)), "pool")
            found.append(records)
            sizes.append(len(here))
        self._members = places, Pool(self.parameters, found, sizes)
        return self._members

    def _by_micro_batch(self, indices: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Return the micro-batches that hold some of the samples, with these samples."""
        out, start = [], 0
        for i, size in enumerate(self.sizes):
            here = [j for j in indices if start <= j < start + size]
            start += size
            if here:
                out.append((i, here))
        return out

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.int64).to(self.losses.device, non_blocking=True)

    def _weights(self, weights: Sequence[float]) -> Tensor:
        return torch.tensor(weights, dtype=self.losses.dtype).to(self.losses.device, non_blocking=True)


def _taking(rows: Tensor) -> Sink:
    """Return a sink that keeps the records of some samples."""
    xp = namespace(rows)
    return lambda name, record: record.take(xp, rows)
