r"""Bounds on each source's sum of weights: the nearest point, and the quadratic program.

    w >= 0,   sum w = t,   L_s <= sum_(i in s) w_i <= U_s   for each source s.

**The nearest point** to v. With a multiplier tau for the total and mu_s for a source whose bound holds,
w_i = max(v_i - tau - mu_s, 0). For a given tau a source's sum is therefore the plain sum S_s(tau) = sum_i max(v_i -
tau, 0) where that lies within the source's bounds, and the bound it breaks otherwise:

    clip(S_s(tau), L_s, U_s).

These add up to a function that never increases in tau. Bisection finds where it meets t, and with it which sources are
held at which bound. Each held source is then a simplex of its own, and the others together are one.

**The quadratic program.** minimise 1/2 w'Hw - c'w over the set, by the active-set method of ``qp.py`` with the sources'
bounds as further constraints. The working set W holds the equation, the weights that sit at zero, and the sources held
at a bound. Repeat:

1. Go toward the minimum on W, a Newton step in a basis Z of the directions that change nothing in W. The first
   constraint in the way joins W: it is independent of the others, which the step leaves as they are.
2. At the minimum on W the multipliers are unique. If all have the right sign, the point is optimal; else the constraint
   with the worst one leaves W.

A flat direction along which f still falls is followed until a constraint stops it; the set is bounded, so one does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .status import Status

__all__ = ["Shares", "SourceShares", "active_set", "check_shares", "least_slope", "project_shares", "read_shares"]

Array = Any


class SourceShares(NamedTuple):
    """Weights ``w >= 0`` that sum to ``total``, and within source s to between ``lower[s]`` and ``upper[s]``."""

    sources: Array  # (n,) ints, -1 for none
    lower: Any = None  # (m,)
    upper: Any = None  # (m,)
    total: Any = 1.0


class Shares(NamedTuple):
    """The set in numbers; the last source holds the weights that have none."""

    sources: Array  # (n,) ints, 0 .. m
    lower: Array  # (m + 1,)
    upper: Array  # (m + 1,)
    total: float


def read_shares(constraint: Any, n: int) -> Shares:
    """Return the set of a constraint on n weights."""
    sources = np.asarray(constraint.sources)  # (n,)
    if sources.shape != (n,):
        raise ValueError(f"sources has shape {sources.shape} for {n} weights: give one a weight")
    given = [b for b in (constraint.lower, constraint.upper) if b is not None]
    if not given or len({len(b) for b in given}) > 1:
        raise ValueError("give lower or upper, or both of the same length: one bound a source")
    m = len(given[0])
    if np.any((sources < -1) | (sources >= m)):
        raise ValueError(f"sources must lie in -1 .. {m - 1}")
    lower, upper = np.zeros(m + 1), np.full(m + 1, np.inf)  # (m + 1,)
    for s in range(m):
        if constraint.lower is not None and constraint.lower[s] is not None:
            lower[s] = constraint.lower[s]
        if constraint.upper is not None and constraint.upper[s] is not None:
            upper[s] = constraint.upper[s]
    return Shares(np.where(sources < 0, m, sources), lower, upper, float(constraint.total))


def check_shares(box: Shares) -> Status:
    """Say whether the set holds a point: OK, NOT_FINITE or INFEASIBLE."""
    lower, upper, total = box.lower, box.upper, box.total
    if np.isnan(lower).any() or np.isnan(upper).any() or not np.isfinite(total):
        return Status.NOT_FINITE
    there = np.array([np.any(box.sources == s) for s in range(len(lower))])
    if (lower > upper).any() or (upper < 0).any() or (lower[~there] > 0).any() or total < 0:
        return Status.INFEASIBLE
    slack = 1e-12 * abs(total)
    least, most = np.sum(np.maximum(lower, 0)), np.sum(np.minimum(upper, total)[there])
    return Status.OK if least <= total + slack and most >= total - slack else Status.INFEASIBLE


def project_shares(v: Array, box: Shares) -> Array:
    """Return the point of the set nearest to v (n,); the set must not be empty."""
    m = len(box.lower)
    parts = [v[box.sources == s] for s in range(m)]
    there = np.array([len(part) > 0 for part in parts])
    lower = np.where(there, np.maximum(box.lower, 0), 0.0)  # (m + 1,)
    upper = np.where(there, np.minimum(box.upper, box.total), 0.0)

    def sums(tau: float) -> Array:
        return np.array([np.sum(np.maximum(part - tau, 0)) for part in parts])  # (m + 1,)

    low, high = np.min(v) - box.total - 1.0, np.max(v)  # at these every source is at or beyond its upper, lower bound
    for _ in range(200):
        tau = (low + high) / 2
        if np.sum(np.clip(sums(tau), lower, upper)) >= box.total:
            low = tau
        else:
            high = tau
    plain = sums(low)
    held = (plain <= lower) | (plain >= upper)
    amount = np.clip(plain, lower, upper)
    w = np.zeros_like(v)  # (n,)
    for s in range(m):
        if held[s] and there[s]:
            w[box.sources == s] = onto_simplex(parts[s], amount[s])
    loose = ~held[box.sources]  # (n,)
    if loose.any():
        w[loose] = onto_simplex(v[loose], max(box.total - np.sum(amount[held]), 0.0))
    return w


def onto_simplex(v: Array, total: float) -> Array:
    """Return the point of ``w >= 0``, ``sum w = total`` nearest to v (n,)."""
    if total <= 0:
        return np.zeros_like(v)
    u = np.sort(v)[::-1]  # (n,)
    taus = (np.cumsum(u) - total) / np.arange(1, len(v) + 1)  # (n,): the multiplier if the first j weights are positive
    j = int(np.max(np.nonzero(u > taus)[0], initial=0))
    w = np.maximum(v - taus[j], 0)
    if np.sum(w) == 0.0:  # the total is lost in the rounding of v
        w[np.argmax(v)] = 1.0
    return w * (total / np.sum(w))


def least_slope(g: Array, box: Shares) -> float:
    """Return the smallest g'v over the set: the cheapest sample of each source takes all of its weight."""
    there = [s for s in range(len(box.lower)) if np.any(box.sources == s)]
    price = {s: float(np.min(g[box.sources == s])) for s in there}
    left = box.total - sum(max(box.lower[s], 0.0) for s in there)
    value = sum(price[s] * max(box.lower[s], 0.0) for s in there)
    for s in sorted(there, key=lambda s: price[s]):
        more = min(left, min(box.upper[s], box.total) - max(box.lower[s], 0.0))
        value += price[s] * more
        left -= more
    return float(value)


