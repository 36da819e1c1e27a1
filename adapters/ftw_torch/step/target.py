"""The target pass: the mean gradient, the losses, and the lengths that the guard needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftw import OuterProduct, Scale
from ftw.gradients import Record
from ftw_torch import batches
from ftw_torch.capture.passes import Passes, as_seen
from ftw_torch.errors import NonFiniteError
from ftw_torch.records.join import seen
from ftw_torch.records.pool import Pool

from .stream import worth_writing, written

__all__ = ["Target", "named_samples", "refuse_nonfinite", "refuse_nonfinite_update", "refuse_target", "target_of"]


class Target(NamedTuple):
    """What the target says at this step."""

    mean: dict[str, Tensor]  # g_T, under the shapes of records
    losses: Tensor  # (m,)
    samples: Pool | None = None
    used: frozenset[str] = frozenset()  # parameters that the target's losses depend on

    def blended(self, update: Mapping[str, Tensor], share: float, scale: Tensor | None) -> dict[str, Tensor]:
        """Return ``(1 - share) update + share g_T``; ``scale`` is a GradScaler's, which the update carries already."""
        out = {name: g * (1 - share) for name, g in update.items()}
        for name in self.used:
            g = self.mean[name] * share
            g = g if scale is None else g * scale.to(g.device, g.dtype)
            out[name] = out[name] + g if name in out else g
        return out


def target_of(
    passes: Passes,
    parameters: Mapping[str, nn.Parameter],
    batch: Any,
    micro_batch: int | None,
    *,
    samples: bool,
    what: str = "target",
) -> Target:
    """Return the target's mean gradient; with ``samples``, the records it is made from."""
    m = batches.size(batch, what)
    pieces = list(batches.split(batch, m, micro_batch))
    losses: list[Tensor] = []
    if not samples:
        total: dict[str, Tensor] = {}
        for piece in pieces:
            found, total = passes.gradient(parameters, piece, what, 1 / m, total=total)
            losses.append(found)
        mean, pool = as_seen(total), None
    else:
        records = []
        for piece in pieces:
            found, captured = passes.capture(parameters, piece, what, sink=_write)
            losses.append(found)
            records.append(captured)
        pool = Pool(parameters, records, [len(x) for x in losses])
        mean = pool.combine(range(m), [1 / m] * m)
    used = frozenset(mean)
    mean = {
        name: passes.unscaled(mean[name]) if name in mean else p.detach().new_zeros(seen(p.shape))
        for name, p in parameters.items()
    }
    every = torch.cat(losses)  # (m,)
    if every.device.type == "cpu" and what == "target":  # elsewhere looking waits: done together with the pool's
        refuse_nonfinite(every, None, "target")
    return Target(mean, every, pool, used)


def _write(name: str, record: Record) -> Record:
    """Write out what will be asked for twice, the mean and the lengths, unless that takes much more memory."""
    del name
    return written(record) if isinstance(record, OuterProduct) and worth_writing(record, slack=2.0) else record


def refuse_target(goal: Target) -> None:
    """Raise if the target's gradient is not finite, naming the samples if their records are there."""
    if goal.samples is not None:
        lengths = goal.samples.lengths(dict.fromkeys(goal.mean, Scale(1.0)))  # (m,)
        refuse_nonfinite(torch.zeros_like(lengths), lengths, "target")
    broken = [name for name, g in goal.mean.items() if not bool(torch.isfinite(g).all())]
    if broken:
        raise NonFiniteError(
            f"the gradient of the target is not finite in {', '.join(map(repr, broken[:8]))}", parameters=broken
        )


def refuse_nonfinite_update(update: Mapping[str, Tensor]) -> None:
    """Raise if an update is not finite: losses that are do not tell of a gradient that is not."""
    finite = [torch.isfinite(g).all() for g in update.values()]
    if finite and not bool(torch.stack(finite).all()):
        broken = [name for name, g in update.items() if not bool(torch.isfinite(g).all())]
        raise NonFiniteError(
            f"the gradient of the selected samples is not finite in {', '.join(map(repr, broken[:8]))}, although "
            "their losses are; score='exact' names the samples, and on_nonfinite='drop' then goes on without them",
            parameters=broken,
        )


def refuse_nonfinite(losses: Tensor, scores: Tensor | None, what: str) -> None:
    """Raise if a loss, or else a score, is NaN or infinite, naming the samples."""
    for kind, values in (("loss", losses), ("gradient", scores)):
        if values is not None and not bool(torch.isfinite(values).all()):
            bad = ~torch.isfinite(values)  # (n,)
            raise NonFiniteError(
                f"the {kind} of {named_samples(bad, what)} is not finite", samples=torch.nonzero(bad)[:, 0].tolist()
            )


def named_samples(bad: Tensor, what: str) -> str:
    """Return words for the samples of a batch where ``bad`` (n,) is True, the first eight by number."""
    numbers = torch.nonzero(bad)[:, 0].tolist()
    return f"{what} sample {', '.join(map(str, numbers[:8]))}" + (", ..." if len(numbers) > 8 else "")
