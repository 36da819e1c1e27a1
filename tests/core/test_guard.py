"""The guard's formula, for numbers and for arrays of every backend."""

from __future__ import annotations

import numpy as np
import pytest
from backends import BACKENDS
from numpy.testing import assert_allclose

from ftw import guard


def formula(target, samples, distance, m, cap=0.3, slope=2.0):
    if m == 1:
        return 0.0, np.inf
    v = (samples - target) / (m - 1)
    f = target / v
    return min(1.0, v / distance) * min(max(slope * (1 - f), 0.0), cap), f


CASES = [(0.5, 10.0, 3.0, 5), (0.5, 10.0, 0.1, 5), (1.9, 10.0, 3.0, 5), (3.0, 10.0, 3.0, 5), (0.5, 10.0, 3.0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_formula(xp, case):
    *values, m = case
    expected = formula(*values, m)
    assert_allclose(guard.shrinkage(*values, m), expected, rtol=1e-14)
    out = xp.call(lambda *v: guard.shrinkage(*v, m), *(np.asarray(x) for x in values))
    assert_allclose([xp.numpy(x) for x in out], expected, rtol=1e-14)


def test_cap_and_slope():
    assert guard.shrinkage(0.0, 10.0, 1.0, 5, cap=0.0)[0] == 0
    assert guard.shrinkage(0.0, 10.0, 1.0, 5, cap=1.0)[0] == 1
    assert_allclose(guard.shrinkage(1.5, 10.0, 1.0, 5, cap=1.0, slope=1.0), formula(1.5, 10.0, 1.0, 5, 1.0, 1.0))


def test_doubt_stands_for_james_and_steins_factor(xp):
    values = np.asarray(0.5), np.asarray(10.0), np.asarray(3.0)
    f = formula(*values, 5)[1]
    for doubt in (0.0, 0.4, 1.0):
        expected = (0.3 * doubt, f)
        assert_allclose(guard.shrinkage(*map(float, values), 5, doubt=doubt), expected, rtol=1e-12)
        out = xp.call(lambda *v: guard.shrinkage(*v[:3], 5, doubt=v[3]), *values, np.asarray(doubt))
        assert_allclose([xp.numpy(x) for x in out], expected, rtol=1e-12)


def unit(x):
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1)


def ridge_fit(G, t):
    """The share of t that a ridge regression on the rows of G explains, all of length one."""
    s = len(G)
    design = np.concatenate([unit(G).T, np.sqrt(0.05) * np.eye(s)])  # (p + s, s)
    goal = np.concatenate([unit(t), np.zeros(s)])  # (p + s,)
    return 1 - np.sum((goal - design @ np.linalg.lstsq(design, goal)[0]) ** 2)


def test_doubt_about_a_target_that_no_combination_explains(xp, rng):
    G = rng.normal(size=(6, 40)) * rng.lognormal(size=(6, 1))
    G[2], G[4] = 0, G[1]  # no direction: orthogonal to everybody; a copy
    apart = rng.normal(size=40)
    apart = unit(apart - np.linalg.pinv(G) @ (G @ apart))  # orthogonal to all
    seen = []
    for lean in (0.0, 0.13, 0.15, 0.17, 1.0):
        t = apart + lean * unit(G[0])
        seen.append(np.clip(2 - ridge_fit(G, t) / (0.006 * np.sqrt(6)), 0, 1))
        for scale in (1.0, 1e-15, 1e15):
            g, goal = G * scale, t * scale
            samples = np.mean(np.sum(g * g, axis=1))  # far from learned by heart
            out = xp.call(guard.doubt, g @ goal, g @ g.T, np.asarray(goal @ goal), np.asarray(samples))
            assert_allclose(xp.numpy(out), seen[-1], atol=1e-9)
    assert seen[0] == 1
    assert sum(0 < x < 1 for x in seen) >= 2
    assert seen[-1] == 0


def test_doubt_about_a_target_learned_by_heart(xp, rng):
    G = rng.normal(size=(6, 4))
    t = G[0] * 1e-3
    for left, expected in ((0.5, 0.0), (0.02, 0.0), (0.016, 0.4), (0.01, 1.0), (1e-9, 1.0)):
        samples = np.asarray(left * np.mean(np.sum(G * G, axis=1)))
        out = xp.call(guard.doubt, G @ t, G @ G.T, np.asarray(t @ t), samples)
        assert_allclose(xp.numpy(out), expected, atol=1e-9)
    one = np.ones(1), np.ones((1, 1)), np.asarray(1.0), np.asarray(1.0)
    assert xp.numpy(xp.call(guard.doubt, *one)) == 0  # the only candidate is the target
    nobody = np.zeros(2), np.zeros((2, 2)), np.asarray(1.0), np.asarray(1.0)
    assert xp.numpy(xp.call(guard.doubt, *nobody)) == 1


def test_scale_changes_nothing():
    one = guard.shrinkage(0.5, 10.0, 3.0, 5)
    for c in (1e-12, 1e12):
        assert_allclose(guard.shrinkage(0.5 * c, 10.0 * c, 3.0 * c, 5), one, rtol=1e-12)


@pytest.mark.parametrize("as_array", [float, np.asarray])
def test_degenerate_values(as_array):
    # identical targets: no variance, nothing memorised that shows; all zero; a pool that is the target
    for values, a in (((2.0, 2.0, 1.0), 0.0), ((0.0, 0.0, 0.0), 0.0), ((0.0, 1.0, 0.0), 0.3)):
        out, f = guard.shrinkage(*(as_array(v) for v in values), 4)
        assert out == a
        assert not np.isnan(f)
    out, f = guard.shrinkage(*(as_array(v) for v in (np.nan, 1.0, 1.0)), 4)
    assert np.isnan(f)


def test_float32_stays(rng):
    for name in ("numpy", "strict", "torch"):
        xp = BACKENDS[name]
        a, f = guard.shrinkage(*(xp.array(np.float32(v)) for v in (0.5, 10.0, 3.0)), 5)
        assert a.dtype == f.dtype == xp.array(np.float32(1.0)).dtype


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"m": 0}, "int >= 1, got 0"),
        ({"m": 2.0}, "int >= 1, got 2.0"),
        ({"cap": 1.5}, "cap=1.5"),
        ({"cap": -0.1}, "cap=-0.1"),
        ({"slope": -1.0}, "slope=-1.0"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        guard.shrinkage(1.0, 2.0, 1.0, **({"m": 3} | options))


def test_doubt_of_an_indefinite_gram_matrix(xp):
    """The fit is then singular to the last digit; that K is no Gram matrix is for the solver to say."""
    K = np.full((3, 3), -0.525) + 1.525 * np.eye(3)
    found = xp.call(guard.doubt, np.ones(3), K, np.asarray(1.0), np.asarray(2.0))
    assert 0 <= float(xp.numpy(found)) <= 1
