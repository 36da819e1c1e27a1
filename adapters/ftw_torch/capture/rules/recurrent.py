"""Rules of recurrent cells, written as products and sums that have rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.registry import rule

__all__: list[str] = []


def _projected(
    x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what a recurrent cell makes of its input and of its state, which is of the same samples."""
    return F.linear(x, w_x, b_x), F.linear(h + torch.zeros_like(x[..., :1]), w_h, b_h)


def rnn_cell(function: Any) -> Any:
    """Return the rule of ``torch.rnn_tanh_cell`` and its like."""

    def handler(capture: Capture, input: Tensor, hx: Tensor, *weights: Any) -> Any:
        with capture:
            a, b = _projected(input, hx, *weights)
            return function(a + b)

    return handler


@rule(torch.gru_cell)
def gru_cell(capture: Capture, input: Tensor, hx: Tensor, *weights: Any) -> Any:
    """Rule of ``torch.gru_cell``."""
    with capture:
        (r, z, new), (r_h, z_h, new_h) = (x.chunk(3, -1) for x in _projected(input, hx, *weights))
        r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
        new = torch.tanh(new + r * new_h)
        return new + z * (hx - new)


@rule(torch.lstm_cell)
def lstm_cell(capture: Capture, input: Tensor, hx: Any, *weights: Any) -> Any:
    """Rule of ``torch.lstm_cell``; ``hx`` is the hidden state and the cell's."""
    with capture:
        a, b = _projected(input, hx[0], *weights)
        i, f, new, o = (a + b).chunk(4, -1)
        cell = torch.sigmoid(f) * hx[1] + torch.sigmoid(i) * torch.tanh(new)
        return torch.sigmoid(o) * torch.tanh(cell), cell


rule(torch.rnn_tanh_cell)(rnn_cell(torch.tanh))
rule(torch.rnn_relu_cell)(rnn_cell(torch.relu))
