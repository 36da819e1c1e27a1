r"""The kernels: one compiled function from arrays to the exact weights.

    minimise  f(w) = 1/2 w'H w - c'w,   H = K + ridge I      over  l <= w <= u,  and perhaps  sum w = t.

The optimality conditions, the scaling x_i = d_i w_i to a unit diagonal, and what is reported are those of
``ftw_reference/qp.py``. There, one coordinate joins or leaves the free set F at a time, and every step starts from
nothing. Here:

1. **A good first guess.** A few projected gradient steps, with Barzilai and Borwein's step length and an exact line
   search, find most of F. A warm start takes F from the weights of the problem before.
2. **Newton on a whole guess.** Solve for the minimum on F, the rest held at their bounds; then move *all* coordinates
   that break a bound to that bound, and free *all* that are held against their will. Usually three or four rounds end
   it (a primal-dual active set). The number of offenders is watched: when it stops falling, step 3 takes over.
3. **The safe method.** From the nearest feasible point, the active-set method of ``ftw_reference/qp.py`` with the
   offenders added in blocks: walk to the first bound, drop what hits it; at the minimum on F, add the worst
   offenders. f falls in each step.

**The linear algebra.** H_FF = L L' is kept as a Cholesky factor whose rows follow the order in which the coordinates
came. New coordinates are new rows; one that leaves is rotated out; the rows before it stay as they are.

**Singular matrices.** L factors H_FF + eps I with eps = 1e-12 of the unit diagonal, and each solve is a *step* from the
present x: p = -(H_FF + eps I)^-1 (g_F + lambda a_F). Repeating the step is both iterative refinement and the proximal
point method: where H has curvature, p is Newton's step; along a flat slope it is 1e12 times the slope, and a bound
stops it. Nothing is ever divided by a zero pivot, and the fixed points are those of the problem without eps.

**One file.** A compiled function calls only compiled functions of its own file: numba decides by the time stamp of that
one file whether a cached result still holds. Split, a changed kernel would go on running as it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compilation import jit_fast

__all__ = ["solve", "solve_batch"]

Array = Any

EPS = 1e-12  # the proximal term, relative to the unit diagonal
GUESSES = 15  # projected gradient steps before the first guess
NOISE = 1e-15  # slopes below NOISE * (the size of the terms they are made of) are rounding
LOWER, FREE, UPPER = 0, 1, 2


@jit_fast
def solve_batch(
    K: Array,
    c: Array,
    lower: Array,
    upper: Array,
    total: float,
    has_total: bool,
    ridge: float,
    start: Array,
    max_steps: int,
    assume_psd: bool,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Solve B problems: K (B, n, n), c (B, n), start (B, n) or (B, 0); the results have a leading axis B."""
    B, n = c.shape
    weights = np.empty((B, n))
    f, kkt, gap = np.empty(B), np.empty(B), np.empty(B)
    steps, status = np.empty(B, np.int64), np.empty(B, np.int32)
    for i in range(B):
        weights[i], f[i], kkt[i], gap[i], steps[i], status[i] = solve(
            K[i], c[i], lower, upper, total, has_total, ridge, start[i], max_steps, assume_psd
        )
    return weights, f, kkt, gap, steps, status


