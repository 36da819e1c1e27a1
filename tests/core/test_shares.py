"""Bounds on each source's sum of weights, against general QP solvers and the reference, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from backends import BACKENDS, optional
from ftw_conformance import problems
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import ftw
from ftw import SourceShares, Status
from ftw.constraints import project

daqp = optional("daqp")
ref = optional("ftw_reference")
jax = optional("jax")

SOURCES = np.array([0, 1, 2, 0, 1, 2, -1, 0, 1])
LOWER, UPPER = (0.1, 0, 0.3), (0.5, 0.2, None)


def general(K, c, shares):
    """The minimum by a general dual active-set solver: each source's sum is a row of its own."""
    n, m = len(c), len(shares.lower)
    rows = np.stack([np.ones(n), *[(shares.sources == s) * 1.0 for s in range(m)]])
    upper = np.array([1e30 if u is None else u for u in shares.upper])
    high = np.concatenate([np.full(n, 1e30), [shares.total], upper])
    low = np.concatenate([np.zeros(n), [shares.total], np.asarray(shares.lower, dtype=float)])
    sense = np.zeros(n + 1 + m, dtype=np.int32)
    sense[n] = 5
    x, _, flag, _ = daqp.solve(K, -c, rows, high, low, sense)
    return x if flag > 0 else None


def random_shares(rng, n, m, total=1.0):
    sources = rng.integers(-1, m, size=n)
    lower = rng.uniform(0, 0.4, size=m) * (rng.random(m) < 0.7) * total
    return SourceShares(sources, lower, lower + rng.uniform(0, 0.6, size=m) * total, total)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([1.0, 1e-6, 300.0]))
def test_the_solution_is_that_of_a_general_solver(n, m, seed, total):
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(n, 2 * n))
    K, c = G @ G.T, G @ G.sum(axis=0) * total
    shares = random_shares(rng, n, m, total)
    expected = general(K, c / total, shares._replace(total=1.0, lower=shares.lower / total, upper=shares.upper / total))
    out = ftw.solve_qp(K, c, shares)
    if expected is None:
        assert out.status == Status.INFEASIBLE
        assert np.isnan(out.weights).all()
        return
    assert out.status == Status.OK
    assert_allclose(out.weights, expected * total, atol=1e-8 * total)
    sums = np.array([out.weights[shares.sources == s].sum() for s in range(m)])
    assert np.all(sums >= shares.lower - 1e-14 * total)
    assert np.all(sums <= shares.upper + 1e-14 * total)
    assert abs(out.weights.sum() - total) < 1e-14 * total


@pytest.mark.parametrize("kind", list(problems.KINDS))
def test_every_kind_of_problem_is_certified(kind):
    rng = np.random.default_rng(len(kind))
    for seed in range(8):
        n, m = int(rng.integers(3, 24)), int(rng.integers(1, 5))
        K, c = problems.make(kind, n, seed)
        shares = random_shares(rng, n, m)
        if seed % 2:
            shares = shares._replace(upper=np.ones(m))
        out, best = ftw.solve_qp(K, c, shares), ref.solve_qp(K, c, shares)
        assert int(out.status) == int(best.status)
        if best.status == ref.Status.OK:
            w = out.weights
            size = abs(w) @ abs(K) @ abs(w) + abs(c) @ abs(w)
            assert out.kkt <= 1e-8
            assert out.gap <= 1e-8
            assert abs((w @ K @ w / 2 - c @ w) - best.objective) <= 1e-9 * size


def test_the_five_backends_agree_alone_and_in_batches(xp):
    kinds = list(problems.KINDS)
    if xp.name == "jax":
        pytest.skip("compiles long; jit is the same trace")
    K, c = (np.stack(x) for x in zip(*(problems.make(kind, 9, 3) for kind in kinds), strict=True))

    def call(K, c, s):
        return ftw.solve_qp(K, c, SourceShares(s, LOWER, UPPER))

    out = xp.call(call, K, c, SOURCES)
    assert (xp.numpy(out.status) == Status.OK).all()
    for i in range(len(kinds)):
        best = ref.solve_qp(K[i], c[i], SourceShares(SOURCES, LOWER, UPPER))
        assert_allclose(xp.numpy(out.objective)[i], best.objective, rtol=1e-9)
    if xp.name != "jit":
        one = xp.call(call, K[0], c[0], SOURCES)
        assert_allclose(xp.numpy(one.weights), xp.numpy(out.weights)[0], atol=1e-12)


def test_vmap_over_the_bounds_in_a_whole_choice(rng):
    x, g, p = model(rng)
    sources = np.arange(12) % 3
    lower = np.array([[0.1, 0.0, 0.3], [0.0, 0.6, 0.0], [0.5, 0.5, 0.5]])

    def call(low, x, g, p, s):
        out = ftw.filter_then_weight(x, g, p, keep=5, filter="top_k", constraint=SourceShares(s, low))
        return out.indices, out.weights, out.status

    indices, weights, status = jax.jit(jax.vmap(call, (0, None, None, None, None)))(lower, x, g, p, sources)
    assert status.tolist() == [Status.OK, Status.OK, Status.INFEASIBLE]
    for i in range(2):
        best = ftw.filter_then_weight(x, g, p, keep=5, filter="top_k", constraint=SourceShares(sources, lower[i]))
        assert indices[i].tolist() == best.indices.tolist()
        assert_allclose(weights[i], best.weights, atol=1e-9)


