"""Which route is cheaper, from shapes alone: no arrays here.

One FLOP is one multiplication or one addition. Bytes are the largest temporary beyond the inputs and the (n, m) result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Plan", "blocks", "plan_gram"]


class Plan(NamedTuple):
    """The route of one Gram contribution, with what it costs."""

    route: str  # "tokens" or "blocks"
    flops: int
    bytes: int
    rows: int  # of a block; samples of a chunk on the token route
    columns: int  # of a block


def plan_gram(
    n: int,
    m: int,
    shape: tuple[int, int],
    *,
    tokens: tuple[int, int] | None,
    symmetric: bool,
    itemsize: int,
    max_bytes: int,
) -> Plan:
    """Choose how to form ``<X_i, Y_j>`` (n, m) for two records of matrices of ``shape``.

    Parameters
    ----------
    n, m : int
        Samples on each side.
    shape : (int, int)
        Rows d_out and columns d_in of the matrices.
    tokens : (int, int) or None
        Tokens t of X and u of Y if both are outer products under a plain inner product; None rules the token route out.
    symmetric : bool
        Whether X and Y are the same record, so that one block serves both.
    itemsize, max_bytes : int
        Bytes of an element, and of the largest temporary allowed.

    Notes
    -----
    Token route, ``sum_{s,t} (A_is . A'_jt)(B_is . B'_jt)``: 2 n t m u (d_in + d_out) FLOPs.
    Blocks, G_i formed a block of rows and columns at a time: 2 (n t + m u) d_out d_in for forming, 2 n m d_out d_in for
    the products. The token route wins while n t is below about half a side.
    """
    height, width = shape
    sides = 1 if symmetric else 2
    t, u = tokens or (1, 1)
    forming = 2 * (n * t + (0 if symmetric else m * u)) * height * width
    in_blocks = forming + 2 * n * m * height * width
    by_tokens = 2 * n * t * m * u * (height + width) + 2 * n * t * m * u
    if tokens is not None and by_tokens < in_blocks:
        each = 2 * t * m * u * itemsize  # two (t, m u) products for one sample of X
        if each <= max_bytes:
            chunk = min(n, max_bytes // each)
            return Plan("tokens", by_tokens, chunk * each, chunk, 0)
    per_element = (n if symmetric else n + m) * itemsize
    if per_element > max_bytes:
        raise ValueError(
            f"max_bytes={max_bytes} is too small: one element of each of {n + (sides - 1) * m} gradients takes "
            f"{per_element} bytes"
        )
    columns = min(width, max(1, max_bytes // per_element))
    rows = min(height, max(1, max_bytes // (per_element * columns)))
    return Plan("blocks", in_blocks, rows * columns * per_element, rows, columns)


def blocks(shape: tuple[int, int], plan: Plan) -> Iterator[tuple[slice, slice]]:
    """Yield the slices of rows and columns that tile a matrix of ``shape`` in the plan's blocks."""
    height, width = shape
    for r in range(0, height, plan.rows):
        for c in range(0, width, plan.columns):
            yield slice(r, min(r + plan.rows, height)), slice(c, min(c + plan.columns, width))
