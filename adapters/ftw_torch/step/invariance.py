"""The check of a selector's first use: a sample's loss and gradient must not depend on the batch it comes in.

The audit compares sums of gradients, which a value that is computed from the whole batch without a gradient leaves
right: statistics, the capacity of an expert, a scale of quantization. Here a few samples run alone, and one without its
padding, against the same samples in a batch. Models that draw random numbers are not judged: their masks differ.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftw_torch import batches
from ftw_torch.capture.backward import gradients, has_reentrant
from ftw_torch.capture.passes import Randomness
from ftw_torch.errors import BatchingWarning
from ftw_torch.packing import PackedBatch

from .audit import dtypes_of, same_state, tolerance

__all__ = ["warn_of_batching"]

log = logging.getLogger("ftw_torch")

SAMPLES = 2
SMALLEST = 1e-2  # the rounding of logits may be all that is left of a smaller loss
MASK = "attention_mask"
CAUSES = (
    "Statistics of the batch (a batch norm of one's own), a capacity or a scale that the samples share (experts, "
    "quantization), or an attention backend with an error do that"
)
PADDED = (
    "Padding leaks into it: an attention without the mask, positions that count padding on the left (give "
    "position_ids), or a mean or a softmax over padded tokens in the loss"
)


class Gap(NamedTuple):
    """How far a sample alone is from the sample in its batch."""

    sample: int
    what: str  # "loss" or "gradient"
    size: float  # relative
    causes: str


def warn_of_batching(
    losses: Callable[..., Tensor],
    parameters: Mapping[str, nn.Parameter],
    pool: Any,
    target: Any,
    buffers: Sequence[Tensor] = (),
) -> None:
    """Warn once if a sample's loss or gradient changes with the batch by more than rounding.

    Parameters
    ----------
    losses : callable
        ``losses(batch, n, what) -> (n,)``.
    parameters : mapping of str to Parameter
    pool, target : batch
        Their first samples are looked at; the documents of a `PackedBatch` have a check of their own.
    buffers : sequence of Tensor
        The model's, put back afterwards.

    Notes
    -----
    Costs a few forward passes of one sample, and two backward passes, for each of pool and target.
    """
    for batch, what in ((target, "target"), (pool, "pool")):
        if batch is None or isinstance(batch, PackedBatch):
            continue
        gap = _gap(losses, parameters, batch, what, buffers)
        if gap is not None:
            warnings.warn(
                f"the {gap.what} of {what} sample {gap.sample} differs by {gap.size:.2g} (relative) between a batch "
                f"and the sample alone, beyond rounding. {gap.causes}. The selection takes the model as it is in "
                "the batch",
                BatchingWarning,
                stacklevel=6,
            )
            return


def _gap(
    losses: Callable[..., Tensor],
    parameters: Mapping[str, nn.Parameter],
    batch: Any,
    what: str,
    buffers: Sequence[Tensor],
) -> Gap | None:
    """Return the first gap beyond rounding; None if there is none, or if nothing could be compared."""
    n = min(batches.size(batch, what), SAMPLES)
    few = batches.take(batch, torch.arange(n))
    dtypes = {p.dtype for p in parameters.values()}
    with same_state(parameters, buffers) as again:
        randomness = Randomness(parameters)
        with torch.enable_grad(), dtypes_of(dtypes):
            together = losses(few, n, what)  # (n,)
        randomness.mark()
        values = together.detach()
        if randomness.used or not bool(torch.isfinite(values).all()):
            return None
        relative = tolerance(dtypes)
        floor = SMALLEST if relative < 1e-2 else 1.0
        first = _gradient(parameters, together) if n > 1 and float(values[0].abs()) > floor else None
        del together

        def apart(i: int, alone: Tensor | None) -> float | None:
            """Return the relative gap of a loss, None within rounding."""
            if alone is None:
                return None
            size = float((alone[0].detach() - values[i]).abs()) / max(float(values[i].abs()), floor)
            return size if not size <= relative else None

        def steady() -> bool:
            """Return whether the batch has the same losses as before: else the model changes from call to call."""
            again()
            with torch.enable_grad():
                return bool(torch.equal(losses(few, n, what).detach(), values))

        for i in range(n):
            one = batches.take(batch, torch.tensor([i]))
            again()
            alone = _alone(losses, one, what) if n > 1 else None
            size = apart(i, alone)
            if size is not None:
                return Gap(i, "loss", size, CAUSES) if steady() else None
            if i == 0 and alone is not None and first is not None:
                pair = zip(first, _gradient(parameters, alone), strict=True)
                size = _norm(_difference(a, b) for a, b in pair) / max(_norm(first), 1e-300)
                first = None
                if size > relative:
                    return Gap(i, "gradient", size, CAUSES) if steady() else None
            short = _without_padding(one)
            again()
            size = apart(i, None if short is None else _alone(losses, short, what))
            if size is not None:
                return Gap(i, "loss", size, PADDED) if steady() else None
    return None


def _alone(losses: Callable[..., Tensor], batch: Any, what: str) -> Tensor | None:
    """Return the losses (1,) of a batch of one; None for a model that takes no such batch."""
    try:
        with torch.enable_grad():
            return losses(batch, 1, what)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        log.info("one sample of the %s cannot be run by itself (%s): its batching is not checked", what, error)
        return None


def _gradient(parameters: Mapping[str, nn.Parameter], losses: Tensor) -> list[Tensor | None]:
    """Return the gradient of the first of some losses (n,)."""
    with torch.enable_grad():
        first = losses[0]
    return gradients(first, list(parameters.values()), reentrant=has_reentrant([first]))


def _difference(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a - b


def _norm(grads: Iterable[Tensor | None]) -> float:
    """Return the length of a gradient in float64: squares of small entries underflow in float32."""
    return math.sqrt(sum(float(g.double().norm()) ** 2 for g in grads if g is not None))


def _without_padding(one: Any) -> Any | None:
    """Return a batch of one sample without the tokens that its attention mask leaves out.

    None if there is no padding at an end, or if it is not plain which entries have a token axis.
    """
    mask = one.get(MASK) if isinstance(one, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    kept = torch.nonzero(mask[0])[:, 0]
    length = mask.shape[1]
    if not 0 < len(kept) < length or int(kept[-1] - kept[0]) + 1 != len(kept):
        return None
    out = (mask[0] == 0).nonzero()[:, 0]  # the padding's places
    batch = dict(one)
    for name, x in one.items():
        if not isinstance(x, Tensor) or length not in x.shape[1:]:
            if not isinstance(x, (Tensor, int, float, str, type(None))) and name != MASK:
                return None
            continue
        at = out.to(x.device)
        constant = x.ndim == 2 and (name == "position_ids" or bool((x[0, at] == x[0, at[0]]).all()))
        if x.shape[1] != length or length in x.shape[2:] or not constant:
            return None
        batch[name] = x.index_select(1, kept.to(x.device))
    return batch