@jit_fast
def solve(
    K: Array,
    c: Array,
    lower: Array,
    upper: Array,
    total: float,
    has_total: bool,
    ridge: float,
    start: Array,
    max_steps: int,
    assume_psd: bool,
) -> tuple[Array, float, float, float, int, int]:
    """Solve one problem: K (n, n), c (n,), bounds (n,) or (1,), start (n,) or (0,).

    Returns weights (n,), objective, kkt, gap, rounds and status.
    """
    n = c.shape[0]
    w = np.empty(n)  # (n,)
    low, high = np.empty(n), np.empty(n)  # (n,)
    for i in range(n):
        low[i] = lower[i if lower.shape[0] > 1 else 0]
        high[i] = upper[i if upper.shape[0] > 1 else 0]
    d, reach = np.empty(n), np.empty(n)  # (n,)
    A = np.empty((n, n))
    status = scale(K, c, ridge, A, d, reach)
    if status == 0:
        status = check(low, high, total, has_total)
    if status == 0 and not assume_psd and not is_psd(A, 1e-6 * n):
        status = 4
    if status != 0:
        w[:] = np.nan
        return w, np.nan, np.nan, np.nan, 0, status

    q, a, lo, up = np.empty(n), np.empty(n), np.empty(n), np.empty(n)  # (n,)
    for i in range(n):
        q[i] = c[i] / d[i]
        a[i] = 1.0 / d[i] if has_total else 0.0
        lo[i], up[i] = low[i] * d[i], high[i] * d[i]
    x, g = np.empty(n), np.empty(n)  # (n,)
    side = np.empty(n, np.int8)  # (n,): LOWER, FREE or UPPER
    warm = start.shape[0] == n
    for i in range(start.shape[0]):
        warm = warm and np.isfinite(start[i])  # weights that are no weights are no help
    if warm:
        for i in range(n):
            x[i] = min(max(start[i] * d[i], lo[i]), up[i])
            if up[i] < np.inf and up[i] - x[i] <= 1e-12 * abs(up[i]):
                x[i] = up[i]
        gradient(A, x, q, g)
    else:
        guess(A, q, a, lo, up, total, has_total, x, g)
    for i in range(n):
        side[i] = FREE if lo[i] < x[i] < up[i] else (LOWER if x[i] <= lo[i] else UPPER)
    limit = max_steps if max_steps > 0 else 200 + 20 * n
    steps, status = active_set(A, q, a, lo, up, total, has_total, x, g, side, limit)
    if status == 4:
        w[:] = np.nan
        return w, np.nan, np.nan, np.nan, steps, status
    for i in range(n):
        w[i] = low[i] if side[i] == LOWER else (high[i] if side[i] == UPPER else min(max(x[i] / d[i], low[i]), high[i]))
    if status == 5 and has_total:  # stopped on the way, where the sum need not hold
        cut(w.copy(), np.ones(n), low, high, total, 0.0, w)
    tidy(w, low, high, total, has_total)
    for i in range(n):
        x[i] = w[i] * d[i]
    gradient(A, x, q, g)
    f, kkt, gap = certificate(w, x, g, q, d, low, high, total, has_total, reach)
    if not kkt <= 1e-8:
        status = 5
    return w, f, kkt, gap, steps, status


@jit_fast
def scale(K: Array, c: Array, ridge: float, A: Array, d: Array, reach: Array) -> int:
    """Write H scaled to a unit diagonal into A (n, n), the scale into d (n,), sum_j |H_ij| into reach (n,).

    Returns the status that K and c decide.
    """
    n = c.shape[0]
    top = 0.0
    for i in range(n):
        top = max(top, K[i, i] + ridge)
    bad = ridge * 0.0
    for i in range(n):
        d[i] = 1.0 / np.sqrt(max(K[i, i] + ridge, 1e-20 * top)) if top > 0.0 else 1.0
        bad += c[i] * 0.0
    if bad != 0.0:
        return 2
    for i in range(n):
        total = 0.0
        for j in range(n):
            total += abs(K[i, j])
            A[i, j] = K[i, j] * d[j] * d[i]
        bad += total * 0.0
        A[i, i] += ridge * d[i] * d[i]
        reach[i] = total + ridge
    if bad != 0.0:
        return 2
    skew = 0.0
    for top_row in range(0, n, 32):  # in tiles, for the sake of the cache
        for left in range(0, top_row + 1, 32):
            for i in range(top_row, min(top_row + 32, n)):
                for j in range(left, min(left + 32, i)):
                    skew += abs(K[i, j] - K[j, i])
    if skew > 0.0:
        for i in range(n):
            for j in range(i):
                A[i, j] = A[j, i] = 0.5 * (A[i, j] + A[j, i])
    for i in range(n):
        d[i] = 1.0 / d[i]
    return 0


