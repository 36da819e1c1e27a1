"""Per-sample losses from logits and labels, as trainers compute them: -100 is ignored, labels may be shifted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "label_losses", "token_counts"]

IGNORED = -100


def label_losses(
    logits: Tensor, labels: Tensor, *, shift: bool = False, smoothing: float = 0.0, scale: Tensor | None = None
) -> Tensor:
    """Return one loss a sample (n,).

    Parameters
    ----------
    logits : tensor (n, t, vocabulary), (n, classes), (n, 1) or (n,)
    labels : tensor (n, t) or (n,) of ints, -100 where nothing is to be predicted; or floats
        Ints mean cross-entropy; floats the squared error, or with several classes the binary cross-entropy of each.
    shift : bool
        Position i predicts the label of position i + 1, as in causal language models.
    smoothing : float
        Label smoothing, in [0, 1).
    scale : tensor (n,), optional
        The loss of a sample is then the sum over its tokens times its scale, not their mean.

    Returns
    -------
    tensor (n,)
        float32 or wider. A sample without any label has loss 0.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    n = labels.shape[0]
    if labels.is_floating_point():
        if labels.numel() == logits.numel() == n:
            return (logits.reshape(n) - labels.reshape(n)) ** 2
        if labels.shape == logits.shape:
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").flatten(1).mean(1)
    elif labels.ndim == 1 and logits.ndim == 2:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
    elif labels.ndim == 2 and logits.ndim == 3 and labels.shape == logits.shape[:2]:
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = F.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )  # (n, t)
        total = each.sum(1)
        return total / token_counts(labels).clamp(min=1) if scale is None else total * scale.to(total.dtype)
    raise ValueError(
        f"no per-sample loss is known for logits {tuple(logits.shape)} with labels {tuple(labels.shape)} of "
        f"{labels.dtype}; pass per_sample_loss=(model, inputs) -> (n,)"
    )


def token_counts(labels: Tensor, *, shift: bool = False) -> Tensor:
    """Return how many labels of each sample count (n,)."""
    return (labels[:, 1:] if shift else labels).ne(IGNORED).sum(1)
