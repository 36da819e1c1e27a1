"""Whether pool and target may go through the model as one batch: only where the losses stay what they are apart.

A loss may depend on its batch and still be one a sample: divided by the mean number of labels, say. Selecting by it is
sound, but in a batch of pool and target it is another loss. Two comparisons find that, and either sends pool and target
through the model one after the other: whether samples meet in any function on the way to the losses, whatever the
numbers (`Mixing`), and whether the losses are the same numbers together and apart.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ftw_torch import batches
from ftw_torch.capture.mixing import Mixing
from ftw_torch.capture.passes import Passes, Randomness

from .audit import same_state

__all__ = ["Together"]

log = logging.getLogger("ftw_torch")


class Together:
    """What is known of one batch in place of two.

    Attributes
    ----------
    reason : str or None
        Why pool and target go through the model apart, from now on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._sizes: set[tuple[int, int]] = set()  # of pool and target, compared

    def apart(self, reason: str) -> None:
        """Go by two passes from now on."""
        if self.reason is None:
            log.info("pool and target go through the model one after the other: %s", reason)
        self.reason = reason

    def batch(
        self,
        passes: Passes,
        parameters: Mapping[str, nn.Parameter],
        buffers: list[Tensor],
        pool: Any,
        target: Any,
        sizes: tuple[int, int],
        *,
        due: bool,
    ) -> Any | None:
        """Return pool and target as one batch, None where they go apart.

        Compared when that is due, and for every new pair of sizes: two forwards of each sample.
        """
        both = None if self.reason is not None else batches.concatenated(pool, target)
        if both is not None and (due or sizes not in self._sizes):
            with torch.enable_grad(), same_state(parameters, buffers) as rewind:
                reason = _difference(passes, parameters, both, (pool, target), sizes, rewind)
            if reason is not None:
                self.apart(reason)
                return None
            self._sizes.add(sizes)
        return both


def _difference(
    passes: Passes,
    parameters: Mapping[str, nn.Parameter],
    both: Any,
    alone: tuple[Any, Any],
    sizes: tuple[int, int],
    rewind: Any,
) -> str | None:
    """Return in what a pass over both batches differs from one over each, None if in nothing."""
    randomness = Randomness(parameters)
    mixing = Mixing([x for _, x in batches.leaves(both)], sum(sizes))
    try:
        with mixing:
            together = passes.values(both, sum(sizes), "pool and target")  # (n + m,)
    except Exception as error:  # the loss may know one of them by its length, or both be too large
        return f"{type(error).__name__}: {error}"
    randomness.mark()
    if randomness.used:
        return "random numbers are drawn in the forward"
    met = mixing.met(together)
    if met is not None:
        return f"samples meet in {met} on the way to their losses"
    found = []
    for batch, size, what in zip(alone, sizes, ("pool", "target"), strict=True):
        rewind()
        found.append(passes.values(batch, size, what).detach())
    apart = torch.cat(found)  # (n + m,)
    if not _same(together.detach(), apart, parameters):
        return "losses depend on the batch that a sample is in"
    return None


def _same(x: Tensor, y: Tensor, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Return whether losses agree but for rounding; where both are not finite, they do."""
    if x.dtype != y.dtype:
        return False
    coarse = min(z.dtype.itemsize for z in (x, *parameters.values())) < 4
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)):
        return False
    x, y = x[finite].float(), y[finite].float()
    return not len(x) or float((x - y).abs().max()) <= (2e-2 if coarse else 2e-5) * float(y.abs().max())
