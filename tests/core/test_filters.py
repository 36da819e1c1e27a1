"""The filters, each against its formula, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from backends import BACKENDS
from numpy.testing import assert_allclose
from test_selection import brute_greedy, brute_matching

import ftw
from ftw import filters

ALL = list(BACKENDS)
EAGER = ["numpy", "strict", "torch"]


@pytest.fixture
def bk(rng):
    """Scores and a Gram matrix of 12 gradients in 20 dimensions."""
    G = rng.normal(size=(12, 20))
    return G @ (G[:5].sum(axis=0) + rng.normal(size=20)), G @ G.T


def run(xp, function, *arrays):
    out = xp.call(function, *arrays)
    return xp.numpy(out.indices).tolist(), int(out.count)


def test_top_k_breaks_ties_by_index(xp):
    b = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 3.0, 2.0])
    assert run(xp, lambda b: filters.top_k(b, 6), b) == ([1, 3, 5, 2, 6, 0], 6)


def test_top_k_puts_nan_last(xp):
    b = np.array([np.nan, 1.0, np.inf, np.nan, -np.inf])
    assert run(xp, lambda b: filters.top_k(b, 5), b) == ([2, 1, 4, 0, 3], 3)


def test_threshold(xp, bk):
    b, _ = bk

    def both(b):
        return filters.threshold(b, 4, value=1.5), filters.threshold(b, 12, quantile=0.3)

    by_value, by_quantile = xp.call(both, b)
    order = np.argsort(-b, kind="stable")
    assert xp.numpy(by_value.indices).tolist() == order[:4].tolist()
    assert int(by_value.count) == min(4, int((b >= 1.5).sum()))
    assert int(by_quantile.count) == int((b >= np.quantile(b, 0.3)).sum())
    for q in (0.0, 1.0):
        assert int(filters.threshold(b, 12, quantile=q).count) == (12 if q == 0 else 1)


def test_a_score_equal_to_the_value_passes():
    assert filters.threshold(np.array([1.0, 2.0, 3.0]), 3, value=2.0).count == 2


@pytest.mark.parametrize("name", ALL)
def test_matching(name, bk):
    b, K = bk
    xp = BACKENDS[name]
    for k in (1, 5) if name in EAGER else (4,):
        picks, count = run(xp, lambda b, K, k=k: filters.matching(b, K, k), b, K)
        assert picks == brute_matching(b.copy(), K, k, 0.05)
        assert count == k
    if name in EAGER:
        picks, _ = run(xp, lambda b, K: filters.matching(b, K, 12, ridge=0.5), b, K)
        assert picks == brute_matching(b.copy(), K, 12, 0.5)


def test_matching_does_not_take_copies_first(rng):
    g = np.linalg.qr(rng.normal(size=(8, 3)))[0].T
    G = np.concatenate([g[:1], g[:1], g[1:]])
    b = G @ (2 * g[0] + g[1])
    assert filters.top_k(b, 2).indices.tolist()[:2] == [0, 1]
    assert 2 in filters.matching(b, G @ G.T, 2).indices.tolist()


def test_greedy_utility(xp, bk):
    b, K = bk
    for k in (1, 5, 12) if xp.name in EAGER else (5,):
        picks, count = run(xp, lambda b, K, k=k: filters.greedy_utility(b, K, k), b, K)
        assert (picks, count) == (brute_greedy(b, K, k), k)


def test_greedy_utility_without_redundancy_is_top_k(bk):
    b, K = bk
    plain = filters.greedy_utility(b, K, 6, redundancy=0.0).indices.tolist()
    assert plain == filters.top_k(b, 6).indices.tolist()


def test_boltzmann(xp, bk, rng):
    b, _ = bk
    u = rng.uniform(size=12)
    picks, count = run(xp, lambda b, u: filters.boltzmann(b, 5, temperature=0.7, uniforms=u), b, u)
    level = b / b.std() / 0.7 - np.log(-np.log(u))
    assert picks == np.argsort(-level, kind="stable")[:5].tolist()
    assert count == 5


def test_boltzmann_draws_in_proportion(rng):
    b = np.array([0.0, 1.0, 2.0, -1.0])
    draws = [filters.boltzmann(b, 1, temperature=1.0, uniforms=rng.uniform(size=4)).indices[0] for _ in range(4000)]
    p = np.exp(b / b.std())
    assert_allclose(np.bincount(draws, minlength=4) / 4000, p / p.sum(), atol=0.03)
    cold = filters.boltzmann(b, 4, temperature=1e-9, uniforms=rng.uniform(size=4))
    assert cold.indices.tolist() == [2, 1, 0, 3]
    hot = [filters.boltzmann(b, 1, temperature=1e9, uniforms=rng.uniform(size=4)).indices[0] for _ in range(4000)]
    assert_allclose(np.bincount(hot, minlength=4) / 4000, 0.25, atol=0.03)


def test_boltzmann_takes_extreme_scores_and_uniforms():
    for b in (np.array([1e300, -1e300, 0.0]), np.zeros(3), np.full(3, -1e6)):
        for u in (np.zeros(3), np.full(3, 1 - 2**-53)):
            out = filters.boltzmann(b, 3, temperature=0.1, uniforms=u)
            assert sorted(out.indices.tolist()) == [0, 1, 2]
            assert out.count == 3


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_gradients_changes_no_pick(name, factor, bk, rng):
    b, K = bk
    u = rng.uniform(size=12)
    for dtype in (np.float64, np.float32):
        for choose in (
            lambda b, K, u: filters.top_k(b, 6),
            lambda b, K, u: filters.threshold(b, 6, quantile=0.5),
            lambda b, K, u: filters.matching(b, K, 6),
            lambda b, K, u: filters.greedy_utility(b, K, 6),
            lambda b, K, u: filters.boltzmann(b, 6, temperature=0.5, uniforms=u),
        ):
            # candidates and target by the factor; the candidates alone
            one = run(BACKENDS[name], choose, b.astype(dtype), K.astype(dtype), u.astype(dtype))
            for c, d in ((factor**2, factor**2), (factor, factor**2)):
                assert run(BACKENDS[name], choose, (b * c).astype(dtype), (K * d).astype(dtype), u.astype(dtype)) == one


def test_resample(xp, rng):
    w = np.array([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    u = np.append(rng.uniform(size=2000), [0.0, 1 - 2**-53])
    drawn = xp.numpy(xp.call(lambda w, u: ftw.resample(w, 2002, u), w, u))
    assert_allclose(np.bincount(drawn, minlength=6) / 2002, w / 4, atol=0.04)
    assert set(drawn.tolist()) == {1, 3, 4}
    assert drawn[-2:].tolist() == [1, 4]


def test_resample_in_float32_draws_no_sample_of_zero_weight(rng):
    w = rng.uniform(size=1000).astype(np.float32)
    w[::2] = 0
    w[-1] = 0
    drawn = ftw.resample(w, 5000, np.append(rng.uniform(size=4999), 1 - 1e-8).astype(np.float32))
    assert np.all(w[drawn] > 0)


def test_one_candidate_and_all_of_them(xp):
    b, K = np.array([-1.0]), np.array([[0.0]])
    assert run(xp, lambda b, K: filters.matching(b, K, 1), b, K) == ([0], 1)
    assert run(xp, lambda b, K: filters.greedy_utility(b, K, 1), b, K) == ([0], 1)


@pytest.mark.parametrize("name", ["matching", "greedy_utility"])
@pytest.mark.parametrize("backend", EAGER)
def test_nan_in_the_gram_matrix_does_not_raise(backend, name):
    xp, b, K = BACKENDS[backend], np.array([1.0, 2.0, np.nan, 0.5]), np.eye(4)
    K[2] = K[:, 2] = np.nan
    picks, _ = run(xp, lambda b, K: getattr(filters, name)(b, K, 3), b, K)
    assert len(set(picks)) == 3
    assert set(picks) <= {0, 1, 2, 3}
