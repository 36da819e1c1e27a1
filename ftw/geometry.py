"""Operators: the optimizer's linearised response ``P`` to a gradient, one symmetric PSD operator per parameter.

Each operator knows four things. ``apply`` is P itself on a dense gradient. ``sqrt`` is P^1/2. ``is_psd`` says whether
P has no negative eigenvalue, as it must: an optimizer with a negative rate climbs. ``split`` writes the inner product
of two records without forming their gradients first,

    <G_i, P H_j>  =  sum over pieces, rows r, columns c of  X_i[r, c] * weights[r, c] * Y_j[r, c],

with X and Y records again (made by acting on the factors), so that the Gram matrix can be formed in bounded blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _array
from ._array import Array
from ._bilinear import Piece, inner, none_negative
from ._polar import Gains, Polar
from .gradients import Record, matrix_shape

__all__ = ["Diagonal", "Gains", "Kronecker", "Operator", "Piece", "Polar", "Rotated", "Scale"]


@_array.pytree(data=("value",))
@dataclass(frozen=True, eq=False)
class Scale:
    """``P G = value * G``.

    Parameters
    ----------
    value : float or 0-d array
        Not negative.
    """

    value: Any

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def shape(self) -> None:
        """None: any shape."""
        return

    def check(self, name: str) -> None:
        """Raise ValueError if ``value`` is not a number."""
        if getattr(self.value, "ndim", 0) != 0:
            raise ValueError(f"Scale for {name!r}: value must be a number or a 0-d array, got {self.value.shape}")
        if isinstance(self.value, (int, float)) and self.value < 0:
            raise ValueError(f"Scale for {name!r}: value {self.value} must not be negative")

    def apply(self, g: Array) -> Any:
        """Return P g, for g of the parameter's shape, or with leading axes before it."""
        g = _wide(g)
        return g * _array.scalar_like(self.value, g)

    def inner(self, g: Array, h: Array) -> Any:
        """Return ``<g, P h>`` as a 0-d array."""
        return inner(g, self.apply(h))

    def sqrt(self, g: Array) -> Any:
        """Return P^1/2 g, for g of the parameter's shape, or with leading axes before it."""
        g = _wide(g)
        return g * _array.scalar_like(self.value, g) ** 0.5

    def is_psd(self) -> Any:
        """Return whether P has no negative eigenvalue, a bool or a 0-d boolean array; NaN does not count."""
        value = self.value
        return value >= 0 or value != value if isinstance(value, (int, float)) else ~(value < 0)

    def split(self, xp: Any, left: Record, right: Record) -> list[Piece]:
        """Return the pieces of ``<left_i, P right_j>``."""
        return [Piece(left, right, self.value)]


@_array.pytree(data=("values",))
@dataclass(frozen=True, eq=False)
class Diagonal:
    """``P G = values * G``, elementwise.

    Parameters
    ----------
    values : array, shaped like the parameter
        Not negative.
    """

    values: Array

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.values.shape)

    def check(self, name: str) -> None:
        """Nothing to check but the shape, which the caller compares."""

    def apply(self, g: Array) -> Any:
        """Return P g, for g of the parameter's shape, or with leading axes before it."""
        g = _wide(g)
        return g * _array.over(self.values, g)

    def inner(self, g: Array, h: Array) -> Any:
        """Return ``<g, P h>`` as a 0-d array."""
        return inner(g, self.apply(h))

    def sqrt(self, g: Array) -> Any:
        """Return P^1/2 g, for g of the parameter's shape, or with leading axes before it."""
        g = _wide(g)
        return g * _array.over(self.values, g) ** 0.5

    def is_psd(self) -> Any:
        """Return whether P has no negative eigenvalue, a bool or a 0-d boolean array; NaN does not count."""
        return none_negative(self.values)

    def split(self, xp: Any, left: Record, right: Record) -> list[Piece]:
        """Return the pieces of ``<left_i, P right_j>``."""
        return [Piece(left, right, xp.reshape(self.values, matrix_shape(self.shape)))]


