"""Records of packed samples: documents side by side in one line of tokens, each token with its sample's number.

    G_i = sum over the tokens s with samples[s] == i of  output_grads[s] inputs[s]'

A score is one matrix product and a sum over each document's tokens; a combination weighs the tokens. Only a Gram matrix
with elementwise weights needs the gradients themselves, a block at a time. For a block, the tokens of each document are
laid out in chunks of one length, the mean length of a document, so that one batched product forms it: n documents make
at most 2 n chunks, whatever their lengths are, and no shape depends on a value.

Tokens of no sample (number -1) enter nothing, whatever they hold. A number out of range raises where it can be seen; in
a trace, or on a device, it turns every result into NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _array, planner
from ._array import Array, widen
from ._factors import OuterProduct, check_rows, check_size, matrix_shape, one_hot, times

__all__ = ["Packed", "PackedRows", "pack", "sum_by_sample"]


@_array.pytree(data=("inputs", "output_grads", "samples"), static=("size",))
@dataclass(frozen=True, eq=False)
class Packed:
    """Gradients of a matrix parameter for samples of different lengths, packed side by side.

    ``G_i`` is the sum of the outer products of ``output_grads[s]`` and ``inputs[s]`` over the tokens s with
    ``samples[s] == i``. The tokens of one sample need not be neighbours.

    Parameters
    ----------
    inputs : array (t, d_in)
        What the layer saw: all tokens of all samples.
    output_grads : array (t, d_out)
        Gradient of the loss of the token's own sample (never divided by n) with respect to the layer's output.
    samples : integer array (t,)
        Number of each token's sample, in [0, size); -1 for tokens of no sample, such as padding.
    size : int
        Number n of samples (static). Some may have no token: their gradient is zero.
    """

    inputs: Array  # (t, d_in)
    output_grads: Array  # (t, d_out)
    samples: Array  # (t,)
    size: int

    def __post_init__(self) -> None:
        _array.register_pytrees()
        object.__setattr__(self, "samples", _array.integers(self.samples))  # offsets would wrap in narrow integers

    @property
    def n(self) -> int:
        """Number n of samples."""
        return self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (d_out, d_in) of the parameter."""
        return (self.output_grads.shape[1], self.inputs.shape[1])

    @property
    def floats(self) -> list[Any]:
        """The arrays that hold values, not sample numbers."""
        return [self.inputs, self.output_grads]

    def check(self, name: str) -> None:
        """Raise ValueError if the factors do not belong together, TypeError if numbers are no integers."""
        a, b, s = self.inputs, self.output_grads, self.samples
        if (a.ndim, b.ndim, s.ndim) != (2, 2, 1) or not a.shape[0] == b.shape[0] == s.shape[0]:
            raise ValueError(
                f"Packed for {name!r}: inputs {tuple(a.shape)}, output_grads {tuple(b.shape)} and samples "
                f"{tuple(s.shape)} must be (t, d_in), (t, d_out) and (t,); flatten rows and tokens into one axis"
            )
        _check_samples("Packed", name, s, self.size)

    def dot(self, xp: Any, m: Any) -> Any:
        """Return ``<G_i, m>`` (n,) for a dense m (d_out, d_in); 2 t d_out d_in FLOPs on the narrower side."""
        a, b = _array.together(xp, self.inputs, self.output_grads)  # (t, d_in), (t, d_out)
        m = _array.cast(m, a)
        inward = planner.plan_scores(1, a.shape[0], matrix_shape(self.shape), itemsize=0).route == "inputs"
        product = a * (b @ m) if inward else b * (a @ m.T)  # (t, min(d_in, d_out))
        return self.over_tokens(xp, xp.sum(product, axis=1))  # (n,)

    def over_tokens(self, xp: Any, values: Any) -> Any:
        """Return the sums (n,) of one value for each token, (t,)."""
        return sum_by_sample(xp, values[:, None], self.samples, self.size)[:, 0]

    def combine(self, xp: Any, weights: Any) -> Any:
        """Return ``sum_i w_i G_i`` (d_out, d_in); samples of zero weight do not enter, whatever they hold."""
        a, b = _array.together(xp, self.inputs, self.output_grads)  # (t, d_in), (t, d_out)
        w = _token_weights(xp, _array.cast(weights, a), self.samples)[:, None]  # (t, 1)
        a, b = xp.where(w != 0, a, 0.0), w * xp.where(w != 0, b, 0.0)  # no 0 * inf on the way
        return b.T @ a  # (d_out, d_in)

    def take(self, xp: Any, indices: Any) -> Packed:
        """Return the record of some samples; no token goes, those of other samples become those of none."""
        copies, samples = _renumbered(xp, self.samples, self.size, indices)
        a, b = (xp.concat([x] * copies) for x in (self.inputs, self.output_grads))
        return Packed(a, b, samples, indices.shape[0])

    def block(self, xp: Any, rows: slice, columns: slice) -> Any:
        """Return ``G_i[rows, columns]`` (n, r, c) of every sample, by chunks of one length."""
        a, b = _array.together(xp, self.inputs[:, columns], self.output_grads[:, rows])  # (t, c), (t, r)
        n, r, c = self.size, b.shape[1], a.shape[1]
        chunks, length = planner.chunks(n, a.shape[0])
        if not chunks:
            return xp.zeros((n, r, c), dtype=a.dtype, device=_array.device(a))
        tokens, owners, wrong = _chunked(xp, self.samples, n, chunks, length)
        a, b = (xp.reshape(_gathered(xp, x, tokens), (chunks, length, x.shape[1])) for x in (a, b))
        product = xp.reshape(xp.matrix_transpose(b) @ a, (chunks, r * c))  # (chunks, r * c)
        sums = _array.segment_sum(xp, product, owners, n)  # (n, r * c)
        return xp.reshape(xp.where(wrong, xp.nan, sums), (n, r, c))

    def transform(self, xp: Any, left: Any, right: Any) -> Packed:
        """Return the record of ``left.T @ G_i @ right``; None is the identity, a vector a diagonal matrix."""
        return Packed(times(xp, self.inputs, right), times(xp, self.output_grads, left), self.samples, self.size)

    def transposed(self, xp: Any) -> Packed:
        """Return the record of ``G_i.T``."""
        return Packed(self.output_grads, self.inputs, self.samples, self.size)

    def negated(self, xp: Any) -> Packed:
        """Return the record of ``-G_i``."""
        return Packed(self.inputs, -self.output_grads, self.samples, self.size)


