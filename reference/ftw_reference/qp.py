r"""The weights: a small convex quadratic program, solved exactly.

    minimise  f(w) = 1/2 w'H w - c'w,   H = K + ridge I      over  l <= w <= u,  and perhaps  sum w = t.

**Optimality.** Let g = H w - c be the gradient and lambda the multiplier of the equation (0 without it). A feasible w
is a minimum exactly when every coordinate has nothing to gain:

    l_i < w_i < u_i :  g_i + lambda  = 0        free
    w_i = l_i       :  g_i + lambda >= 0        pushed against its lower bound
    w_i = u_i       :  g_i + lambda <= 0        pushed against its upper bound.

Most samples end up pushed against zero: which ones is all there is to find out. If we knew, the rest would be a linear
system.

**The active-set method** keeps a feasible w and a guess F of the free coordinates, and repeats:

1. *Newton step on F.* Minimise f over the coordinates in F, the others held, the sum held. Walk toward that minimum
   until the first bound stops a coordinate; that coordinate leaves F.
2. When nothing stops the walk, w is the minimum on F. Compute lambda and look at the coordinates that are held. If none
   of them violates its inequality, w is optimal. Otherwise the worst of them joins F.

f never rises, no guess F comes back, and there are finitely many guesses.

**Flat directions.** H is often singular: two copies of a sample, a zero gradient, more samples than dimensions. So the
Newton step looks at the eigenvalues of the reduced matrix. Along eigenvectors with curvature it goes to the minimum; if
f still slopes along a flat one, it slides down there until a bound stops it. If no bound does, there is no minimum.

**Holding the sum.** Steps with a'p = 0 are written p_r = -sum_(i != r) (a_i / a_r) p_i, one coordinate r paying for the
others; r is the one with the largest a, so that no ratio exceeds one.

**Scaling.** Gradients differ in norm by orders of magnitude. With d_i = sqrt(H_ii) and x_i = d_i w_i the matrix has a
unit diagonal, and nothing below depends on the units of any sample. The equation becomes a'x = t with a_i = 1 / d_i.

**What is reported**, in the original variables, with g = H w - c:

- ``kkt``  = max|w - Proj(w - g/L)| / max|w|,  L = max_i sum_j |H_ij|: the natural residual.
- ``gap``  = sum_i (g_i w_i) - min over v in the set of g'v,  divided by
  sum_i |w_i (Hw)_i| + |w_i c_i|. By convexity it bounds
  f(w) - min f. A bound that is infinite is replaced by
  w_i +- max_j |d_j w_j| / d_i.
- ``objective`` = f(w), the ridge included.

Read next: ``filters.py``, which calls this once per pick.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import shares
from ._jit import jit
from .projections import NonNegative
from .qp_problem import QPSolution, certificate, diagonal_scale, first_point, no_solution, read_problem, tidy
from .status import Status

__all__ = ["NonNegative", "QPSolution", "certificate", "solve_qp"]

Array = Any

SOLVED = 1e-8  # the natural residual that a solution may have
INDEFINITE = 1e-6  # an eigenvalue below -INDEFINITE * n of the unit-diagonal matrix is more than rounding
FLAT = 1e-14  # eigenvalues below FLAT * n of the unit-diagonal matrix count as zero
SLOPE = 1e-13  # slopes below SLOPE * (the size of the terms they are made of) count as zero


def solve_qp(K: Array, c: Array, constraint: Any, *, ridge: float = 0.0, max_steps: int | None = None) -> QPSolution:
    """Minimise 1/2 w'(K + ridge I) w - c'w over a constraint set.

    This is the teaching solver: one weight at a time, to be read, and slow. The fast ones are `ftw.solve_qp`, for
    arrays of any namespace, and, compiled by numba, `ftw_compiled.solve_qp`.

    Parameters
    ----------
    K : array (n, n)
        Symmetric and positive semi-definite.
    c : array (n,)
        The linear term: the scores, in the method.
    constraint : a NamedTuple
        NonNegative(), Simplex(total), CappedSimplex(cap, total), Box(lower, upper) or SourceShares(sources, lower,
        upper, total); the method for the last one is in ``shares.py``.
    ridge : float
        Added to the diagonal as it is.
    max_steps : int, optional
        The most changes of the free set; 100 + 50 n unless told.

    Returns
    -------
    QPSolution
        ``weights`` (n,), NaN when the status is NOT_FINITE, INFEASIBLE or NOT_PSD.

    Examples
    --------
    >>> solve_qp([[1.0, 0.0], [0.0, 1.0]], [1.0, -1.0], NonNegative()).weights
    array([1., 0.])
    """
    if getattr(constraint, "_fields", ())[:1] == ("sources",):
        return solve_shares(K, c, constraint, ridge)
    K, c, box, status = read_problem(K, c, constraint, ridge)
    n = c.shape[0]
    if status != Status.OK:
        return no_solution(n, status)
    H = K + ridge * np.eye(n)  # (n, n)
    d = diagonal_scale(H)  # (n,)
    A = np.ascontiguousarray(H / d[:, None] / d)  # (n, n), unit diagonal
    if np.linalg.eigvalsh(A)[0] < -INDEFINITE * n:
        return no_solution(n, Status.NOT_PSD)
    limit = 100 + 50 * n if max_steps is None else max_steps
    start = first_point(c, box)  # (n,)
    x, steps, done = active_set(
        A, c / d, box.lower * d, box.upper * d, 1.0 / d, box.has_total, start * d, limit, INDEFINITE, FLAT, SLOPE
    )
    w = tidy(x / d, box)  # (n,)
    objective, kkt, gap = certificate(H, c, w, box)
    return QPSolution(w, objective, kkt, gap, steps, Status.OK if done and kkt <= SOLVED else Status.MAX_STEPS)


def solve_shares(K: Array, c: Array, constraint: Any, ridge: float) -> QPSolution:
    """Minimise over bounds on each source's sum; the reports are those of `solve_qp`."""
    K, c, _, status = read_problem(K, c, NonNegative(), ridge)
    n = c.shape[0]
    box = shares.read_shares(constraint, n)
    if status == Status.OK:
        status = shares.check_shares(box)
    H = K + ridge * np.eye(n)  # (n, n)
    if status == Status.OK:
        d = diagonal_scale(H)  # (n,)
        if np.linalg.eigvalsh(H / d[:, None] / d)[0] < -INDEFINITE * n:
            status = Status.NOT_PSD
    if status != Status.OK:
        return no_solution(n, status)
    w, steps, done = shares.active_set(H, c, box)
    w = shares.project_shares(w, box)  # what rounding left of the sums
    g = H @ w - c  # (n,)
    L = max(float(np.max(np.sum(np.abs(H), axis=1))), 1e-300)
    size = max(float(np.max(np.abs(w))), 1e-300)
    kkt = float(np.max(np.abs(w - shares.project_shares(w - g / L, box)))) / size
    scale = np.sum(np.abs(w * (g + c))) + np.sum(np.abs(w * c))
    gap = max(float(g @ w) - shares.least_slope(g, box), 0.0) / (scale if scale > 0 else 1.0)
    value = float(0.5 * (w @ H @ w) - c @ w)
    return QPSolution(w, value, kkt, gap, steps, Status.OK if done and kkt <= SOLVED else Status.MAX_STEPS)


