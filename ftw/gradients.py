"""Records: the gradients of n samples for one parameter, as the factors they come from.

A layer ``y = x W'`` with inputs ``A_i`` (t, d_in) and output gradients ``B_i`` (t, d_out) has the gradient
``G_i = B_i' A_i`` for sample i. The records keep the factors; what the method asks of a gradient is answered from them:

====================  ==========================================================================================
``dot(M)``            ``<G_i, M>`` for all i, on the narrower side, no G_i formed           (scores)
``combine(w)``        ``sum_i w_i G_i`` in one matrix product                                (the update)
``block(r, c)``       rows r and columns c of every G_i, as many as memory allows            (Gram matrices)
``transform(L, R)``   the record of ``L' G_i R``, made by acting on the factors              (geometry)
====================  ==========================================================================================

Parameters that are not matrices are seen as one: (d,) as (1, d) and (a, b, c ...) as (a, b*c ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import _array, _plan
from ._array import Array, widen

__all__ = ["Dense", "OuterProduct", "Record", "Rows", "Sum", "combine", "take"]


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
    def samples(self) -> int:
        """Number n of samples."""
        return self.inputs.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (d_out, d_in) of the parameter."""
        return (self.output_grads.shape[2], self.inputs.shape[2])

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
        inward = _plan.plan_scores(a.shape[0], a.shape[1], matrix_shape(self.shape), itemsize=0).route == "inputs"
        product = a * (b @ m) if inward else b * (a @ m.T)  # (n, t, min(d_in, d_out))
        return xp.sum(product, axis=(1, 2))  # (n,)

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
        return OuterProduct(_times(xp, self.inputs, right), _times(xp, self.output_grads, left))

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
    def samples(self) -> int:
        """Number n of samples."""
        return self.indices.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (size, d) of the parameter."""
        return (self.size, self.output_grads.shape[2])

    def check(self, name: str) -> None:
        """Raise ValueError if the factors do not belong together."""
        i, b = self.indices, self.output_grads
        if i.ndim != 2 or b.ndim != 3 or i.shape != b.shape[:2]:
            raise ValueError(
                f"Rows for {name!r}: indices {tuple(i.shape)} and output_grads {tuple(b.shape)} must be (n, t) and "
                "(n, t, d)"
            )
        if not isinstance(self.size, int) or isinstance(self.size, bool):
            raise TypeError(f"Rows for {name!r}: size must be a Python int, got {type(self.size).__name__}")
        if not _array.namespace(i).isdtype(i.dtype, "integral"):
            raise TypeError(f"Rows for {name!r}: indices are {i.dtype}; they must be integers")
        if _array.outside(i, self.size):
            raise ValueError(
                f"Rows for {name!r}: indices must lie in [0, {self.size}), the rows of the parameter; give a token "
                "without a row any row and an output gradient of zero"
            )

    def dot(self, xp: Any, m: Any) -> Any:
        """Return ``<G_i, m>`` (n,) for a dense m (size, d); 2 n t d FLOPs."""
        b = widen(xp, self.output_grads)  # (n, t, d)
        rows = xp.take(_array.cast(m, b), xp.reshape(self.indices, (-1,)), axis=0)  # (n t, d)
        return xp.sum(xp.reshape(rows, b.shape) * b, axis=(1, 2))  # (n,)

    def combine(self, xp: Any, weights: Any) -> Any:
        """Return ``sum_i w_i G_i`` (size, d); samples of zero weight do not enter, whatever they hold."""
        b = widen(xp, self.output_grads)  # (n, t, d)
        n, t, d = b.shape
        w = _array.cast(weights, b)[:, None, None]  # (n, 1, 1)
        b = w * xp.where(w != 0, b, 0.0)
        return _array.segment_sum(xp, xp.reshape(b, (n * t, d)), xp.reshape(self.indices, (-1,)), self.size)

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
        b = _times(xp, self.output_grads, right)  # (n, t, d')
        if left is None:
            return Rows(self.indices, b, self.size)
        b = widen(xp, b)
        left = _array.cast(left, b)
        picked = xp.take(left, xp.reshape(self.indices, (-1,)), axis=0)  # (n * t,) or (n * t, size')
        if left.ndim == 1:
            return Rows(self.indices, b * xp.reshape(picked, (*self.indices.shape, 1)), self.size)
        return OuterProduct(b, xp.reshape(picked, (*self.indices.shape, left.shape[1])))

    def transposed(self, xp: Any) -> OuterProduct:
        """Return the record of ``G_i.T``, with one-hot rows written out."""
        numbers = xp.arange(self.size, dtype=self.indices.dtype, device=_array.device(self.indices))
        hot = xp.astype(self.indices[:, :, None] == numbers, self.output_grads.dtype)  # (n, t, size)
        return OuterProduct(hot, self.output_grads)

    def negated(self, xp: Any) -> Rows:
        """Return the record of ``-G_i``."""
        return Rows(self.indices, -self.output_grads, self.size)


@_array.pytree(data=("grads",))
@dataclass(frozen=True, eq=False)
class Dense:
    """Gradients written out: biases, norms, anything small.

    Parameters
    ----------
    grads : array (n, ...)
        Gradient of each sample's own loss.
    """

    grads: Array  # (n, *shape)

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def samples(self) -> int:
        """Number n of samples."""
        return self.grads.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.grads.shape[1:])

    def check(self, name: str) -> None:
        """Raise ValueError if there is no sample axis."""
        if self.grads.ndim < 1:
            raise ValueError(f"Dense for {name!r}: grads must be (n, *shape), got a 0-d array")

    def dot(self, xp: Any, m: Any) -> Any:
        """Return ``<G_i, m>`` (n,) for m of the parameter's shape."""
        g = xp.reshape(widen(xp, self.grads), (self.samples, math.prod(self.shape)))  # (n, p)
        return g @ xp.reshape(_array.cast(m, g), (-1,))

    def combine(self, xp: Any, weights: Any) -> Any:
        """Return ``sum_i w_i G_i``; samples of zero weight do not enter, whatever they hold."""
        g = xp.reshape(widen(xp, self.grads), (self.samples, math.prod(self.shape)))  # (n, p)
        w = _array.cast(weights, g)  # (n,)
        return xp.reshape(xp.where((w != 0)[:, None], g, 0.0).T @ w, self.shape)

    def take(self, xp: Any, indices: Any) -> Dense:
        """Return the record of some samples."""
        return Dense(xp.take(self.grads, indices, axis=0))

    def matrix(self, xp: Any) -> Any:
        """Return the gradients as matrices (n, rows, columns)."""
        return xp.reshape(self.grads, (self.samples, *matrix_shape(self.shape)))

    def block(self, xp: Any, rows: slice, columns: slice) -> Any:
        """Return ``G_i[rows, columns]`` (n, r, c) of every sample."""
        return widen(xp, self.matrix(xp)[:, rows, columns])

    def transform(self, xp: Any, left: Any, right: Any) -> Dense:
        """Return the record of ``left.T @ G_i @ right``; None is the identity, a vector a diagonal matrix."""
        g = _times(xp, self.matrix(xp), right)  # (n, rows, columns')
        return Dense(xp.matrix_transpose(_times(xp, xp.matrix_transpose(g), left)))

    def transposed(self, xp: Any) -> Dense:
        """Return the record of ``G_i.T``."""
        return Dense(xp.matrix_transpose(self.matrix(xp)))

    def negated(self, xp: Any) -> Dense:
        """Return the record of ``-G_i``."""
        return Dense(-self.grads)


