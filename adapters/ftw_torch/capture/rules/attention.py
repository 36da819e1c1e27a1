"""Rules of attention, written as products and sums that have rules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import rule

from .common import batched

__all__: list[str] = []


@rule(F.multi_head_attention_forward)
def multi_head_attention(
    capture: Capture,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Rule of the attention of ``nn.MultiheadAttention``: query, key and value are (t, n, d)."""
    if any(x is not None for x in (bias_k, bias_v, static_k, static_v)) or add_zero_attn or query.ndim != 3:
        return NotImplemented
    with capture:
        if not use_separate_proj_weight:
            assert in_proj_weight is not None
            if query is key and key is value:
                q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
            else:
                biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
                weights = in_proj_weight.chunk(3)
                q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        else:
            biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
            assert q_proj_weight is not None
            assert k_proj_weight is not None
            assert v_proj_weight is not None
            weights = (q_proj_weight, k_proj_weight, v_proj_weight)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        t, n, d = q.shape
        q, k, v = (x.reshape(x.shape[0], n, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))  # (n, heads, t, d')
        mask = _mask(q, k, attn_mask, key_padding_mask)
        if is_causal and mask is None and not need_weights:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p if training else 0.0, is_causal=True)
            attention = None
        elif not need_weights:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p if training else 0.0)
            attention = None
        else:
            product = (q @ k.mT) / math.sqrt(q.shape[-1])
            attention = torch.softmax(product if mask is None else product + mask, -1)  # (n, heads, t, s)
            attention = F.dropout(attention, dropout_p, training)
            out = attention @ v
        out = out.permute(2, 0, 1, 3).reshape(t, n, d)
        out = F.linear(out, out_proj_weight, out_proj_bias)
        if attention is not None and average_attn_weights:
            attention = attention.mean(1)
        return out, attention


def _mask(q: Tensor, k: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Return one additive mask that broadcasts over (n, heads, t, s)."""
    total = None
    for mask in (attention, None if padding is None else padding[:, None, None, :]):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -math.inf)
        if mask.ndim == 3:  # (n heads, t, s)
            mask = mask.reshape(q.shape[0], q.shape[1], *mask.shape[1:])
        total = mask if total is None else total + mask
    return total


rule(F.scaled_dot_product_attention)(batched(F.scaled_dot_product_attention))