@_array.pytree(data=("indices", "output_grads", "samples"), static=("size", "height"))
@dataclass(frozen=True, eq=False)
class PackedRows:
    """Gradients of an embedding for packed samples: token s adds ``output_grads[s]`` to row ``indices[s]``.

    The order of the fields is that of `Packed`, with the parameter's own size last.

    Parameters
    ----------
    indices : integer array (t,)
        Row numbers in [0, height), of tokens of no sample too. Rows that occur several times add up.
    output_grads : array (t, d)
        Gradient of the loss of the token's own sample with respect to the looked-up row.
    samples : integer array (t,)
        Number of each token's sample, in [0, size); -1 for tokens of no sample, such as padding.
    size : int
        Number n of samples (static). Some may have no token: their gradient is zero.
    height : int
        Number of rows of the parameter (static).
    """

    indices: Array  # (t,)
    output_grads: Array  # (t, d)
    samples: Array  # (t,)
    size: int
    height: int

    def __post_init__(self) -> None:
        _array.register_pytrees()
        for name in ("indices", "samples"):  # offsets would wrap in narrow integers
            object.__setattr__(self, name, _array.integers(getattr(self, name)))

    @property
    def n(self) -> int:
        """Number n of samples."""
        return self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (height, d) of the parameter."""
        return (self.height, self.output_grads.shape[1])

    @property
    def floats(self) -> list[Any]:
        """The arrays that hold values, not row or sample numbers."""
        return [self.output_grads]

    def check(self, name: str) -> None:
        """Raise ValueError if the factors do not belong together, TypeError if numbers are no integers."""
        i, b, s = self.indices, self.output_grads, self.samples
        if (i.ndim, b.ndim, s.ndim) != (1, 2, 1) or not i.shape[0] == b.shape[0] == s.shape[0]:
            raise ValueError(
                f"PackedRows for {name!r}: indices {tuple(i.shape)}, output_grads {tuple(b.shape)} and samples "
                f"{tuple(s.shape)} must be (t,), (t, d) and (t,); flatten rows and tokens into one axis"
            )
        check_size("PackedRows", name, "height", self.height)
        check_rows("PackedRows", name, i, self.height)
        _check_samples("PackedRows", name, s, self.size)

    def dot(self, xp: Any, m: Any) -> Any:
        """Return ``<G_i, m>`` (n,) for a dense m (height, d); 2 t d FLOPs."""
        b = widen(xp, self.output_grads)  # (t, d)
        rows = xp.take(_array.cast(m, b), self.indices, axis=0)  # (t, d)
        return self.over_tokens(xp, xp.sum(rows * b, axis=1))  # (n,)

    def over_tokens(self, xp: Any, values: Any) -> Any:
        """Return the sums (n,) of one value for each token, (t,)."""
        return sum_by_sample(xp, values[:, None], self.samples, self.size)[:, 0]

    def combine(self, xp: Any, weights: Any) -> Any:
        """Return ``sum_i w_i G_i`` (height, d); samples of zero weight do not enter, whatever they hold."""
        b = widen(xp, self.output_grads)  # (t, d)
        w = _token_weights(xp, _array.cast(weights, b), self.samples)[:, None]  # (t, 1)
        b = w * xp.where(w != 0, b, 0.0)
        return _array.segment_sum(xp, b, self.indices, self.height)

    def take(self, xp: Any, indices: Any) -> PackedRows:
        """Return the record of some samples; no token goes, those of other samples become those of none."""
        copies, samples = _renumbered(xp, self.samples, self.size, indices)
        i, b = (xp.concat([x] * copies) for x in (self.indices, self.output_grads))
        return PackedRows(i, b, samples, indices.shape[0], self.height)

    def block(self, xp: Any, rows: slice, columns: slice) -> Any:
        """Return ``G_i[rows, columns]`` (n, r, c) of every sample."""
        b = widen(xp, self.output_grads[:, columns])  # (t, c)
        n, r, c = self.size, rows.stop - rows.start, b.shape[1]
        samples, wrong = _numbers(xp, self.samples, n)  # (t,), n: of none
        local = self.indices - rows.start  # (t,)
        inside = (local >= 0) & (local < r) & (samples < n)
        segments = xp.where(inside, samples * r + local, n * r)  # (t,): what lies outside is dropped
        sums = _array.segment_sum(xp, b, segments, n * r + 1)  # (n * r + 1, c)
        return xp.reshape(xp.where(wrong, xp.nan, sums[: n * r, :]), (n, r, c))

    def transform(self, xp: Any, left: Any, right: Any) -> PackedRows | Packed:
        """Return the record of ``left.T @ G_i @ right``; a dense left side turns rows into outer products."""
        b = times(xp, self.output_grads, right)  # (t, d')
        if left is None:
            return PackedRows(self.indices, b, self.samples, self.size, self.height)
        b = widen(xp, b)
        left = _array.cast(left, b)
        picked = xp.take(left, self.indices, axis=0)  # (t,) or (t, height')
        if left.ndim == 1:
            return PackedRows(self.indices, b * picked[:, None], self.samples, self.size, self.height)
        return Packed(b, picked, self.samples, self.size)

    def renumbered(self, indices: Any, height: int) -> PackedRows:
        """Return the record with other row numbers, of a parameter of ``height`` rows."""
        return PackedRows(indices, self.output_grads, self.samples, self.size, height)

    def transposed(self, xp: Any) -> Packed:
        """Return the record of ``G_i.T``, with one-hot rows materialized."""
        hot = one_hot(xp, self.indices, self.height, self.output_grads.dtype)  # (t, height)
        return Packed(hot, self.output_grads, self.samples, self.size)

    def negated(self, xp: Any) -> PackedRows:
        """Return the record of ``-G_i``."""
        return PackedRows(self.indices, -self.output_grads, self.samples, self.size, self.height)


def pack(xp: Any, record: OuterProduct | Packed) -> Packed:
    """Return a record of samples of equal length as a packed one; nothing is copied."""
    if isinstance(record, Packed):
        return record
    a, b = record.inputs, record.output_grads  # (n, t, d_in), (n, t, d_out)
    n, t, d_in = a.shape
    numbers = xp.arange(n * t, device=_array.device(a)) // max(t, 1)  # (n t,)
    return Packed(xp.reshape(a, (n * t, d_in)), xp.reshape(b, (n * t, b.shape[2])), numbers, n)


def sum_by_sample(xp: Any, values: Any, samples: Any, n: int) -> Any:
    """Return the sums (n, c) of the values (t, c) of each sample's tokens; NaN if a number is out of range."""
    numbers, wrong = _numbers(xp, samples, n)
    return xp.where(wrong, xp.nan, _array.segment_sum(xp, values, numbers, n + 1)[:n, :])


