"""The weights: exact on every kind of problem, honest about the rest, alike on every backend."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from backends import BACKENDS
from ftw_conformance.problems import KINDS, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftw.constraints import Box, CappedSimplex, NonNegative, Simplex, project
from ftw.qp import solve_qp
from ftw.status import Status

SETS = ("nonnegative", "simplex", "capped", "box")
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def a_set(name, n):
    return {
        "nonnegative": NonNegative(),
        "simplex": Simplex(1.0),
        "capped": CappedSimplex(4.0 / n, 1.0),
        "box": Box(-1.0 / n, 4.0 / n),
    }[name]


def bounds(constraint, n):
    """Return lower, upper (n,) and the total (None for none)."""
    if isinstance(constraint, Box):
        return np.broadcast_to(constraint.lower, n), np.broadcast_to(constraint.upper, n), None
    cap = constraint.cap if isinstance(constraint, CappedSimplex) else np.inf
    return np.zeros(n), np.broadcast_to(cap, n), getattr(constraint, "total", None)


def value(K, c, w):
    return 0.5 * w @ K @ w - c @ w


def residual(K, c, w, constraint):
    """Return the natural residual in the plain metric, over the size of the weights."""
    L = max(np.linalg.eigvalsh(K)[-1], 1e-300)
    return np.abs(w - project(constraint, w - (K @ w - c) / L)).max() / max(np.abs(w).max(), 1e-300)


def by_enumeration(K, c, constraint):
    """Return the least objective over all faces of the set: every weight free, at its lower or at its upper bound."""
    n = len(c)
    lower, upper, total = bounds(constraint, n)
    best = np.inf
    for sides in itertools.product((0, 1, 2) if np.isfinite(upper).all() else (0, 1), repeat=n):
        s = np.array(sides)
        w = np.where(s == 0, lower, np.where(s == 2, upper, 0.0))
        F = np.flatnonzero(s == 1)
        m = len(F) + (total is not None)
        A, b = np.zeros((m, m)), np.zeros(m)
        A[: len(F), : len(F)], b[: len(F)] = K[np.ix_(F, F)], c[F] - K[F] @ w
        if total is not None:
            A[-1, : len(F)] = A[: len(F), -1] = 1.0
            b[-1] = total - w.sum()
        if m:
            w[F] = np.linalg.lstsq(A, b, rcond=1e-13)[0][: len(F)]
        slack = 1e-9
        if (
            (w >= lower - slack).all()
            and (w <= upper + slack).all()
            and (total is None or abs(w.sum() - total) < slack)
        ):
            best = min(best, value(K, c, w))
    return best


def check_feasible(w, constraint):
    lower, upper, total = bounds(constraint, len(w))
    assert (w >= lower).all()
    assert (w <= upper).all()
    if total is not None:
        assert abs(w.sum() - total) <= 1e-12 * total


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_solved(kind, name):
    for n, seed in ((1, 0), (2, 0), (9, 1), (33, 2), (64, 3)):
        K, c = make(kind, n, seed)
        constraint = a_set(name, n)
        r = solve_qp(K, c, constraint)
        assert r.status == Status.OK, Status(int(r.status)).message
        check_feasible(r.weights, constraint)
        assert r.kkt <= 1e-8
        assert r.gap <= 1e-8
        assert residual(K, c, r.weights, constraint) <= 1e-8
        np.testing.assert_allclose(r.objective, value(K, c, r.weights), rtol=1e-9, atol=1e-9 * np.abs(c).max())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind, name):
    K, c = make(kind, 24, 5)
    constraint = a_set(name, 24)
    exact = solve_qp(K, c, constraint)
    r = solve_qp(K.astype(np.float32), c.astype(np.float32), constraint)
    assert r.weights.dtype == r.objective.dtype == np.float32
    assert r.status == Status.OK
    assert r.kkt <= 1e-4
    w = r.weights.astype(float)
    assert abs(value(K, c, w) - exact.objective) <= 1e-3 * (abs(exact.objective) + np.abs(exact.weights) @ np.abs(c))


@pytest.mark.parametrize("name", SETS)
def test_backends_agree(xp, name):
    constraint = a_set(name, 12)
    for kind in ("wide", "twins", "narrow", "conditioned"):  # the last crosses by the interior
        K, c = make(kind, 12, 0)
        exact = solve_qp(K, c, constraint)
        r = xp.call(plain, K, c, constraint)
        w = xp.numpy(r.weights)
        assert int(r.status) == Status.OK
        check_feasible(w, constraint)
        assert abs(value(K, c, w) - exact.objective) <= 1e-10 * abs(exact.objective)
        if kind == "wide":
            np.testing.assert_allclose(w, exact.weights, atol=1e-10)


@pytest.mark.parametrize("name", SETS)
def test_leading_axes(xp, name):
    if xp.name == "jax" or (xp.jit and name in ("nonnegative", "capped")):
        pytest.skip("compiles for long, and the other two sets run the same code")
    problems = [make(kind, 10, 1) for kind in ("wide", "conditioned", "negative", "zeros", "huge", "clusters")]
    K, c = (np.stack(x).reshape(2, 3, *x[0].shape) for x in zip(*problems, strict=True))
    r = xp.call(lambda K, c: solve_qp(K, c, a_set(name, 10), ridge=0.0), K, c)
    w = xp.numpy(r.weights)
    assert w.shape == (2, 3, 10)
    assert xp.numpy(r.status).shape == (2, 3)
    for i in np.ndindex(2, 3):
        exact = solve_qp(K[i], c[i], a_set(name, 10))
        assert abs(value(K[i], c[i], w[i]) - exact.objective) <= 1e-9 * max(abs(exact.objective), np.abs(c[i]).max())


def test_vmap_and_traced_settings():
    import jax
    import jax.numpy as jnp

    K, c = (np.stack(x) for x in zip(*[make(k, 8, 0) for k in ("wide", "twins", "conditioned")], strict=True))
    solve = jax.jit(
        jax.vmap(lambda K, c, r, t: solve_qp(K, c, Simplex(2.0), ridge=r, tol=t), in_axes=(0, 0, None, None))
    )
    r = solve(jnp.asarray(K), jnp.asarray(c), 0.1, 1e-9)
    assert (np.asarray(r.status) == 0).all()
    for i in range(3):
        exact = solve_qp(K[i], c[i], Simplex(2.0), ridge=0.1)
        np.testing.assert_allclose(r.objective[i], exact.objective, rtol=1e-10)


@pytest.mark.parametrize("name", SETS)
@quick
@given(seed=st.integers(0, 2**31), n=st.integers(1, 5), rank=st.integers(1, 7), twin=st.booleans(), zero=st.booleans())
def test_is_the_least_of_all_faces(name, seed, n, rank, twin, zero):
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(n, rank)) * 10 ** rng.uniform(-2, 2, size=(n, 1))
    if twin:
        G[-1] = G[0]
    if zero:
        G[n // 2] = 0
    K, c = G @ G.T, G @ rng.normal(size=rank)
    constraint = a_set(name, n)
    r = solve_qp(K, c, constraint)
    assert r.status == Status.OK
    check_feasible(r.weights, constraint)
    least = by_enumeration(K, c, constraint)  # of points that may be 1e-9 outside
    size = abs(least) + np.abs(r.weights) @ np.abs(c) + 0.2 * np.abs(c).sum()
    assert abs(value(K, c, r.weights) - least) <= 1e-8 * size


@quick
@given(seed=st.integers(0, 2**31), n=st.integers(1, 20), extra=st.integers(-5, 20))
def test_against_scipy_nnls(seed, n, extra):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    G, target = rng.normal(size=(n, max(n + extra, 1))), rng.normal(size=max(n + extra, 1))
    r = solve_qp(G @ G.T, G @ target, NonNegative())
    _, distance = optimize.nnls(G.T, target)
    assert r.status == Status.OK
    np.testing.assert_allclose(r.objective, 0.5 * (distance**2 - target @ target), atol=1e-10 * (target @ target))


@pytest.mark.parametrize("kind", ["wide", "square", "heavy", "clusters", "adam"])
def test_against_peers(kind):
    daqp, quadprog = pytest.importorskip("daqp"), pytest.importorskip("quadprog")
    n = 20
    K, c = make(kind, n, 7)
    mean = np.trace(K) / n
    r = solve_qp(K / mean, c / mean, CappedSimplex(0.2, 1.0))
    sense = np.zeros(n + 1, dtype=np.int32)
    sense[n] = 5
    bounds_low, bounds_high = np.r_[np.zeros(n), 1.0], np.r_[np.full(n, 0.2), 1.0]
    theirs = daqp.solve(K / mean, -c / mean, np.ones((1, n)), bounds_high, bounds_low, sense)[1]
    np.testing.assert_allclose(r.objective, theirs, rtol=1e-7)
    A = np.c_[np.ones(n), np.eye(n), -np.eye(n)]
    other = quadprog.solve_qp(K / mean, c / mean, A, np.r_[1.0, np.zeros(n), np.full(n, -0.2)], 1)[1]
    np.testing.assert_allclose(r.objective, other, rtol=1e-7)


@pytest.mark.parametrize("name", SETS)
def test_against_the_reference(name):
    reference = pytest.importorskip("ftw_reference")
    for kind in KINDS:
        K, c = make(kind, 16, 3)
        theirs = reference.solve_qp(K, c, a_set(name, 16))
        ours = solve_qp(K, c, a_set(name, 16))
        size = np.abs(ours.weights) @ np.abs(c)
        assert abs(value(K, c, np.asarray(theirs.weights)) - ours.objective) <= 1e-9 * max(size, abs(ours.objective)), (
            kind
        )


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("a", "b"), [(1e-24, 1e-12), (1e24, 1e12), (1e30, 1e30), (1e-30, 1e-30), (1.0, 1e-20)])
def test_scales(name, a, b):
    """Scaling K by a and c by b scales the weights by b/a, if the set is scaled with them."""
    for dtype, rtol in ((np.float64, 1e-9), (np.float32, 1e-3)):
        K, c = (x.astype(dtype) for x in make("wide", 12, 4))
        K, c = K / np.trace(K), c / np.trace(K)
        one = solve_qp(K, c, a_set(name, 12))
        t = b / a
        scaled = {
            "nonnegative": NonNegative(),
            "simplex": Simplex(t),
            "capped": CappedSimplex(t * 4 / 12, t),
            "box": Box(-t / 12, t * 4 / 12),
        }[name]
        r = solve_qp(K * dtype(a), c * dtype(b), scaled)
        assert r.status == Status.OK
        np.testing.assert_allclose(r.weights / dtype(t), one.weights, atol=rtol)


# One test per degenerate input


def plain(K, c, constraint):
    return solve_qp(K, c, constraint)


def same(xp, constraint, K, c):
    """Solve with ``plain``, which jit compiles once for each kind of set: all these problems have n = 4."""
    if xp.name == "jax":
        pytest.skip("eager JAX compiles the same whole: the jit backend is enough")
    r = xp.call(plain, np.asarray(K, float), np.asarray(c, float), constraint)
    return type(r)(*(xp.numpy(x) for x in r))


def padded(K, c):
    """Return a problem made n = 4 with samples that are no use and no burden."""
    more = 4 - len(c)
    K = np.block([[np.asarray(K, float), np.zeros((len(c), more))], [np.zeros((more, len(c))), np.eye(more)]])
    return K, np.r_[c, np.zeros(more)]


def test_no_information_at_all(xp):
    """K = 0, c = 0: any weights do; they must be in the set."""
    for name in SETS:
        r = same(xp, a_set(name, 4), np.zeros((4, 4)), np.zeros(4))
        assert r.status == Status.OK
        check_feasible(r.weights, a_set(name, 4))
        assert r.objective == 0


def test_zero_matrix_with_slopes(xp):
    r = same(xp, Simplex(1.0), np.zeros((4, 4)), [1.0, 3.0, 2.0, 0.0])
    assert r.status == Status.OK
    np.testing.assert_allclose(r.weights, [0, 1, 0, 0], atol=1e-9)
    r = same(xp, Box(-1.0, 2.0), np.zeros((4, 4)), [1.0, -3.0, 2.0, 1.0])
    assert r.status == Status.OK
    np.testing.assert_array_equal(r.weights, [2, -1, 2, 2])


def test_nothing_helps_gives_exactly_zero(xp):
    K, c = make("negative", 4, 0)
    r = same(xp, NonNegative(), K, c)
    assert r.status == Status.OK
    np.testing.assert_array_equal(r.weights, 0.0)
    assert r.objective == r.kkt == r.gap == 0
    np.testing.assert_array_equal(same(xp, NonNegative(), K, np.zeros(4)).weights, 0.0)


def test_one_sample(xp):
    cases = ((Simplex(1.0), 1.0), (Box(0.0, 0.5), 0.5), (NonNegative(), 1.5), (CappedSimplex(1.0), 1.0))
    for constraint, w in cases[: 1 if xp.jit else 4]:
        r = same(xp, constraint, [[2.0]], [3.0])
        assert r.status == Status.OK
        np.testing.assert_allclose(r.weights, [w], rtol=1e-12)


def test_tight_cap_and_closed_box(xp):
    K, c = make("wide", 4, 0)
    r = same(xp, CappedSimplex(0.25, 1.0), K, c)
    assert r.status == Status.OK
    np.testing.assert_allclose(r.weights, 0.25, rtol=1e-12)
    r = same(xp, Box(0.3, 0.3), K, c)
    assert r.status == Status.OK
    np.testing.assert_array_equal(r.weights, 0.3)


def test_zero_total(xp):
    r = same(xp, Simplex(0.0), *make("wide", 4, 0))
    assert r.status == Status.OK
    np.testing.assert_array_equal(r.weights, 0.0)


def test_twins_are_solved_and_repeatable(xp):
    K = np.ones((4, 4))
    r, again = (same(xp, Simplex(1.0), K, np.ones(4)) for _ in range(2))
    assert r.status == Status.OK
    np.testing.assert_allclose(r.objective, -0.5, rtol=1e-12)
    np.testing.assert_array_equal(r.weights, again.weights)


def test_an_unbounded_problem_is_not_called_solved(xp):
    r = same(xp, NonNegative(), *padded(np.diag([1.0, 0.0]), [1.0, 1.0]))
    assert r.status == Status.MAX_STEPS
    r = same(xp, NonNegative(), *padded([[1.0, -1.0], [-1.0, 1.0]], [1.0, 0.5]))
    assert r.status == Status.MAX_STEPS
    r = same(xp, Box(-np.inf, 1.0), *padded(np.zeros((2, 2)), [-1.0, 1.0]))
    assert r.status == Status.MAX_STEPS


def test_open_boxes(xp):
    K, c = make("wide", 4, 2)
    r = same(xp, Box(-np.inf, np.inf), K, c)
    assert r.status == Status.OK
    np.testing.assert_allclose(r.weights, np.linalg.solve(K, c), rtol=1e-9)
    r = same(xp, Box(0.0, np.inf), K, c)
    np.testing.assert_allclose(r.weights, solve_qp(K, c, NonNegative()).weights, atol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(xp, bad):
    K, c = make("wide", 4, 0)
    for broken in ((np.where(np.eye(4) > 0, bad, K), c), (K, np.where(np.arange(4) == 2, bad, c))):
        for name in SETS:
            r = same(xp, a_set(name, 4), *broken)
            assert r.status == Status.NOT_FINITE
            assert np.isnan(r.weights).all()
            assert np.isnan([r.objective, r.kkt, r.gap]).all()
    assert same(xp, Simplex(bad), K, c).status == Status.NOT_FINITE
    assert same(xp, Box(0.0, np.nan), K, c).status == Status.NOT_FINITE


@pytest.mark.parametrize("empty", [CappedSimplex(0.2, 1.0), Simplex(-1.0), Box(1.0, 0.0), CappedSimplex(-0.1, 1.0)])
def test_infeasible(xp, empty):
    r = same(xp, empty, *make("wide", 4, 0))
    assert r.status == Status.INFEASIBLE
    assert np.isnan(r.weights).all()


def test_indefinite(xp):
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    for K in (
        np.diag([1.0, -1.0]),
        [[0.0, 1.0], [1.0, 0.0]],
        1.9 * np.eye(3) - 0.9,
        rotation * [1, 2, 3, -0.1] @ rotation.T,
    ):
        r = same(xp, Simplex(1.0), *padded(K, np.ones(len(K))))
        assert r.status == Status.NOT_PSD
        assert np.isnan(r.weights).all()
    K, c = make("narrow", 4, 0)
    assert same(xp, Simplex(1.0), K - 1e-13 * np.trace(K) / 4 * np.eye(4), c).status == Status.OK


def test_one_bad_problem_spoils_no_other(xp):
    K, c = (np.stack([x] * 4) for x in make("wide", 5, 0))
    K[1] = -K[1]
    c[2, 0] = np.nan
    r = xp.call(lambda K, c: solve_qp(K, c, Simplex(1.0)), K, c)
    assert xp.numpy(r.status).tolist() == [Status.OK, Status.NOT_PSD, Status.NOT_FINITE, Status.OK]
    w = xp.numpy(r.weights)
    assert np.isnan(w[1:3]).all()
    np.testing.assert_allclose(w[[0, 3]], [solve_qp(K[0], c[0], Simplex(1.0)).weights] * 2, atol=1e-12)


def test_too_few_steps_is_said_and_the_weights_are_still_in_the_set(xp):
    for name in SETS[1:2] if "j" in xp.name else SETS:
        constraint = a_set(name, 12)
        r = xp.call(lambda K, c, s=constraint: solve_qp(K, c, s, max_steps=2), *make("conditioned", 12, 0))
        r = type(r)(*(xp.numpy(x) for x in r))
        assert r.status == Status.MAX_STEPS
        assert r.steps <= 2
        check_feasible(r.weights, constraint)
        assert max(r.kkt, r.gap) > 1e-8


def test_asymmetry_of_rounding_is_averaged(rng):
    K, c = make("wide", 8, 0)
    skew = 1e-15 * rng.normal(size=(8, 8)) * np.abs(K).max()
    np.testing.assert_allclose(
        solve_qp(K + skew - skew.T, c, Simplex(1.0)).weights, solve_qp(K, c, Simplex(1.0)).weights, atol=1e-13
    )


@pytest.mark.parametrize("kind", ["rank", "zero gradient", "one direction"])
@pytest.mark.parametrize("constraint", [Simplex(1e-6), CappedSimplex(0.3)])
@pytest.mark.parametrize("name", ["numpy", "strict", "torch"])
def test_a_least_norm_of_zero_is_found(name, kind, constraint, rng):
    xp, n = BACKENDS[name], 8
    G = rng.normal(size=(n, {"rank": 4, "zero gradient": n, "one direction": 1}[kind]))
    G[0] = 0.0 if kind == "zero gradient" else G[0]
    K = G @ G.T
    solution = xp.call(lambda K, c: solve_qp(K, c, constraint), K, np.zeros(n))
    w = np.asarray(xp.numpy(solution.weights))
    check_feasible(w, constraint)
    assert int(solution.status) == Status.OK
    if isinstance(constraint, Simplex) and kind == "zero gradient":
        np.testing.assert_allclose(w, constraint.total * (np.arange(n) == 0), atol=1e-12)
    slopes = K @ w  # optimal: nobody with weight has a steeper slope than the flattest
    assert (
        np.max(slopes[w > 1e-9 * constraint.total]) <= np.min(slopes[w < 0.299]) + 1e-10 * np.max(K) * constraint.total
    )


def test_ridge_is_added_to_the_diagonal(xp):
    K, c = make("narrow", 7, 0)
    r = xp.call(lambda K, c: solve_qp(K, c, Simplex(1.0), ridge=3.0), K, c)
    np.testing.assert_allclose(xp.numpy(r.weights), solve_qp(K + 3.0 * np.eye(7), c, Simplex(1.0)).weights, atol=1e-12)


def test_caps_and_bounds_for_each_weight(xp):
    K, c = make("wide", 6, 1)
    cap = np.array([0.1, 0.2, 0.3, 0.4, 0.5, np.inf])
    r = xp.call(lambda K, c, cap, total: solve_qp(K, c, CappedSimplex(cap, total)), K, c, cap, np.float64(1.0))
    w = xp.numpy(r.weights)
    assert int(r.status) == Status.OK
    assert (w <= cap).all()
    assert residual(K, c, w, CappedSimplex(cap, 1.0)) < 1e-10
    if "j" in xp.name:
        return
    r = xp.call(lambda K, c, u: solve_qp(K, c, Box(0.0, u)), K, c, cap)
    assert residual(K, c, xp.numpy(r.weights), Box(0.0, cap)) < 1e-10


@pytest.mark.parametrize("name", SETS)
def test_warm_start(xp, name):
    if "j" in xp.name and name != "simplex":
        pytest.skip("compiles for long, and the simplex runs the same code")
    K, c = make("adam", 24, 0)
    cold = solve_qp(K, c, a_set(name, 24))
    warm = xp.call(lambda K, c, w: solve_qp(K, c, a_set(name, 24), start=w), K, c, cold.weights)
    assert int(warm.steps) <= 2
    np.testing.assert_allclose(xp.numpy(warm.objective), cold.objective, rtol=1e-10)
    for start in (np.full(24, np.nan), np.full(24, 1e9), np.zeros(24)):
        r = solve_qp(K, c, a_set(name, 24), start=start)
        np.testing.assert_allclose(r.objective, cold.objective, rtol=1e-10)


def test_without_the_polish_it_is_the_same_problem():
    for name in SETS:
        K, c = make("wide", 16, 0)
        r = solve_qp(K, c, a_set(name, 16), _polish=False, max_steps=2000)
        exact = solve_qp(K, c, a_set(name, 16))
        np.testing.assert_allclose(r.weights, exact.weights, atol=1e-6)
        assert r.steps > 5 * exact.steps


def test_sixteen_bits_are_widened():
    import jax.numpy as jnp
    import torch

    K, c = make("wide", 6, 0)
    K, c = K / np.trace(K), c / np.trace(K)
    for r in (
        solve_qp(torch.tensor(K).bfloat16(), torch.tensor(c).bfloat16(), Simplex(1.0)),
        solve_qp(jnp.asarray(K, jnp.bfloat16), jnp.asarray(c, jnp.bfloat16), Simplex(1.0)),
        solve_qp(K.astype(np.float16), c.astype(np.float16), Simplex(1.0)),
    ):
        assert "float32" in str(r.weights.dtype)
        assert int(r.status) == Status.OK


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, r"\(\.\.\., n, n\).*\(3, 4\)", (np.ones((3, 4)), np.ones(3), Simplex())),
        (ValueError, r"linear.*\(3,\).*\(4, 4\)", (np.eye(4), np.ones(3), Simplex())),
        (ValueError, "n >= 1", (np.ones((0, 0)), np.ones(0), Simplex())),
        (TypeError, "gram.*float.*int", (np.eye(3, dtype=int), np.ones(3), Simplex())),
        (TypeError, "linear.*float.*int", (np.eye(3), np.ones(3, dtype=int), Simplex())),
        (TypeError, "constraint must be", (np.eye(3), np.ones(3), "simplex")),
        (TypeError, r"Simplex\(\.\.\.\)", (np.eye(3), np.ones(3), Simplex)),
        (ValueError, r"cap.*\(2,\).*\(3,\)", (np.eye(3), np.ones(3), CappedSimplex(np.ones(2)))),
    ],
)
def test_refused(xp, error, match, arguments):
    K, c, constraint = arguments
    with pytest.raises(error, match=match):
        xp.call(lambda K, c: solve_qp(K, c, xp.tree(constraint) if isinstance(constraint, tuple) else constraint), K, c)


def test_refused_numbers():
    K, c = np.eye(3), np.ones(3)
    for wrong in ({"ridge": -1.0}, {"tol": 0.0}, {"max_steps": 0}, {"max_steps": 2.0}, {"start": np.ones(4)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            solve_qp(K, c, Simplex(), **wrong)
    with pytest.raises(TypeError, match="one namespace"):
        solve_qp(K, BACKENDS["torch"].array(c), Simplex())