@jit
def active_set(
    H: Array,
    c: Array,
    lower: Array,
    upper: Array,
    a: Array,
    has_total: bool,
    start: Array,
    max_steps: int,
    indefinite: float,
    flat: float,
    slope: float,
) -> tuple[Array, int, bool]:
    """Minimise 1/2 x'Hx - c'x over l <= x <= u with a'x held: the method of the module's docstring.

    Parameters
    ----------
    H : array (n, n)
        Unit diagonal, positive semi-definite.
    c, lower, upper, a, start : arrays (n,)
        The linear term, the bounds, the coefficients of the equation, a feasible point.
    has_total : bool
        Whether the equation is there.
    max_steps, indefinite, flat, slope : numbers
        The limit and the tolerances.

    Returns
    -------
    x : array (n,)
    steps : int
    done : bool
        False when the steps ran out or f has no minimum.
    """
    n = H.shape[0]
    x = start.copy()  # (n,)
    free = (lower < x) & (x < upper)  # (n,)
    size = np.abs(H)  # (n, n)
    stalled = 0  # steps in a row that led nowhere
    refined = False  # whether the last Newton step only removed the rounding of the one before
    i: Any
    hit: Any
    enter: Any
    partner: Any
    for steps in range(max_steps):
        gradient = H @ x - c  # (n,)
        noise = slope * (size @ np.abs(x) + np.abs(c))  # (n,): the gradient is not known better than this
        F = np.nonzero(free)[0]  # (k,)
        if F.shape[0] > has_total:
            step, is_flat = newton_step(H, gradient, noise, a, has_total, F, flat)  # (n,)
            # Walk until the first bound.
            length = np.inf if is_flat else 1.0
            hit = -1
            for i in F:
                room = upper[i] - x[i] if step[i] > 0 else lower[i] - x[i]
                if step[i] != 0 and room / step[i] < length:
                    length = max(room / step[i], 0.0)
                    hit = i
            if length == np.inf:
                return x, steps, False  # f falls forever
            moved = length * np.max(np.abs(step)) > 1e-15 * np.max(np.abs(x))
            stalled = 0 if moved else stalled + 1
            x += length * step
            if stalled > 4 * n:
                return x, steps, True  # rounding, not f, decides what is left: the certificate says how much
            if hit >= 0:
                x[hit] = upper[hit] if step[hit] > 0 else lower[hit]
                free[hit] = False
                refined = False
                continue
            gradient = H @ x - c
        elif F.shape[0] == 1:
            stalled += 1
        # x is the minimum on F. The multiplier, then the coordinates that are held.
        multiplier = 0.0
        if has_total:
            multiplier = price(gradient, a, lower, upper, x, F)
        worst = 1.0  # violations are measured in units of their noise
        enter = -1
        partner = -1
        for i in range(n):
            if free[i] or lower[i] == upper[i]:
                continue
            reduced = gradient[i] + multiplier * a[i]
            violation = -reduced if x[i] <= lower[i] else reduced
            threshold = noise[i] + slope * abs(multiplier) * a[i] + 1e-300
            if violation > threshold:
                if stalled > n:  # ties can lead in circles: the first violated coordinate cannot
                    enter = i
                    break
                # In units of the unit-diagonal problem the fall of f is about violation^2 / 2.
                if enter < 0 or violation > worst:
                    worst = violation
                    enter = i
        if enter < 0:
            if refined:
                return x, steps + 1, True
            refined = True
            continue
        refined = False
        free[enter] = True
        if has_total and F.shape[0] == 0:
            # Every coordinate sits on a bound: the sum is held only if two move. The second one pays the least.
            best = -np.inf
            rising = x[enter] <= lower[enter]
            for i in range(n):
                if i == enter or lower[i] == upper[i] or (x[i] <= lower[i]) == rising:
                    continue
                gain = gradient[i] / a[i] if rising else -gradient[i] / a[i]
                if gain > best:
                    best = gain
                    partner = i
            if partner >= 0:
                free[partner] = True
            else:
                return x, steps + 1, True
    return x, max_steps, False