def _check_samples(kind: str, name: str, samples: Any, size: int) -> None:
    check_size(kind, name, "size", size)
    if not _array.namespace(samples).isdtype(samples.dtype, "integral"):
        raise TypeError(f"{kind} for {name!r}: samples are {samples.dtype}; they must be integers")
    if _array.outside(samples, size, least=-1):
        raise ValueError(
            f"{kind} for {name!r}: samples must lie in [0, {size}), the number of samples, or be -1 for tokens of none"
        )


def _numbers(xp: Any, samples: Any, n: int) -> tuple[Any, Any]:
    """Return the sample numbers (t,), n for tokens of none, and whether one of them is out of range (0-d)."""
    s = _array.integers(samples)  # (t,)
    return xp.where((s < 0) | (s >= n), n, s), xp.any((s < -1) | (s >= n))


def _token_weights(xp: Any, weights: Any, samples: Any) -> Any:
    """Return the weight (t,) of each token's sample, zero for tokens of none."""
    numbers, wrong = _numbers(xp, samples, weights.shape[0])
    w = xp.take(xp.concat([weights, xp.zeros(1, dtype=weights.dtype, device=_array.device(weights))]), numbers)
    return xp.where(wrong, xp.nan, w)


def _renumbered(xp: Any, samples: Any, n: int, indices: Any) -> tuple[int, Any]:
    """Return how often the tokens must be repeated, and their numbers (copies * t,) among the samples ``indices``.

    They are repeated only if a sample is taken several times. In a trace that cannot be known: the numbers are then out
    of range.
    """
    k = indices.shape[0]
    numbers, wrong = _numbers(xp, samples, n)  # (t,)
    indices = _array.integers(indices)  # (k,)
    line = xp.arange(k, dtype=indices.dtype, device=_array.device(indices))  # (k,)
    earlier = (indices[:, None] == indices[None, :]) & (line[:, None] > line[None, :])  # (k, k)
    rank = xp.sum(xp.astype(earlier, indices.dtype), axis=1)  # (k,): how often the same sample has been taken before
    repeated = xp.any(rank > 0)
    copies = 1
    if _array.known(repeated, wait=True):
        copies, repeated = 1 + int(xp.max(rank)), False
    hit = (
        indices[:, None] == xp.arange(n + 1, dtype=indices.dtype, device=_array.device(indices))[None, :]
    )  # (k, n + 1)
    out = []
    for copy in range(copies):
        here = hit & (rank == copy)[:, None]  # (k, n + 1), at most one in each column
        place = xp.sum(xp.where(here, line[:, None] + 1, 0), axis=0) - 1  # (n + 1,), -1 for samples not taken
        out.append(xp.where(wrong | repeated, k, xp.take(place, numbers)))  # (t,)
    return copies, xp.concat(out)


