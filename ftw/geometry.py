"""Operators: the optimizer's linearised response ``P`` to a gradient, one symmetric PSD operator per parameter.

Each operator knows four things. ``apply`` is P itself on a dense gradient. ``sqrt`` is P^1/2. ``is_psd`` says whether
P has no negative eigenvalue, as it must: an optimizer with a negative rate climbs. ``split`` writes the inner product
of two records without forming their gradients first,

    <G_i, P H_j>  =  sum over pieces, rows r, columns c of  X_i[r, c] * weights[r, c] * Y_j[r, c],

with X and Y records again (made by acting on the factors), so that the Gram matrix can walk over bounded blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _array
from ._array import Array
from .gradients import Record, Sum, matrix_shape

__all__ = ["Diagonal", "Kronecker", "Operator", "Polar", "Rotated", "Scale"]


class Piece(NamedTuple):
    """One term of a bilinear form: two records and elementwise weights (a number, or broadcastable to the matrix)."""

    left: Record
    right: Record
    weights: Any


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
        return _inner(g, self.apply(h))

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
        return _inner(g, self.apply(h))

    def sqrt(self, g: Array) -> Any:
        """Return P^1/2 g, for g of the parameter's shape, or with leading axes before it."""
        g = _wide(g)
        return g * _array.over(self.values, g) ** 0.5

    def is_psd(self) -> Any:
        """Return whether P has no negative eigenvalue, a bool or a 0-d boolean array; NaN does not count."""
        return _none_negative(self.values)

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
        return _inner(g, self.apply(h))

    def sqrt(self, g: Array) -> Any:
        """Return P^1/2 g, for g (..., d_out, d_in); an eigendecomposition of each dense side."""
        xp = _array.namespace(self.left, self.right, g)
        return _sandwich(half(xp, self.left), g, half(xp, self.right))

    def is_psd(self) -> Any:
        """Return whether P has no negative eigenvalue, a bool or a 0-d boolean array; NaN does not count.

        Each side must be so, up to rounding; one Cholesky factorisation of each dense side.
        """
        sides = [_none_negative(x) if x.ndim == 1 else _is_psd(x) for x in (self.left, self.right)]
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
        return _inner(g, self.apply(h))

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
        return _none_negative(self.values)

    def split(self, xp: Any, left: Record, right: Record) -> list[Piece]:
        """Return the pieces of ``<left_i, P right_j>``."""
        x = left.transform(xp, self.left, self.right)
        return [Piece(x, x if right is left else right.transform(xp, self.left, self.right), self.values)]


class Gains(NamedTuple):
    """By what a spectral function multiplies the parts of a change; see `Polar`.

    Attributes
    ----------
    symmetric : array (r, r)
        Of ``(K + K') / 2``; symmetric, as the next.
    antisymmetric : array (r, r)
        Of ``(K - K') / 2``.
    outside : array (r,)
        Of what lies outside of the row or the column space.
    """

    symmetric: Any
    antisymmetric: Any
    outside: Any


