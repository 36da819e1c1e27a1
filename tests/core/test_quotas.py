"""Quotas against every subset, in each filter, on every backend."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import ftw
from ftw import Quota, Status, filters

N, M = 10, 3
SOURCES = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, -1])


def counts(picks, sources=SOURCES, m=M):
    return np.array([np.sum(sources[np.asarray(picks)] == s) for s in range(m)])


def obeys(picks, low, high, sources=SOURCES):
    got = counts(picks, sources, len(low))
    return bool(np.all(got >= low) and np.all(got <= high))


def best_subset(b, k, low, high, sources=SOURCES):
    """The subset of the largest sum of scores that obeys the bounds, None for none: every subset is tried."""
    allowed = [s for s in itertools.combinations(range(len(b)), k) if obeys(s, low, high, sources)]
    return max(allowed, key=lambda s: sum(b[list(s)]), default=None)


def brute_pick(value, k, low, high, sources=SOURCES):
    """Pick one at a time the largest ``value(picks)`` among the candidates from which some whole choice is left."""
    sets = [set(s) for s in itertools.combinations(range(len(sources)), k) if obeys(s, low, high, sources)]
    picks = []
    for _ in range(k):
        v = value(picks)
        left = {i for s in sets if set(picks) <= s for i in s if i not in picks}
        picks.append(max(sorted(left), key=lambda i: v[i]))
    return picks


def problem(rng, n=N):
    G = rng.normal(size=(n, 16))
    return G @ (G[:4].sum(axis=0) + rng.normal(size=16)), G @ G.T


def residual(b, K, picks):
    from test_selection import nnls

    part = K[np.ix_(picks, picks)]
    return b - K[:, picks] @ nnls(part, b[picks], 0.05 * np.mean(np.diag(part)) if picks else 0.0)


def utility(b, K, k, picks):
    top = np.argsort(-b, kind="stable")[:k]
    eta = max(b[top].sum(), 0) / K[np.ix_(top, top)].sum()
    return b - eta * (np.diag(K) / 2 + K[:, picks].sum(axis=1))


BOUNDS = [((2, 0, 1), (None, 1, None)), ((0, 3, 2), None), (None, (1, 1, 2)), ((0.2, 0.4, 0.0), (0.6, 1.0, 0.2))]


def as_counts(bounds, k, free):
    if bounds is None:
        return np.full(M, free)
    up = free == 0
    whole = [free if x is None else x * k if isinstance(x, float) else x for x in bounds]
    return np.array([int(np.ceil(x - 1e-9) if up else np.floor(x + 1e-9)) for x in whole])


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("name", ["top_k", "greedy_utility", "matching"])
def test_every_filter_picks_the_best_that_obeys(xp, rng, name, bounds):
    if xp.name == "jax" or (xp.name == "jit" and bounds is not BOUNDS[0]):
        pytest.skip("compiles long")
    b, K = problem(rng)
    k = 5
    low, high = as_counts(bounds[0], k, 0), as_counts(bounds[1], k, k)
    inputs = (b,) if name == "top_k" else (b, K)

    def call(sources, *inputs):
        return getattr(filters, name)(*inputs, k, quota=Quota(sources, *bounds))

    out = xp.call(call, SOURCES, *inputs)
    picks = xp.numpy(out.indices).tolist()
    assert int(out.count) == k
    if name == "top_k":
        assert set(picks) == set(best_subset(b, k, low, high))
        assert picks == sorted(picks, key=lambda i: -b[i])
    else:
        value = functools.partial(residual, b, K) if name == "matching" else functools.partial(utility, b, K, k)
        assert picks == brute_pick(value, k, low, high)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-1, 2), min_size=4, max_size=8),
    st.integers(1, 4),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_feasible_exactly_where_some_subset_obeys(sources, k, low, high, seed):
    sources = np.array(sources)
    b, K = problem(np.random.default_rng(seed), len(sources))
    best = best_subset(b, k, low, high, sources)
    quota = Quota(sources, tuple(low), tuple(high))
    for out in (
        filters.top_k(b, k, quota=quota),
        filters.matching(b, K, k, quota=quota),
        filters.greedy_utility(b, K, k, quota=quota),
        filters.threshold(b, k, quantile=0.0, quota=quota),
        filters.boltzmann(b, k, temperature=1.0, uniforms=np.full(len(b), 0.5), quota=quota),
    ):
        assert len(set(out.indices.tolist())) == k
        assert out.count == (0 if best is None else k)
        assert best is None or obeys(out.indices, low, high, sources)
    if best is not None:
        assert set(filters.top_k(b, k, quota=quota).indices.tolist()) == set(best)


def test_a_floor_is_obeyed_as_far_as_there_are_candidates(rng):
    b, K = problem(rng)
    for quota in (Quota(SOURCES, (0, 0, 3)), Quota(SOURCES, (0, 2, 2), (1, 1, 1)), Quota(SOURCES, None, (1, 0, 0))):
        for out in (
            filters.top_k(b, 4, quota=quota),
            filters.matching(b, K, 4, quota=quota),
            filters.greedy_utility(b, K, 4, quota=quota),
        ):
            assert out.count == 0
            got = counts(out.indices)
            if quota.at_least is not None:
                assert got[2] == 2
            else:
                assert 9 in out.indices


def test_a_threshold_lets_a_floor_pass(xp):
    b = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])

    def call(b, s):
        return filters.threshold(b, 4, value=7.5, quota=Quota(s, (0, 0, 1), (None, None, 1)))

    out = xp.call(call, b, SOURCES)
    assert (xp.numpy(out.indices).tolist(), int(out.count)) == ([0, 1, 7, 2], 3)


def test_boltzmann_draws_within_the_quota(rng):
    b, _ = problem(rng)
    for _ in range(50):
        out = filters.boltzmann(
            b, 4, temperature=5.0, uniforms=rng.uniform(size=N), quota=Quota(SOURCES, (1, 1, 1), (2, 1, 2))
        )
        assert obeys(out.indices, (1, 1, 1), (2, 1, 2))


def test_fractions_are_obeyed_exactly():
    b = np.arange(10.0)
    third = 1 / 3
    quota = Quota(np.arange(10) % 3, (third,) * 3)
    assert filters.top_k(b, 9, quota=quota).count == 9
    assert filters.top_k(b, 8, quota=quota).count == 0  # a third of 8, rounded up, three times
    quota = Quota(np.arange(10) % 3, None, np.array([0.3, 1.0, 1.0]))
    assert counts(filters.top_k(b, 8, quota=quota).indices, np.arange(10) % 3)[0] == 2


# ---------------------------------------------------------------------------------------------------------------------
# In the whole choice


def model(rng, n=N):
    x = {"w": ftw.OuterProduct(rng.normal(size=(n, 3, 4)), rng.normal(size=(n, 3, 5)))}
    g = ftw.combine(x, np.maximum(rng.normal(size=n), 0))
    return x, g, {"w": ftw.Diagonal(rng.uniform(0.5, 2, size=(5, 4)))}


def few(scores, gram, k):
    out = filters.top_k(scores, k)
    return out._replace(count=out.count - 2)


def noisy(scores, gram, k):
    return filters.top_k(-scores, k)


@pytest.mark.parametrize(
    "filter", ["matching", "top_k", "greedy_utility", few, noisy], ids=lambda f: getattr(f, "__name__", f)
)
def test_the_choice_obeys_from_any_shortlist(xp, rng, filter):
    x, g, p = model(rng)
    b = ftw.scores(x, g, p)
    rare = np.where(b == b.min(), 1, 0)  # the worst candidate is the only one of its source

    if xp.name == "jax" or (xp.name == "jit" and filter not in ("top_k", few)):
        pytest.skip("compiles long")

    def call(x, g, p, s, shortlist):
        return ftw.filter_then_weight(
            x, g, p, keep=4, filter=filter, shortlist=shortlist, quota=Quota(s, (0, 1), (3, 1))
        )

    for shortlist in (4, 6, None)[: 1 if xp.name in ("jax", "jit") else 3]:
        out = xp.call(functools.partial(call, shortlist=shortlist), x, g, p, rare)
        assert counts(xp.numpy(out.indices), rare, 2).tolist() == [3, 1]
        assert int(out.status) in (Status.OK, Status.NOTHING_USEFUL)
        assert int(out.relaxed) == 0
        assert int(out.count) == (4 if filter is not few else 3)


def test_a_shortlist_keeps_the_proportions_of_the_quota(rng):
    x, g, p = model(rng, 24)
    b = ftw.scores(x, g, p)
    sources = (np.argsort(np.argsort(-b)) >= 12).astype(int)  # the worse half
    seen = []

    def spy(scores, gram, k):
        seen.append(scores)
        return filters.top_k(scores, k)

    ftw.filter_then_weight(x, g, p, keep=4, filter=spy, shortlist=12, quota=Quota(sources, (0, 2)), ridge=0.1)
    worse = np.sort(b[sources == 1])[::-1]
    assert set(worse[:6]) <= set(seen[0])  # half of the places, half of the shortlist
    assert worse[6] not in seen[0]


@pytest.mark.parametrize(
    ("low", "high"), [((0, 0, 3), None), ((2, 2, 2), None), (None, (1, 0, 0)), ((2, 0, 0), (1, 4, 4))], ids=str
)
def test_bounds_that_cannot_be_filled(xp, rng, low, high):
    x, g, p = model(rng)
    if xp.name == "jax" or (xp.name == "jit" and low != (0, 0, 3)):
        pytest.skip("compiles long")

    def call(x, g, p, s):
        options = {"keep": 4, "quota": Quota(s, low, high), "filter": "top_k"}
        return ftw.filter_then_weight(x, g, p, **options), ftw.filter_then_weight(x, g, p, fill="relax", **options)

    out, relaxed = xp.call(call, x, g, p, SOURCES)
    assert int(out.status) == Status.INFEASIBLE
    assert np.isnan(xp.numpy(out.weights)).all()
    assert int(relaxed.status) == Status.OK
    assert abs(xp.numpy(relaxed.weights).sum() - 1) < 1e-12
    got = counts(xp.numpy(relaxed.indices))
    missed = (got < (low or (0, 0, 0))) | (got > (high or (4, 4, 4)))
    assert int(relaxed.relaxed) == missed.sum() > 0
    assert_array_equal(xp.numpy(out.indices), xp.numpy(relaxed.indices))


def test_bounds_may_be_arrays(xp, rng):
    b, _ = problem(rng)
    for low in (np.array([1, 0, 2]), np.array([0.2, 0.0, 0.4])):
        out = xp.call(lambda b, s, low: filters.top_k(b, 5, quota=Quota(s, low)), b, SOURCES, low)
        assert set(xp.numpy(out.indices)) == set(best_subset(b, 5, (1, 0, 2), (5, 5, 5)))


def test_a_source_beyond_the_bounds_is_an_error_or_under_jit_a_status(rng):
    import jax

    x, g, p = model(rng)
    with pytest.raises(ValueError, match=r"Quota\.sources must lie in 0 \.\. 1 .* got -1 \.\. 2"):
        ftw.filter_then_weight(x, g, p, keep=4, quota=Quota(SOURCES, (1, 1)))

    def call(x, g, p, s):
        return ftw.filter_then_weight(x, g, p, keep=4, filter="top_k", weight="uniform", quota=Quota(s, (1, 1)))

    assert int(jax.jit(call)(x, g, p, SOURCES).status) == Status.INFEASIBLE


@pytest.mark.parametrize(
    ("quota", "error", "says"),
    [
        (Quota(SOURCES), ValueError, "no bounds: give at_least= or at_most="),
        (Quota(SOURCES, (1, 1), (1, 1, 1)), ValueError, "of 2 and 3 sources"),
        (Quota(SOURCES[:-1], (1, 1, 1)), ValueError, r"\(9,\) must be \(10,\)"),
        (Quota(SOURCES * 1.0, (1, 1, 1)), TypeError, "integer array"),
        (Quota(SOURCES, (1.5, 0, 0)), ValueError, r"at_least\[0\] = 1.5 as a fraction must lie in \[0, 1\]"),
        (Quota(SOURCES, (-1, 0, 0)), ValueError, r"at_least\[0\] = -1 must not be negative"),
        (Quota(SOURCES, (True, 0, 0)), TypeError, "an int, a float or None"),
        (Quota(SOURCES, 2), TypeError, "one bound a source, got int"),
        ((SOURCES, (1, 0, 0)), TypeError, "must be ftw.Quota"),
    ],
)
def test_what_is_wrong_is_named(rng, quota, error, says):
    x, g, p = model(rng)
    with pytest.raises(error, match=says):
        ftw.filter_then_weight(x, g, p, keep=4, quota=quota)
    with pytest.raises(ValueError, match="fill='drop' must be 'raise' or 'relax'"):
        ftw.filter_then_weight(x, g, p, keep=4, fill="drop")


def test_without_a_quota_nothing_changes(rng):
    x, g, p = model(rng)
    loose = Quota(SOURCES, (0, 0, 0))
    for options in ({}, {"filter": "top_k", "shortlist": 6}, {"filter": few, "weight": "uniform"}):
        one = ftw.filter_then_weight(x, g, p, keep=4, **options)
        two = ftw.filter_then_weight(x, g, p, keep=4, quota=loose, **options)
        assert_array_equal(one.indices, two.indices)
        assert_array_equal(one.weights, two.weights)
        assert one.relaxed is None
