"""filter_then_weight against the method written out: explicit gradients, every active set of the QP tried."""

from __future__ import annotations

import itertools

import explicit
import models
import numpy as np
import pytest
from backends import BACKENDS, optional
from numpy.testing import assert_allclose

import ftw
from ftw import Box, CappedSimplex, NonNegative, Simplex, Status

ftw_compiled = optional("ftw_compiled")
jax = optional("jax")
scipy_linalg = optional("scipy.linalg")
scipy_optimize = optional("scipy.optimize")

N = 9
SIMPLEX = Simplex(1.0)


def brute_qp(K, c, constraint, ridge):
    """The minimum over all choices of which weights are at which bound."""
    k = len(c)
    H = K + ridge * np.eye(k)
    lower, upper, total = np.zeros(k), np.full(k, np.inf), None
    if isinstance(constraint, CappedSimplex):
        upper, total = np.zeros(k) + constraint.cap, constraint.total
    if isinstance(constraint, Simplex):
        total = constraint.total
    if isinstance(constraint, Box):
        lower, upper = lower + constraint.lower, 0 * lower + constraint.upper
    best, found = np.inf, None
    for places in itertools.product("l-u", repeat=k):
        free = np.array([p == "-" for p in places])
        w = np.where([p == "l" for p in places], lower, np.where([p == "u" for p in places], upper, 0.0))
        if not np.all(np.isfinite(w)):
            continue
        f = int(free.sum())
        right = (c - H @ w)[free]
        if total is None:
            if f:
                w[free] = np.linalg.solve(H[np.ix_(free, free)], right)
        elif f:
            kkt = np.block([[H[np.ix_(free, free)], np.ones((f, 1))], [np.ones((1, f)), np.zeros((1, 1))]])
            w[free] = np.linalg.solve(kkt, np.append(right, total - w.sum()))[:f]
        elif abs(w.sum() - total) > 1e-12:
            continue
        if np.all(w >= lower - 1e-13) and np.all(w <= upper + 1e-13):
            value = w @ H @ w / 2 - c @ w
            if value < best:
                best, found = value, w
    return found


def nnls(K, c, ridge):
    if len(c) == 0:
        return np.zeros(0)
    L = np.linalg.cholesky(K + ridge * np.eye(len(c)))
    return scipy_optimize.nnls(L.T, np.linalg.solve(L, c))[0]


def brute_matching(b, K, keep, ridge):
    picks, w = [], np.zeros(0)
    for _ in range(keep):
        residual = b - K[:, picks] @ w
        residual[picks] = -np.inf
        picks.append(int(np.argmax(residual)))
        part = K[np.ix_(picks, picks)]
        w = nnls(part, b[picks], ridge * np.mean(np.diag(part)))
    return picks


def brute_greedy(b, K, keep):
    top = np.argsort(-b, kind="stable")[:keep]
    eta = max(b[top].sum(), 0) / K[np.ix_(top, top)].sum()
    picks = []
    for _ in range(keep):
        utility = b - eta * (np.diag(K) / 2 + K[:, picks].sum(axis=1))
        utility[picks] = -np.inf
        picks.append(int(np.argmax(utility)))
    return picks


def brute_doubt(G, d, T, P):
    """By a ridge regression of the target on the candidates, all of length one in P, and by the lengths."""
    root = scipy_linalg.sqrtm(P).real
    G, d, T = G @ root, d @ root, T @ root
    design = np.concatenate([(G / np.linalg.norm(G, axis=1, keepdims=True)).T, np.sqrt(0.05) * np.eye(len(G))])
    goal = np.concatenate([d / np.linalg.norm(d), np.zeros(len(G))])
    explained = 1 - np.sum((goal - design @ np.linalg.lstsq(design, goal)[0]) ** 2)
    left = np.sum(T * T) / len(T) / np.mean(np.sum(G * G, axis=1))
    return float(max(np.clip(2 - explained / (0.006 * np.sqrt(len(G))), 0, 1), np.clip(2 - left / 0.01, 0, 1)))


