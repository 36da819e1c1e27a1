"""The guard's formula, for numbers and for arrays of every backend."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import BACKENDS
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


def test_an_unknown_target_is_shrunk_to_the_cap(xp):
    values = np.asarray(0.5), np.asarray(10.0), np.asarray(3.0)
    stein, f = formula(*values, 5)
    for known, factor in ((0.01, 1.0), (0.06, 0.8), (0.2, stein / 0.3), (np.inf, stein / 0.3)):
        expected = (max(0.3 * factor, stein), f)
        assert_allclose(guard.shrinkage(*map(float, values), 5, recognition=known), expected, rtol=1e-12)
        out = xp.call(lambda *v: guard.shrinkage(*v[:3], 5, recognition=v[3]), *values, np.asarray(known))
        assert_allclose([xp.numpy(x) for x in out], expected, rtol=1e-12)


def test_recognition_is_a_ratio_of_squared_cosines(xp, rng):
    G, t = rng.normal(size=(6, 4)) * rng.lognormal(size=(6, 1)), rng.normal(size=4)
    G[2] = 0  # no direction: orthogonal to everybody
    unit = G / np.where(np.linalg.norm(G, axis=1, keepdims=True) > 0, np.linalg.norm(G, axis=1, keepdims=True), 1)
    pairs = [(unit[i] @ unit[j]) ** 2 for i in range(6) for j in range(6) if i != j]
    expected = np.mean((unit @ t) ** 2) / (t @ t) / np.mean(pairs)
    for scale in (1.0, 1e-15, 1e15):
        g, goal = G * scale, t * scale
        out = xp.call(guard.recognition, g @ goal, g @ g.T, np.asarray(goal @ goal))
        assert_allclose(xp.numpy(out), expected, rtol=1e-9)
    out = xp.call(guard.recognition, np.ones(1), np.ones((1, 1)), np.asarray(1.0))
    assert np.isinf(xp.numpy(out))


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
