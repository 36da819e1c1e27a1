"""The projections against first principles, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ftw.constraints import Box, CappedSimplex, NonNegative, Simplex, project

SETS = {
    "nonnegative": NonNegative(),
    "simplex": Simplex(2.0),
    "capped": CappedSimplex(0.5, 2.0),
    "box": Box(-0.5, 0.25),
}
numbers = st.floats(-10, 10, allow_subnormal=False)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bounds(constraint, n):
    """Return lower, upper (n,) and the total (None for none)."""
    if isinstance(constraint, Box):
        return np.broadcast_to(constraint.lower, n), np.broadcast_to(constraint.upper, n), None
    cap = constraint.cap if isinstance(constraint, CappedSimplex) else np.inf
    return np.zeros(n), np.broadcast_to(cap, n), getattr(constraint, "total", None)


def by_bisection(v, constraint, metric):
    """Return the nearest point by bisection on the multiplier of the sum."""
    lower, upper, total = bounds(constraint, len(v))
    if total is None:
        return np.clip(v, lower, upper)
    low, high = -1e6, 1e6
    for _ in range(200):
        middle = 0.5 * (low + high)
        above = np.clip(v - middle / metric, lower, upper).sum() > total
        low, high = (middle, high) if above else (low, middle)
    return np.clip(v - low / metric, lower, upper)


@pytest.mark.parametrize("name", SETS)
@quick
@given(v=arrays(float, st.integers(4, 9), elements=numbers), seed=st.integers(0, 99), weighted=st.booleans())
def test_is_the_nearest_point(name, v, seed, weighted):
    constraint = SETS[name]
    metric = np.exp(np.random.default_rng(seed).normal(size=len(v))) if weighted else np.ones(len(v))
    w = project(constraint, v, metric=metric if weighted else None)
    np.testing.assert_allclose(w, by_bisection(v, constraint, metric), atol=1e-9)
    lower, upper, total = bounds(constraint, len(v))
    assert (w >= lower).all()
    assert (w <= upper).all()
    if total is not None:
        assert abs(w.sum() - total) <= 1e-12 * total


@pytest.mark.parametrize("name", SETS)
def test_agrees_on_every_backend_and_in_batches(xp, rng, name):
    v = rng.normal(size=(2, 3, 8))
    metric = np.exp(rng.normal(size=(2, 3, 8)))
    w = xp.numpy(xp.call(lambda v, m: project(SETS[name], v, metric=m), v, metric))
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(w[i], by_bisection(v[i], SETS[name], metric[i]), atol=1e-9)


def test_twice_is_once_and_far_points_keep_the_sum(rng):
    for constraint in SETS.values():
        w = project(constraint, 1e8 * rng.normal(size=12))
        np.testing.assert_allclose(project(constraint, w), w, atol=1e-12)
        if hasattr(constraint, "total"):
            assert abs(w.sum() - constraint.total) <= 1e-12 * constraint.total


def test_a_cap_for_each_weight_and_float32(rng):
    cap = np.array([0.1, 0.2, 0.3, np.inf, 0.0])
    w = project(CappedSimplex(cap, 1.0), rng.normal(size=5))
    np.testing.assert_allclose(
        w, by_bisection(rng.normal(size=5) * 0 + w, CappedSimplex(cap, 1.0), np.ones(5)), atol=1e-12
    )
    assert (w <= cap).all()
    assert project(Simplex(np.float64(1.0)), rng.normal(size=5).astype(np.float32)).dtype == np.float32


def test_tight_sets_have_their_one_point():
    np.testing.assert_allclose(project(CappedSimplex(0.1, 1.0), np.arange(10.0)), 0.1)
    np.testing.assert_allclose(project(Box(0.3, 0.3), np.arange(3.0)), 0.3)
    np.testing.assert_array_equal(project(Simplex(0.0), np.arange(3.0)), 0.0)


@pytest.mark.parametrize("empty", [CappedSimplex(0.1, 2.0), Simplex(-1.0), Box(1.0, 0.0), CappedSimplex(-1.0, 0.0)])
def test_an_empty_set_gives_nan(xp, empty):
    assert np.isnan(xp.numpy(xp.call(lambda v: project(empty, v), np.ones(4)))).all()


def test_what_is_not_a_set_is_refused():
    with pytest.raises(TypeError, match="NonNegative"):
        project("simplex", np.ones(3))
    with pytest.raises(TypeError, match=r"write Simplex\(\.\.\.\)"):
        project(Simplex, np.ones(3))
    with pytest.raises(ValueError, match=r"cap.*\(4,\).*\(3,\)"):
        project(CappedSimplex(np.ones(4)), np.ones(3))
    with pytest.raises(TypeError, match="float"):
        project(Simplex(), np.ones(3, dtype=int))
