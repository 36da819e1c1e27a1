"""Records of samples of equal length: `OuterProduct` for matrices, `Rows` for embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import _array, planner
from ._array import Array, widen

__all__ = ["OuterProduct", "Rows", "check_rows", "check_size", "matrix_shape", "one_hot", "times"]


@_array.pytree(data=("inputs", "output_grads"))
@dataclass(frozen=True, eq=False)
class OuterProduct:
    """Gradients of a matrix parameter as outer products, ``G_i = output_grads[i].T @ inputs[i]``: (d_out, d_in).

    Parameters
    ----------
    inputs : array (n, t, d_in)
        What the layer saw: t tokens of each of n samples.
    output_grads : array (n, t, d_out)
        Gradient of sample i's own loss (never divided by n) with respect to the layer's output.
    """

    inputs: Array  # (n, t, d_in)
    output_grads: Array  # (n, t, d_out)

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def n(self) -> int:
        """Number n of samples."""
        return self.inputs.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (d_out, d_in) of the parameter."""
        return (self.output_grads.shape[2], self.inputs.shape[2])

    @property
    def floats(self) -> list[Any]:
        """The arrays that hold values."""
        return [self.inputs, self.output_grads]

    def check(self, name: str) -> None:
        """Raise ValueError if the factors do not belong together."""
        a, b = self.inputs, self.output_grads
        if a.ndim != 3 or b.ndim != 3 or a.shape[:2] != b.shape[:2]:
            raise ValueError(
                f"OuterProduct for {name!r}: inputs {tuple(a.shape)} and output_grads {tuple(b.shape)} must be "
                "(n, t, d_in) and (n, t, d_out); give samples without tokens an axis of length 1"
            )

    def dot(self, xp: Any, m: Any) -> Any:
        """Return ``<G_i, m>`` (n,) for a dense m (d_out, d_in); 2 n t d_out d_in FLOPs on the narrower side."""
        a, b = _array.together(xp, self.inputs, self.output_grads)  # (n, t, d_in), (n, t, d_out)
        m = _array.cast(m, a)
        inward = planner.plan_scores(a.shape[0], a.shape[1], matrix_shape(self.shape), itemsize=0).route == "inputs"
        product = a * (b @ m) if inward else b * (a @ m.T)  # (n, t, min(d_in, d_out))
        return xp.sum(product, axis=(1, 2))  # (n,)

    def over_tokens(self, xp: Any, values: Any) -> Any:
        """Return the sums (n,) of one value for each token, (n, t)."""
        return xp.sum(values, axis=1)

    def combine(self, xp: Any, weights: Any) -> Any:
        """Return ``sum_i w_i G_i`` (d_out, d_in); samples of zero weight do not enter, whatever they hold."""
        a, b = _array.together(xp, self.inputs, self.output_grads)  # (n, t, d_in), (n, t, d_out)
        w = _array.cast(weights, a)[:, None, None]  # (n, 1, 1)
        a, b = xp.where(w != 0, a, 0.0), w * xp.where(w != 0, b, 0.0)  # no 0 * inf on the way
        n, t = self.inputs.shape[:2]
        d_out, d_in = self.shape
        return xp.reshape(b, (n * t, d_out)).T @ xp.reshape(a, (n * t, d_in))  # (d_out, d_in)

    def take(self, xp: Any, indices: Any) -> OuterProduct:
        """Return the record of some samples."""
        return OuterProduct(xp.take(self.inputs, indices, axis=0), xp.take(self.output_grads, indices, axis=0))

    def block(self, xp: Any, rows: slice, columns: slice) -> Any:
        """Return ``G_i[rows, columns]`` (n, r, c) of every sample."""
        a, b = _array.together(xp, self.inputs[:, :, columns], self.output_grads[:, :, rows])  # (n, t, c), (n, t, r)
        return xp.matrix_transpose(b) @ a

    def transform(self, xp: Any, left: Any, right: Any) -> OuterProduct:
        """Return the record of ``left.T @ G_i @ right``; None is the identity, a vector a diagonal matrix."""
        return OuterProduct(times(xp, self.inputs, right), times(xp, self.output_grads, left))

    def transposed(self, xp: Any) -> OuterProduct:
        """Return the record of ``G_i.T``."""
        return OuterProduct(self.output_grads, self.inputs)

    def negated(self, xp: Any) -> OuterProduct:
        """Return the record of ``-G_i``."""
        return OuterProduct(self.inputs, -self.output_grads)


