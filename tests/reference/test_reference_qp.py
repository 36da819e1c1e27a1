"""The reference's two exact solvers against brute force, scipy, each other and two peers."""

from __future__ import annotations

import itertools

import ftw_compiled
import ftw_reference as ref
import numpy as np
import pytest
from ftw_reference import Box, CappedSimplex, NonNegative, Simplex, Status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

SOLVERS = {"plain": ref.solve_qp, "fast": ftw_compiled.solve_qp}
KINDS = (
    "wide", "narrow", "twins", "near_twins", "heavy", "zeros", "conditioned", "diagonal", "negative", "tiny", "huge",
    "clusters", "adam", "zero", "ones",
)  # fmt: skip


@pytest.fixture(params=SOLVERS)
def solve(request):
    return SOLVERS[request.param]


def problem(kind, n, seed):
    """Return K (n, n) and c (n,) of one kind."""
    rng = np.random.default_rng([seed, n, KINDS.index(kind)])
    p = max(1, n // 2) if kind == "narrow" else 2 * n
    G, target = rng.normal(size=(n, p)), rng.normal(size=p)
    G += rng.uniform(-0.3, 1.0, size=(n, 1)) * target
    metric = np.ones(p)
    half = n // 2
    if kind == "twins":
        G[half : 2 * half] = G[:half]
    if kind == "near_twins":
        G[half : 2 * half] = G[:half] * (1 + 1e-6 * rng.normal(size=(half, p)))
    if kind == "heavy":
        G *= 10 ** rng.uniform(-3, 3, size=(n, 1))
    if kind == "zeros":
        G[::3] = 0.0
    if kind == "conditioned":
        G *= np.logspace(0, -5, p)
    if kind == "clusters":
        G = G[rng.integers(max(1, n // 4), size=n)] + 0.05 * rng.normal(size=(n, p))
    if kind == "adam":
        metric = 1 / (10 ** rng.uniform(-4, 0, size=p) + 1e-3)
    K, c = (G * metric) @ G.T, (G * metric) @ target
    if kind == "diagonal":
        K = np.diag(np.diag(K))
    if kind == "negative":
        c = -np.abs(c)
    if kind == "zero":
        K *= 0
    if kind == "ones":
        K = np.ones((n, n))
    size = {"tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)
    return 0.5 * size * (K + K.T), size * c


def constraints(n, seed):
    """Return sets of all four sorts on n weights, with their bounds and total."""
    rng = np.random.default_rng(seed)
    caps = rng.uniform(0.5 / n, 4 / n, size=n)
    caps *= max(1.0, 1.01 / caps.sum())
    lower = np.where(rng.uniform(size=n) < 0.3, 0.2, -0.1)  # (n,): some coordinates cannot move
    zero, inf = np.zeros(n), np.full(n, np.inf)
    return [
        (NonNegative(), zero, inf, None),
        (Simplex(2.0), zero, inf, 2.0),
        (CappedSimplex(1.5 / n), zero, np.full(n, 1.5 / n), 1.0),
        (CappedSimplex(caps, 1.0), zero, caps, 1.0),
        (CappedSimplex(1 / n), zero, np.full(n, 1 / n), 1.0),
        (Box(lower, 0.2), lower, np.full(n, 0.2), None),
    ]


def brute_force(K, c, lower, upper, total):
    """Return the least objective over all ways of putting coordinates on their bounds."""
    n, best = len(c), np.inf
    for sides in itertools.product((0, 1, 2), repeat=n):
        side = np.array(sides)
        if np.isinf(upper[side == 2]).any():
            continue
        free, held = np.nonzero(side == 1)[0], np.nonzero(side != 1)[0]
        w = np.where(side == 2, upper, lower)
        right = c[free] - K[np.ix_(free, held)] @ w[held]
        left = K[np.ix_(free, free)]
        if total is not None:
            if len(free) == 0 and abs(w.sum() - total) > 1e-11 * total:
                continue
            edge = np.full((len(free), 1), np.abs(K).max() or 1.0)
            left = np.block([[left, edge], [edge.T, np.zeros((1, 1))]])
            right = np.append(right, edge[:1, 0] * (total - w[held].sum())) if len(free) else np.zeros(1)
        if len(free):
            w[free] = np.linalg.lstsq(left, right, rcond=1e-12)[0][: len(free)]
        if total is not None and abs(w.sum() - total) > 1e-9 * total:
            continue
        slack = 1e-11 * np.abs(w).max()
        if (w >= lower - slack).all() and (w <= upper + slack).all():
            best = min(best, 0.5 * w @ K @ w - c @ w)
    return best


def size_of(K, c, w):
    return np.abs(w * (K @ w)).sum() + np.abs(c * w).sum() + 1e-300


def check_feasible(w, constraint):
    lower, upper, total, has_total = ref.projections.bounds(constraint, len(w))
    assert (w >= lower).all()
    assert (w <= upper).all()
    if has_total:
        assert abs(w.sum() - total) <= 1e-12 * total


@pytest.mark.parametrize("kind", KINDS)
def test_against_brute_force(solve, kind):
    for seed in range(5):
        n = 1 + seed
        K, c = problem(kind, n, seed)
        for constraint, lower, upper, total in constraints(n, seed):
            if kind == "zero" and constraint == NonNegative():
                continue  # no minimum
            ridge = 0.1 * np.trace(K) / n * (seed % 2)
            solution = solve(K, c, constraint, ridge=ridge)
            H = K + ridge * np.eye(n)
            least = brute_force(H, c, lower, upper, total)
            # Least squares with a cut-off gets stuck above the minimum where norms differ by 1e6: one-sided there.
            error = (solution.objective - least) / size_of(H, c, solution.weights)
            assert solution.status == Status.OK, (constraint, seed)
            assert error <= 1e-10, (constraint, seed)
            assert error >= -1e-10 or kind in ("heavy", "conditioned", "near_twins"), (constraint, seed)
            assert solution.kkt <= 1e-10, (constraint, seed)
            assert solution.gap <= 1e-8, (constraint, seed)
            check_feasible(solution.weights, constraint)


@pytest.mark.parametrize("n", [3, 20, 60])
def test_against_scipy_nnls(solve, n):
    for seed in range(3):
        rng = np.random.default_rng([seed, n])
        G, target = rng.normal(size=(2 * n, n)), rng.normal(size=2 * n)
        expected, _ = nnls(G, target)
        solution = solve(G.T @ G, G.T @ target, NonNegative())
        np.testing.assert_allclose(solution.weights, expected, atol=1e-10)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "zero"])
def test_fast_against_plain(kind):
    for seed, n in enumerate((7, 33)):
        K, c = problem(kind, n, seed)
        for constraint, *_ in constraints(n, seed):
            for ridge in (0.0, 0.05 * np.trace(K) / n):
                plain = ref.solve_qp(K, c, constraint, ridge=ridge)
                fast = ftw_compiled.solve_qp(K, c, constraint, ridge=ridge)
                assert plain.status == fast.status == Status.OK
                size = size_of(K, c, plain.weights)
                assert abs(plain.objective - fast.objective) <= 1e-10 * size, (constraint, n)
                assert max(plain.kkt, fast.kkt) <= 1e-10, (constraint, n)
                assert max(plain.gap, fast.gap) <= 1e-8, (constraint, n)
                check_feasible(plain.weights, constraint)
                check_feasible(fast.weights, constraint)
                if ridge > 0 and kind not in ("heavy", "ones"):
                    np.testing.assert_allclose(
                        plain.weights, fast.weights, rtol=0, atol=1e-9 * np.abs(plain.weights).max()
                    )


@pytest.mark.parametrize("peer", ["daqp", "quadprog"])
def test_against_peers(solve, peer):
    module = pytest.importorskip(peer)
    for seed in range(3):
        n = 24
        K, c = problem("wide", n, seed)
        if peer == "daqp":
            bounds = np.append(np.full(n, 0.1), 1.0)
            sense = np.append(np.zeros(n, np.int32), np.int32(5))
            lower = np.append(np.zeros(n), 1.0)
            expected = module.solve(K, -c, np.ones((1, n)), bounds, lower, sense)[0]
        else:
            C = np.column_stack([np.ones(n), np.eye(n), -np.eye(n)])
            expected = module.solve_qp(K, c, C, np.concatenate([[1.0], np.zeros(n), np.full(n, -0.1)]), 1)[0]
        np.testing.assert_allclose(solve(K, c, CappedSimplex(0.1)).weights, expected, atol=1e-8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([k for k in KINDS if k != "zero"]),
    n=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    which=st.integers(0, 5),
    ridge=st.sampled_from([0.0, 1e-6, 0.1]),
    stretch=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_problem(kind, n, seed, which, ridge, stretch):
    K, c = problem(kind, n, seed)
    constraint = constraints(n, seed)[which][0]
    ridge = ridge * max(np.trace(K) / n, 1e-300)
    plain, fast = (f(K, stretch * c, constraint, ridge=ridge) for f in SOLVERS.values())
    assert plain.status == fast.status == Status.OK
    assert max(plain.kkt, fast.kkt) <= 1e-8
    H = K + ridge * np.eye(n)
    assert abs(plain.objective - fast.objective) <= 1e-9 * size_of(H, stretch * c, plain.weights)
    for solution in (plain, fast):
        check_feasible(solution.weights, constraint)
        w = solution.weights
        assert abs(solution.objective - (0.5 * w @ H @ w - stretch * c @ w)) <= 1e-12 * size_of(H, stretch * c, w)


def test_the_certificate_sees_a_wrong_answer():
    K, c = problem("wide", 8, 0)
    box = ref.projections.bounds(Simplex(1.0), 8)
    best = ref.solve_qp(K, c, Simplex(1.0)).weights
    objective, kkt, gap = ref.qp.certificate(K, c, best, box)
    assert max(kkt, gap) < 1e-12
    worse, kkt, gap = ref.qp.certificate(K, c, np.roll(best, 1), box)
    scale = size_of(K, c, np.roll(best, 1))
    assert kkt > 1e-3
    assert gap * scale >= worse - objective > 0  # the gap bounds the error


def test_the_fast_certificate_is_the_plain_one():
    """Stopped after one round, where there is something to certify."""
    K, c = problem("conditioned", 30, 0)
    start = np.random.default_rng(0).uniform(size=30)
    for constraint, *_ in constraints(30, 0):
        solution = ftw_compiled.solve_qp(K, c, constraint, max_steps=1, start=start)
        check_feasible(solution.weights, constraint)
        box = ref.projections.bounds(constraint, 30)
        expected = ref.qp.certificate(K, c, solution.weights, box)
        np.testing.assert_allclose((solution.objective, solution.kkt, solution.gap), expected, rtol=1e-6, atol=1e-12)
        assert solution.status == Status.MAX_STEPS or solution.kkt <= 1e-8


def test_no_positive_linear_term_gives_zero(solve):
    K, c = problem("negative", 9, 1)
    assert (solve(K, c, NonNegative()).weights == 0).all()
    assert (solve(K, np.zeros(9), NonNegative()).weights == 0).all()


def test_a_zero_matrix_fills_the_best_first(solve):
    weights = solve(np.zeros((4, 4)), np.array([1.0, 3.0, 2.0, -1.0]), CappedSimplex(0.6)).weights
    np.testing.assert_allclose(weights, [0.0, 0.6, 0.4, 0.0], atol=1e-12)
    weights = solve(np.zeros((3, 3)), np.array([1.0, 3.0, 2.0]), Simplex(2.0)).weights
    np.testing.assert_allclose(weights, [0.0, 2.0, 0.0], atol=1e-12)


def test_sets_of_one_point(solve):
    K, c = problem("wide", 5, 2)
    assert solve([[4.0]], [1.0], Simplex(3.0)).weights == 3.0
    np.testing.assert_allclose(solve(K, c, CappedSimplex(0.2)).weights, np.full(5, 0.2), rtol=1e-15)
    np.testing.assert_array_equal(solve(K, c, Box(0.3, 0.3)).weights, np.full(5, 0.3))
    np.testing.assert_array_equal(solve(K, c, Simplex(0.0)).weights, np.zeros(5))


def test_no_minimum_is_said(solve):
    assert solve(np.zeros((2, 2)), np.ones(2), NonNegative()).status == Status.MAX_STEPS
    assert solve(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.ones(2), NonNegative()).status == Status.MAX_STEPS


@pytest.mark.parametrize(
    ("K", "c", "constraint", "status"),
    [
        (np.diag([1.0, np.nan]), np.ones(2), Simplex(1.0), Status.NOT_FINITE),
        (np.array([[1.0, np.inf], [np.inf, 1.0]]), np.ones(2), Simplex(1.0), Status.NOT_FINITE),
        (np.eye(2), np.array([1.0, -np.inf]), NonNegative(), Status.NOT_FINITE),
        (np.eye(2), np.ones(2), CappedSimplex(np.array([1.0, np.nan])), Status.NOT_FINITE),
        (np.eye(2), np.ones(2), Simplex(np.inf), Status.NOT_FINITE),
        (np.eye(2), np.ones(2), Simplex(-1.0), Status.INFEASIBLE),
        (np.eye(2), np.ones(2), CappedSimplex(0.4), Status.INFEASIBLE),
        (np.eye(2), np.ones(2), CappedSimplex(np.array([2.0, -0.1])), Status.INFEASIBLE),
        (np.eye(2), np.ones(2), Box(1.0, 0.0), Status.INFEASIBLE),
        (-np.eye(2), np.ones(2), Simplex(1.0), Status.NOT_PSD),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), np.ones(2), Simplex(1.0), Status.NOT_PSD),
        (np.array([[0.0, 1.0], [1.0, 0.0]]), np.ones(2), Box(0.0, 1.0), Status.NOT_PSD),
        (np.diag([1.0, 1.0, -1.0]), np.array([1.0, 1.0, -9.0]), NonNegative(), Status.NOT_PSD),
        (np.eye(12) - np.full((12, 12), 0.25), np.ones(12), Simplex(1.0), Status.NOT_PSD),
        (np.eye(200) - np.full((200, 200), 0.01), -np.ones(200), NonNegative(), Status.NOT_PSD),
    ],
)
def test_values_that_cannot_be_solved(solve, K, c, constraint, status):
    solution = solve(K, c, constraint)
    assert solution.status == status
    assert np.isnan(solution.weights).all()
    assert solution.weights.shape == c.shape


def test_rounding_is_not_indefiniteness(solve):
    G = np.random.default_rng(0).normal(size=(40, 10)).astype(np.float32)
    K = (G @ G.T).astype(np.float64)
    assert solve(K, K[:, 0].copy(), Simplex(1.0)).status == Status.OK


@pytest.mark.parametrize(
    ("K", "c", "constraint", "words"),
    [
        (np.ones((2, 3)), np.ones(2), Simplex(), "(2, 3)"),
        (np.eye(2), np.ones(3), Simplex(), "(3,)"),
        (np.eye(2), np.ones(2), CappedSimplex(np.ones(3)), "(3,)"),
        (np.zeros((0, 0)), np.ones(0), Simplex(), "(0, 0)"),
    ],
)
def test_wrong_shapes_raise(solve, K, c, constraint, words):
    with pytest.raises(ValueError, match=r".*".join(map(_escape, words.split()))):
        solve(K, c, constraint)


def test_other_mistakes_raise(solve):
    with pytest.raises(ValueError, match="ridge is -1"):
        solve(np.eye(2), np.ones(2), Simplex(), ridge=-1.0)
    with pytest.raises(TypeError, match="Simplex"):
        solve(np.eye(2), np.ones(2), "simplex")


def test_ftw_constraints_are_taken_by_their_fields(solve):
    ftw = pytest.importorskip("ftw.constraints")
    K, c = problem("wide", 6, 3)
    for own, other in (
        (NonNegative(), ftw.NonNegative()),
        (Simplex(2.0), ftw.Simplex(2.0)),
        (CappedSimplex(0.3, 1.0), ftw.CappedSimplex(0.3, 1.0)),
        (Box(0.0, 0.1), ftw.Box(0.0, 0.1)),
    ):
        np.testing.assert_array_equal(solve(K, c, own).weights, solve(K, c, other).weights)


def test_an_asymmetric_matrix_counts_by_its_symmetric_part(solve):
    K, c = problem("wide", 6, 4)
    skew = np.triu(np.ones((6, 6)), 1)
    expected = solve(K, c, Simplex(1.0)).weights
    np.testing.assert_allclose(solve(K + skew - skew.T, c, Simplex(1.0)).weights, expected, atol=1e-12)


def test_batch_is_a_loop():
    problems = [problem(kind, 16, 5) for kind in KINDS if kind != "zero"]
    K, c = (np.stack(x) for x in zip(*problems, strict=True))
    for constraint, *_ in constraints(16, 5):
        batch = ftw_compiled.solve_qp(K, c, constraint)
        for i in range(len(K)):
            one = ftw_compiled.solve_qp(K[i], c[i], constraint)
            np.testing.assert_array_equal(batch.weights[i], one.weights)
            assert (batch.status[i], batch.steps[i], batch.kkt[i]) == (one.status, one.steps, one.kkt)
    K[3, 0, 0] = np.nan
    batch = ftw_compiled.solve_qp(K, c, Simplex(1.0))
    assert batch.status[3] == Status.NOT_FINITE
    assert np.isnan(batch.weights[3]).all()
    assert (np.delete(batch.status, 3) == Status.OK).all()


def test_a_gram_matrix_need_not_be_checked():
    for kind in KINDS[:7]:
        K, c = problem(kind, 20, 8)
        for constraint, *_ in constraints(20, 8):
            checked = ftw_compiled.solve_qp(K, c, constraint)
            trusted = ftw_compiled.solve_qp(K, c, constraint, assume_psd=True)
            np.testing.assert_array_equal(checked.weights, trusted.weights)
    # What is broken on the free coordinates is still found.
    assert (
        ftw_compiled.solve_qp(np.diag([1.0, -1.0]), np.ones(2), Simplex(1.0), assume_psd=True).status == Status.NOT_PSD
    )


def test_warm_start_changes_nothing_but_the_way():
    rng = np.random.default_rng(6)
    for n in (5, 40):
        K, c = problem("wide", n, 6)
        for constraint, *_ in constraints(n, 6):
            cold = ftw_compiled.solve_qp(K, c, constraint)
            for start in (cold.weights, rng.uniform(-1, 1, size=n), np.zeros(n), np.full(n, 1e9), np.full(n, np.nan)):
                warm = ftw_compiled.solve_qp(K, c, constraint, start=start)
                np.testing.assert_allclose(warm.weights, cold.weights, atol=1e-10)
            assert ftw_compiled.solve_qp(K, c, constraint, start=cold.weights).steps <= 2


def _escape(text):
    return text.replace("(", r"\(").replace(")", r"\)")
