"""16 bits: autocast is for the user's forward alone; what overflows under a GradScaler is the scaler's to skip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ftw import Selection, Status

__all__ = ["Ambient", "Overflow", "overflowed"]

KINDS = ("cpu", "cuda")


class Ambient:
    """The autocast that was on where the selector was called."""

    def __init__(self) -> None:
        self.states = [(kind, torch.get_autocast_dtype(kind)) for kind in KINDS if torch.is_autocast_enabled(kind)]

    def dtypes(self, device: torch.device) -> list[torch.dtype]:
        """Return the dtype that it computes in on a device, if any."""
        return [dtype for kind, dtype in self.states if kind == device.type]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run a block without it."""
        with ExitStack() as stack:
            for kind, dtype in self.states:
                stack.enter_context(torch.autocast(kind, dtype, enabled=False))
            yield

    @contextmanager
    def on(self) -> Iterator[None]:
        """Run a block under it, inside one of `off`."""
        with ExitStack() as stack:
            for kind, dtype in self.states:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


class Overflow(Exception):  # noqa: N818
    """A gradient that is not finite under a GradScaler, which is about to skip the step."""

    def __init__(self, selection: Selection) -> None:
        super().__init__("a scaled gradient is not finite")
        self.selection = selection


def overflowed(keep: int, scores: Tensor, losses: Tensor, target_losses: Tensor) -> Selection:
    """Return the selection of a step that is to be skipped."""
    nan = torch.full((), torch.nan, dtype=scores.dtype)
    return Selection(
        indices=torch.arange(keep),
        weights=nan.repeat(keep),
        scores=scores,
        match=nan,
        predicted_decrease=nan,
        effective_size=nan,
        shrinkage=nan,
        count=torch.zeros((), dtype=torch.int32),
        status=torch.tensor(int(Status.NOT_FINITE), dtype=torch.int32),
        signal=nan,
        losses=losses,
        target_loss=target_losses.mean(),
    )