def brute(
    x, g, p, *, keep, filter="matching", weight="qp", constraint=SIMPLEX, ridge=0.05, shortlist=None, samples=None
):
    """(indices, weights, match, predicted decrease, shrinkage), by the definitions."""
    G, P = explicit.flat(x), explicit.metric(x, p)
    n = len(G)
    d = G.mean(axis=0) if g is None else np.concatenate([g[name].reshape(-1) for name in x])
    b, K = G @ P @ d, G @ P @ G.T
    s = (
        n
        if shortlist is None
        else max(keep, int(np.ceil(shortlist * n)) if isinstance(shortlist, float) else shortlist)
    )
    short = np.sort(np.argsort(-b, kind="stable")[:s])
    a, linear = 0.0, b
    if samples is not None:
        T, pool = explicit.flat(samples), G.mean(axis=0)
        doubt = None if filter == "top_k" else brute_doubt(G[short], d, T, P)
        a, _ = ftw.guard.shrinkage(
            float(d @ P @ d),
            float(np.mean(np.sum(T @ P * T, axis=1))),
            float((d - pool) @ P @ (d - pool)),
            len(T),
            doubt=doubt,
            slope=2.0 if doubt is None else 4.0,
        )
        linear = (1 - a) * b + a * K.mean(axis=1)
    bs, Ks = linear[short], K[np.ix_(short, short)]
    if filter == "matching":
        picks = brute_matching(bs, Ks, keep, ridge)
    else:
        picks = brute_greedy(bs, Ks, keep) if filter == "greedy_utility" else np.argsort(-bs, kind="stable")[:keep]
    indices = short[picks]
    c, part = linear[indices], K[np.ix_(indices, indices)]
    r = ridge * np.mean(np.diag(part))
    if weight == "uniform":
        w = np.full(keep, getattr(constraint, "total", 1.0) / keep)
    elif isinstance(constraint, (NonNegative, Box)):
        w = brute_qp(part, c, constraint, r)
    else:
        scale = constraint.total / brute_qp(part, c, NonNegative(), r).sum()
        w = brute_qp(part, c * scale, constraint, r)
    gained, length = b[indices] @ w, w @ part @ w
    return indices, w, gained / np.sqrt(length * (d @ P @ d)), gained - length / 2, a


def problem(rng, kind="diagonal", n=N, names=("linear", "bias")):
    """Candidates with duplicates and a target that some of them serve."""
    x = models.records(rng, n, names=names)
    x = ftw.take(x, np.array([*range(n - 1), 1]))  # the last one is a copy
    p = models.geometry(rng, x, kind)
    some = ftw.combine(x, np.maximum(rng.normal(size=n), 0))
    return x, {name: v + 0.3 * rng.normal(size=v.shape) for name, v in some.items()}, p


def run(xp, x, g, p, samples=None, **options):
    out = xp.call(lambda x, g, p, t: ftw.filter_then_weight(x, g, p, target_samples=t, **options), x, g, p, samples)
    return ftw.Selection(*(None if v is None else xp.numpy(v) for v in out))


def compare(out, expected, rtol=1e-9):
    indices, w, match, decrease, a = expected
    copy = {N - 1: 1}  # the same up to candidates whose gradients are identical
    assert [copy.get(i, i) for i in out.indices.tolist()] == [copy.get(i, i) for i in indices]
    assert len(set(out.indices.tolist())) == len(indices)
    assert int(out.status) == Status.OK
    assert_allclose(out.weights, w, rtol=0, atol=rtol * max(1, np.abs(w).max()))
    assert_allclose([out.match, out.predicted_decrease], [match, decrease], rtol=1e-7)
    assert_allclose(out.effective_size, w.sum() ** 2 / (w**2).sum(), rtol=1e-7)
    assert_allclose(out.shrinkage, a, rtol=1e-9, atol=1e-12)