@_array.pytree(data=("indices", "output_grads"), static=("size",))
@dataclass(frozen=True, eq=False)
class Rows:
    """Gradients of an embedding: token s of sample i adds ``output_grads[i, s]`` to row ``indices[i, s]``.

    Parameters
    ----------
    indices : integer array (n, t)
        Row numbers in [0, size), of any integer dtype: they are held in the namespace's default one. Rows that occur
        several times add up.
    output_grads : array (n, t, d)
        Gradient of sample i's own loss with respect to the looked-up rows.
    size : int
        Number of rows of the parameter (static).
    """

    indices: Array  # (n, t)
    output_grads: Array  # (n, t, d)
    size: int

    def __post_init__(self) -> None:
        _array.register_pytrees()
        object.__setattr__(self, "indices", _array.integers(self.indices))  # offsets would wrap in narrow integers

    @property
    def n(self) -> int:
        """Number n of samples."""
        return self.indices.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (size, d) of the parameter."""
        return (self.size, self.output_grads.shape[2])

    @property
    def floats(self) -> list[Any]:
        """The arrays that hold values, not row numbers."""
        return [self.output_grads]

    def check(self, name: str) -> None:
        """Raise ValueError if the factors do not belong together."""
        i, b = self.indices, self.output_grads
        if i.ndim != 2 or b.ndim != 3 or i.shape != b.shape[:2]:
            raise ValueError(
                f"Rows for {name!r}: indices {tuple(i.shape)} and output_grads {tuple(b.shape)} must be (n, t) and "
                "(n, t, d)"
            )
        check_size("Rows", name, "size", self.size)
        check_rows("Rows", name, i, self.size)

    def dot(self, xp: Any, m: Any) -> Any:
        """Return ``<G_i, m>`` (n,) for a dense m (size, d); 2 n t d FLOPs."""
        b = widen(xp, self.output_grads)  # (n, t, d)
        rows = xp.take(_array.cast(m, b), self._flat(xp), axis=0)  # (n t, d)
        return xp.sum(xp.reshape(rows, b.shape) * b, axis=(1, 2))  # (n,)

    def over_tokens(self, xp: Any, values: Any) -> Any:
        """Return the sums (n,) of one value for each token, (n, t)."""
        return xp.sum(values, axis=1)

    def _flat(self, xp: Any) -> Any:
        """Return the row numbers (n t,), in a dtype that indexes."""
        return xp.reshape(self.indices, (-1,))

    def combine(self, xp: Any, weights: Any) -> Any:
        """Return ``sum_i w_i G_i`` (size, d); samples of zero weight do not enter, whatever they hold."""
        b = widen(xp, self.output_grads)  # (n, t, d)
        n, t, d = b.shape
        w = _array.cast(weights, b)[:, None, None]  # (n, 1, 1)
        b = w * xp.where(w != 0, b, 0.0)
        return _array.segment_sum(xp, xp.reshape(b, (n * t, d)), self._flat(xp), self.size)

    def take(self, xp: Any, indices: Any) -> Rows:
        """Return the record of some samples."""
        return Rows(xp.take(self.indices, indices, axis=0), xp.take(self.output_grads, indices, axis=0), self.size)

    def block(self, xp: Any, rows: slice, columns: slice) -> Any:
        """Return ``G_i[rows, columns]`` (n, r, c) of every sample."""
        n, t = self.indices.shape
        height = rows.stop - rows.start
        b = widen(xp, self.output_grads[:, :, columns])  # (n, t, c)
        local = self.indices - rows.start  # (n, t)
        sample = xp.arange(n, dtype=local.dtype, device=_array.device(local))[:, None]  # (n, 1)
        inside = (local >= 0) & (local < height)
        segment = xp.where(inside, sample * height + local, n * height)  # (n, t): what lies outside is dropped
        flat = xp.reshape(b, (n * t, b.shape[2])), xp.reshape(segment, (-1,))
        sums = _array.segment_sum(xp, *flat, n * height + 1)  # (n * r + 1, c)
        return xp.reshape(sums[: n * height, :], (n, height, b.shape[2]))

    def transform(self, xp: Any, left: Any, right: Any) -> Rows | OuterProduct:
        """Return the record of ``left.T @ G_i @ right``; a dense left side turns rows into outer products."""
        b = times(xp, self.output_grads, right)  # (n, t, d')
        if left is None:
            return Rows(self.indices, b, self.size)
        b = widen(xp, b)
        left = _array.cast(left, b)
        picked = xp.take(left, self._flat(xp), axis=0)  # (n * t,) or (n * t, size')
        if left.ndim == 1:
            return Rows(self.indices, b * xp.reshape(picked, (*self.indices.shape, 1)), self.size)
        return OuterProduct(b, xp.reshape(picked, (*self.indices.shape, left.shape[1])))

    def renumbered(self, indices: Any, size: int) -> Rows:
        """Return the record with other row numbers, of a parameter of ``size`` rows."""
        return Rows(indices, self.output_grads, size)

    def transposed(self, xp: Any) -> OuterProduct:
        """Return the record of ``G_i.T``, with one-hot rows materialized."""
        hot = one_hot(xp, self.indices, self.size, self.output_grads.dtype)  # (n, t, size)
        return OuterProduct(hot, self.output_grads)

    def negated(self, xp: Any) -> Rows:
        """Return the record of ``-G_i``."""
        return Rows(self.indices, -self.output_grads, self.size)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape under which a parameter is seen as a matrix."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def times(xp: Any, factor: Any, side: Any) -> Any:
    """Return ``factor @ side`` along the last axis; None is the identity, a vector a diagonal matrix."""
    if side is None:
        return factor
    factor = widen(xp, factor)
    side = _array.cast(side, factor)
    return factor * _array.over(side, factor) if side.ndim == 1 else factor @ side


def one_hot(xp: Any, indices: Any, size: int, dtype: Any) -> Any:
    """Return ones (..., size) where the row numbers ``indices`` (...) point, zeros elsewhere."""
    numbers = _array.integers(indices)[..., None]  # (..., 1)
    line = xp.arange(size, dtype=numbers.dtype, device=_array.device(numbers))  # (size,)
    return xp.astype(numbers == _array.over(line, numbers), dtype)


def check_size(kind: str, name: str, what: str, size: Any) -> None:
    """Raise if a static size is no Python int, or negative."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{kind} for {name!r}: {what} must be a Python int, got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"{kind} for {name!r}: {what}={size} must not be negative")


def check_rows(kind: str, name: str, indices: Any, size: int) -> None:
    """Raise if row numbers are no integers, or do not lie in [0, size)."""
    if not _array.namespace(indices).isdtype(indices.dtype, "integral"):
        raise TypeError(f"{kind} for {name!r}: indices are {indices.dtype}; they must be integers")
    if _array.outside(indices, size):
        raise ValueError(
            f"{kind} for {name!r}: indices must lie in [0, {size}), the rows of the parameter; give a token "
            "without a row any row and an output gradient of zero"
        )