@jit
def price(gradient: Array, a: Array, lower: Array, upper: Array, x: Array, F: Array) -> float:
    """Return the multiplier of the equation; arrays (n,), F (k,).

    From the free coordinates by least squares. Without any, optimality leaves an interval between what the lower and
    the upper bounds ask for; its middle is returned, which violates both ends when the interval is empty.
    """
    if F.shape[0] > 0:
        top, bottom = 0.0, 0.0
        for i in F:
            top -= a[i] * gradient[i]
            bottom += a[i] * a[i]
        return top / bottom
    least, most = -np.inf, np.inf
    for i in range(x.shape[0]):
        if lower[i] == upper[i]:
            continue
        if x[i] <= lower[i]:
            least = max(least, -gradient[i] / a[i])
        else:
            most = min(most, -gradient[i] / a[i])
    if least == -np.inf:
        return 0.0 if most == np.inf else most
    return least if most == np.inf else 0.5 * (least + most)


@jit
def newton_step(
    H: Array, gradient: Array, noise: Array, a: Array, has_total: bool, F: Array, flat: float
) -> tuple[Array, bool]:
    """Return the step to the minimum on F (k,), or a flat way down, as an array (n,), and whether it is flat."""
    n, k = H.shape[0], F.shape[0]
    # A basis of the steps on F: column j moves one coordinate of F, and coordinate r pays so that a'p = 0.
    Z = np.zeros((n, k - 1 if has_total else k))  # (n, m)
    r = F[np.argmax(a[F])] if has_total else -1
    column = 0
    for i in F:
        if i != r:
            Z[i, column] = 1.0
            if has_total:
                Z[r, column] = -a[i] / a[r]
            column += 1
    ZT = np.ascontiguousarray(Z.T)  # (m, n)
    values, vectors = np.linalg.eigh(ZT @ H @ Z)  # (m,), (m, m)
    slopes = np.ascontiguousarray(vectors.T) @ (ZT @ gradient)  # (m,): the slope of f along each eigenvector
    doubt = np.sqrt(np.sum((np.abs(ZT) @ noise) ** 2))
    step = np.zeros(values.shape[0])  # (m,)
    is_flat = False
    for j in range(values.shape[0]):
        if values[j] <= flat * n and abs(slopes[j]) > doubt:
            is_flat = True
            step[j] = -slopes[j]
    if not is_flat:
        for j in range(values.shape[0]):
            if values[j] > flat * n:
                step[j] = -slopes[j] / values[j]
    return Z @ (vectors @ step), is_flat