@jit_fast
def is_psd(A: Array, shift: float) -> bool:
    """Return whether A + shift I (n, n) has a Cholesky factor U'U: eight rows at a time, in blocks when large."""
    n = A.shape[0]
    M = A.copy()
    block = n if n <= 96 else 32
    for first in range(0, n, block):
        end = min(first + block, n)
        for j in range(first, end, 8):
            e = min(j + 8, end)
            for r in range(j, e):
                pivot = M[r, r] + shift
                if not pivot > 0.0:
                    return False
                inverse = 1.0 / np.sqrt(pivot)
                for m in range(r, n):
                    M[r, m] *= inverse
                for i in range(r + 1, e):
                    f0 = M[r, i]
                    for m in range(i, n):
                        M[i, m] -= f0 * M[r, m]
            if e - j < 8:
                break
            for i in range(e, end):
                f0, f1, f2, f3 = M[j, i], M[j + 1, i], M[j + 2, i], M[j + 3, i]
                f4, f5, f6, f7 = M[j + 4, i], M[j + 5, i], M[j + 6, i], M[j + 7, i]
                for m in range(i, n):
                    half = f0 * M[j, m] + f1 * M[j + 1, m] + f2 * M[j + 2, m] + f3 * M[j + 3, m]
                    rest = f4 * M[j + 4, m] + f5 * M[j + 5, m] + f6 * M[j + 6, m] + f7 * M[j + 7, m]
                    M[i, m] -= half + rest
        for left in range(end, n, 128):
            right = min(left + 128, n)
            rows = np.ascontiguousarray(M[first:end, left:])  # (block, n - left)
            M[left:right, left:] -= np.dot(np.ascontiguousarray(rows[:, : right - left].T), rows)
    return True


@jit_fast
def check(low: Array, high: Array, total: float, has_total: bool) -> int:
    """Return the status that the bounds (n,) and the total decide."""
    least, most = 0.0, 0.0
    for i in range(low.shape[0]):
        if np.isnan(low[i]) or np.isnan(high[i]):
            return 2
        if low[i] > high[i] or low[i] == np.inf or high[i] == -np.inf:
            return 3
        least += low[i]
        most += high[i]
    if has_total:
        if not np.isfinite(total):
            return 2
        slack = 1e-12 * abs(total)
        if least > total + slack or most < total - slack:
            return 3
    return 0


@jit_fast
def gradient(A: Array, x: Array, q: Array, g: Array) -> None:
    """Write A x - q into g: (n, n), (n,), (n,), (n,)."""
    n = x.shape[0]
    for i in range(n):
        g[i] = -q[i]
    for j in range(n):
        if x[j] != 0.0:
            for i in range(n):
                g[i] += A[j, i] * x[j]


@jit_fast
def cut(v: Array, a: Array, lo: Array, up: Array, total: float, tau: float, out: Array) -> float:
    """Write clip(v - tau a, lo, up) into out (n,), with the tau that makes a'out the total; return tau.

    Newton's method on the piecewise linear a'out(tau), which never rises, inside a bracket.
    """
    n = v.shape[0]
    left, right = np.inf, -np.inf  # at the left end every coordinate alone would hold the total, or sits at its cap
    for i in range(n):
        left = min(left, (v[i] - min(up[i], lo[i] + abs(total) / a[i])) / a[i])
        right = max(right, (v[i] - lo[i]) / a[i])
    if not left < tau < right:
        tau = left
    for _ in range(200):
        value, slope = 0.0, 0.0
        for i in range(n):
            y = v[i] - tau * a[i]
            inside = a[i] * a[i] if lo[i] < y < up[i] else 0.0
            y = min(max(y, lo[i]), up[i])
            out[i] = y
            value += a[i] * y
            slope += inside
        excess = value - total
        if abs(excess) <= 1e-15 * abs(total):
            break
        if excess > 0.0:
            left = tau
        else:
            right = tau
        new = tau + excess / slope if slope > 0.0 else left
        if not left < new < right:
            new = 0.5 * (left + right)
            if not left < new < right:
                break
        tau = new
    return tau


