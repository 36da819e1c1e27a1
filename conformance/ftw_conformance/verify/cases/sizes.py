"""How long gradients are, and how many terms their sums have: what rounding may be measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import ftw

Array = Any


def lengths(x: Mapping[str, Any]) -> Array:
    """Return a bound of each gradient's length (n,) before its tokens cancel."""
    return np.sqrt(sum(length(r) ** 2 for r in x.values()))


def length(record: Any) -> Any:
    """Return ``sum_t |a_t| |b_t|`` (n,) of one record."""
    if isinstance(record, ftw.OuterProduct):
        a, b = (np.linalg.norm(np.asarray(v), axis=2) for v in (record.inputs, record.output_grads))
        return np.sum(a * b, axis=1)
    if isinstance(record, ftw.Rows):
        return np.sum(np.linalg.norm(np.asarray(record.output_grads), axis=2), axis=1)
    if isinstance(record, (ftw.Packed, ftw.PackedRows)):
        b = np.linalg.norm(np.asarray(record.output_grads, dtype=float), axis=1)  # (t,)
        if isinstance(record, ftw.Packed):
            b = b * np.linalg.norm(np.asarray(record.inputs, dtype=float), axis=1)
        return np.array([np.sum(b[np.asarray(record.samples) == i]) for i in range(record.size)])
    if isinstance(record, ftw.Dense):
        return np.sqrt(np.sum(np.asarray(record.grads).reshape(record.n, -1) ** 2, axis=1))
    return sum(length(part) for part in record.parts)


def terms(x: Mapping[str, Any]) -> int:
    """Return the number of products in the longest sum."""
    return max(record_terms(r) for r in x.values())


def record_terms(record: Any) -> int:
    """Return the number of terms in the sum of each entry of a record's gradient."""
    if isinstance(record, ftw.Sum):
        return sum(map(record_terms, record.parts))
    size = int(np.prod(record.shape))
    if isinstance(record, (ftw.Packed, ftw.PackedRows)):
        return size * record.output_grads.shape[0]
    return size * (record.output_grads.shape[1] if hasattr(record, "output_grads") else 1)