OPTIONS = [
    {},
    {"filter": "top_k"},
    {"filter": "greedy_utility"},
    {"weight": "uniform"},
    {"filter": "top_k", "weight": "uniform"},
    {"constraint": NonNegative()},
    {"constraint": Simplex(3.0)},
    {"constraint": CappedSimplex(0.35)},
    {"constraint": CappedSimplex(2.0, 4.0), "shortlist": 5},
    {"constraint": Box(0.05, 0.3)},
    {"constraint": Box(-0.2, 0.4)},
    {"shortlist": 6},
    {"shortlist": 0.5},
    {"shortlist": 1},
    {"ridge": 0.5},
    {"keep": 1},
    {"keep": 1, "constraint": NonNegative()},
]
ON_JAX = {"jax": (0,), "jit": (0, 8)}  # XLA compiles the solver anew for each: seconds


def cases():
    for name in BACKENDS:
        for i, options in enumerate(OPTIONS):
            if i in ON_JAX.get(name, range(len(OPTIONS))):
                yield pytest.param(BACKENDS[name], options, id=f"{name}-{i}")


@pytest.mark.parametrize(("xp", "options"), list(cases()))
def test_against_the_method_written_out(xp, options, rng):
    x, g, p = problem(rng)
    options = {"keep": 4, **options}
    compare(run(xp, x, g, p, **options), brute(x, g, p, **options))


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jit"])
def test_on_every_kind_of_record_and_operator(name, rng):
    xp, few = BACKENDS[name], name == "jit"
    for first in (0,) if few else range(len(models.KINDS)):
        x, g, p = problem(rng, first, names=models.SMALL if few else None)
        compare(run(xp, x, g, p, keep=3), brute(x, g, p, keep=3))


def test_no_target_is_the_pools_mean(rng):
    x, _, p = problem(rng)
    for name in ("numpy", "strict", "torch"):
        compare(run(BACKENDS[name], x, None, p, keep=4), brute(x, None, p, keep=4))


def faint(x, samples, p, left):
    """What the samples' gradients must be multiplied by, so that their squares are ``left`` times the candidates'."""
    P = explicit.metric(x, p)
    own, theirs = (np.mean(np.sum(G @ P * G, axis=1)) for G in map(explicit.flat, (samples, x)))
    return np.sqrt(left * theirs / own)


GUARDED = [(name, noise) for name in ("numpy", "strict", "torch") for noise in (0.1, 30.0)] + [("jit", 30.0)]


@pytest.mark.parametrize(("name", "noise"), GUARDED)
def test_guard(name, rng, noise):
    xp = BACKENDS[name]
    x, g, p = problem(rng)
    samples = models.records(rng, 4, names=list(x))
    mean = ftw.combine(samples, np.full(4, 0.25))
    samples = {  # targets that agree (the guard stays shut), and targets that do not
        name: ftw.Sum((ftw.Dense(noise * (explicit.dense(r) - mean[name])), ftw.Dense(np.stack([g[name]] * 4))))
        for name, r in samples.items()
    }
    if noise > 1:  # and have been learned by heart, more or less
        scale = faint(x, samples, p, 0.014)
        samples = {name: ftw.Dense(scale * explicit.dense(r)) for name, r in samples.items()}
        g = {name: scale * v for name, v in g.items()}
    expected = brute(x, g, p, keep=4, samples=samples)
    assert (0.05 < expected[-1] < 0.3) if noise > 1 else (expected[-1] == 0)
    compare(run(xp, x, g, p, samples, keep=4), expected)
    if noise > 1 and not xp.jit:
        off = run(xp, x, g, p, samples, keep=4, guard=0.0)
        compare(off, brute(x, g, p, keep=4))