def test_float32():
    for kind in problems.KINDS:
        K, c = problems.make(kind, 9, 3)
        out = ftw.solve_qp(K.astype(np.float32), c.astype(np.float32), SourceShares(SOURCES, LOWER, UPPER))
        assert out.status == Status.OK
        assert out.weights.dtype == np.float32


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 10), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 1e4]), st.booleans())
def test_the_projection_is_the_nearest_point(n, m, seed, spread, weighted):
    rng = np.random.default_rng(seed)
    shares, v = random_shares(rng, n, m), spread * rng.normal(size=n)
    metric = np.exp(rng.normal(size=n)) if weighted else None
    w = project(shares, v, metric=metric)
    D = np.diag(np.ones(n) if metric is None else metric)
    expected = general(D, D @ v, shares)
    if expected is None:
        assert np.isnan(w).all()
    else:
        assert_allclose(w, expected, atol=1e-9 * max(spread, 1))
        assert_allclose(project(shares, w, metric=metric), w, atol=1e-14 * max(spread, 1))


def test_the_projection_on_every_backend_and_in_batches(xp, rng):
    v = rng.normal(size=(2, 3, 9))
    w = xp.numpy(xp.call(lambda v, s: project(SourceShares(s, LOWER, UPPER), v), v, SOURCES))
    for i in np.ndindex(2, 3):
        assert_allclose(w[i], ref.project(v[i], SourceShares(SOURCES, LOWER, UPPER)), atol=1e-14)


EMPTY = {
    "lower bounds above the total": SourceShares(SOURCES, (0.5, 0.4, 0.2)),
    "upper bounds below the total": SourceShares(np.abs(SOURCES), None, (0.5, 0.2, 0.2)),
    "a lower bound above the upper": SourceShares(SOURCES, (0.3, 0, 0), (0.2, 1, 1)),
    "a floor without a candidate": SourceShares(np.zeros(9, dtype=int), (0.1, 0.1)),
    "a negative total": SourceShares(SOURCES, (0, 0, 0), None, -1.0),
}


@pytest.mark.parametrize("what", EMPTY)
def test_an_empty_set_is_a_status(xp, what):
    if xp.name in ("jax", "jit"):
        pytest.skip("compiles long")
    out = xp.call(
        lambda K, c, s: ftw.solve_qp(K, c, EMPTY[what]._replace(sources=s)), np.eye(9), np.ones(9), EMPTY[what].sources
    )
    assert int(out.status) == Status.INFEASIBLE
    assert np.isnan(xp.numpy(out.weights)).all()
    assert np.isnan(
        xp.numpy(xp.call(lambda v, s: project(EMPTY[what]._replace(sources=s), v), np.ones(9), EMPTY[what].sources))
    ).all()


def test_numbers_that_are_none_are_a_status():
    for shares in (SourceShares(SOURCES, (np.nan, 0, 0)), SourceShares(SOURCES, (0, 0, 0), total=np.inf)):
        assert ftw.solve_qp(np.eye(9), np.ones(9), shares).status == Status.NOT_FINITE
    assert ftw.solve_qp(-np.eye(9), np.ones(9), SourceShares(SOURCES, LOWER)).status == Status.NOT_PSD


@pytest.mark.parametrize(
    ("shares", "error", "says"),
    [
        (SourceShares(SOURCES), ValueError, "no bounds: give lower= or upper="),
        (SourceShares(SOURCES, (0, 0), (1, 1, 1)), ValueError, "of 2 and 3 sources"),
        (SourceShares(SOURCES[:4], LOWER), ValueError, r"\(4,\) does not broadcast to \(9,\)"),
        (SourceShares(SOURCES * 1.0, LOWER), TypeError, "integer array"),
        (SourceShares(SOURCES, (0.1, 0.1)), ValueError, r"must lie in 0 \.\. 1"),
    ],
)
def test_what_is_wrong_is_named(shares, error, says):
    with pytest.raises(error, match=says):
        ftw.solve_qp(np.eye(9), np.ones(9), shares)


# ---------------------------------------------------------------------------------------------------------------------
# In the whole choice


def model(rng, n=12):
    x = {"w": ftw.OuterProduct(rng.normal(size=(n, 3, 4)), rng.normal(size=(n, 3, 5)))}
    return x, ftw.combine(x, np.maximum(rng.normal(size=n), 0)), {"w": ftw.Diagonal(rng.uniform(0.5, 2, size=(5, 4)))}