@jit_fast
def guess(
    A: Array, q: Array, a: Array, lo: Array, up: Array, total: float, has_total: bool, x: Array, g: Array
) -> None:
    """Write a feasible x (n,) near the minimum, and its gradient g (n,): a few projected gradient steps."""
    n = x.shape[0]
    v, p, y = np.empty(n), np.empty(n), np.empty(n)  # (n,)
    tau = 0.0
    for i in range(n):
        v[i] = 0.0
    if has_total:
        for i in range(n):
            v[i] = total / (n * a[i])
        tau = cut(v, a, lo, up, total, 0.0, x)
    else:
        for i in range(n):
            x[i] = min(max(0.0, lo[i]), up[i])
    gradient(A, x, q, g)
    length = 1.0
    zero = np.zeros(n)
    settled = 0
    tau = 0.0
    for step in range(GUESSES):
        for i in range(n):
            v[i] = x[i] - length * g[i]
        if has_total:
            tau = cut(v, a, lo, up, total, tau, p)
        else:
            for i in range(n):
                p[i] = min(max(v[i], lo[i]), up[i])
        changed = 0
        slope, size = 0.0, 0.0
        for i in range(n):
            if (p[i] > lo[i]) != (x[i] > lo[i]):
                changed += 1
            p[i] -= x[i]
            slope += p[i] * g[i]
            size += p[i] * p[i]
        if not slope < 0.0:
            break
        gradient(A, p, zero, y)
        curve = 0.0
        for i in range(n):
            curve += p[i] * y[i]
        theta = min(1.0, -slope / curve) if curve > 0.0 else 1.0
        if step == 0 and theta < 1.0:
            length = size / curve
            continue
        for i in range(n):
            x[i] += theta * p[i] if theta < 1.0 else p[i]
            g[i] += theta * y[i]
        length = min(size / curve if curve > 0.0 else 1e6 * length, 1e6)
        settled = settled + 1 if changed == 0 else 0
        if settled == 2:
            break


@jit_fast
def factor(A: Array, F: Array, first: int, k: int, L: Array) -> bool:
    """Write rows first .. k - 1 of the Cholesky factor of A_FF + EPS I into L; False if A is strongly indefinite."""
    fine = True
    for i in range(first, k):
        row = A[F[i]]  # (n,)
        for j in range(i):
            total = row[F[j]]
            for m in range(j):
                total -= L[i, m] * L[j, m]
            L[i, j] = total * L[j, j]
        total = row[F[i]] + EPS
        for m in range(i):
            total -= L[i, m] * L[i, m]
        if total < 0.5 * EPS:
            fine = fine and total > -1e-6 * A.shape[0]
            total = EPS
        L[i, i] = 1.0 / np.sqrt(total)  # the diagonal is stored inverted
    return fine


@jit_fast
def remove(L: Array, F: Array, r: int, k: int) -> None:
    """Take place r out of the factor of the k coordinates F: rotate column r into the rows below it."""
    for i in range(r, k - 1):
        F[i] = F[i + 1]
        for m in range(r):
            L[i, m] = L[i + 1, m]
    # Row i of the new factor is row i + 1 of the old, with one column too many: undone by rotations, kept in cs and sn.
    cs, sn = np.empty(k), np.empty(k)
    for i in range(r, k - 1):
        carry = L[i + 1, r] if i + 1 > r else 0.0
        for m in range(r, i):
            old = L[i + 1, m + 1]
            L[i, m] = cs[m] * carry + sn[m] * old
            carry = cs[m] * old - sn[m] * carry
        old = 1.0 / L[i + 1, i + 1]
        norm = np.sqrt(carry * carry + old * old)
        cs[i], sn[i] = carry / norm, old / norm
        L[i, i] = 1.0 / norm


