"""Losses of preference and policy training, one value a sample, for loops of one's own.

A sample is what can be left out without changing the loss of another: a pair of DPO or of a reward model, an answer of
KTO, and in GRPO a group of rollouts of one prompt (or a rollout, its advantage given).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dpo", "group_advantages", "grpo", "kto", "reward_pairs", "sequence_logps", "token_logps"]


def token_logps(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the log-probability of each next token (n, t - 1); 0 where the label is ignored.

    Parameters
    ----------
    logits : tensor (n, t, vocabulary)
        Position i predicts the label of position i + 1.
    labels : tensor of int (n, t)
    ignore_index : int
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return -F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=ignore_index, reduction="none")


def sequence_logps(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the log-probability of each sequence's labels (n,), see `token_logps`."""
    return token_logps(logits, labels, ignore_index=ignore_index).sum(1)


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the loss of each pair (n,) of direct preference optimization (Rafailov et al., arXiv 2305.18290).

    ``-log sigmoid(beta d)``, with d the gain of the chosen over the rejected answer against the reference. With
    label smoothing s, a share s of the preferences counts as turned around: ``-(1 - s) log sigmoid(beta d) - s log
    sigmoid(-beta d)``.

    Parameters
    ----------
    chosen, rejected, ref_chosen, ref_rejected : tensor (n,)
        Log-probabilities of the answers under the model and the reference, see `sequence_logps`.
    """
    gain = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))  # (n,)
    return -(1 - label_smoothing) * F.logsigmoid(gain) - label_smoothing * F.logsigmoid(-gain)


def reward_pairs(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, centre: float | None = None
) -> Tensor:
    """Return the loss of each pair (n,) of a reward model, ``-log sigmoid(r_chosen - r_rejected - margin)``.

    Parameters
    ----------
    chosen, rejected : tensor (n,)
        Rewards.
    margin : tensor (n,) or float
    centre : float, optional
        Adds this times the square of the two rewards' sum, which keeps them near zero.
    """
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss if centre is None else loss + centre * (chosen + rejected) ** 2


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the loss of each answer (n,) of Kahneman-Tversky optimization (Ethayarajh et al., arXiv 2402.01306).

    Parameters
    ----------
    logps, ref_logps : tensor (n,)
        Log-probabilities under the model and the reference, see `sequence_logps`.
    desirable : tensor of bool (n,)
    kl : tensor () or float
        The divergence from the reference, a number for all samples: estimated on mismatched answers, without gradient,
        at least 0. It must not be made of the samples that are selected from, or they are no longer independent.
    """
    kl = kl.detach() if isinstance(kl, Tensor) else kl
    gain = beta * (logps - ref_logps - kl)  # (n,)
    good, bad = desirable_weight * (1 - torch.sigmoid(gain)), undesirable_weight * (1 - torch.sigmoid(-gain))
    return torch.where(desirable.bool(), good, bad)


def group_advantages(rewards: Tensor, group: int, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """Return each rollout's reward (n,) less its group's mean, over the group's standard deviation.

    Groups are neighbours, of ``group`` rollouts each. Rollouts of a group with equal rewards have advantage 0, and so
    no gradient: a pool of groups is best filled with others.
    """
    each = rewards.reshape(-1, group)
    centred = each - each.mean(1, keepdim=True)
    return (centred / (each.std(1, keepdim=True) + eps) if scale else centred).reshape(-1)


def grpo(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    group: int = 1,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    beta: float = 0.0,
    corrected: bool = False,
    length: int | None = None,
) -> Tensor:
    """Return the loss of each group (n / group,) of rollouts (Shao et al., arXiv 2402.03300).

    Parameters
    ----------
    logps : tensor (n, t)
        Log-probabilities of the answers' tokens, see `token_logps`; the rollouts of a group are neighbours.
    advantages : tensor (n,)
        See `group_advantages`.
    mask : tensor (n, t)
        1 for tokens of the answer.
    group : int
        Rollouts of one prompt that are kept or left out together; 1 takes each rollout as a sample.
    old_logps : tensor (n, t), optional
        Under the model that made the rollouts; without them the ratio is 1, with its gradient.
    ref_logps : tensor (n, t), optional
        With ``beta``, for the divergence from a reference.
    corrected : bool
        Multiply each token's divergence by the ratio, so that it has no bias (TRL's ``use_bias_correction_kl``).
    clip : tuple of float
        How far the ratio may go below and above 1.
    length : int, optional
        Divide by this number of tokens, not by those of each rollout (Dr. GRPO, arXiv 2503.20783).
    """
    log_ratio = logps - (logps.detach() if old_logps is None else old_logps)
    ratio, gain = log_ratio.exp(), advantages[:, None]
    each = -torch.minimum(ratio * gain, ratio.clamp(1 - clip[0], 1 + clip[1]) * gain)  # (n, t)
    if ref_logps is not None:
        apart = ref_logps - logps
        divergence = apart.exp() - apart - 1
        each = each + beta * (divergence * ratio if corrected else divergence)
    tokens = mask.sum(1).clamp(min=1) if length is None else length
    return ((each * mask).sum(1) / tokens).reshape(-1, group).mean(1)
