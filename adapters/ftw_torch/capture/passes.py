"""Passes over a batch: its losses, its records, and the gradient of a weighted few by plain autograd."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ftw.gradients import Record
from ftw_torch import batches
from ftw_torch.capture.amp import Ambient
from ftw_torch.packing import PackedBatch
from ftw_torch.records.join import merge, seen

from . import rules
from .backward import gradients, has_reentrant
from .discovery import Capture, Sink
from .grid import TokenGrid
from .registry import apply_rules

assert rules  # importing the package registers its rules

__all__ = ["Passes", "Randomness", "as_seen", "uncompiled"]


class Passes:
    """The model's losses on a batch, alone or with the records of their gradients.

    Parameters
    ----------
    model : nn.Module
    per_sample_loss : callable
    slow : dict of str to str
        Parameters left to per-sample autograd, see `Capture`.
    ambient : Ambient
        The autocast under which the losses are computed.
    scale : tensor (), optional
        A GradScaler's: what losses are multiplied by before a backward.
    """

    def __init__(
        self,
        model: nn.Module,
        per_sample_loss: Any,
        slow: dict[str, str],
        ambient: Ambient | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self.model, self.per_sample_loss, self.slow = model, per_sample_loss, slow
        self.ambient, self.scale = Ambient() if ambient is None else ambient, scale
        self.checkpointed = False  # whether any backward ran a part of the forward again

    def unscaled(self, x: Tensor, power: int = 1) -> Tensor:
        """Return what was multiplied by the scale, to a power, without it."""
        return x if self.scale is None else x / self.scale.to(x.device, x.dtype) ** power

    def losses(self, batch: Any, n: int, what: str) -> Tensor:
        """Return the per-sample losses (n,) of a batch, or raise what is wrong with them."""
        losses = self.values(batch, n, what)
        if not losses.requires_grad:
            raise ValueError(
                f"the losses of the {what} do not depend on any parameter that requires a gradient; is something "
                "detached, or computed under torch.no_grad()?"
            )
        return losses

    def values(self, batch: Any, n: int, what: str) -> Tensor:
        """Return the per-sample losses (n,) of a batch, which need not record a gradient."""
        with self.ambient.on():
            losses = self.per_sample_loss(self.model, batch)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (n,):
            got = f"a tensor {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise ValueError(
                f"per_sample_loss must return one loss for each of the {n} samples of the {what}, a tensor ({n},); "
                f"got {got}. A loss function's reduction='none', then a mean over tokens, gives that; a mean over "
                "samples does not"
            )
        return losses

    def capture(
        self, parameters: Mapping[str, nn.Parameter], batch: Any, what: str, sink: Sink | None = None
    ) -> tuple[Tensor, dict[str, Record]]:
        """Return the losses (n,) of a batch, detached, and its records."""
        n = batches.size(batch, what)
        tensors = [tensor for _, tensor in batches.leaves(batch)]
        grid = TokenGrid(batch.samples, n) if isinstance(batch, PackedBatch) and n > 1 else None
        before = Randomness(parameters)
        with torch.enable_grad(), Capture(parameters, n, tensors, slow=self.slow, sink=sink, grid=grid) as capture:
            with apply_rules(self.model, capture):
                losses = self.losses(batch, n, what)
            records = capture.backward(self._scaled(losses))
        self.checkpointed = self.checkpointed or capture.recomputed
        if capture.hidden:  # the first time: from now on these are left to autograd from the start
            again = Capture(parameters, n, tensors, slow=self.slow, sink=sink, grid=grid)
            with before.again(0), torch.enable_grad(), again:
                with apply_rules(self.model, again):
                    losses_again = self.losses(batch, n, what)
                more = again.past(self._scaled(losses_again), capture.hidden)
            for name, record in more.items():
                records[name] = merge([records[name], record]) if name in records else record
        return losses.detach(), records

    def _scaled(self, losses: Tensor) -> Tensor:
        return losses if self.scale is None else losses * self.scale.to(losses.dtype)

    def gradient(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Any,
        what: str,
        weights: Tensor | float,
        total: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses (n,) of a batch, and ``sum_i w_i g_i`` by plain autograd, added to a total.

        Parameters that are not used are missing.
        """
        total = {} if total is None else total
        with torch.enable_grad():
            losses = self.losses(batch, batches.size(batch, what), what)
            share = self._scaled((losses * weights).sum())
        grads = gradients(share, list(parameters.values()), reentrant=has_reentrant([share]))
        held: set[int] = set()
        for name, g in zip(parameters, grads, strict=True):
            if g is not None:
                total[name] = total[name].add_(g) if name in total else _own(g, held)
        return losses.detach(), total


def _own(g: Tensor, held: set[int]) -> Tensor:
    """Return a gradient in memory of its own, to be added to: autograd hands one tensor to both sides of a sum."""
    if g.layout is not torch.strided:
        return g.to_dense()
    place = g.untyped_storage().data_ptr()
    shared = place in held or 0 in g.stride()
    held.add(place)
    return g.clone(memory_format=torch.contiguous_format) if shared else g


def as_seen(total: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients under the shapes of records."""
    return {name: g.reshape(seen(g.shape)) for name, g in total.items()}


class Randomness:
    """States of the random generators before each piece of a pass, so that masks can be drawn again."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.devices = sorted({p.device.index or 0 for p in parameters.values() if p.device.type == "cuda"})
        self.states = [self._state()]

    def rewind(self) -> None:
        """Go back to where the pass began."""
        torch.set_rng_state(self.states[0][0])
        for device, state in zip(self.devices, self.states[0][1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def mark(self) -> None:
        """Write down the state, at the end of a piece."""
        self.states.append(self._state())

    @property
    def used(self) -> bool:
        """Whether any piece drew random numbers."""
        first = self.states[0]
        return any(not torch.equal(x, y) for state in self.states[1:] for x, y in zip(first, state, strict=True))

    @contextmanager
    def again(self, piece: int) -> Iterator[None]:
        """Run a block with the random numbers of a piece; afterwards the generators are as they were."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.states[piece][0])
            for device, state in zip(self.devices, self.states[piece][1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield

    def _state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models eagerly: a compiled graph has the layers fused away that capture must see."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