@_array.pytree(data=("parts",))
@dataclass(frozen=True, eq=False)
class Sum:
    """Gradients of one parameter that is used several times, or tied: the records of its uses, added.

    Parameters
    ----------
    parts : tuple of records
        One record a use, all of the same samples and of the parameter's shape.
    """

    parts: tuple[Record, ...]

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def samples(self) -> int:
        """Number n of samples."""
        return self.parts[0].samples

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.parts[0].shape

    def check(self, name: str) -> None:
        """Raise ValueError if there are no parts, or if they disagree in samples or shape."""
        if not self.parts:
            raise ValueError(f"Sum for {name!r}: needs at least one part")
        for part in self.parts:
            part.check(name)
        kinds = {(part.samples, part.shape) for part in self.parts}
        if len(kinds) > 1:
            raise ValueError(f"Sum for {name!r}: parts disagree in (samples, shape): {sorted(kinds)}")

    def dot(self, xp: Any, m: Any) -> Any:
        """Return ``<G_i, m>`` (n,)."""
        return _add(part.dot(xp, m) for part in self.parts)

    def combine(self, xp: Any, weights: Any) -> Any:
        """Return ``sum_i w_i G_i``."""
        return _add(part.combine(xp, weights) for part in self.parts)

    def take(self, xp: Any, indices: Any) -> Sum:
        """Return the record of some samples."""
        return Sum(tuple(part.take(xp, indices) for part in self.parts))

    def block(self, xp: Any, rows: slice, columns: slice) -> Any:
        """Return ``G_i[rows, columns]`` (n, r, c) of every sample."""
        return _add(part.block(xp, rows, columns) for part in self.parts)

    def transform(self, xp: Any, left: Any, right: Any) -> Sum:
        """Return the record of ``left.T @ G_i @ right``."""
        return Sum(tuple(part.transform(xp, left, right) for part in self.parts))

    def transposed(self, xp: Any) -> Sum:
        """Return the record of ``G_i.T``."""
        return Sum(tuple(part.transposed(xp) for part in self.parts))

    def negated(self, xp: Any) -> Sum:
        """Return the record of ``-G_i``."""
        return Sum(tuple(part.negated(xp) for part in self.parts))


