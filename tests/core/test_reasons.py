"""Reasons against the definitions, from explicit gradients, on every backend."""

from __future__ import annotations

import explicit
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_selection import nnls

import ftw
from ftw import Quota, Reason

N = 12


@pytest.fixture
def problem(rng):
    """Twelve candidates; 7 is a copy of 2, which leans toward the target."""
    x = {"w": ftw.OuterProduct(rng.normal(size=(N, 3, 4)), rng.normal(size=(N, 3, 5)))}
    x = ftw.take(x, np.array([0, 1, 2, 3, 4, 5, 6, 2, 8, 9, 10, 11]))
    w = np.maximum(rng.normal(size=N), 0)
    w[2] = 3.0
    return x, ftw.combine(x, w), {"w": ftw.Diagonal(rng.uniform(0.5, 2, size=(5, 4)))}


def explain(xp, problem, **options):
    def call(x, g, p):
        return ftw.filter_then_weight(x, g, p, explain=True, **options)

    out = xp.call(call, *problem)
    return xp.numpy(out.indices), xp.numpy(out.weights), [xp.numpy(r) for r in out.reasons]


def numbers(problem):
    x, g, p = problem
    G, P = explicit.flat(x), explicit.metric(x, p)
    return G @ P @ g["w"].reshape(-1), G @ P @ G.T


@pytest.mark.parametrize("shortlist", [None, 8])
def test_matching(xp, problem, shortlist):
    if xp.name == "jax" or (xp.name == "jit" and shortlist is None):
        pytest.skip("compiles long")
    b, K = numbers(problem)
    picks, _, (code, residual, rival, similarity) = explain(xp, problem, keep=4, shortlist=shortlist)
    short = np.argsort(-b, kind="stable")[: shortlist or N]
    expected = np.full(N, Reason.REFUSED_SCORE)
    expected[short] = Reason.REFUSED_REDUNDANT
    expected[short[b[short] <= 0]] = Reason.REFUSED_HARMFUL
    expected[picks] = Reason.PICKED
    assert_array_equal(code, expected)
    assert code.dtype == np.int32
    part = K[np.ix_(picks, picks)]
    left = b - K[:, picks] @ nnls(part, b[picks], 0.05 * np.mean(np.diag(part)))
    assert_allclose(residual[short], left[short], atol=1e-9 * abs(b).max())
    assert np.isnan(np.delete(residual, short)).all()
    cosines = K / np.sqrt(np.outer(np.diag(K), np.diag(K)))
    for i in range(N):
        if code[i] == Reason.REFUSED_REDUNDANT:
            assert rival[i] == picks[np.argmax(cosines[i, picks])]
            assert_allclose(similarity[i], cosines[i, rival[i]], rtol=1e-12)
        else:
            assert rival[i] == -1
            assert np.isnan(similarity[i])
    assert 2 in picks
    assert (rival[7], Reason(int(code[7]))) == (2, Reason.REFUSED_REDUNDANT)
    assert_allclose(similarity[7], 1.0, rtol=1e-12)


def test_top_k_refuses_by_score_and_forms_no_other_gram(xp, problem):
    if xp.name in ("jax", "jit"):
        pytest.skip("compiles long")
    b, K = numbers(problem)
    picks, _, (code, residual, rival, _) = explain(xp, problem, keep=4, filter="top_k", shortlist=8)
    short = np.argsort(-b, kind="stable")[:8]
    expected = np.full(N, Reason.REFUSED_SCORE)
    expected[short[b[short] <= 0]] = Reason.REFUSED_HARMFUL
    expected[picks] = Reason.PICKED
    assert_array_equal(code, expected)
    part = K[np.ix_(picks, picks)]
    left = b[picks] - part @ nnls(part, b[picks], 0.05 * np.mean(np.diag(part)))
    assert_allclose(residual[picks], left, atol=1e-9 * abs(b).max())
    assert np.isnan(np.delete(residual, picks)).all()
    assert (rival == -1).all()


def test_the_quota_is_a_reason(xp, problem):
    if xp.name in ("jax", "jit"):
        pytest.skip("compiles long")
    b, _ = numbers(problem)
    order = np.argsort(-b, kind="stable")
    sources = np.zeros(N, dtype=int)
    sources[order[4:]] = 1

    def call(x, g, p, s):
        options = {"keep": 3, "quota": Quota(s, None, (1, None)), "explain": True}
        return [
            ftw.filter_then_weight(x, g, p, filter="top_k", **options).reasons.code,
            ftw.filter_then_weight(x, g, p, filter="top_k", shortlist=4, **options).reasons.code,
            ftw.filter_then_weight(x, g, p, filter="greedy_utility", weight="uniform", **options).reasons.code,
        ]

    *by_score, greedy = map(xp.numpy, xp.call(call, *problem, sources))
    for code in by_score:
        assert code[order[0]] == Reason.PICKED
        assert (code[order[1:4]] == Reason.REFUSED_QUOTA).all()
    for code in (*by_score, greedy):
        assert sorted(code[sources == 0])[0] == Reason.PICKED
        assert np.sum(code[sources == 0] == Reason.REFUSED_QUOTA) >= 2
        assert (code[sources == 1] != Reason.REFUSED_QUOTA).all()


def test_a_sample_that_the_filter_does_not_let_pass(problem):
    def two(scores, gram, k):
        return ftw.filters.top_k(scores, k)._replace(count=np.int32(2))

    out = ftw.filter_then_weight(*problem, keep=4, filter=two, explain=True)
    assert out.reasons.code[out.indices].tolist() == [0, 0, 1, 1]
    assert set(out.reasons.rival.tolist()) <= {-1, *out.indices[:2].tolist()}


def test_uniform_weights_are_taken_at_their_best_length(problem):
    b, K = numbers(problem)
    out = ftw.filter_then_weight(*problem, keep=4, filter="greedy_utility", weight="uniform", explain=True)
    u = np.zeros(N)
    u[out.indices] = 0.25
    assert_allclose(out.reasons.residual, b - K @ u * (b @ u) / (u @ K @ u), atol=1e-9 * abs(b).max())


def test_a_candidate_that_is_not_finite_is_dropped(xp, problem):
    if xp.name in ("jax", "jit"):
        pytest.skip("compiles long")
    x, g, p = problem
    w = np.where(np.arange(N) == 5, np.nan, 1.0)[:, None, None]
    x = {"w": ftw.OuterProduct(x["w"].inputs, x["w"].output_grads * w)}
    _, _, (code, residual, _, _) = explain(xp, (x, g, p), keep=4)
    assert code[5] == Reason.DROPPED
    assert (np.delete(code, 5) != Reason.DROPPED).all()
    assert np.isnan(residual).all()


def test_no_second_gram_matrix_and_off_by_default(problem):
    calls = []
    b, K = numbers(problem)
    products = ftw.choice.Products(
        gram=lambda i: calls.append(i) or (K if i is None else K[np.ix_(i, i)]), length=None, target=np.float64(1.0)
    )
    plain = ftw.choice.choose(b, products, keep=4, shortlist=8)
    told = ftw.choice.choose(b, products, keep=4, shortlist=8, explain=True)
    assert len(calls) == 2
    assert plain.reasons is None
    assert_array_equal(plain.weights, told.weights)


def test_messages():
    assert all(reason.message for reason in Reason)
    assert [int(r) for r in Reason] == list(range(6))
