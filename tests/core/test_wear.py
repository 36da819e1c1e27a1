"""Wear: the shared part against regressions written out, the ridge that it gives, and the count of uses."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import ftw
from ftw import wear
from ftw.uses import Uses


def predicted(G):
    """R by a ridge regression of each unit gradient on the others, over the coordinates."""
    U = G / np.linalg.norm(G, axis=1, keepdims=True)
    out = []
    for i in range(len(U)):
        others = np.delete(U, i, axis=0)  # (o, p)
        # the dual of ridge regression: coefficients a minimise |u - others' a|^2 + 0.05 |a|^2
        rows = np.concatenate([others.T, np.sqrt(0.05) * np.eye(len(others))])
        a = np.linalg.lstsq(rows, np.concatenate([U[i], np.zeros(len(others))]), rcond=None)[0]
        left = np.sum((U[i] - others.T @ a) ** 2) + 0.05 * a @ a
        out.append((1 - left) / 1.05)
    return np.median(out)


@pytest.mark.parametrize("lean", [0.0, 0.6, 1.0, 3.0])
def test_shared_is_what_regressions_on_the_others_explain(lean):
    rng = np.random.default_rng(int(10 * lean))
    G = rng.normal(size=(8, 60)) + lean * rng.normal(size=60)
    assert_allclose(wear.shared(G @ G.T), predicted(G), rtol=1e-10, atol=1e-12)


def test_scale_and_a_few_copies_do_not_move_it():
    rng = np.random.default_rng(3)
    G = rng.normal(size=(12, 400))
    plain = float(wear.shared(G @ G.T))
    scaled = G * rng.lognormal(size=(12, 1))
    assert_allclose(wear.shared(scaled @ scaled.T), plain, rtol=1e-10)
    G[1] = G[2] = G[0]
    assert float(wear.shared(G @ G.T)) < plain + 0.02
    assert float(wear.shared(np.zeros((3, 3)))) == 0.0
    assert float(wear.shared(np.array([[4.0]]))) == 0.0


def test_the_ridge_grows_by_use_where_little_is_shared_and_stays_where_much_is():
    rng = np.random.default_rng(4)
    apart, alike = rng.normal(size=(6, 5000)), rng.normal(size=(6, 50)) + 5 * rng.normal(size=50)
    assert_allclose(wear.ridge(0.05, 7.0, apart @ apart.T), 0.05 * 8)
    assert_allclose(wear.ridge(0.05, 7.0, alike @ alike.T), 0.05)
    halfway = np.full((2, 2), np.sqrt(0.375 * 1.05 * 1.05)) + np.diag([1 - np.sqrt(0.375 * 1.05 * 1.05)] * 2)
    assert_allclose(wear.shared(halfway), 0.375, rtol=1e-12)  # c^2 / 1.05^2 of two
    assert_allclose(wear.ridge(0.1, 4.0, halfway), 0.1 * (1 + 0.5 * 4))


def a_choice(**options):
    rng = np.random.default_rng(5)
    G, t = rng.normal(size=(10, 40)), rng.normal(size=40)
    G += 0.4 * t
    return ftw.filter_then_weight({"w": ftw.Dense(G)}, {"w": t}, {"w": ftw.Scale(1.0)}, keep=4, **options), G


@pytest.mark.parametrize("shortlist", [None, 6])
def test_the_choice_takes_the_ridge_of_its_shortlist(shortlist):
    worn, G = a_choice(uses=20.0, shortlist=shortlist)
    fresh, _ = a_choice(shortlist=shortlist)
    short = np.sort(np.argsort(-fresh.scores, kind="stable")[: shortlist or 10])
    ridge = float(wear.ridge(0.05, 20.0, G[short] @ G[short].T))
    assert ridge > 0.3
    same, _ = a_choice(ridge=ridge, shortlist=shortlist)
    assert_array_equal(worn.indices, same.indices)
    assert_allclose(worn.weights, same.weights, rtol=1e-10)
    assert float(worn.effective_size) > float(fresh.effective_size)


@pytest.mark.parametrize(("uses", "error"), [(-1, ValueError), (float("inf"), ValueError), ("3", TypeError)])
def test_uses_must_be_a_count(uses, error):
    with pytest.raises(error, match="uses"):
        a_choice(uses=uses)


def test_uses_are_counted_sample_by_sample():
    uses = Uses()
    assert uses.note([]) == 0
    assert uses.note(["a", "b"]) == 0
    assert uses.note(["a", "c"]) == 0.5
    assert uses.note(["a", "a"]) == 2
    again = Uses()
    again.load_state_dict(uses.state_dict())
    assert again.note(["a", "b", "c", "d"]) == uses.note(["a", "b", "c", "d"])
    short = Uses(limit=2)
    short.note(["a", "b"])
    short.note(["a"])
    short.note(["c"])  # b has not come for longest
    assert short.note(["a"]) == 2
    assert short.note(["b"]) == 0
    with pytest.raises(ValueError, match="limit=0"):
        Uses(limit=0)
