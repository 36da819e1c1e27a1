"""The choice of a step from losses, scores and inner products, the same for one process and for many.

finite?    candidates whose loss or score is not finite are dropped, or the step raises and names them
choose     `ftw.spi.choose` over the rest, in NumPy (``host.py``)
status     one without usable weights becomes a `SelectionError`
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ftw import Reason, Reasons, Selection, Status
from ftw.spi import Products, unfilled
from ftw_torch.capture.amp import Overflow, overflowed
from ftw_torch.errors import NonFiniteError, SelectionError
from ftw_torch.options import Options
from ftw_torch.step.sources import Grouped

from .host import choose_on_host

__all__ = ["Candidates", "decide", "decide_batches"]


class Candidates(Protocol):
    """What a step knows of its candidates before the choice.

    Attributes
    ----------
    losses, scores : tensor (n,)
    target_losses : tensor (m,)
        Losses of the target samples, or their mean alone.
    targets : int
        Number of target samples that the guard may judge by, 0 for none.
    good : tensor (n',) or None
        The candidates that take part, None for all; indices in `products` count among these.
    """

    losses: Tensor
    scores: Tensor
    target_losses: Tensor
    targets: int
    good: Tensor | None

    def products(self) -> Products:
        """Return the inner products that a choice asks for."""
        ...

    def named(self, bad: Tensor) -> str:
        """Return words for the candidates where ``bad`` (n,) is True."""
        ...

    def refuse_target(self) -> None:
        """Raise if the target's gradient is not finite."""
        ...


def decide(
    candidates: Candidates,
    options: Options,
    keep: int,
    solver: Any,
    *,
    scaled: bool = False,
    grouped: Grouped | None = None,
) -> Selection:
    """Return the selection, its indices as numbers in the pool.

    ``grouped`` has the sources of the candidates, where options ask for them. ``scaled`` says that a GradScaler
    multiplied the losses: a gradient that overflows is then passed on to it.
    """
    good = _good(candidates, options, keep, scaled)
    return _decided(candidates, options, keep if good is None else min(keep, len(good)), solver, good, grouped)


def decide_batches(
    candidates: Candidates,
    options: Options,
    keep: int,
    solver: Any,
    steps: int,
    *,
    scaled: bool = False,
    grouped: Grouped | None = None,
) -> list[Selection]:
    """Return disjoint selections of one pool, each the choice from the candidates that the ones before left over.

    Fewer than ``steps`` if dropped candidates leave none.
    """
    rest = _good(candidates, options, keep, scaled)  # (n',)
    out: list[Selection] = []
    for _ in range(steps):
        left = len(candidates.losses) if rest is None else len(rest)
        if left == 0:
            break
        chosen = _decided(candidates, options, min(keep, left), solver, rest, grouped)
        unmeasured = torch.isnan(chosen.predicted_decrease)
        out.append(chosen._replace(match=chosen.match.masked_fill(unmeasured, torch.nan)))
        every = torch.arange(left) if rest is None else rest
        rest = every[~torch.isin(every, out[-1].indices)]
    return out


def _good(candidates: Candidates, options: Options, keep: int, scaled: bool) -> Tensor | None:
    """Return the candidates (n',) that are finite, None for all; raise if some are not and may not be dropped."""
    losses, scores = candidates.losses, candidates.scores
    bad = ~(torch.isfinite(losses) & torch.isfinite(scores))  # (n,)
    if bool((scores == 0).all()):
        raise SelectionError(
            "the scores of all candidates are exactly zero: the target's gradient does not reach any parameter "
            "that the pool trains, the optimizer's response is zero, or gradients are so small that their products "
            "underflow (then multiply the losses by a constant: it changes nothing else)"
        )
    return _finite(candidates, options, keep, bad, scaled) if bool(bad.any()) else None


def _decided(
    candidates: Candidates, options: Options, keep: int, solver: Any, good: Tensor | None, grouped: Grouped | None
) -> Selection:
    """Return the choice among the candidates ``good`` (n',), all for None."""
    losses, scores = candidates.losses, candidates.scores
    candidates.good = good
    remaining = scores if good is None else scores[good]
    choice = options.choice
    if grouped is not None:
        grouped = grouped.among(good)
        choice |= {"quota": grouped.quota, "constraint": grouped.constraint}
    chosen = choose_on_host(
        remaining, candidates.products(), keep=keep, targets=candidates.targets, solver=solver, **choice
    )
    status = Status(int(chosen.status))
    if status in (Status.NOT_FINITE, Status.INFEASIBLE, Status.NOT_PSD):
        kind = NonFiniteError if status == Status.NOT_FINITE else SelectionError
        causes = []
        if grouped is not None and status == Status.INFEASIBLE:
            causes = unfilled(remaining, keep, grouped.quota, grouped.constraint, grouped.names)
        why = f"{'; '.join(causes)}; fill='relax' goes on with the nearest choice" if causes else status.message
        raise kind(f"no weights for this pool: {why} ({status.name})", status=status)
    if good is not None:
        full = torch.full_like(scores, math.nan).index_copy(0, good, remaining)
        chosen = chosen._replace(indices=good[chosen.indices], scores=full)
        if chosen.reasons is not None:
            chosen = chosen._replace(reasons=_of_all(chosen.reasons, good, full))
    return chosen._replace(losses=losses, target_loss=candidates.target_losses.mean())


def _of_all(reasons: Reasons, good: Tensor, scores: Tensor) -> Reasons:
    """Return the reasons of all candidates (n,) from those of the candidates ``good`` (n',); the others are dropped."""
    rival = torch.where(reasons.rival < 0, reasons.rival, good[reasons.rival.clamp(min=0)])  # (n',)
    code = torch.full_like(scores, int(Reason.DROPPED), dtype=reasons.code.dtype).index_copy(0, good, reasons.code)
    nan = torch.full_like(scores, math.nan, dtype=reasons.residual.dtype)
    return Reasons(
        code,
        nan.index_copy(0, good, reasons.residual),
        torch.full_like(scores, -1, dtype=rival.dtype).index_copy(0, good, rival),
        nan.index_copy(0, good, reasons.similarity),
    )


def _finite(candidates: Candidates, options: Options, keep: int, bad: Tensor, scaled: bool) -> Tensor:
    """Return the candidates (n',) that are finite if the others may be dropped; raise otherwise."""
    every = bool(bad.all())
    if every and not scaled:
        candidates.refuse_target()
    if options.on_nonfinite == "raise" or every:
        if scaled and bool(torch.isfinite(candidates.losses).all()):
            raise Overflow(overflowed(keep, candidates.scores, candidates.losses, candidates.target_losses))
        lost = ~torch.isfinite(candidates.losses)  # (n,)
        kind, these = ("loss", lost) if bool(lost.any()) else ("gradient", bad)
        remedy = "" if every else "; on_nonfinite='drop' goes on without them"
        raise NonFiniteError(
            f"the {kind} of {candidates.named(these)} is not finite{remedy}",
            samples=torch.nonzero(these)[:, 0].tolist(),
        )
    return torch.nonzero(~bad)[:, 0]