@pytest.mark.parametrize("name", ["numpy", "strict", "torch"])
def test_the_choice_obeys_shares_of_the_pool(name, rng):
    xp = BACKENDS[name]
    x, g, p = model(rng)
    b = ftw.scores(x, g, p)
    sources = np.where(b <= np.sort(b)[1], 1, 0)  # the two worst

    def call(x, g, p, s):
        return ftw.filter_then_weight(x, g, p, keep=4, constraint=SourceShares(s, (0, 0.25), (0.7, None)))

    out = xp.call(call, x, g, p, sources)
    w, picks = xp.numpy(out.weights), xp.numpy(out.indices)
    assert int(out.status) == Status.OK
    share = w[sources[picks] == 1].sum()
    assert share >= 0.3 - 1e-12  # the cap of the others asks for more than the floor
    assert abs(w.sum() - 1) < 1e-12
    # the weights are those of the scaled target over the set, by a general solver
    import explicit

    G, P = explicit.flat(x), explicit.metric(x, p)
    K = (G @ P @ G.T)[np.ix_(picks, picks)]
    H = K + 0.05 * np.mean(np.diag(K)) * np.eye(4)
    free = ref.solve_qp(H, b[picks], ref.NonNegative()).weights.sum()
    assert_allclose(w, general(H, b[picks] / free, SourceShares(sources[picks], (0, 0.25), (0.7, None))), atol=1e-8)


def test_what_the_pool_holds_is_never_infeasible(rng):
    x, g, p = model(rng)
    for seed in range(30):
        r = np.random.default_rng(seed)
        sources = r.integers(0, 3, size=12)
        upper = r.uniform(0.2, 0.7, size=3)
        lower = np.minimum(r.uniform(0, 0.3, size=3), upper)
        there = np.isin(np.arange(3), sources)
        possible = upper[there].sum() >= 1 and lower.sum() <= 1 and there.all()
        for filter in ("matching", "top_k"):
            shares = SourceShares(sources, lower, upper)
            out = ftw.filter_then_weight(x, g, p, keep=3, shortlist=3, filter=filter, constraint=shares)
            assert (out.status == Status.OK) == possible


def test_relaxed_shares_go_as_far_as_they_can(rng):
    x, g, p = model(rng)
    sources = np.zeros(12, dtype=int)
    for shares, sums, relaxed in (
        (SourceShares(sources, (0.2, 0.4)), (1.0, 0.0), 1),
        (SourceShares(sources, None, (0.5, 0.5)), (1.0, 0.0), 1),
        (SourceShares(np.arange(12) % 2, (0.8, 0.8)), (0.5, 0.5), 2),
        (SourceShares(np.arange(12) % 2, (0.9, 0.0), (0.2, 1.0)), (0.9, 0.1), 1),
    ):
        for weight in ("qp", "uniform"):
            options = {"keep": 4, "constraint": shares, "weight": weight}
            assert ftw.filter_then_weight(x, g, p, **options).status == Status.INFEASIBLE
            out = ftw.filter_then_weight(x, g, p, fill="relax", **options)
            assert out.status == Status.OK
            got = [out.weights[shares.sources[out.indices] == s].sum() for s in range(2)]
            if weight == "qp" and relaxed == 1 and sums[1] == 0.1:
                assert got[0] >= 0.9 - 1e-12
            else:
                assert_allclose(got, sums, atol=1e-9)
            assert out.relaxed == relaxed


def test_a_quota_on_the_same_sources_joins_the_floors(rng):
    x, g, p = model(rng)
    b = ftw.scores(x, g, p)
    sources = np.argsort(np.argsort(-b)) // 6
    quota = ftw.Quota(sources, None, (3, None))
    out = ftw.filter_then_weight(x, g, p, keep=4, quota=quota, constraint=SourceShares(sources, (0.5, 0.2)))
    assert out.status == Status.OK
    assert np.sum(sources[out.indices] == 0) <= 3
    assert out.weights[sources[out.indices] == 1].sum() >= 0.2 - 1e-12
    assert out.relaxed == 0


def test_samples_that_do_not_pass_have_no_weight(rng):
    x, g, p = model(rng)
    sources = np.arange(12) % 2

    def two(scores, gram, k):
        return ftw.filters.top_k(scores, k)._replace(count=np.int32(2))

    quota = ftw.Quota(sources, (1, 1))
    out = ftw.filter_then_weight(x, g, p, keep=4, filter=two, quota=quota, constraint=SourceShares(sources, (0.3, 0.3)))
    assert out.status == Status.OK
    assert np.all(out.weights[int(out.count) :] == 0)


def test_a_floor_of_samples_that_do_not_pass_is_infeasible(rng):
    x, g, p = model(rng)
    order = np.argsort(-ftw.scores(x, g, p))
    sources = np.zeros(12, dtype=int)
    sources[order[2]] = 1  # kept, but not let pass

    def two(scores, gram, k):
        return ftw.filters.top_k(scores, k)._replace(count=np.int32(2))

    options = {"keep": 3, "filter": two, "quota": ftw.Quota(0 * sources, (0,))}  # over other sources: it adds no floor
    shares = SourceShares(sources, (0.0, 0.3))
    assert ftw.filter_then_weight(x, g, p, constraint=shares, **options).status == Status.INFEASIBLE
    out = ftw.filter_then_weight(x, g, p, constraint=shares, fill="relax", **options)
    assert (out.status, out.relaxed, out.weights[2]) == (Status.OK, 1, 0.0)
