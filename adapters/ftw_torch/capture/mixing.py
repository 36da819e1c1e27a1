"""Whether samples of a batch meet before the losses: counts over the batch, branches on its contents, its statistics.

A loss that depends on its batch is another one where pool and target go through the model together. Comparing numbers
shows that only if the numbers at hand differ; here the functions themselves are followed, from the batch's tensors to
the losses (`batching.py` says how each moves the samples' axis). What is not known counts as a meeting.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .batch_axis import Layout, Scattered
from .batching import place
from .functions import PLAIN, first, tensors, transformed

__all__ = ["Mixing"]

_MASKS = ("transformers.masking_utils", "transformers.modeling_attn_mask_utils")
"""Leave out a mask that hides nothing: with it or without, the numbers are the same."""

UNSEEN = "a function that PyTorch does not show"


class Mixing(TorchFunctionMode):
    """Follows the samples of a batch through a forward.

    Parameters
    ----------
    batch : iterable of tensor
        Samples on axis 0.
    samples : int
        Their number n.
    """

    def __init__(self, batch: Iterable[Tensor], samples: int) -> None:
        super().__init__()
        self.samples = samples
        self._known: dict[int, tuple[weakref.ref[Tensor], Layout | Scattered | None, str]] = {}
        self._constant: dict[int, Tensor] = {}  # made of parameters alone; held, so that no identity is given away
        self._read: str | None = None  # the function by which Python read a tensor of the batch
        for x in batch:
            if x.ndim and x.shape[0] == samples:
                self._note(x, Layout(1, x.numel() // samples), "")

    def met(self, losses: Tensor) -> str | None:
        """Return the function in which samples meet on the way to the ``losses`` (n,), None if they do not."""
        if self._read is not None:
            return self._read
        found = self._find(losses)
        if found is None:
            return UNSEEN
        where, why = found
        return None if where == Layout(1, 1) else why or "an unknown function"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch; note where the samples are in its results."""
        kwargs = kwargs or {}
        if func is Tensor.__iter__:
            with self:
                return iter(args[0].unbind(0))
        out = func(*args, **kwargs)
        if func in PLAIN or transformed():
            return out
        given = tensors((args, kwargs.values()))
        inputs = [(x, found) for x in given if (found := self._find(x)) is not None]
        name = getattr(func, "__name__", str(func))
        results = tensors(out)
        unseen = any(x.grad_fn is not None and id(x) not in self._constant and self._find(x) is None for x in given)
        if unseen:
            for y in results:
                self._note(y, None, UNSEEN)
            return out
        if not inputs:
            self._constant.update((id(y), y) for y in results if y.grad_fn is not None)
            return out
        if not results and out is not None:
            if sys._getframe(1).f_globals.get("__name__") not in _MASKS:
                self._read = self._read or name
            return out
        if out is None and isinstance(first(args), Tensor):  # written in place
            results = [first(args)]
        for y in results:
            self._note(y, *self._moved(func, name, inputs, args, kwargs, y, written=out is None))
        return out

    def _moved(
        self, func: Any, name: str, inputs: Any, args: Any, kwargs: Any, out: Tensor, *, written: bool
    ) -> tuple[Layout | Scattered | None, str]:
        """Return where the samples are in a result, None and why if they meet."""
        if written:
            mine = self._find(out)
            odd = next((why for _, (where, why) in inputs if where is None), None)
            return (None, odd or name) if mine is None or odd is not None else mine
        places = []
        for x, (where, why) in inputs:
            if where is None:
                return None, why
            try:
                places.append(place(func, x, where, self.samples, args, kwargs, out))
            except (IndexError, TypeError, KeyError, StopIteration):  # arguments given by name
                return None, name
        if any(found is None for found in places) or (len(places) > 1 and not _alike(places)):
            return None, name
        return places[0], ""

    def _find(self, x: Tensor) -> tuple[Layout | Scattered | None, str] | None:
        known = self._known.get(id(x))
        return None if known is None or known[0]() is not x else known[1:]

    def _note(self, x: Tensor, where: Layout | Scattered | None, why: str) -> None:
        self._known[id(x)] = weakref.ref(x), where, why


def _alike(places: list[Any]) -> bool:
    return all(isinstance(found, Scattered) or found == places[0] for found in places)
