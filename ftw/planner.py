"""Which route is cheaper, from shapes alone: no arrays here.

FLOPs are those of the matrix products, two for each multiplication and addition; what else is done is one pass over the
temporaries. Bytes are the temporaries alive at once beyond the inputs and the result. A copy that widens 16-bit
factors, or acts on them (a rotation, a Kronecker side), is as large as the factors of one parameter and not counted.

=================  ===================================================  ==============================================
what               route                                                FLOPs
=================  ===================================================  ==============================================
scores             "inputs" or "outputs": multiply on the narrower side  2 n t d_out d_in
combine            "product", one for all samples                        2 n t d_out d_in
Gram matrix        "tokens": all pairs of tokens                         2 n t m u (d_in + d_out)
                   "blocks" of rows and columns of every G_i             2 (n t + m u + n m) d_out d_in
=================  ===================================================  ==============================================

For packed samples n t and m u are the tokens of all samples together; "blocks" lay them out in chunks of one length,
which at most doubles them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Plan", "Side", "blocks", "chunks", "plan_combine", "plan_gram", "plan_scores", "plan_transform"]


class Plan(NamedTuple):
    """A route, with what it costs."""

    route: str
    flops: int
    bytes: int
    rows: int = 0  # of a block; samples of a chunk on the token route, tokens if they are packed
    columns: int = 0  # of a block


class Side(NamedTuple):
    """One side of a Gram matrix.

    Attributes
    ----------
    samples : int
    tokens : int
        Outer products to add for one gradient; 0 if it is formed without any (`Dense`, `Rows`).
    copies : int
        Arrays of a block's size alive at once while it is formed.
    packed : int
        Tokens of packed samples, all together.
    """

    samples: int
    tokens: int
    copies: int = 1
    packed: int = 0

    @property
    def total(self) -> int:
        """Tokens of all samples."""
        return self.samples * self.tokens + self.packed

    @property
    def formed(self) -> int:
        """Outer products to add for the gradients of all samples."""
        count, length = chunks(self.samples, self.packed)
        return self.samples * self.tokens + count * length


def chunks(n: int, t: int) -> tuple[int, int]:
    """Return number and length of the chunks in which t tokens of n samples fit, one sample a chunk, however they lie.

    The length is the mean of the samples' lengths, so that there are fewer than 2 n chunks and 2 t places.
    """
    length = max(1, t // max(n, 1))
    return ((t + n * (length - 1)) // length if n else 0), length


def plan_scores(n: int, t: int, shape: tuple[int, int], *, itemsize: int) -> Plan:
    """Choose the side on which ``<B_i' A_i, M>`` is multiplied; A is (n, t, d_in), B (n, t, d_out), M ``shape``."""
    d_out, d_in = shape
    return Plan("inputs" if d_in <= d_out else "outputs", 2 * n * t * d_out * d_in, 2 * n * t * min(shape) * itemsize)


def plan_combine(n: int, t: int, shape: tuple[int, int], *, itemsize: int) -> Plan:
    """Cost of ``sum_i w_i B_i' A_i`` in one product; both factors are copied, to cut unwanted samples out."""
    d_out, d_in = shape
    return Plan("product", 2 * n * t * d_out * d_in, n * t * (d_in + 2 * d_out) * itemsize)


def plan_transform(
    n: int, t: int, shape: tuple[int, int], *, left: int | None, right: int | None, itemsize: int
) -> Plan:
    """Cost of acting on the factors with dense sides (d_out, left) and (d_in, right), None for the identity."""
    d_out, d_in = shape
    flops = 2 * n * t * (d_out * (left or 0) + d_in * (right or 0))
    return Plan("factors", flops, n * t * ((left or 0) + (right or 0)) * itemsize)


def plan_gram(
    x: Side,
    y: Side | None,
    shape: tuple[int, int],
    *,
    by_tokens: bool,
    elementwise: bool,
    itemsize: int,
    max_bytes: int,
) -> Plan:
    """Choose how to form ``<X_i, W * Y_j>`` (n, m) for two records of matrices of ``shape``.

    Parameters
    ----------
    x, y : Side
        ``y`` is None if both are the same record, so that one block serves both sides.
    shape : (int, int)
        Rows d_out and columns d_in of the matrices.
    by_tokens : bool
        Whether pairs of tokens may be taken: both are outer products, packed or not, and W is a number.
    elementwise : bool
        Whether W is an array, which costs a weighted copy of a block.
    itemsize, max_bytes : int
        Bytes of an element, and of the temporaries allowed.

    Raises
    ------
    ValueError
        If ``max_bytes`` does not hold one element of every gradient.

    Notes
    -----
    The token route wins while n t is below about half a side; it is left where one sample's pairs exceed ``max_bytes``.
    """
    other = x if y is None else y
    height, width = shape
    pairs = x.samples * other.samples
    forming = 2 * (x.formed + (0 if y is None else y.formed)) * height * width
    in_blocks = forming + 2 * pairs * height * width
    in_tokens = 2 * x.total * other.total * (height + width)
    if by_tokens and in_tokens < in_blocks:
        step, steps = (1, x.total) if x.packed or other.packed else (x.tokens, x.samples)
        each = 3 * step * other.total * itemsize  # two products of (step, m u), and their product
        if each <= max_bytes:
            chunk = max(1, min(steps, max_bytes // max(each, 1)))
            return Plan("tokens", in_tokens, chunk * each, chunk)

    weighted = 2 if elementwise else 1
    if y is None:
        alive = x.samples * max(x.copies, weighted)
    else:
        alive = x.samples * x.copies  # first X's block, then Y's beside it, then Y's weighted
        alive = max(alive, x.samples + y.samples * max(y.copies, weighted))
    alive += elementwise  # the weights of a block, or their root
    per_element = max(1, alive * itemsize)
    if per_element > max_bytes:
        raise ValueError(
            f"max_bytes={max_bytes} is too small: one element of every gradient takes {per_element} bytes; raise it, "
            "or take fewer samples at a time"
        )
    columns = max(1, min(width, max_bytes // per_element))
    rows = max(1, min(height, max_bytes // (per_element * columns)))
    return Plan("blocks", in_blocks, rows * columns * per_element, rows, columns)


def blocks(shape: tuple[int, int], plan: Plan) -> Iterator[tuple[slice, slice]]:
    """Yield the slices of rows and columns that tile a matrix of ``shape`` in the plan's blocks."""
    height, width = shape
    for r in range(0, height, plan.rows):
        for c in range(0, width, plan.columns):
            yield slice(r, min(r + plan.rows, height)), slice(c, min(c + plan.columns, width))