@_array.pytree(data=("u", "s", "vt", "gains"))
@dataclass(frozen=True, eq=False)
class Polar:
    """Derivative of the polar factor ``U V'`` at ``M = U diag(s) V'``: what Muon does to a small change of M.

    With ``K = U' E V`` for a change E,

        P E = U [(K - K')_ij / (s_i + s_j)] V'  +  U S^-1 U' E (I - V V')  +  (I - U U') E V S^-1 V'.

    It is the Hessian of the nuclear norm at M, hence symmetric and PSD. For another function f of the singular values,
    ``U f(s) V'``, the parts of K, and what lies outside, have other `Gains` in place of (0, 2 / (s_i + s_j), 1 / s_i):
    ``(f(s_i) - f(s_j)) / (s_i - s_j)``, ``(f(s_i) + f(s_j)) / (s_i + s_j)``, ``f(s_i) / s_i``.

    Parameters
    ----------
    u : array (d_out, r)
        Left singular vectors; r = min(d_out, d_in).
    s : array (r,)
        Singular values; without ``gains`` positive, floor them first, for P grows like 1 / s.
    vt : array (r, d_in)
        Right singular vectors, transposed.
    gains : Gains, optional
        Those of another function, none negative (`ftw.optimizers.muon` has those of the Newton-Schulz steps).
    """

    u: Array
    s: Array
    vt: Array
    gains: Gains | None = None

    def __post_init__(self) -> None:
        _array.register_pytrees()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (d_out, d_in) of the parameter."""
        return (self.u.shape[0], self.vt.shape[1])

    def check(self, name: str) -> None:
        """Raise ValueError if the factors are not those of a thin SVD."""
        u, s, vt = (tuple(x.shape) for x in (self.u, self.s, self.vt))
        if len(u) != 2 or len(vt) != 2 or s != (u[1],) or vt[0] != s[0] or s[0] != min(u[0], vt[1]):
            raise ValueError(
                f"Polar for {name!r}: u {u}, s {s}, vt {vt} must be (d_out, r), (r,), (r, d_in), r = min(d)"
            )
        shapes = [tuple(x.shape) for x in self.gains or ()]
        if shapes and shapes != [s + s, s + s, s]:
            raise ValueError(f"Polar for {name!r}: gains {shapes} must be {s + s}, {s + s}, {s}")

    def scaled(self, factor: Any) -> Polar:
        """Return ``factor * P``, for a number or 0-d array that is not negative."""
        if self.gains is not None:
            return Polar(self.u, self.s, self.vt, Gains(*(x * factor for x in self.gains)))
        xp = _array.namespace(self.s)
        factor = _array.scalar_like(factor, self.s)
        return Polar(self.u, self.s / xp.where(factor != 0, factor, xp.inf), self.vt)

    def _gains(self) -> tuple[Any, Any, Any]:
        """Return the gains; None for no symmetric part."""
        if self.gains is not None:
            return self.gains
        s: Any = self.s
        return None, 2 / (s[:, None] + s[None, :]), 1 / s

    def apply(self, g: Array) -> Any:
        """Return P g, for g (..., d_out, d_in)."""
        return self._power(g, 1.0)

    def inner(self, g: Array, h: Array) -> Any:
        """Return ``<g, P h>`` as a 0-d array."""
        return _inner(g, self.apply(h))

    def sqrt(self, g: Array) -> Any:
        """Return P^1/2 g, for g (..., d_out, d_in)."""
        return self._power(g, 0.5)

    def _power(self, g: Any, power: float) -> Any:
        """Return P^power g: the gains are P's eigenvalues."""
        xp = _array.namespace(self.u, self.s, self.vt, g)
        g = _array.widen(xp, g)
        u, vt = _array.cast(self.u, g), _array.cast(self.vt, g)
        gains: list[Any] = [x if x is None else _array.cast(x, g) ** power for x in self._gains()]
        both, skew, beyond = gains
        k = u.T @ g @ vt.T  # (..., r, r)
        part = (k - xp.matrix_transpose(k)) / 2 * _array.over(skew, k)  # (..., r, r)
        if both is not None:
            part = part + (k + xp.matrix_transpose(k)) / 2 * _array.over(both, k)
        total = u @ part @ vt
        if self.shape[1] > self.shape[0]:  # wide: something lies outside the row space
            total = total + u @ (_array.over(beyond[:, None], k) * (u.T @ g - k @ vt))
        if self.shape[0] > self.shape[1]:  # tall
            total = total + ((g @ vt.T - u @ k) * _array.over(beyond, k)) @ vt
        return total

    def is_psd(self) -> Any:
        """Return whether P has no negative eigenvalue, a bool or a 0-d boolean array; NaN does not count."""
        if self.gains is None:
            return _none_negative(self.s)
        square = self.shape[0] == self.shape[1]  # nothing lies outside
        fine = _none_negative(self.gains.symmetric) & _none_negative(self.gains.antisymmetric)
        return fine if square else fine & _none_negative(self.gains.outside)

    def split(self, xp: Any, left: Record, right: Record) -> list[Piece]:
        """Return the pieces of ``<left_i, P right_j>``."""
        v = self.vt.T  # (d_in, r)
        both, skew, beyond = self._gains()

        def turned(record: Record, sign: int) -> Record:
            k = record.transform(xp, self.u, v)  # G_i -> U' G_i V: (r, r)
            return Sum((k, k.transposed(xp) if sign > 0 else k.transposed(xp).negated(xp)))

        def outside(record: Record) -> Record | None:
            if self.shape[1] > self.shape[0]:  # U' G_i (I - V V'): (r, d_in)
                x = record.transform(xp, self.u, None)
                return Sum((x, x.transform(xp, None, v).transform(xp, None, self.vt).negated(xp)))
            if self.shape[0] > self.shape[1]:  # (I - U U') G_i V: (d_out, r)
                x = record.transform(xp, None, v)
                return Sum((x, x.transform(xp, self.u, None).transform(xp, self.u.T, None).negated(xp)))
            return None

        pieces = []
        for sign, gain in ((-1, skew), (1, both)):
            if gain is not None:
                x = turned(left, sign)
                pieces.append(Piece(x, x if right is left else turned(right, sign), gain / 4))
        y = outside(left)
        if y is not None:
            z = y if right is left else outside(right)
            weights = beyond[:, None] if self.shape[1] > self.shape[0] else beyond[None, :]  # (r, 1) or (1, r)
            pieces.append(Piece(y, z, weights))  # type: ignore[arg-type]
        return pieces


Operator = Scale | Diagonal | Kronecker | Rotated | Polar


def _inner(g: Any, h: Any) -> Any:
    xp = _array.namespace(g, h)
    return xp.sum(g * h)


def _none_negative(values: Any) -> Any:
    """Return whether no number is below zero, a 0-d boolean array."""
    return ~_array.namespace(values).any(values < 0)


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
