"""Scores from two forward passes of the pool, at theta and at theta - s P g_T; nothing is captured for them.

    1. g_T                   one ordinary backward of the target
    2. theta - s P g_T       losses without gradients, in a state that is rewound afterwards
    3. theta                 losses without gradients, with the same random numbers: same dropout masks

The parameters are copied, and copied back: they return bit for bit. What the choice asks for beyond the scores comes
from the shortlist alone, captured exactly; the k of top-k with uniform weights are trained by an ordinary backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import ftw
from ftw_torch.capture.passes import Randomness, uncompiled
from ftw_torch.records.pool import Pool

from .audit import same_state
from .pool_pass import PoolPass

__all__ = ["ForwardPass", "forward_length", "shifted"]


class ForwardPass(PoolPass):
    """A pool pass without a backward: ``run`` computes losses and scores from two forward passes.

    Parameters
    ----------
    step : float or None
        s; None chooses it by the target's losses and the dtypes.
    target_losses : tensor (m,)
    *args
        Those of `PoolPass`.
    """

    def __init__(self, step: float | None, target_losses: Tensor, *args: Any) -> None:
        super().__init__(*args)
        self.step, self.target_losses = step, target_losses

    def run(self) -> None:
        """Compute ``losses`` and ``scores`` (n,)."""
        self.kept = False
        direction = {
            name: self.operators[name].apply(self.target[name]).reshape(p.shape) for name, p in self.parameters.items()
        }
        decrease = _inner(self.target, direction)  # ()
        with torch.no_grad():
            step = self._step(decrease)
            buffers = list(self.passes.model.buffers())
            with same_state(self.parameters, buffers), shifted(self.parameters, direction, step):
                after = self._losses()
            self.losses = self._losses()
        scores: Any = ftw.forward_scores(self.losses, after, step)
        self.scores = scores  # (n,)
        self.randomness = Randomness(self.parameters)  # later passes draw masks of their own

    def gram(self, indices: Tensor | None) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s) of captured candidates."""
        every = list(range(len(self.losses))) if indices is None else indices.tolist()
        places, pool = self._captured(every)
        return self.unscaled(pool.gram(self.operators, self._index([places.index(i) for i in every])), 2)

    def _captured(self, wanted: Sequence[int]) -> tuple[list[int], Pool]:
        with uncompiled():
            return super()._captured(wanted)

    def _losses(self) -> Tensor:
        """Return the losses (n,) at the present parameters."""
        return torch.cat([self.passes.values(b, n, "pool") for b, n in zip(self.batches, self.sizes, strict=True)])

    def _step(self, decrease: Tensor) -> Tensor | float:
        if self.step is not None:
            return self.step
        dtypes = [p.dtype for p in self.parameters.values()] + [self.target_losses.dtype]
        return forward_length(self.target_losses, decrease, [*dtypes, *self.passes.ambient.dtypes(decrease.device)])


def forward_length(target_losses: Tensor, decrease: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Return the step s () for losses that go through some dtypes; see `ftw.forward_step`."""
    found: Tensor = ftw.forward_step(target_losses, decrease, max(torch.finfo(dtype).eps for dtype in dtypes))
    return found


@contextmanager
def shifted(parameters: Mapping[str, Tensor], direction: dict[str, Tensor], step: Tensor | float) -> Iterator[None]:
    """Run a block at ``theta - step * direction``; afterwards, after an error too, theta is bit for bit what it was.

    ``direction`` is used up: copies of the parameters take its place.
    """
    held: list[tuple[Tensor, Tensor]] = []
    try:
        for name, p in parameters.items():
            d = direction.pop(name)
            wide = torch.promote_types(p.dtype, torch.promote_types(d.dtype, torch.float32))
            held.append((p, p.detach().clone()))
            p.data.copy_(p.detach().to(wide) - d.to(wide) * step)  # .data: not a change that autograd need know of
            del d
        torch.clear_autocast_cache()  # it holds 16-bit copies of theta
        yield
    finally:
        for moved, old in reversed(held):  # views of one storage too
            moved.data.copy_(old)
        torch.clear_autocast_cache()


def _inner(target: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
    """Return ``<g_T, P g_T>`` ()."""
    total: Tensor | None = None
    for name, d in direction.items():
        wide = torch.promote_types(d.dtype, torch.float32)
        term = torch.dot(target[name].reshape(-1).to(wide), d.reshape(-1).to(wide))
        total = term if total is None else total.to(torch.promote_types(total.dtype, wide)) + term
    assert total is not None
    return total
