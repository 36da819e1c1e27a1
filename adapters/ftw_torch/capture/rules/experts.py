"""Rule of the grouped product, with which a mixture of experts multiplies each of its experts with that one's rows.

``y_r = x_r W_e`` for the rows r of expert e, which come one expert after another, ``offs`` saying where each ends. The
rows of a sample are anywhere among them (`Scattered`). The per-sample gradient of the stack of experts is written out,
``G_ie = sum over the rows r of sample i and expert e of x_r' b_r``: as factors it would be a stack of zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftw import Dense
from ftw_torch.capture.batch_axis import Scattered, group
from ftw_torch.capture.discovery import Capture
from ftw_torch.capture.internals import quietly
from ftw_torch.capture.registry import rule
from ftw_torch.records.blocks import product

from .common import trains

__all__: list[str] = []

grouped_mm: Any = getattr(torch, "_grouped_mm", None)


_FUNCTIONS = [f for home, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if (f := getattr(home, name, None))]


class _Grouped(torch.autograd.Function):
    """The grouped product; its backward gives the rows' gradient only and delivers the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, offs: Tensor, anchor: Tensor, use: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """Multiply, and keep what the backward needs."""
        ctx.use = use
        ctx.save_for_backward(x, weight, offs)
        out: Tensor = grouped_mm(x, weight, offs=offs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver (x, g); return x's gradient."""
        x, weight, offs = ctx.saved_tensors
        with quietly():
            ctx.use(x.detach(), g)
            dx = grouped_mm(g, weight.mT, offs=offs) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


@rule(*_FUNCTIONS)
def grouped(
    capture: Capture, input: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Rule of ``grouped_mm(x, W, offs)`` with x (r, d_in), W (e, d_in, d_out)."""
    name, n = capture.name(weight), capture.samples
    place: Any = capture.where(input)
    if n == 1:
        place = Scattered(torch.zeros(len(input), dtype=torch.int64, device=input.device), 1)
    plain = input.ndim == 2 and weight.ndim == 3 and offs is not None and bias is None and out_dtype is None
    if name is None or trains(bias) or not plain or not isinstance(place, Scattered) or place.rows.ndim != 1:
        return NotImplemented
    assert offs is not None
    experts, owners = len(weight), place.rows

    def deliver(x: Tensor, b: Tensor) -> None:
        rows = torch.arange(len(x), device=x.device, dtype=offs.dtype)
        expert = torch.searchsorted(offs, rows, right=True)  # (r,), e for what no expert reads
        inside = torch.nonzero(expert < experts)[:, 0]
        whose = Scattered((owners * experts + expert)[inside], n * experts)
        parts = [group(y[inside], whose, n * experts, 1) for y in (x, b)]  # (n e, t, d_in), (n e, t, d_out)
        assert parts[0] is not None
        assert parts[1] is not None
        capture.deliver(name, Dense(product(parts[0].mT, parts[1]).view(n, *weight.shape)))

    return _Grouped.apply(input, weight.detach(), offs, capture.anchor, deliver)  # type: ignore[no-untyped-call]
