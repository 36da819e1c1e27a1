"""The Gram matrix of candidates of several ranks: their records go round in blocks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import ftw
from ftw.geometry import Operator
from ftw.gradients import Record
from ftw.inner_products import cross_gram
from ftw_torch.records.blocks import add_sketches

from .collectives import Exchange, Layouts

__all__ = ["by_rank", "gram_of_ranks"]


def by_rank(wanted: Sequence[int], sizes: Sequence[int], rank: int) -> tuple[list[int], list[int], Tensor]:
    """Return a rank's own among the candidates ``wanted`` (s,), how many each has, and the places (s,) by rank."""
    starts = [0, *itertools.accumulate(sizes)]
    owned = [[at for at, i in enumerate(wanted) if a <= i < b] for a, b in itertools.pairwise(starts)]
    return (
        [wanted[at] - starts[rank] for at in owned[rank]],
        [len(some) for some in owned],
        torch.tensor([at for some in owned for at in some]),
    )


def gram_of_ranks(
    exchange: Exchange,
    layouts: Layouts,
    own: Mapping[str, Record],
    counts: Sequence[int],
    places: Tensor,
    operators: Mapping[str, Operator],
    *,
    like: Tensor,
    sketch: int | None,
    max_bytes: int,
) -> Tensor:
    """Return ``<g_i, P g_j>`` (s, s), exactly or from sketches, on the host.

    Parameters
    ----------
    own : mapping of str to record
        This rank's candidates; empty for none.
    counts : sequence of int
        Candidates of each rank, s together.
    places : tensor (s,)
        Where the candidates, by rank, stand in the matrix.
    like : tensor
        Of the matrix's dtype, on the records' device.
    """
    mine, device, order = counts[exchange.rank], like.device, places.to(like.device)
    rows = like.new_zeros(mine, sum(counts))  # (s_r, s)
    if sketch is not None:
        x = like.new_zeros(mine, sketch)  # (s_r, m)
        for name, record in own.items():
            x += add_sketches(name, [record], operators[name], sketch).to(x.dtype)
        x = exchange.rows(x, counts, "gram")[order.argsort()]  # (s, m), as asked
        return (x @ x.T).cpu()
    starts = [0, *itertools.accumulate(counts)]
    for name, operator in operators.items():
        if not layouts.used(name):
            continue
        size = layouts.chunk(name, max_bytes)
        for begin in range(0, max(counts), size):
            now = [max(0, min(size, count - begin)) for count in counts]
            here = None
            if begin < mine:
                here = ftw.take({name: own[name]}, torch.arange(begin, begin + now[exchange.rank], device=device))[name]
            others = layouts.gather(name, here, now, size)
            if mine:
                found = cross_gram({name: own[name]}, {name: others}, {name: operator})
                at = [order[a + begin : a + begin + n] for a, n in zip(starts, now, strict=False)]
                rows[:, torch.cat(at)] += found.to(rows.dtype)
    every = exchange.rows(rows, counts, "gram")  # (s, s), by rank
    full = torch.empty_like(every)
    full[order] = every
    return ((full + full.T) / 2).cpu()