@jit_fast
def back_solve(L: Array, k: int, y: Array) -> None:
    """Overwrite y (k,) with (L L')^-1 y."""
    for i in range(k):
        total = y[i]
        for m in range(i):
            total -= L[i, m] * y[m]
        y[i] = total * L[i, i]
    for i in range(k - 1, -1, -1):
        y[i] *= L[i, i]
        for m in range(i):
            y[m] -= L[i, m] * y[i]


@jit_fast
def newton(
    L: Array, F: Array, k: int, g: Array, a: Array, has_total: bool, missing: float, p: Array, y: Array
) -> float:
    """Write into p (k,) the step to the minimum on F that adds ``missing`` to a'x; return the multiplier.

    The multiplier is first estimated by least squares, so that what is solved for is small.
    """
    if not has_total:
        for i in range(k):
            p[i] = -g[F[i]]
        back_solve(L, k, p)
        return 0.0
    top, bottom = 0.0, 0.0
    for i in range(k):
        y[i] = a[F[i]]
        top -= g[F[i]] * y[i]
        bottom += y[i] * y[i]
    multiplier = top / bottom
    for i in range(k):
        p[i] = -g[F[i]] - multiplier * y[i]
    back_solve(L, k, p)
    back_solve(L, k, y)
    bottom = 0.0
    for i in range(k):
        bottom += a[F[i]] * y[i]
    for _ in range(2):
        top = -missing
        for i in range(k):
            top += a[F[i]] * p[i]
        top /= bottom
        multiplier += top
        for i in range(k):
            p[i] -= top * y[i]
    return multiplier