def _chunked(xp: Any, samples: Any, n: int, chunks: int, length: int) -> tuple[Any, Any, Any]:
    """Return a layout of the tokens in chunks that hold tokens of one sample each.

    Returns
    -------
    tokens : array (chunks * length,)
        Token in each place of the chunks; t where there is none.
    owners : array (chunks,)
        Sample of each chunk. Chunks that are left over hold nothing.
    wrong : 0-d array
        Whether a sample number is out of range.
    """
    numbers, wrong = _numbers(xp, samples, n)  # (t,)
    t, d = numbers.shape[0], _array.device(numbers)
    order = _array.integers(xp.argsort(numbers, stable=True))  # (t,)
    every = xp.arange(n + 1, dtype=numbers.dtype, device=d)
    starts = _array.integers(xp.searchsorted(xp.take(numbers, order), every))  # (n + 1,) first token of each sample
    ends = xp.cumulative_sum((starts[1:] - starts[:-1] + length - 1) // length)  # (n,) chunks up to each sample's last
    line = xp.arange(chunks, dtype=numbers.dtype, device=d)
    owners = xp.clip(_array.integers(xp.searchsorted(ends, line, side="right")), max=n - 1)  # (chunks,)
    first = xp.concat([xp.zeros_like(ends[:1]), ends[:-1]])  # (n,) first chunk of each sample
    begin = xp.take(starts, owners) + (line - xp.take(first, owners)) * length  # (chunks,)
    places = begin[:, None] + xp.arange(length, dtype=numbers.dtype, device=d)[None, :]  # (chunks, length)
    inside = places < xp.take(starts, owners + 1)[:, None]
    tokens = xp.take(order, xp.reshape(xp.where(inside, places, 0), (-1,)))  # (chunks * length,)
    return xp.where(xp.reshape(inside, (-1,)), tokens, t), owners, wrong


def _gathered(xp: Any, x: Any, tokens: Any) -> Any:
    """Return rows of x (t, d), zero where the token is t."""
    return xp.take(xp.concat([x, xp.zeros_like(x[:1, :])]), tokens, axis=0)
