"""Records: the gradients of n samples for one parameter, as the factors they come from.

A layer ``y = x W'`` with inputs ``A_i`` (t, d_in) and output gradients ``B_i`` (t, d_out) has the gradient
``G_i = B_i' A_i`` for sample i. The records keep the factors, from which all that the method needs is computed:

====================  ==========================================================================================
``dot(M)``            ``<G_i, M>`` for all i, on the narrower side, no G_i formed           (scores)
``combine(w)``        ``sum_i w_i G_i`` in one matrix product                                (the update)
``block(r, c)``       rows r and columns c of every G_i, as many as memory allows            (Gram matrices)
``transform(L, R)``   the record of ``L' G_i R``, made by acting on the factors              (geometry)
====================  ==========================================================================================

Parameters that are not matrices are seen as one: (d,) as (1, d) and (a, b, c ...) as (a, b*c ...). Samples of equal
length are in ``_factors.py``, documents that lie side by side in ``_packed.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import _array, _kinds
from ._array import Array, widen
from ._factors import OuterProduct, Rows, matrix_shape, times
from ._packed import Packed, PackedRows

__all__ = [
    "Dense",
    "OuterProduct",
    "Packed",
    "PackedRows",
    "Record",
    "Rows",
    "Sum",
    "combine",
    "matrix_shape",
    "take",
]


@_array.pytree(data=("grads",))
@dataclass(frozen=True, eq=False)
class Dense:
    """Materialized gradients: biases, norms, anything small.

    Parameters
    ----------
    grads : array (n, ...)
        Gradient of each sample's own loss.
    """

    grads: Array  # (n, *shape)

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def n(self) -> int:
        """Number n of samples."""
        return self.grads.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.grads.shape[1:])

    @property
    def floats(self) -> list[Any]:
        """The arrays that hold values."""
        return [self.grads]

    def check(self, name: str) -> None:
        """Raise ValueError if there is no sample axis."""
        if self.grads.ndim < 1:
            raise ValueError(f"Dense for {name!r}: grads must be (n, *shape), got a 0-d array")

    def dot(self, xp: Any, m: Any) -> Any:
        """Return ``<G_i, m>`` (n,) for m of the parameter's shape."""
        g = xp.reshape(widen(xp, self.grads), (self.n, math.prod(self.shape)))  # (n, p)
        return g @ xp.reshape(_array.cast(m, g), (-1,))

    def combine(self, xp: Any, weights: Any) -> Any:
        """Return ``sum_i w_i G_i``; samples of zero weight do not enter, whatever they hold."""
        g = xp.reshape(widen(xp, self.grads), (self.n, math.prod(self.shape)))  # (n, p)
        w = _array.cast(weights, g)  # (n,)
        return xp.reshape(xp.where((w != 0)[:, None], g, 0.0).T @ w, self.shape)

    def take(self, xp: Any, indices: Any) -> Dense:
        """Return the record of some samples."""
        return Dense(xp.take(self.grads, indices, axis=0))

    def matrix(self, xp: Any) -> Any:
        """Return the gradients as matrices (n, rows, columns)."""
        return xp.reshape(self.grads, (self.n, *matrix_shape(self.shape)))

    def block(self, xp: Any, rows: slice, columns: slice) -> Any:
        """Return ``G_i[rows, columns]`` (n, r, c) of every sample."""
        return widen(xp, self.matrix(xp)[:, rows, columns])

    def transform(self, xp: Any, left: Any, right: Any) -> Dense:
        """Return the record of ``left.T @ G_i @ right``; None is the identity, a vector a diagonal matrix."""
        g = times(xp, self.matrix(xp), right)  # (n, rows, columns')
        return Dense(xp.matrix_transpose(times(xp, xp.matrix_transpose(g), left)))

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
    def n(self) -> int:
        """Number n of samples."""
        return self.parts[0].n

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.parts[0].shape

    @property
    def floats(self) -> list[Any]:
        """The arrays that hold values, not row or sample numbers."""
        return [leaf for part in self.parts for leaf in part.floats]

    def check(self, name: str) -> None:
        """Raise ValueError if there are no parts, or if they disagree in samples or shape."""
        if not self.parts:
            raise ValueError(f"Sum for {name!r}: needs at least one part")
        for part in self.parts:
            part.check(name)
        kinds = {(part.n, part.shape) for part in self.parts}
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


Record = OuterProduct | Rows | Packed | PackedRows | Dense | Sum


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
    _kinds.require(weights, "combine: weights")
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
        A sample may be taken several times. Only where the indices are known may a packed one be: in a trace its copies
        would have no tokens, and the result is NaN.

    Raises
    ------
    ValueError, TypeError
        If ``indices`` is not a vector of integers, or one lies outside [0, n) and is no tracer's.
    """
    xp, n = check(gradients, what="take")
    first = _array.leaves(gradients)[0]
    if isinstance(indices, (list, tuple)):
        indices = xp.asarray(indices, device=_array.device(first))
    _kinds.require(indices, "take: indices")
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
        if not isinstance(record, Record):
            raise TypeError(
                f"{what}: the record of {name!r} is a {type(record).__name__}; expected OuterProduct, Rows, Packed, "
                "PackedRows, Dense or Sum"
            )
        _kinds.require_leaves(record, name, what=what)
        record.check(name)
    arrays = _array.leaves(gradients)
    xp = _array.namespace(*arrays, what=what)
    for name, record in gradients.items():
        for leaf in record.floats:
            if not _array.is_floating(xp, leaf):
                raise TypeError(f"{what}: {name!r} holds {leaf.dtype}; gradients must be of a real floating dtype")
    counts = {name: record.n for name, record in gradients.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{what}: parameters disagree in the number of samples: {counts}")
    n = next(iter(counts.values()))
    return xp, n


def dtype(xp: Any, record: Record) -> Any:
    """Return the dtype in which the record's sums are taken."""
    floats = [leaf.dtype for leaf in record.floats]
    return xp.result_type(*(xp.float32 if xp.finfo(d).bits < 32 else d for d in floats))


def _add(terms: Any) -> Any:
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total
