"""Autocast is for the user's forward: what the selector computes around it runs as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["Ambient"]

KINDS = ("cpu", "cuda")


class Ambient:
    """The autocast that was on where the selector was called."""

    def __init__(self) -> None:
        self.states = [(kind, torch.get_autocast_dtype(kind)) for kind in KINDS if torch.is_autocast_enabled(kind)]

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