@jit_fast
def active_set(
    A: Array,
    q: Array,
    a: Array,
    lo: Array,
    up: Array,
    total: float,
    has_total: bool,
    x: Array,
    g: Array,
    side: Array,
    limit: int,
) -> tuple[int, int]:
    """Move x (n,) to the minimum, from a guess with its gradient g and sides (n,); return rounds and status."""
    n = x.shape[0]
    F = np.empty(n, np.int64)  # (n,): the free coordinates, in the order of the rows of L
    L = np.empty((n, n))
    p, y = np.empty(n), np.empty(n)  # (n,)
    k = 0
    for i in range(n):
        if side[i] == FREE:
            F[k] = i
            k += 1
    done = 0  # rows of L that are valid
    safe = False
    fewest, patience, stalled, refined = n + 1, 3, 0, 0
    tiny = NOISE * (4.0 + n / 64.0)
    fine = True
    for step in range(limit):
        if k == 0 and has_total and not safe:
            safe = True  # nothing is free to hold the sum: from the nearest feasible point
            k = restart(A, q, a, lo, up, total, has_total, x, g, side, F)
            done = 0
        fine = factor(A, F, done, k, L) and fine
        done = k
        missing = 0.0
        if has_total:
            missing = total
            for i in range(n):
                missing -= a[i] * x[i]
        multiplier = 0.0
        if k > 0:
            multiplier = newton(L, F, k, g, a, has_total, missing, p, y)
        elif has_total:
            multiplier = price(g, a, lo, up, side)
        # In the safe mode the walk ends at the first bound.
        if safe:
            length, hit = 1.0, -1
            for i in range(k):
                j = F[i]
                room = up[j] - x[j] if p[i] > 0.0 else lo[j] - x[j]
                if abs(room) < length * abs(p[i]):
                    length = room / p[i]
                    hit = i
            if hit >= 0:
                stalled = stalled + 1 if length <= 0.0 else 0
                for i in range(k):
                    p[i] *= max(length, 0.0)
                move(A, F, k, p, x, g)
                j = F[hit]
                bound = up[j] if abs(up[j] - x[j]) < abs(lo[j] - x[j]) else lo[j]
                side[j] = UPPER if bound == up[j] else LOWER
                shift(A[j], bound - x[j], g)
                x[j] = bound
                remove(L, F, hit, k)
                k -= 1
                done = k
                refined = 0
                continue
        gain, size = 0.0, 0.0
        for i in range(k):
            gain -= 0.5 * p[i] * g[F[i]]
            size = max(size, abs(p[i]))
        move(A, F, k, p, x, g)
        # Who offends?
        scale, mass, largest = 0.0, 0.0, 0.0
        for i in range(n):
            scale += abs(q[i] * x[i])
            mass += abs(x[i])
            largest = max(largest, abs(x[i]))
        out, wrong = 0, 0
        worst = 0.0
        for i in range(n):
            if side[i] == FREE:
                if x[i] < lo[i] or x[i] > up[i]:
                    out += 1
                y[i] = 0.0
                continue
            reduced = g[i] + multiplier * a[i]
            y[i] = -reduced if side[i] == LOWER else reduced
            if lo[i] < up[i] and y[i] > tiny * (abs(q[i]) + mass + abs(multiplier) * a[i]):
                wrong += 1
                worst = max(worst, y[i])
            else:
                y[i] = 0.0
        if out + wrong == 0:
            gradient(A, x, q, g)  # without the rounding that the moves have left in it
            weak, rough = 0.0, 0.0  # the largest inverted pivot; what the slopes left on F add to the gap
            for i in range(k):
                weak = max(weak, L[i, i])
                slope = abs(g[F[i]] + multiplier * a[F[i]])
                rough = max(rough, slope * total / a[F[i]] if has_total else slope * largest * k)
            small = weak < 100.0 or gain <= 1e-14 * scale
            if small and size <= 10.0 * largest and (rough <= 1e-11 * scale or refined >= 3):
                return step + 1, 0 if fine else 4
            refined += 1
            if refined > 60:
                break
            continue
        refined = 0
        if not safe:
            if out + wrong < fewest:
                fewest, patience = out + wrong, 3
            else:
                patience -= 1
            if patience < 0:
                safe = True
                k = restart(A, q, a, lo, up, total, has_total, x, g, side, F)
                done = 0
                continue
            # All offenders change sides at once.
            kept = 0
            for i in range(k):
                j = F[i]
                if x[j] < lo[j] or x[j] > up[j]:
                    done = min(done, kept)
                    bound = lo[j] if x[j] < lo[j] else up[j]
                    side[j] = LOWER if x[j] < lo[j] else UPPER
                    shift(A[j], bound - x[j], g)
                    x[j] = bound
                else:
                    F[kept] = j
                    kept += 1
            k = kept
            for i in range(n):
                if y[i] > 0.0:
                    side[i] = FREE
                    F[k] = i
                    k += 1
            continue
        # The safe mode adds the worst offenders; a single one where blocks lead nowhere.
        level = 0.5 * worst if stalled < 5 else worst
        for i in range(n):
            if y[i] >= level and y[i] > 0.0:
                side[i] = FREE
                F[k] = i
                k += 1
                if stalled >= 5:
                    break
    return limit, 5 if fine else 4


@jit_fast
def shift(row: Array, amount: float, g: Array) -> None:
    """Add amount * row to g: (n,), (n,)."""
    for i in range(g.shape[0]):
        g[i] += amount * row[i]


@jit_fast
def move(A: Array, F: Array, k: int, p: Array, x: Array, g: Array) -> None:
    """Add the step p (k,) on F to x (n,), and what it changes to the gradient g (n,)."""
    for i in range(k):
        x[F[i]] += p[i]
        shift(A[F[i]], p[i], g)


@jit_fast
def restart(
    A: Array,
    q: Array,
    a: Array,
    lo: Array,
    up: Array,
    total: float,
    has_total: bool,
    x: Array,
    g: Array,
    side: Array,
    F: Array,
) -> int:
    """Move x (n,) to the nearest feasible point, set sides and F to match; return how many are free."""
    n = x.shape[0]
    if has_total:
        cut(x.copy(), a, lo, up, total, 0.0, x)
    else:
        for i in range(n):
            x[i] = min(max(x[i], lo[i]), up[i])
    gradient(A, x, q, g)
    k = 0
    for i in range(n):
        side[i] = FREE if lo[i] < x[i] < up[i] else (LOWER if x[i] <= lo[i] else UPPER)
        if side[i] == FREE:
            F[k] = i
            k += 1
    return k


