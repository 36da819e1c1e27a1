"""Layers that are compositions of simpler functions, written out so that capture sees those.

Each runs under the capture itself: its products and sums find their own rules, and what has none is left to autograd.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftw_torch.capture.batch_axis import Layout, axis
from ftw_torch.capture.coupling import refuse_batch_statistics

if TYPE_CHECKING:
    from ftw_torch.capture.discovery import Capture

__all__ = [
    "affine",
    "batch_norm",
    "bilinear",
    "einsum",
    "group_norm",
    "gru_cell",
    "instance_norm",
    "lstm_cell",
    "multi_head_attention",
    "prelu",
    "rms_norm",
    "rnn_cell",
]


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``x * weight + bias``, whatever of the two there is."""
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _by_channel(p: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a parameter (c,) in a shape that aligns with x (n, c, ...)."""
    return p if p is None or x.ndim == 2 else p.view(-1, *[1] * (x.ndim - 2))


def rms_norm(
    capture: Capture, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """Rule of ``F.rms_norm``."""
    with capture:
        return affine(F.rms_norm(input, normalized_shape, None, eps), weight, None)


def group_norm(
    capture: Capture,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Rule of ``F.group_norm``."""
    with capture:
        normal = F.group_norm(input, num_groups, None, None, eps)
        return affine(normal, _by_channel(weight, input), _by_channel(bias, input))


def instance_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Rule of ``F.instance_norm``."""
    with capture:
        normal = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
        return affine(normal, _by_channel(weight, input), _by_channel(bias, input))


def batch_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Rule of ``F.batch_norm`` with fixed statistics; those of the batch couple its samples."""
    refuse_batch_statistics(input, running_mean, running_var, weight, bias, training)
    with capture:
        normal = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
        return affine(normal, _by_channel(weight, input), _by_channel(bias, input))


def prelu(capture: Capture, input: Tensor, weight: Tensor) -> Any:
    """Rule of ``F.prelu``."""
    with capture:
        slope: Any = weight if weight.numel() == 1 else _by_channel(weight, input)
        return torch.where(input > 0, input, input * slope)


def bilinear(capture: Capture, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Rule of ``F.bilinear``, ``y_o = x1' W_o x2``."""
    if capture.name(weight) is None:
        return NotImplemented
    with capture:
        z = F.linear(input2, weight.reshape(-1, weight.shape[2]))
        z = z.reshape(*input2.shape[:-1], *weight.shape[:2])  # (..., d_out, d1)
        return affine((z * input1[..., None, :]).sum(-1), None, bias)


def einsum(capture: Capture, equation: Any, *operands: Any) -> Any:
    """Rule of ``einsum("...,...->...", x, W)`` where it is a matrix product, or one for each entry of common axes."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return NotImplemented
    terms, out = equation.replace(" ", "").split("->")
    letters = terms.split(",")
    k = next((i for i in (0, 1) if capture.name(operands[i]) is not None and capture.sampled(operands[1 - i])), None)
    if k is None or len(letters) != 2 or any(len(set(term)) < len(term) for term in (*letters, out)):
        return NotImplemented
    own, other = letters[k], letters[1 - k]
    both = [c for c in own if c in other]
    each, summed = [c for c in both if c in out], [c for c in both if c not in out]
    new, rest = [c for c in own if c not in other], [c for c in other if c not in own]
    weight, x = operands[k], operands[1 - k]
    alike = all(weight.shape[own.index(c)] == x.shape[other.index(c)] for c in both)  # einsum repeats what is 1 long
    if not summed or not alike or set(out) != {*new, *rest, *each}:
        return NotImplemented  # sums over what one of them has alone
    sizes = {**dict(zip(own, weight.shape, strict=True)), **dict(zip(other, x.shape, strict=True))}
    columns = math.prod(sizes[c] for c in summed)
    if each:
        rest = _samples_first(capture, x, other, rest)
        if not rest:
            return NotImplemented
    with capture:
        if each:  # a product for each of these
            order = [*rest[:1], *each, *rest[1:]]
            X = x.permute([other.index(c) for c in order + summed])
            X = X.reshape(*(sizes[c] for c in [*rest[:1], *each]), -1, columns)  # (n, *each, t, columns)
            form = each + summed + new
            W = weight if own == "".join(form) else weight.permute([own.index(c) for c in form])
            y = X @ W.reshape(*(sizes[c] for c in each), columns, -1)
            y = y.reshape([sizes[c] for c in order + new])
            return y.permute([(order + new).index(c) for c in out])
        rows = x.permute([other.index(c) for c in rest + summed]).reshape(*(sizes[c] for c in rest), columns)
        if own == "".join(summed + new):
            y = rows @ weight.reshape(columns, -1)
        else:
            weight = weight if own == "".join(new + summed) else weight.permute([own.index(c) for c in new + summed])
            y = F.linear(rows, weight.reshape(-1, columns))
        y = y.reshape([sizes[c] for c in rest + new])
        return y.permute([(rest + new).index(c) for c in out])


def _samples_first(capture: Capture, x: Tensor, letters: str, rest: list[str]) -> list[str]:
    """Return the letters with that of the samples' axis first; nothing if it is not among them."""
    if capture.samples == 1:
        return rest
    place = capture.where(x)
    where = axis(x.shape, place, capture.samples) if isinstance(place, Layout) else None
    letter = "" if where is None else letters[where.number]
    return [letter, *(c for c in rest if c != letter)] if letter in rest else []


def _projected(
    x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what a recurrent cell makes of its input and of its state, which is of the same samples."""
    return F.linear(x, w_x, b_x), F.linear(h + torch.zeros_like(x[..., :1]), w_h, b_h)


def rnn_cell(function: Any) -> Any:
    """Return the rule of ``torch.rnn_tanh_cell`` and its like."""

    def rule(capture: Capture, input: Tensor, hx: Tensor, *weights: Any) -> Any:
        with capture:
            a, b = _projected(input, hx, *weights)
            return function(a + b)

    return rule


def gru_cell(capture: Capture, input: Tensor, hx: Tensor, *weights: Any) -> Any:
    """Rule of ``torch.gru_cell``."""
    with capture:
        (r, z, new), (r_h, z_h, new_h) = (x.chunk(3, -1) for x in _projected(input, hx, *weights))
        r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
        new = torch.tanh(new + r * new_h)
        return new + z * (hx - new)


def lstm_cell(capture: Capture, input: Tensor, hx: Any, *weights: Any) -> Any:
    """Rule of ``torch.lstm_cell``; ``hx`` is the hidden state and the cell's."""
    with capture:
        a, b = _projected(input, hx[0], *weights)
        i, f, new, o = (a + b).chunk(4, -1)
        cell = torch.sigmoid(f) * hx[1] + torch.sigmoid(i) * torch.tanh(new)
        return torch.sigmoid(o) * torch.tanh(cell), cell


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
