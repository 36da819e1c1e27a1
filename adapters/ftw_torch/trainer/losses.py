"""Torch's loss functions, one value a sample: what each returns for that sample alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import IGNORED, Documents, entries
from .owners import Owners

__all__ = ["LOSSES", "SampleLosses", "sample_losses", "token_counts"]

LOSSES: dict[Callable[..., Any], str] = {  # the argument whose entries say how many losses there are
    F.cross_entropy: "target",
    F.nll_loss: "target",
    F.mse_loss: "target",
    F.l1_loss: "target",
    F.smooth_l1_loss: "target",
    F.huber_loss: "target",
    F.binary_cross_entropy: "target",
    F.binary_cross_entropy_with_logits: "target",
    F.kl_div: "target",
    F.ctc_loss: "target_lengths",
}
_BY_CLASS = (F.cross_entropy, F.nll_loss)


class SampleLosses(NamedTuple):
    """The value of a loss function over a batch, and over each sample alone."""

    value: Tensor  # ()
    rows: Tensor  # (n,)
    counts: Tensor | None  # (n,), the labels of each sample that are not ignored, where there are classes


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def sample_losses(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], owners: Owners
) -> SampleLosses | Tensor | None:
    """Return a loss function's value and that of each of n samples.

    Parameters
    ----------
    function : a key of ``LOSSES``
    args, kwargs
        Its own.
    owners : Owners
        Whose the entries are that it compares.

    Returns
    -------
    SampleLosses, tensor or None
        The tensor for ``reduction="none"``. None where the samples cannot be told apart.

    Notes
    -----
    Reductions are those over one sample alone: a mean over the labels that are not ignored, or their sum. A sample
    without any label has loss 0, where the function itself returns 0/0.
    """
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    named = bound.arguments
    if named.get("reduce") is not None or named.get("size_average") is not None:
        return None
    target = named[LOSSES[function]]
    entries = target.numel() if isinstance(target, Tensor) else len(target)
    if entries != owners.n if function is F.ctc_loss else not owners.may_compare(entries):
        return None
    reduction = named["reduction"]
    x = named.get("input")
    if function not in (*_BY_CLASS, F.ctc_loss) and isinstance(x, Tensor) and not target.is_floating_point():
        named["target"] = target.to(x.dtype)  # integer ratings: their gradient needs one dtype
    named["reduction"] = "none"
    each = function(*bound.args, **bound.kwargs)  # of the terms
    if not owners.holds(each):
        return None
    if reduction == "none":
        return each  # type: ignore[no-any-return]
    if reduction == "sum":
        return SampleLosses(each.sum(), owners.sums(each), None)
    if function is F.ctc_loss:
        rows = each / torch.as_tensor(target, device=each.device).clamp(min=1)
        return SampleLosses(rows.mean(), rows, None)
    if function is F.kl_div and reduction == "batchmean":
        if not owners.in_rows:
            return None
        first = max(1, x.shape[0] // owners.n) if isinstance(x, Tensor) else 1
        rows = owners.sums(each) / first
        return SampleLosses(rows.mean(), rows, None)
    if function in _BY_CLASS and not target.is_floating_point():
        kept = target != named["ignore_index"]
        weight = named["weight"]
        share = kept.to(each.dtype) if weight is None else weight[target.where(kept, 0)] * kept
        divisors = owners.sums(share)  # (n,)
        rows = owners.sums(each) / divisors.where(divisors > 0, 1)
        return SampleLosses(each.sum() / divisors.sum(), rows, owners.sums(kept))
    return SampleLosses(each.mean(), owners.means(each), None)


def token_counts(batch: Any, *, shift: bool = False) -> Tensor | None:
    """Return how many labels of each sample of a batch count (n,); None if they are not tokens.

    With ``shift`` the first of each is not predicted, unless the batch has shifted them itself.
    """
    inputs = entries(batch)
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    shift = shift and "shift_labels" not in inputs
    if isinstance(batch, Documents):
        return torch.stack([row[int(shift) :].ne(IGNORED).sum() for row in batch.rows(labels)])
    return (labels[:, 1:] if shift else labels).ne(IGNORED).sum(1)
