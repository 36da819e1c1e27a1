"""``sum_i w_i G_i`` of one record, in a few calls however many samples are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftw import Dense, Packed, PackedRows, Rows, Sum, combine
from ftw.gradients import Record

from .blocks import block_bytes, product
from .dtypes import promoted

__all__ = ["Picks", "weighted_sum"]


class Picks:
    """Some samples of a piece and their weights, wherever they are asked for.

    Parameters
    ----------
    chosen : sequence of (int, float)
        Numbers and weights, no weight zero.
    n : int
        Samples in the piece.
    """

    def __init__(self, chosen: Sequence[tuple[int, float]], n: int) -> None:
        self._places, self._shares = zip(*chosen, strict=True)
        self._n = n
        self._every = list(self._places) == list(range(n))
        self._there: dict[Any, Tensor] = {}
        self.equal = self._shares[0] if len(set(self._shares)) == 1 else None

    def of(self, x: Any) -> Tensor:
        """Return the rows of these samples."""
        out: Tensor = x if self._every else x.index_select(0, self._at(x.device, torch.int64, self._places))
        return out

    def weights(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the weights (k,)."""
        return self._at(device, dtype, self._shares)

    def spread(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the weights (n,) of all samples, zero where one is not selected."""
        out = torch.zeros(self._n, dtype=dtype, device=device)
        return out.index_add_(0, self._at(device, torch.int64, self._places), self.weights(device, dtype))

    def _at(self, device: torch.device, dtype: torch.dtype, values: Sequence[float]) -> Tensor:
        if (device, dtype) not in self._there:
            self._there[device, dtype] = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
        return self._there[device, dtype]


def weighted_sum(record: Record, picks: Picks) -> Tensor:
    """Return ``sum_i w_i G_i`` in float32 or wider."""
    if isinstance(record, Sum):
        total = weighted_sum(record.parts[0], picks)
        for part in record.parts[1:]:
            total.add_(weighted_sum(part, picks))
        return total
    if isinstance(record, (Packed, PackedRows)):
        of_tokens: Any = record.output_grads
        wide = torch.promote_types(of_tokens.dtype, torch.float32)
        every: Any = picks.spread(of_tokens.device, wide)  # (n,)
        return combine({"": record}, every)[""]  # type: ignore[no-any-return]
    b: Any = picks.of(record.grads if isinstance(record, Dense) else record.output_grads)  # (k, ...)
    wide = promoted(b.dtype)
    w = picks.weights(b.device, wide)  # (k,)
    out: Tensor
    if isinstance(record, Dense):
        out = (w @ b.to(wide).reshape(len(b), -1)).view(record.shape)
    elif isinstance(record, Rows):
        rows: Any = record.indices  # (n, t)
        scaled = (b.to(wide) * w[:, None, None]).flatten(0, 1)  # (k t, d)
        out = scaled.new_zeros(record.shape).index_add_(0, picks.of(rows).reshape(-1), scaled)
    else:
        a: Any = record.inputs  # (n, t, d_in)
        out = _of_factors(picks.of(a), b, w, picks.equal)
    return out


def _of_factors(a: Tensor, b: Tensor, w: Tensor, equal: float | None) -> Tensor:
    """Return ``sum_i w_i B_i' A_i`` (d_out, d_in); factors of 16 bits are not rounded again by weights."""
    if b.dtype.itemsize >= 4 or a.dtype != b.dtype:
        wide = promoted(a.dtype, w.dtype)
        scaled = (b.to(wide) * w[:, None, None]).flatten(0, 1)  # (k t, d_out)
        return scaled.T @ a.to(wide).flatten(0, 1)
    if equal is not None:
        return product(b.flatten(0, 1).T, a.flatten(0, 1)).mul_(equal)
    k, _, height = b.shape
    width = a.shape[2]
    out = w.new_empty(height, width)
    rows = max(1, block_bytes(a) // (k * width * 4))
    for start in range(0, height, rows):
        part = slice(start, min(start + rows, height))
        blocks = product(b[:, :, part].mT, a)  # (k, r, d_in)
        out[part] = (w @ blocks.view(k, -1)).view(-1, width)
    return out