def test_guard_estimates_the_pools_mean_from_the_shortlist_and_a_sample(rng):
    x, g, p = problem(rng, n=64)
    samples = {name: ftw.Dense(rng.normal(size=(6, *v.shape))) for name, v in g.items()}
    scale = faint(x, samples, p, 0.01)
    samples = {name: ftw.Dense(scale * r.grads) for name, r in samples.items()}
    g = {name: 0.1 * np.mean(r.grads, axis=0) for name, r in samples.items()}
    exact = ftw.filter_then_weight(x, g, p, keep=4, target_samples=samples)
    rough = ftw.filter_then_weight(x, g, p, keep=4, target_samples=samples, shortlist=0.5)
    assert 0 < rough.shrinkage <= 0.3
    assert_allclose(rough.shrinkage, exact.shrinkage, rtol=0.3)


def test_one_target_sample_leaves_the_guard_shut(rng):
    x, g, p = problem(rng)
    samples = {name: ftw.Dense(v[None]) for name, v in g.items()}
    out = ftw.filter_then_weight(x, g, p, keep=4, target_samples=samples)
    assert out.shrinkage == 0
    assert out.signal == np.inf


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jit"])
@pytest.mark.parametrize("picks", [(2, 5, 2), (1, N, 0), (-1, 3, 4)])
def test_a_filter_whose_picks_are_not_distinct_candidates_is_noticed(name, picks, rng):
    xp = BACKENDS[name]
    x, g, p = problem(rng)

    def wrong(b, K, k):
        count = ftw.filters.top_k(b, k).count
        return ftw.Filtered(xp.array(picks), count)

    out = run(xp, x, g, p, keep=3, filter=wrong, weight="uniform")
    assert int(out.status) == Status.INFEASIBLE
    assert np.all(np.isnan(out.weights))
    assert len(set(out.indices.tolist())) == 3


def test_a_filter_must_return_its_picks_as_integers(rng):
    x, g, p = problem(rng)

    def wrong(b, K, k):
        return ftw.Filtered(np.arange(k + 1.0), np.asarray(k))

    with pytest.raises(
        ValueError, match=r"indices \(3,\) of integers, count\); got Filtered\(indices \(4,\) float64\)"
    ):
        ftw.filter_then_weight(x, g, p, keep=3, filter=wrong)


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jit"])
def test_a_filter_of_ones_own_that_lets_few_pass(name, rng):
    xp = BACKENDS[name]
    x, g, p = problem(rng)
    b = explicit.flat(x) @ explicit.metric(x, p) @ np.concatenate([g[n].reshape(-1) for n in x])
    value = np.sort(b)[-2] - 1e-9

    def two(b, K, k):
        return ftw.filters.threshold(b, k, value=float(value))

    for constraint in (Simplex(1.0), CappedSimplex(0.6), Box(0.1, 0.2))[: 1 if xp.jit else 3]:
        out = run(xp, x, g, p, keep=4, filter=two, constraint=constraint)
        assert int(out.count) == 2
        assert_allclose(out.weights[2:], 0, atol=0)
        compare(
            out._replace(indices=out.indices[:2], weights=out.weights[:2]),
            brute(x, g, p, keep=2, filter="top_k", constraint=constraint),
        )


def test_bounds_may_be_given_per_candidate(rng):
    x, g, p = problem(rng)
    caps = rng.uniform(0.25, 0.5, size=N)
    out = run(BACKENDS["numpy"], x, g, p, keep=4, constraint=CappedSimplex(caps))
    assert np.all(out.weights <= caps[out.indices] + 1e-12)
    compare(out, brute(x, g, p, keep=4, constraint=CappedSimplex(caps[out.indices])))
    with pytest.raises(ValueError, match="one a candidate"):
        ftw.filter_then_weight(x, g, p, keep=4, constraint=CappedSimplex(caps[:4]))


def test_a_solver_of_ones_own_is_called(rng):
    x, g, p = problem(rng)
    seen = []

    def solver(K, c, constraint, *, ridge=0.0, start=None):
        seen.append(type(constraint).__name__)
        return ftw.solve_qp(K, c, constraint, ridge=ridge, start=start)

    ftw.filter_then_weight(x, g, p, keep=3, constraint=CappedSimplex(0.5), solver=solver)
    assert seen == ["NonNegative"] * 3 + ["CappedSimplex"]  # the last refit is the non-negative solution


