"""What the two methods over sources share: the sources' rows, and a linear system with them as equations."""

from __future__ import annotations

from typing import Any, NamedTuple

from ftw import _array, _loops

__all__ = ["Sources", "dot_rows", "equality", "signs", "sums_of"]

ROUNDS = 6  # of iterative refinement: near-twins in different sources need them


class Sources(NamedTuple):
    """What does not change while a problem is solved."""

    rows: Any  # (..., m + 1, n): normal_i where weight i is of the source
    inside: Any  # (..., m + 1, n) booleans
    alive: Any  # (..., n) booleans: weights of a source whose sum may be positive
    fixed: Any  # (..., m + 1) booleans: low == high, and some weight is alive
    floored: Any  # (..., m + 1) booleans: a lower bound that can bind
    capped: Any  # (..., m + 1) booleans: an upper bound that can bind


def sums_of(xp: Any, s: Sources, z: Any) -> Any:
    """Return the sums of the sources, (..., m + 1)."""
    return xp.sum(s.rows * z[..., None, :], axis=-1)  # (..., m + 1)


def signs(xp: Any, low: Any, high: Any) -> Any:
    """Return -1 at a lower bound, 1 at an upper one, 0 in between: int32."""
    return xp.astype(high & ~low, xp.int32) - xp.astype(low, xp.int32)


def equality(xp: Any, A: Any, right: Any, C: Any, h: Any, active: Any, soft: Any) -> tuple[Any, Any]:
    """Solve ``A x - C' y = right``, ``C x + soft y = h`` on the active rows: x (..., n) and y (..., r), 0 elsewhere."""
    sides = xp.concat([right[..., None, :], C], axis=-2)  # (..., 1 + r, n)
    X = _array.solve_positive(xp, A, xp.matrix_transpose(sides))  # (..., n, 1 + r)
    x, bends = X[..., 0], X[..., 1:]
    S = C @ bends  # (..., r, r)
    S = (S + xp.matrix_transpose(S)) / 2
    unit = xp.eye(h.shape[-1], dtype=h.dtype, device=_array.device(h))
    scale = xp.where(active, xp.linalg.diagonal(S) + soft, 1.0)  # (..., r)
    root = xp.sqrt(xp.where(scale > 0, scale, 1.0))
    both = active[..., :, None] & active[..., None, :]
    S = xp.where(both, (S + unit * soft[..., None]) / root[..., :, None] / root[..., None, :], 0.0)
    shift = 4 * h.shape[-1] * float(xp.finfo(h.dtype).eps)
    S = S + unit * xp.where(active, shift, xp.ones_like(h))[..., None]

    def refine(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        x, y = state
        left = right + dot_rows(xp, xp.matrix_transpose(C), y) - dot_rows(xp, A, x)
        x = x + _array.solve_positive(xp, A, left[..., None])[..., 0]
        missing = xp.where(active, (h - dot_rows(xp, C, x) - soft * y) / root, 0.0)  # last: the sums are to hold
        dy = xp.where(active, _array.solve_positive(xp, S, missing[..., None])[..., 0] / root, 0.0)
        return x + dot_rows(xp, bends, dy), y + dy

    # both parts of x may be far larger than their sum: what that loses is solved for again
    solved: tuple[Any, Any] = _loops.fori_loop(ROUNDS, refine, (x, xp.zeros_like(h)))
    return solved


def dot_rows(xp: Any, A: Any, x: Any) -> Any:
    """Return A x, (..., r) for A (..., r, n)."""
    return (A @ x[..., None])[..., 0]