Record = OuterProduct | Rows | Dense | Sum


@_array.quiet
def combine(gradients: Mapping[str, Record], weights: Array) -> dict[str, Any]:
    """Return the weighted gradient ``{name: sum_i w_i G_i}``.

    Parameters
    ----------
    gradients : mapping of str to record
        Gradients of n samples.
    weights : array (n,)
        Weights. Where one is zero the sample does not enter: ``0 * NaN`` is 0 here.

    Returns
    -------
    dict of str to array
        One array of each parameter's shape, in the records' dtype (16-bit floats widened to float32).

    Raises
    ------
    ValueError, TypeError
        If shapes, names or namespaces do not fit together.

    Notes
    -----
    2 n t d_out d_in FLOPs for an `OuterProduct`; no G_i is formed.
    """
    xp, n = check(gradients, what="combine")
    _array.namespace(weights, *_array.leaves(gradients)[:1], what="combine")
    if tuple(weights.shape) != (n,):
        raise ValueError(f"combine: weights {tuple(weights.shape)} must be ({n},), one a sample")
    if not _array.is_floating(xp, weights):
        raise TypeError(f"combine: weights are {weights.dtype}; they must be of a real floating dtype")
    weights = widen(xp, weights)
    return {name: record.combine(xp, weights) for name, record in gradients.items()}


def take(gradients: Mapping[str, Record], indices: Array) -> dict[str, Record]:
    """Return the records of the samples ``indices`` (k,), in that order.

    Parameters
    ----------
    gradients : mapping of str to record
        Gradients of n samples.
    indices : integer array (k,), or list of int
        A sample may be taken several times.

    Raises
    ------
    ValueError, TypeError
        If ``indices`` is not a vector of integers, or one lies outside [0, n) and is no tracer's.
    """
    xp, n = check(gradients, what="take")
    first = _array.leaves(gradients)[0]
    if isinstance(indices, (list, tuple)):
        indices = xp.asarray(indices, device=_array.device(first))
    _array.namespace(indices, first, what="take")
    if indices.ndim != 1 or not xp.isdtype(indices.dtype, "integral"):
        raise ValueError(f"take: indices must be a vector of integers, got {indices.dtype} {tuple(indices.shape)}")
    indices = _array.integers(indices)
    if _array.outside(indices, n):
        raise ValueError(f"take: indices must lie in [0, {n}), the number of samples")
    return {name: record.take(xp, indices) for name, record in gradients.items()}


def check(gradients: Mapping[str, Record], *, what: str) -> tuple[Any, int]:
    """Return the namespace and the number of samples of a model's records, or raise what is wrong with them."""
    if not isinstance(gradients, Mapping) or not gradients:
        raise TypeError(f"{what}: gradients must be a non-empty mapping {{parameter name: record}}")
    for name, record in gradients.items():
        if not isinstance(record, (OuterProduct, Rows, Dense, Sum)):
            raise TypeError(
                f"{what}: the record of {name!r} is a {type(record).__name__}; expected OuterProduct, Rows, Dense, Sum"
            )
        record.check(name)
    arrays = _array.leaves(gradients)
    xp = _array.namespace(*arrays, what=what)
    for name, record in gradients.items():
        for leaf in _floats(record):
            if not _array.is_floating(xp, leaf):
                raise TypeError(f"{what}: {name!r} holds {leaf.dtype}; gradients must be of a real floating dtype")
    counts = {name: record.samples for name, record in gradients.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{what}: parameters disagree in the number of samples: {counts}")
    n = next(iter(counts.values()))
    return xp, n


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape under which a parameter is seen as a matrix."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def _floats(record: Record) -> list[Any]:
    """Return the arrays of a record that hold values, not row numbers."""
    if isinstance(record, Rows):
        return [record.output_grads]
    if isinstance(record, Sum):
        return [leaf for part in record.parts for leaf in _floats(part)]
    return _array.leaves(record)


def dtype(xp: Any, record: Record) -> Any:
    """Return the dtype in which the record's sums are taken."""
    floats = [leaf.dtype for leaf in _floats(record)]
    return xp.result_type(*(xp.float32 if xp.finfo(d).bits < 32 else d for d in floats))


def _times(xp: Any, factor: Any, side: Any) -> Any:
    """Return ``factor @ side`` along the last axis; None is the identity, a vector a diagonal matrix."""
    if side is None:
        return factor
    factor = widen(xp, factor)
    side = _array.cast(side, factor)
    return factor * side if side.ndim == 1 else factor @ side


def _add(terms: Any) -> Any:
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total