def test_a_solver_may_answer_with_an_enum(rng):
    """The reference's does."""
    x, g, p = problem(rng)
    ours = ftw.filter_then_weight(x, g, p, keep=3)
    theirs = ftw.filter_then_weight(x, g, p, keep=3, solver=ftw_compiled.solve_qp)
    assert ours.indices.tolist() == theirs.indices.tolist()
    assert_allclose(theirs.weights, ours.weights, rtol=1e-6, atol=1e-9)
    assert int(theirs.status) == Status.OK


def test_scores_that_are_there_already_are_taken(rng):
    x, g, p = problem(rng)
    b = ftw.scores(x, g, p)
    out = ftw.filter_then_weight(x, g, p, keep=3, scores=b)
    compare(out, brute(x, g, p, keep=3))


# ---------------------------------------------------------------------------------------------------------------------
# Scale


def scaled(tree, factor, dtype):
    return jax.tree.map(
        lambda a: (a * factor).astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a, tree
    )


def scaled_gradients(x, factor, dtype):
    """Records are products of two factors: only one of them takes the factor."""
    return {
        name: ftw.OuterProduct(r.inputs.astype(dtype), scaled(r.output_grads, factor, dtype))
        if isinstance(r, ftw.OuterProduct)
        else scaled(r, factor, dtype)
        for name, r in x.items()
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["numpy", "torch", "strict"])
@pytest.mark.parametrize("options", [{}, {"constraint": CappedSimplex(0.35)}, {"filter": "greedy_utility"}], ids=str)
def test_scale_changes_nothing(name, rng, dtype, options):
    xp = BACKENDS[name]
    x, g, p = problem(rng, n=24)
    for which in ("gradients", "candidates", "geometry"):
        # powers of two lose nothing on the way in; with others the comparison is with rounded input
        for factor in (2.0**20, 2.0**-20) + ((1e6, 1e-6) if dtype == np.float64 else ()):
            y, h, q = scaled_gradients(x, 1.0, dtype), scaled(g, 1.0, dtype), scaled(p, 1.0, dtype)
            one = run(xp, y, h, q, keep=6, **options)
            if which == "geometry":
                q = scaled(p, factor, dtype)
            else:
                y = scaled_gradients(x, factor, dtype)
                h = scaled(g, factor, dtype) if which == "gradients" else h
            other = run(xp, y, h, q, keep=6, **options)
            assert one.indices.tolist() == other.indices.tolist()
            assert one.weights.dtype == dtype
            assert_allclose(other.weights, one.weights, rtol=1e-6, atol=1e-7)
            assert_allclose(other.match, one.match, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Values that have no answer


def poison(tree, value, at):
    def one(a):
        a = a.copy()
        a[(at,) + (0,) * (a.ndim - 1)] = value
        return a

    return jax.tree.map(lambda a: one(a) if a.dtype.kind == "f" else a, tree)


@pytest.mark.parametrize("name", ["numpy", "torch", "jit"])
def test_what_is_not_finite_gives_a_status_and_no_number(name, rng):
    xp = BACKENDS[name]
    x, g, p = problem(rng)
    samples = {n: ftw.Dense(rng.normal(size=(4, *v.shape))) for n, v in g.items()}

    def both(x, g, p, t):
        options = {"keep": 3} if xp.jit else {"keep": 3, "constraint": CappedSimplex(0.5)}
        return (
            ftw.filter_then_weight(x, g, p, **options),
            ftw.filter_then_weight(x, g, p, filter="top_k", shortlist=5, target_samples=t, **options),
        )

    call = jax.jit(both) if xp.jit else both
    plain = call(*(xp.tree(t) for t in (x, g, p, samples)))
    assert [int(out.status) for out in plain] == [Status.OK, Status.OK]
    for value in (np.nan, np.inf):
        # sample 0 is the worst or the best: wherever a NaN is, it is seen
        trees = [
            (poison(x, value, 0), g, p, samples),
            (poison(x, value, 5), g, p, samples),
            (x, poison(g, value, 0), p, samples),
            (x, g, poison(p, value, 0), samples),
        ]
        for tree in trees:
            for out in call(*(xp.tree(t) for t in tree)):
                assert int(out.status) == Status.NOT_FINITE
                assert np.all(np.isnan(xp.numpy(out.weights)))
                assert np.isnan(float(out.match))
                assert np.isnan(float(out.predicted_decrease))
                assert np.isnan(float(out.effective_size))
                assert np.isnan(sum(float(v.sum()) for v in ftw.combine(xp.tree(x), out_weights(xp, out)).values()))
        out = call(*(xp.tree(t) for t in (x, g, p, poison(samples, value, 1))))
        assert int(out[1].status) == Status.NOT_FINITE


def out_weights(xp, out):
    return xp.array(np.full(N, xp.numpy(out.weights)[0]))


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jit"])
@pytest.mark.parametrize("constraint", [Simplex(2.0), CappedSimplex(0.9, 2.0), NonNegative(), Box(0.0, 0.1)], ids=str)
def test_nothing_useful(name, constraint, rng):
    xp = BACKENDS[name]
    if xp.jit and not isinstance(constraint, Simplex):
        pytest.skip("compiled for one set")
    x = {"w": ftw.Dense(np.abs(rng.normal(size=(6, 4))))}
    g, p = {"w": -np.ones(4)}, {"w": ftw.Scale(1.0)}
    b = x["w"].grads @ g["w"]
    out = run(xp, x, g, p, keep=3, constraint=constraint)
    assert int(out.status) == Status.NOTHING_USEFUL
    assert out.indices.tolist() == np.argsort(-b)[:3].tolist()
    each = {Simplex: 2 / 3, CappedSimplex: 2 / 3, NonNegative: 1 / 3, Box: 0.1}[type(constraint)]
    assert_allclose(out.weights, each, rtol=1e-12)


@pytest.mark.parametrize("name", ["numpy", "jit"])
@pytest.mark.parametrize("weight", ["qp", "uniform"])
def test_empty_sets(name, weight, rng):
    xp = BACKENDS[name]
    x, g, p = problem(rng)
    for constraint, status in (
        (CappedSimplex(0.2), Status.INFEASIBLE),
        (Simplex(-1.0), Status.INFEASIBLE),
        (Box(0.5, 0.2), Status.INFEASIBLE),
        (Simplex(float("nan")), Status.NOT_FINITE),
        (CappedSimplex(float("nan")), Status.NOT_FINITE),
    )[: (1 if weight == "qp" else 2) if xp.jit else 5]:
        out = run(xp, x, g, p, keep=4, constraint=constraint, weight=weight)
        assert int(out.status) == status, constraint
        assert np.all(np.isnan(out.weights))


def test_no_sample_passes(rng):
    x, g, p = problem(rng)
    for constraint in (Simplex(), CappedSimplex(0.5), NonNegative(), Box(0.1, 1.0)):
        out = ftw.filter_then_weight(
            x, g, p, keep=3, filter=lambda b, K, k: ftw.filters.threshold(b, k, value=1e9), constraint=constraint
        )
        assert (out.count, out.status) == (0, Status.NOTHING_USEFUL)
        assert_allclose(out.weights, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Edges


@pytest.mark.parametrize("name", ["numpy", "strict", "torch"])
def test_one_candidate_is_taken(name, rng):
    x, _, p = problem(rng, n=2)
    x = ftw.take(x, np.array([0]))
    out = run(BACKENDS[name], x, ftw.combine(x, np.ones(1)), p, keep=1)
    assert (out.indices.tolist(), out.weights.tolist(), int(out.status)) == ([0], [1.0], Status.OK)
    assert_allclose(out.match, 1, rtol=1e-12)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_keep_all_and_zero_gradients(name, rng):
    xp = BACKENDS[name]
    x, g, p = problem(rng, n=5, names=("bias",))
    x["bias"].grads[2] = 0.0
    out = run(xp, x, g, p, keep=5)
    assert sorted(out.indices.tolist()) == [0, 1, 2, 3, 4]
    assert out.weights[out.indices.tolist().index(2)] == 0
    compare(out, brute(x, g, p, keep=5))
    still = {"bias": ftw.Dense(np.zeros((5, 4)))}
    out = run(xp, still, g, p, keep=2)
    assert (out.indices.tolist(), int(out.status)) == ([0, 1], Status.NOTHING_USEFUL)
    assert_allclose(out.weights, 0.5)
    assert (out.match, out.predicted_decrease) == (0, 0)


def test_identical_candidates_go_by_index(rng):
    x, g, p = problem(rng, n=6)
    x = ftw.take(x, np.zeros(6, dtype=int))
    g = ftw.combine(x, np.ones(6))
    for name in ("matching", "top_k", "greedy_utility"):
        for shortlist in (None, 4):
            out = ftw.filter_then_weight(x, g, p, keep=3, filter=name, shortlist=shortlist)
            assert out.indices.tolist()[0] == 0
            assert len(set(out.indices.tolist())) == 3


def test_float32_stays_float32(rng):
    x, g, p = problem(rng)
    x, g, p = scaled_gradients(x, 1.0, np.float32), scaled(g, 1.0, np.float32), scaled(p, 1.0, np.float32)
    for name in ("numpy", "strict", "torch"):
        out = run(BACKENDS[name], x, g, p, {n: ftw.Dense(np.stack([v, -v])) for n, v in g.items()}, keep=4)
        for field in ("weights", "scores", "match", "predicted_decrease", "effective_size", "shrinkage", "signal"):
            assert getattr(out, field).dtype == np.float32, field
        assert out.status.dtype == np.int32


def test_dtypes_may_be_mixed(rng):
    x, g, p = problem(rng, 2, names=("linear", "embedding", "bias"))
    expected = brute(x, g, p, keep=3)
    for name in ("numpy", "torch"):
        for mixed in ((np.float32, np.float64, np.float64), (np.float64, np.float32, np.float32)):
            y, h, q = (scaled(tree, 1.0, dtype) for tree, dtype in zip((x, g, p), mixed, strict=True))
            out = run(BACKENDS[name], y, h, q, keep=3)
            assert out.indices.tolist() == list(expected[0])
            assert_allclose(out.weights, expected[1], atol=1e-5)
            assert out.weights.dtype == mixed[0]


def test_a_refused_sample_never_reaches_the_update(rng):
    x, g, p = problem(rng)
    out = ftw.filter_then_weight(x, g, p, keep=3)
    every = np.zeros(N)
    every[out.indices] = out.weights
    refused = int(np.flatnonzero(every == 0)[0])
    clean, dirty = ftw.combine(x, every), ftw.combine(poison(x, np.nan, refused), every)
    for name, value in clean.items():
        assert_allclose(dirty[name], value, rtol=1e-14)


def test_one_compilation_serves_every_step(rng):
    x, g, p = problem(rng)
    traces = []

    def step(x, g, p):
        traces.append(1)
        return ftw.filter_then_weight(x, g, p, keep=2, filter="top_k", weight="uniform").match

    jitted = jax.jit(step)
    for factor in (1.0, 2.0, 3.0):
        jitted(scaled_gradients(x, factor, np.float64), g, p)
    assert len(traces) == 1


def test_a_nan_in_the_target_where_no_candidate_looks(rng):
    x = {"table": ftw.Rows(np.zeros((4, 2), dtype=int), rng.normal(size=(4, 2, 3)), 9)}
    g = {"table": rng.normal(size=(9, 3))}
    p = {"table": ftw.Scale(1.0)}
    assert ftw.filter_then_weight(x, g, p, keep=2).status != Status.NOT_FINITE
    g["table"][8, 0] = np.nan
    out = ftw.filter_then_weight(x, g, p, keep=2)
    assert out.status == Status.NOT_FINITE
    assert np.all(np.isnan(out.weights))