def first_amounts(box: Shares) -> Array:
    """Return sums (m + 1,) of the sources between their bounds that add up to the total."""
    there = np.array([np.any(box.sources == s) for s in range(len(box.lower))])
    low = np.where(there, np.maximum(box.lower, 0), 0.0)
    span = np.where(there, np.minimum(box.upper, box.total), 0.0) - low
    return low + span * ((box.total - np.sum(low)) / max(np.sum(span), 1e-300))


def active_set(H: Array, c: Array, box: Shares, flat: float = 1e-14) -> tuple[Array, int, bool]:
    """Minimise 1/2 w'Hw - c'w over the set: H (n, n) positive semi-definite, c (n,).

    Returns the weights (n,), the steps taken and whether they ended at a minimum.
    """
    n, m = len(c), len(box.lower)
    diagonal, top = np.diag(H), max(float(np.max(np.diag(H))), 1e-300)
    d = np.sqrt(
        np.where(diagonal > 1e-20 * top, diagonal, top)
    )  # (n,): x = d w, a unit diagonal but for zero gradients
    A, q = H / d[:, None] / d, c / d
    rows = np.stack([(box.sources == s) / d for s in range(m)])  # (m + 1, n): the sums of the sources
    amounts = first_amounts(box)  # (m + 1,)
    size = np.array([max(np.sum(box.sources == s), 1) for s in range(m)])
    x = (amounts / size)[box.sources] * d  # (n,)
    bounds = np.stack([np.maximum(box.lower, 0), np.minimum(box.upper, box.total)])  # (2, m + 1)
    zero = x <= 0  # (n,): in the working set
    held = np.zeros(m, dtype=int)  # (m + 1,): 0, or -1 and 1 for the lower and the upper bound
    pinned = bounds[1] - bounds[0] <= 1e-13 * box.total  # (m + 1,): one amount is all there is
    some = np.array([np.any((box.sources == s) & ~zero) for s in range(m)])
    if np.all(pinned[some]) or abs(np.sum(bounds[0]) - box.total) <= 1e-13 * box.total:
        pinned = pinned | some  # the bounds leave every source one amount; the total then follows
    elif abs(np.sum(bounds[1][some]) - box.total) <= 1e-13 * box.total:
        pinned = pinned | some
    held[pinned & some] = -1
    stalled, limit = 0, 200 + 60 * n
    for step in range(limit):
        g = A @ x - q  # (n,)
        noise = 1e-13 * (np.abs(A) @ np.abs(x) + np.abs(q))  # (n,)
        F = np.nonzero(~zero)[0]
        sums_held = np.nonzero(held)[0]
        total_follows = len(F) > 0 and set(box.sources[F]) <= set(sums_held)
        working = rows[sums_held] if total_follows else np.concatenate([rows.sum(axis=0)[None], rows[sums_held]])
        active = working[:, F]  # (r, f)
        Z = null_space(active)  # (f, f - r)
        p = np.zeros(n)
        is_flat = False
        if Z.shape[1]:
            values, vectors = np.linalg.eigh(Z.T @ A[np.ix_(F, F)] @ Z)
            slopes = vectors.T @ (Z.T @ g[F])
            doubt = np.sqrt(np.sum((np.abs(Z.T) @ noise[F]) ** 2))
            idle = values <= flat * n
            steep = idle & (np.abs(slopes) > doubt)
            is_flat = bool(steep.any())
            move = (
                np.where(steep, -slopes, 0.0) if is_flat else np.where(idle, 0.0, -slopes / np.where(idle, 1.0, values))
            )
            p[F] = Z @ (vectors @ move)
        length, hit, kind = (np.inf if is_flat else 1.0), -1, ""
        for i in F:
            if p[i] < 0 and -x[i] / p[i] < length:
                length, hit, kind = max(-x[i] / p[i], 0.0), int(i), "weight"
        change, now = rows @ p, rows @ x  # (m + 1,)
        for s in range(m):
            if held[s] or abs(change[s]) <= 1e-15 * np.sum(np.abs(rows[s] * p)):
                continue
            room = (bounds[1][s] if change[s] > 0 else bounds[0][s]) - now[s]
            if (bounds[1][s] < box.total if change[s] > 0 else bounds[0][s] > 0) and room / change[s] < length:
                length, hit, kind = max(room / change[s], 0.0), s, "source"
        if length == np.inf:
            return x / d, step, False
        moved = length * np.max(np.abs(p), initial=0.0) > 1e-15 * np.max(np.abs(x))
        stalled = 0 if moved else stalled + 1
        x = x + length * p
        if stalled > 6 * (n + m):
            return x / d, step, True
        if kind == "weight":
            x[hit] = 0.0
            zero[hit] = True
            continue
        if kind == "source":
            held[hit] = 1 if change[hit] > 0 else -1
            continue
        g = A @ x - q
        prices = np.linalg.lstsq(active.T, g[F], rcond=None)[0]  # (r,)
        at = np.zeros(m)
        at[sums_held] = prices[-len(sums_held) :] if len(sums_held) else 0.0
        level = 0.0 if total_follows else prices[0]
        worst: float = 1.0
        leave: tuple[str, int] | None = None
        if total_follows:  # the total's multiplier may be any that suits the sources that are held
            ends = [at[s] for s in sums_held if held[s] > 0 and not pinned[s]]
            tops = [at[s] for s in sums_held if held[s] < 0 and not pinned[s]]
            tops += [
                float(np.min((g / rows.sum(axis=0))[box.sources == s])) for s in range(m) if not some_free(box, zero, s)
            ]
            low, high = max(ends, default=-np.inf), min(tops, default=np.inf)
            level = low if high == np.inf else high if low == -np.inf else (low + high) / 2
            level = 0.0 if not np.isfinite(level) else level
            at[sums_held] -= level
        slope = g - level * rows.sum(axis=0) - rows.T @ at  # (n,)
        for j in range(n):
            if zero[j] and bounds[1][box.sources[j]] > 0:
                doubt = noise[j] + 1e-13 * abs(level + at[box.sources[j]]) / d[j] + 1e-300
                if -slope[j] / doubt > worst:
                    worst, leave = -slope[j] / doubt, ("weight", j)
                    if stalled > n:
                        break
        for held_source in sums_held:
            s = int(held_source)
            if pinned[s]:
                continue
            doubt = 1e-12 * (abs(level) + abs(at[s]) + abs(level + at[s])) + 1e-300
            if held[s] * at[s] / doubt > worst:
                worst, leave = held[s] * at[s] / doubt, ("source", int(s))
        if leave is None:
            return x / d, step + 1, True
        if leave[0] == "weight":
            zero[leave[1]] = False
        else:
            held[leave[1]] = 0
    return x / d, limit, False


def some_free(box: Shares, zero: Array, s: int) -> bool:
    """Return whether a source is without samples, or has a weight that is not held at zero."""
    mine = box.sources == s
    return bool(not mine.any() or np.any(mine & ~zero))


def null_space(A: Array) -> Array:
    """Return an orthonormal basis (f, f - rank) of the directions that A (r, f) sends to zero."""
    if A.shape[1] == 0:
        return np.zeros((0, 0))
    scale = np.linalg.norm(A, axis=1)
    _, singular, vectors = np.linalg.svd(A / np.where(scale > 0, scale, 1.0)[:, None])
    rank = int(np.sum(singular > 1e-12 * max(np.max(singular, initial=0.0), 1e-300)))
    return vectors[rank:].T
