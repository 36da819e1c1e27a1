"""The operator of Muon: the derivative of the polar factor, and of other functions of the singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _array
from ._array import Array
from ._bilinear import Piece, inner, none_negative
from .gradients import Record, Sum

__all__ = ["Gains", "Polar"]


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
        return inner(g, self.apply(h))

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
            return none_negative(self.s)
        square = self.shape[0] == self.shape[1]  # nothing lies outside
        fine = none_negative(self.gains.symmetric) & none_negative(self.gains.antisymmetric)
        return fine if square else fine & none_negative(self.gains.outside)

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
