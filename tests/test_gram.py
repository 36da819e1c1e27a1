"""Scores, Gram matrices and combinations against gradients and operators written out in NumPy."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

import explicit
import ftw
import models


@pytest.fixture(params=models.KINDS)
def kind(request):
    return request.param


def test_scores(xp, rng, kind):
    x = models.records(rng, 5)
    g, p = models.target(rng, x), models.geometry(rng, x, kind)
    expected = explicit.flat(x) @ explicit.metric(x, p) @ np.concatenate([v.reshape(-1) for v in g.values()])
    assert_allclose(xp.numpy(xp.call(ftw.scores, x, g, p)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("max_bytes", [400, 2**28])
def test_gram(xp, rng, kind, max_bytes):
    x = models.records(rng, 5)
    p = models.geometry(rng, x, kind)
    expected = explicit.flat(x) @ explicit.metric(x, p) @ explicit.flat(x).T
    K = xp.numpy(xp.call(lambda x, p: ftw.gram(x, p, max_bytes=max_bytes), x, p))
    assert_allclose(K, expected, rtol=1e-11, atol=1e-10)
    assert_allclose(K, K.T, rtol=0, atol=0)


@pytest.mark.parametrize("max_bytes", [600, 2**28])
def test_cross_gram(xp, rng, kind, max_bytes):
    x, y = models.records(rng, 5), models.records(rng, 3, t=2)
    p = models.geometry(rng, x, kind)
    expected = explicit.flat(x) @ explicit.metric(x, p) @ explicit.flat(y).T
    K = xp.call(lambda x, y, p: ftw.cross_gram(x, y, p, max_bytes=max_bytes), x, y, p)
    assert_allclose(xp.numpy(K), expected, rtol=1e-11, atol=1e-10)


def test_combine(xp, rng):
    x = models.records(rng, 5)
    w = rng.normal(size=5)
    out = xp.call(ftw.combine, x, w)
    for name, record in x.items():
        assert_allclose(xp.numpy(out[name]), np.tensordot(w, explicit.dense(record), axes=1), rtol=1e-12, atol=1e-12)


def test_combine_leaves_out_samples_of_zero_weight(xp, rng):
    x = models.records(rng, 4)
    poisoned = jax.tree.map(lambda a: np.where(np.arange(4).reshape(-1, *[1] * (a.ndim - 1)) == 2, np.nan, a)
                            if a.dtype.kind == "f" else a, x)
    w = np.array([0.5, 1.0, 0.0, 2.0])
    clean, out = xp.call(ftw.combine, x, w), xp.call(ftw.combine, poisoned, w)
    for name in x:
        assert_allclose(xp.numpy(out[name]), xp.numpy(clean[name]), rtol=1e-13)


def test_take(xp, rng):
    x = models.records(rng, 5)
    out = xp.call(ftw.take, x, np.array([3, 0]))
    for name, record in x.items():
        got = jax.tree.map(xp.numpy, out[name]) if xp.name != "strict" else None
        if got is not None:
            assert_allclose(explicit.dense(got), explicit.dense(record)[[3, 0]], rtol=1e-14)


def test_operators_are_symmetric_psd_and_have_a_root(xp, rng, kind):
    for shape in ((4, 6), (6, 4), (5, 5)):
        p = models.operator(rng, kind, shape)
        dense = explicit.matrix(p, shape)
        g, h = rng.normal(size=shape), rng.normal(size=shape)
        applied = xp.numpy(xp.call(lambda p, g: p.apply(g), p, g))
        assert_allclose(applied.reshape(-1), dense @ g.reshape(-1), rtol=1e-11, atol=1e-12)
        one, other = (float(xp.numpy(xp.call(lambda p, a, b: p.inner(a, b), p, *pair))) for pair in ((g, h), (h, g)))
        assert_allclose(one, other, rtol=1e-11)
        assert np.linalg.eigvalsh((dense + dense.T) / 2).min() > -1e-12
        twice = xp.call(lambda p, g: p.sqrt(p.sqrt(g)), p, g)
        assert_allclose(xp.numpy(twice), applied, rtol=1e-9, atol=1e-10)


def test_16_bit_factors_are_summed_in_float32(rng):
    import torch

    a, b = torch.randn(4, 300, 3), torch.randn(4, 300, 2)
    half = {"w": ftw.OuterProduct(a.bfloat16(), b.bfloat16())}
    wide = {"w": ftw.OuterProduct(a.bfloat16().float(), b.bfloat16().float())}
    one, p = torch.ones(2, 3), {"w": ftw.Scale(1.0)}
    assert_allclose(ftw.scores(half, {"w": one}, p), ftw.scores(wide, {"w": one}, p), rtol=1e-6)
    assert_allclose(ftw.gram(half, p), ftw.gram(wide, p), rtol=1e-6)
    assert ftw.combine(half, torch.ones(4))["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda x, g, p: p.pop("bias"), "geometry lacks \\['bias'\\]"),
        (lambda x, g, p: g.update(bias=np.ones(3)), "target of 'bias' is \\(3,\\)"),
        (lambda x, g, p: p.update(bias=ftw.Diagonal(np.ones(9))), "Diagonal of 'bias'"),
        (lambda x, g, p: x.update(bias=ftw.Dense(np.ones((5, 4), dtype=int))), "real floating"),
        (lambda x, g, p: x.update(bias=ftw.Dense(np.ones((6, 4)))), "number of samples"),
        (lambda x, g, p: x.update(bias=np.ones((5, 4))), "expected OuterProduct"),
        (lambda x, g, p: x.update(linear=ftw.OuterProduct(np.ones((5, 5)), np.ones((5, 4)))), "\\(n, t, d_in\\)"),
    ],
)
def test_what_does_not_fit_is_named(rng, break_it, match):
    x = models.records(rng, 5)
    g, p = models.target(rng, x), models.geometry(rng, x)
    break_it(x, g, p)
    with pytest.raises((ValueError, TypeError), match=match):
        ftw.scores(x, g, p)


def test_namespaces_may_not_be_mixed(rng):
    import torch

    x = models.records(rng, 5)
    g, p = models.target(rng, x), models.geometry(rng, x)
    g["bias"] = torch.ones(4)
    with pytest.raises(TypeError, match="one namespace"):
        ftw.scores(x, g, p)


def test_max_bytes_too_small_is_refused(rng):
    x = models.records(rng, 5)
    with pytest.raises(ValueError, match="max_bytes=8 is too small"):
        ftw.gram(x, models.geometry(rng, x), max_bytes=8)
