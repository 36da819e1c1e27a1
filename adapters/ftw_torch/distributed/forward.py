"""Scores from forward passes over several processes: no record is captured, and no parameter gathered for good.

    1. g_T                   one ordinary backward: FSDP2 reduce-scatters it, replicas all-reduce it
    2. P g_T                 each rank on its shard of the optimizer's state
    3. theta - s P g_T       each rank's shard moves in place; losses without gradients; it moves back, bit for bit
    4. theta                 losses without gradients
    5. choice                from 2 n numbers a rank, gathered; the same on every rank
    6. update                an ordinary weighted backward of the selected samples

What a choice needs beyond scores, a Gram matrix, comes from the shortlist, captured on its rank: parameters must then
be whole there.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ftw
from ftw.gradients import Record
from ftw.spi import Products
from ftw_torch import batches
from ftw_torch.capture.passes import Passes, uncompiled
from ftw_torch.errors import NonFiniteError
from ftw_torch.optim.sharded import ShardedGeometry
from ftw_torch.options import Options
from ftw_torch.records.join import join
from ftw_torch.step.audit import same_state
from ftw_torch.step.forward_scores import forward_length, shifted

from .collectives import Exchange, Layouts
from .gram import by_rank, gram_of_ranks
from .numbering import Numbered
from .passes import RankPasses, cut
from .sharding import Sharding, local_part, redistributed

__all__ = ["ForwardCandidates", "forward_candidates"]


def forward_candidates(
    exchange: Exchange,
    sharding: Sharding,
    passes: Passes,
    pool: Any,
    target: Any,
    *,
    keep: int,
    steps: int,
    optimizer: Any,
    options: Options,
    max_bytes: int,
) -> ForwardCandidates:
    """Return the candidates of all ranks with their scores; a collective."""
    parameters, micro = sharding.parameters, options.micro_batch
    pieces, aims = exchange.together(
        "looking at its batches", lambda: (cut(pool, "pool", micro), cut(target, "target", micro))
    )
    own = [sum(n for _, n in some) for some in (pieces, aims)]
    counts = exchange.counts([*own, len(pieces), len(aims), int(target is None)])
    sizes, whole_pool = [c[0] for c in counts], all(c[4] for c in counts)
    if whole_pool:
        aims = pieces
        counts = [[c[0], c[0], c[2], c[2], 1] for c in counts]
    targets = sum(c[1] for c in counts)
    _check(exchange, sharding, options, counts, keep, steps)
    ranks = RankPasses(exchange, sharding, passes, parameters, _spare(aims or pieces))

    what = "pool" if whole_pool else "target"
    share = [(batch, n, torch.full((n,), 1 / targets)) for batch, n in aims]
    losses, mean, used = ranks.gradient(share, max(c[3] for c in counts), what, finite=not whole_pool)
    mean = {name: mean[name] if name in mean else torch.zeros_like(p.detach()) for name, p in parameters.items()}
    wide = _widest(exchange, losses)
    losses = exchange.rows(sharding.same(losses.to(wide))[:, None], [c[1] for c in counts], "scores")[:, 0]  # (m,)
    geometry = ShardedGeometry(optimizer, parameters, mean, options.damping, functools.partial(exchange.count, "state"))
    direction = {name: geometry.apply(name, g) for name, g in mean.items()}
    decrease = sum_over(sharding, {name: _dot(mean[name], d) for name, d in direction.items()})  # ()

    step: Any = options.score_step
    if step is None:
        step = forward_length(losses, decrease, [*_dtypes(parameters, passes), losses.dtype, *sharding.dtypes()])
    local = {name: local_part(p.detach()) for name, p in parameters.items()}
    moves = {name: local_part(direction.pop(name)) for name in list(direction)}
    rounds = max(c[2] for c in counts)
    with same_state(parameters, list(passes.model.buffers())), shifted(local, moves, step):
        after = ranks.losses(pieces, rounds)
    before = ranks.losses(pieces, rounds)
    both = sharding.same(torch.stack([before, after], 1).to(wide))  # (n, 2)
    both = exchange.rows(both, sizes, "scores")  # (N, 2)
    scores = ftw.forward_scores(both[:, 0], both[:, 1], step)
    return ForwardCandidates(
        ranks, geometry, pool, sizes, both[:, 0], scores, losses, mean, used, decrease, options, max_bytes
    )


class ForwardCandidates(Numbered):
    """The candidates of all ranks by their forward scores, numbered through the ranks.

    Losses, scores and Gram matrices are on the host; gradients are in the shards of their parameters.
    """

    def __init__(
        self,
        ranks: RankPasses,
        geometry: ShardedGeometry,
        pool: Any,
        sizes: list[int],
        losses: Tensor,
        scores: Any,
        target_losses: Tensor,
        mean: dict[str, Tensor],
        used: set[str],
        square: Tensor,
        options: Options,
        max_bytes: int,
    ) -> None:
        super().__init__(sizes, scores.cpu())  # (N,)
        self.ranks, self.geometry, self.pool = ranks, geometry, pool
        self.exchange, self.parameters = ranks.exchange, ranks.parameters
        self.start = sum(sizes[: self.exchange.rank])
        self.losses, self.target_losses = losses.cpu(), target_losses.cpu()
        self.device = losses.device
        self.mean, self.used, self.square, self.targets = mean, used, square.cpu(), 0
        self.options, self.max_bytes = options, max_bytes
        self._composed: tuple[Any, dict[str, Tensor]] | None = None

    def products(self) -> Products:
        """Return the inner products that a choice asks for."""
        return Products(lambda indices: self.gram(self._number(indices)), self.length, self.square.to(self.scores))

    def refuse_target(self) -> None:
        """Raise if the target's gradient is not finite."""
        self._refuse_nonfinite(self.mean, "the gradient of the target is not finite")

    def _composed_length(self, indices: Tensor, weights: Tensor) -> Tensor:
        update = self._sum(indices, weights)
        found = sum_over(
            self.ranks.sharding, {name: _dot(g, self.geometry.apply(name, g)) for name, g in update.items()}
        )
        return found.to(self.scores)

    def update(self, indices: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return ``{name: (1 - a) sum_i w_i g_i + a g_T}`` of candidates by number, in the shards of the parameters."""
        update, a = self._sum(indices, weights), self.options.train_on_target
        self._refuse_nonfinite(
            update,
            "the gradient of the selected samples is not finite although their losses are; score='exact' names the "
            "samples, and on_nonfinite='drop' then goes on without them",
        )
        if not a:
            return update
        out = {name: g * (1 - a) for name, g in update.items()}
        for name in self.used:
            out[name] = out[name] + a * self.mean[name] if name in out else a * self.mean[name]
        return {name: redistributed(g, self.parameters[name]) for name, g in out.items()}

    def _sum(self, indices: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return ``{name: sum_i w_i g_i}`` over candidates of all ranks, by an ordinary backward."""
        key = indices.tolist(), weights.tolist()
        if self._composed is not None and self._composed[0] == key:
            return self._composed[1]
        micro = self.options.micro_batch
        ends = list(itertools.accumulate(self.sizes))
        chosen = [(i, w) for i, w in zip(*key, strict=True) if w]
        counts = [sum(end - size <= i < end for i, _ in chosen) for end, size in zip(ends, self.sizes, strict=True)]
        mine = [(i - self.start, w) for i, w in chosen if self.start <= i < ends[self.exchange.rank]]
        size = micro or max(1, len(mine))
        pieces = []
        for begin in range(0, len(mine), size):
            part = mine[begin : begin + size]
            rows = torch.tensor([i for i, _ in part]).to(self.device)
            pieces.append((batches.take(self.pool, rows), len(part), torch.tensor([w for _, w in part])))
        rounds = max(-(-count // micro) if micro else int(count > 0) for count in counts)
        _, total, _ = self.ranks.gradient(pieces, rounds, "update")
        self._composed = key, total
        return total

    def gram(self, indices: Tensor) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s) of candidates of all ranks, captured where they are."""
        mine, counts, places = by_rank(indices.tolist(), self.sizes, self.exchange.rank)
        records = self.exchange.together("the capture of its shortlist", lambda: self._captured(mine))
        return gram_of_ranks(
            self.exchange,
            Layouts(self.exchange, records, self.parameters),
            records,
            counts,
            places,
            self.geometry.whole(),
            like=self.scores.to(self.device),
            sketch=self.options.gram_sketch,
            max_bytes=self.max_bytes,
        )

    def _captured(self, mine: Sequence[int]) -> dict[str, Record]:
        """Return the records of some of this rank's candidates, in order."""
        if not mine:
            return {}
        ranks, found, sizes = self.ranks, [], []
        size = self.options.micro_batch or len(mine)
        with uncompiled():
            for begin in range(0, len(mine), size):
                rows = torch.tensor(mine[begin : begin + size]).to(self.device)
                piece = batches.take(self.pool, rows)
                found.append(ranks.passes.capture(self.parameters, piece, "pool")[1])
                sizes.append(len(rows))
        return join(found, sizes, self.parameters)

    def _refuse_nonfinite(self, g: Mapping[str, Tensor], words: str) -> None:
        """Raise on all ranks if a gradient is not finite on one."""
        bad = [name for name, x in g.items() if not bool(torch.isfinite(local_part(x)).all())]
        every = [
            name for text in self.exchange.texts(json.dumps(bad) if bad else "") if text for name in json.loads(text)
        ]
        if every:
            broken = list(dict.fromkeys(every))
            raise NonFiniteError(f"{words}: {', '.join(map(repr, broken[:8]))}", parameters=broken)


def sum_over(sharding: Sharding, values: Mapping[str, Tensor]) -> Tensor:
    """Return the sum () of numbers, one of each parameter's local part: an all-reduce of one number for each mesh."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    total: Any = 0.0
    meshes: dict[Any, Any] = {}
    for name, x in values.items():
        p: Any = sharding.parameters[name]
        if not hasattr(p, "placements"):
            total = total + x
            continue
        over = tuple(not placement.is_replicate() for placement in p.placements)
        meshes[p.device_mesh, over] = meshes.get((p.device_mesh, over), 0.0) + x
    for (mesh, over), x in meshes.items():
        pending = [Partial() if cut else Replicate() for cut in over]
        total = total + DTensor.from_local(x, mesh, pending, run_check=False).full_tensor()
    return torch.as_tensor(total)


def _check(
    exchange: Exchange, sharding: Sharding, options: Options, counts: list[list[int]], keep: int, steps: int
) -> None:
    """Raise, on all ranks alike, what is wrong with the batches of all ranks, or asks for captured records."""
    n, m = sum(c[0] for c in counts), sum(c[1] for c in counts)
    if keep * steps > n or m == 0:
        raise ValueError(
            f"{f'{steps} selections of ' if steps > 1 else ''}keep={keep} of {n} candidates on all ranks, with {m} "
            "target samples; offer more"
        )
    idle = [rank for rank, c in enumerate(counts) if c[0] == 0 and c[1] == 0]
    if idle and sharding.hooked:
        raise ValueError(
            f"rank {idle[0]} has neither candidates nor target samples, and the others wait for it in every layer: "
            "give each rank a target sample"
        )
    if sharding.sharded and options.gram_of(n, keep):
        raise ValueError(
            f"filter={options.filter!r} with weight={options.weight!r} needs the Gram matrix of captured gradients, "
            "and the parameters are sharded: score='forward' over shards takes filter='top_k' with weight='uniform'; "
            "score='exact' gathers the whole model on each rank of fully_shard"
        )


def _widest(exchange: Exchange, losses: Tensor) -> torch.dtype:
    """Return the dtype, 32 or 64 bits, in which all ranks send their losses; ranks without samples follow."""
    bits = exchange.counts([losses.dtype.itemsize if len(losses) else 0])
    return torch.float64 if max(bits) == [8] else torch.float32


def _spare(pieces: Sequence[tuple[Any, int]]) -> Any:
    if not pieces:
        return None
    batch = pieces[0][0]
    return batches.take(batch, torch.zeros(1, dtype=torch.int64, device=next(iter(batches.devices(batch)), None)))


def _dtypes(parameters: Mapping[str, nn.Parameter], passes: Passes) -> list[torch.dtype]:
    devices = {p.device for p in parameters.values()}
    ambient = [dtype for device in devices for dtype in passes.ambient.dtypes(device)]
    return [*(p.dtype for p in parameters.values()), *ambient]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product () of this rank's parts."""
    wide = torch.promote_types(b.dtype, torch.float32)
    return torch.dot(local_part(a).reshape(-1).to(wide), local_part(b).reshape(-1).to(wide))