@jit_fast
def price(g: Array, a: Array, lo: Array, up: Array, side: Array) -> float:
    """Return the multiplier when no coordinate is free: the middle of what the bounds ask for; arrays (n,)."""
    least, most = -np.inf, np.inf
    for i in range(g.shape[0]):
        if lo[i] < up[i]:
            if side[i] == LOWER:
                least = max(least, -g[i] / a[i])
            else:
                most = min(most, -g[i] / a[i])
    if least == -np.inf:
        return 0.0 if most == np.inf else most
    return least if most == np.inf else 0.5 * (least + most)


@jit_fast
def tidy(w: Array, low: Array, high: Array, total: float, has_total: bool) -> None:
    """Move the rounding error of the sum of w (n,) to where there is room, in proportion to the weights."""
    if not has_total:
        return
    for turn in range(4):
        left, room = total, 0.0
        for i in range(w.shape[0]):
            left -= w[i]
        if left == 0.0:
            return
        for i in range(w.shape[0]):
            if turn == 3 or low[i] < w[i] < high[i]:  # a weight on its bound stays there while others have room
                room += min(abs(w[i]), high[i] - w[i] if left > 0.0 else w[i] - low[i])
        if room <= 0.0:
            continue
        for i in range(w.shape[0]):
            if turn == 3 or low[i] < w[i] < high[i]:
                share = min(abs(w[i]), high[i] - w[i] if left > 0.0 else w[i] - low[i]) / room
                w[i] = min(max(w[i] + left * share, low[i]), high[i])


@jit_fast
def certificate(
    w: Array,
    x: Array,
    g: Array,
    q: Array,
    d: Array,
    low: Array,
    high: Array,
    total: float,
    has_total: bool,
    reach: Array,
) -> tuple[float, float, float]:
    """Return the objective, the natural residual and the gap of the reference for w (n,), x = d w, g = A x - q."""
    n = w.shape[0]
    quadratic, linear, size, L, width, steepest, scale = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        quadratic += 0.5 * x[i] * (g[i] + q[i])
        scale += abs(x[i] * (g[i] + q[i])) + abs(x[i] * q[i])
        linear += q[i] * x[i]
        size = max(size, abs(w[i]))
        width = max(width, abs(x[i]))
        L = max(L, reach[i])
        steepest = max(steepest, abs(q[i] * d[i]))
    if L == 0.0:
        L = max(steepest, 1e-300) / max(size, 1e-300)
    v, p, one = np.empty(n), np.empty(n), np.ones(n)  # (n,)
    for i in range(n):
        v[i] = w[i] - g[i] * d[i] / L
    if has_total:
        cut(v, one, low, high, total, 0.0, p)
    else:
        for i in range(n):
            p[i] = min(max(v[i], low[i]), high[i])
    kkt = 0.0
    for i in range(n):
        kkt = max(kkt, abs(w[i] - p[i]))
    if size > 0.0:
        kkt /= size
    gap = 0.0
    if has_total:
        # The least g'v over the set: the cheapest coordinates filled first.
        left = total
        for i in range(n):
            gap += g[i] * d[i] * (w[i] - low[i])
            left -= low[i]
        used = np.zeros(n, np.bool_)
        while left > 0.0:
            best = -1
            for i in range(n):
                if not used[i] and (best < 0 or g[i] * d[i] < g[best] * d[best]):
                    best = i
            if best < 0:
                break
            used[best] = True
            amount = min(left, high[best] - low[best])
            gap -= amount * g[best] * d[best]
            left -= amount
    else:
        for i in range(n):
            bound = low[i] if g[i] > 0.0 else high[i]
            if not np.isfinite(bound):
                bound = w[i] - width / d[i] if g[i] > 0.0 else w[i] + width / d[i]
            gap += g[i] * d[i] * (w[i] - bound)
    return quadratic - linear, kkt, max(gap, 0.0) / scale if scale > 0.0 else max(gap, 0.0)