@_array.pytree(data=("left", "right"))
@dataclass(frozen=True, eq=False)
class Kronecker:
    """``P G = left @ G @ right`` for matrix parameters (Shampoo, K-FAC, Adafactor's factored second moment).

    Parameters
    ----------
    left : array (d_out, d_out) or (d_out,)
        Symmetric PSD; a vector stands for a diagonal matrix.
    right : array (d_in, d_in) or (d_in,)
        The same for the other side.

    Notes
    -----
    It acts on the factors of a record, ``A @ right`` and ``B @ left``; no gradient is formed to apply it.
    """

    left: Array
    right: Array

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (d_out, d_in) of the parameter."""
        return (self.left.shape[0], self.right.shape[0])

    def check(self, name: str) -> None:
        """Raise ValueError if a side is neither a vector nor a square matrix."""
        for side, x in (("left", self.left), ("right", self.right)):
            if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != x.shape[1]):
                raise ValueError(f"Kronecker for {name!r}: {side} {tuple(x.shape)} must be (d, d) or (d,)")

    def apply(self, g: Array) -> Any:
        """Return P g, for g (..., d_out, d_in)."""
        return _sandwich(self.left, g, self.right)

    def inner(self, g: Array, h: Array) -> Any:
        """Return ``<g, P h>`` as a 0-d array."""
        return inner(g, self.apply(h))

    def sqrt(self, g: Array) -> Any:
        """Return P^1/2 g, for g (..., d_out, d_in); an eigendecomposition of each dense side."""
        xp = _array.namespace(self.left, self.right, g)
        return _sandwich(half(xp, self.left), g, half(xp, self.right))

    def is_psd(self) -> Any:
        """Return whether P has no negative eigenvalue, a bool or a 0-d boolean array; NaN does not count.

        Each side must be so, up to rounding; one Cholesky factorisation of each dense side.
        """
        sides = [none_negative(x) if x.ndim == 1 else _is_psd(x) for x in (self.left, self.right)]
        return sides[0] & sides[1]

    def split(self, xp: Any, left: Record, right: Record) -> list[Piece]:
        """Return the pieces of ``<left_i, P right_j>``."""
        if self.left.ndim == self.right.ndim == 1:  # both halves cost nothing: the form stays symmetric
            halves = self.left**0.5, self.right**0.5  # (d_out,), (d_in,)
            x = left.transform(xp, *halves)
            return [Piece(x, x if right is left else right.transform(xp, *halves), 1.0)]
        return [Piece(left, right.transform(xp, self.left, self.right), 1.0)]


@_array.pytree(data=("left", "values", "right"))
@dataclass(frozen=True, eq=False)
class Rotated:
    """``P G = left @ (values * (left.T @ G @ right)) @ right.T``: diagonal in a rotated basis (SOAP).

    Parameters
    ----------
    left : array (d_out, r_out), or None
        Orthonormal columns; None is the identity.
    values : array (r_out, r_in)
        Not negative.
    right : array (d_in, r_in), or None
        Orthonormal columns.
    """

    left: Array | None
    values: Array
    right: Array | None

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (d_out, d_in) of the parameter."""
        rows, columns = self.values.shape
        rows = rows if self.left is None else self.left.shape[0]
        return (rows, columns if self.right is None else self.right.shape[0])

    def check(self, name: str) -> None:
        """Raise ValueError if the bases do not fit the values."""
        values = tuple(self.values.shape)
        ends = zip((self.left, self.right), (values[:1], values[-1:]), strict=True)
        left, right = (d * 2 if q is None else tuple(q.shape) for q, d in ends)
        shapes = left, values, right
        if any(len(s) != 2 for s in shapes) or shapes[1] != (shapes[0][1], shapes[2][1]):
            raise ValueError(
                f"Rotated for {name!r}: left {shapes[0]}, values {shapes[1]}, right {shapes[2]} must be (d_out, "
                "r_out), (r_out, r_in), (d_in, r_in)"
            )

    def apply(self, g: Array) -> Any:
        """Return P g, for g (..., d_out, d_in)."""
        return self._scaled(g, 1.0)

    def inner(self, g: Array, h: Array) -> Any:
        """Return ``<g, P h>`` as a 0-d array."""
        return inner(g, self.apply(h))

    def sqrt(self, g: Array) -> Any:
        """Return P^1/2 g, for g (..., d_out, d_in)."""
        return self._scaled(g, 0.5)

    def _scaled(self, g: Any, power: float) -> Any:
        g = _wide(g)
        left, right = (None if q is None else _array.cast(q, g) for q in (self.left, self.right))
        g = g if left is None else left.T @ g
        g = g if right is None else g @ right
        g = _array.over(self.values, g) ** power * g  # (..., r_out, r_in)
        g = g if left is None else left @ g
        return g if right is None else g @ right.T

    def is_psd(self) -> Any:
        """Return whether P has no negative eigenvalue, a bool or a 0-d boolean array; NaN does not count."""
        return none_negative(self.values)

    def split(self, xp: Any, left: Record, right: Record) -> list[Piece]:
        """Return the pieces of ``<left_i, P right_j>``."""
        x = left.transform(xp, self.left, self.right)
        return [Piece(x, x if right is left else right.transform(xp, self.left, self.right), self.values)]


Operator = Scale | Diagonal | Kronecker | Rotated | Polar


def _is_psd(side: Any) -> Any:
    """Return whether a symmetric matrix (d, d) has no eigenvalue that is negative beyond rounding, a 0-d array."""
    xp = _array.namespace(side)
    side = _array.widen(xp, side)
    unit = xp.eye(side.shape[0], dtype=side.dtype, device=_array.device(side))
    size = xp.max(xp.abs(xp.linalg.diagonal(side)))
    size = xp.where(size > 0, size, xp.ones_like(size))
    side = xp.where(xp.all(xp.isfinite(side)), side / size, unit)
    return xp.asarray(_array.is_positive(xp, side + float(xp.finfo(side.dtype).eps) ** 0.5 * unit))


def _wide(g: Any) -> Any:
    return _array.widen(_array.namespace(g), g)


def _sandwich(left: Any, g: Any, right: Any) -> Any:
    g = _wide(g)
    left, right = _array.cast(left, g), _array.cast(right, g)
    g = _array.over(left[:, None], g) * g if left.ndim == 1 else left @ g
    return g * _array.over(right, g) if right.ndim == 1 else g @ right


def half(xp: Any, side: Any) -> Any:
    """Return the square root of a PSD matrix, or of a vector that stands for a diagonal one."""
    side = _array.widen(xp, side)
    if side.ndim == 1:
        return side**0.5
    values, vectors = xp.linalg.eigh(side)  # (d,), (d, d)
    return (vectors * xp.sqrt(xp.where(values > 0, values, xp.zeros_like(values)))[None, :]) @ vectors.T
