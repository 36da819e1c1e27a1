"""Scores, Gram matrices and combinations against gradients and operators written out in NumPy."""

import explicit
import models
import numpy as np
import pytest
from backends import BACKENDS, optional
from numpy.testing import assert_allclose

import ftw
from ftw.inner_products import squared_norms

jax = optional("jax")

# XLA compiles every shape anew, so the JAX backends run fewer records, with the kinds of operators mixed.
EAGER = [(name, kind, None) for name in ("numpy", "strict", "torch") for kind in models.KINDS]
CASES = EAGER + [(name, first, models.SMALL) for name, first in (("jax", 1), ("jit", 1), ("jit", 4))]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    name, kind, names = request.param
    return BACKENDS[name], kind, names


def close(value, expected):
    assert_allclose(value, expected, rtol=1e-11, atol=1e-10)


def test_scores_gram_and_cross_gram(case, rng):
    xp, kind, names = case
    x, y = models.records(rng, 5, names=names), models.records(rng, 3, t=2, names=names)
    g, p = models.target(rng, x), models.geometry(rng, x, kind)
    P, X, Y = explicit.metric(x, p), explicit.flat(x), explicit.flat(y)
    b, K, L = xp.call(lambda x, y, g, p: (ftw.scores(x, g, p), ftw.gram(x, p), ftw.cross_gram(x, y, p)), x, y, g, p)
    close(xp.numpy(b), X @ P @ np.concatenate([v.reshape(-1) for v in g.values()]))
    close(xp.numpy(K), X @ P @ X.T)
    close(xp.numpy(L), X @ P @ Y.T)
    assert_allclose(xp.numpy(K), xp.numpy(K).T, rtol=0, atol=0)


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("name", ["numpy", "strict", "torch"])
def test_little_memory_changes_nothing(name, kind, rng):
    xp = BACKENDS[name]
    x, y = models.records(rng, 5), models.records(rng, 3, t=2)
    p = models.geometry(rng, x, kind)
    X, P = explicit.flat(x), explicit.metric(x, p)
    close(xp.numpy(xp.call(lambda x, p: ftw.gram(x, p, max_bytes=1000), x, p)), X @ P @ X.T)
    L = xp.call(lambda x, y, p: ftw.cross_gram(x, y, p, max_bytes=1000), x, y, p)
    close(xp.numpy(L), X @ P @ explicit.flat(y).T)


@pytest.mark.parametrize("kind", models.KINDS)
def test_squared_norms(rng, kind):
    x = models.records(rng, 5)
    p = models.geometry(rng, x, kind)
    close(squared_norms(x, p), np.diag(ftw.gram(x, p)))


def test_combine(xp, rng):
    x = models.records(rng, 5)
    w = rng.normal(size=5)
    out = xp.call(ftw.combine, x, w)
    for name, record in x.items():
        assert_allclose(xp.numpy(out[name]), np.tensordot(w, explicit.dense(record), axes=1), rtol=1e-12, atol=1e-12)


def test_combine_leaves_out_samples_of_zero_weight(xp, rng):
    x = models.records(rng, 4, names=models.SMALL)
    poisoned = jax.tree.map(
        lambda a: np.where(np.arange(4).reshape(-1, *[1] * (a.ndim - 1)) == 2, np.nan, a) if a.dtype.kind == "f" else a,
        x,
    )
    w = np.array([0.5, 1.0, 0.0, 2.0])
    clean, out = xp.call(lambda x, y, w: (ftw.combine(x, w), ftw.combine(y, w)), x, poisoned, w)
    for name in x:
        assert_allclose(xp.numpy(out[name]), xp.numpy(clean[name]), rtol=1e-13)


def test_take(xp, rng):
    x = models.records(rng, 5)
    out = xp.call(ftw.take, x, np.array([3, 0]))
    for name, record in x.items():
        got = jax.tree.map(xp.numpy, out[name]) if xp.name != "strict" else None
        if got is not None:
            assert_allclose(explicit.dense(got), explicit.dense(record)[[3, 0]], rtol=1e-14)


@pytest.mark.parametrize("kind", models.KINDS)
def test_operators_are_symmetric_psd_and_have_a_root(xp, rng, kind):
    def everything(p, g, h):
        return p.apply(g), p.inner(g, h), p.inner(h, g), p.sqrt(p.sqrt(g))

    for shape in ((4, 6), (6, 4), (5, 5)) if xp.name not in ("jax", "jit") else ((4, 6),):
        p = models.operator(rng, kind, shape)
        dense = explicit.matrix(p, shape)
        g, h = rng.normal(size=shape), rng.normal(size=shape)
        applied, one, other, twice = (xp.numpy(x) for x in xp.call(everything, p, g, h))
        assert_allclose(applied.reshape(-1), dense @ g.reshape(-1), rtol=1e-11, atol=1e-12)
        assert_allclose(one, other, rtol=1e-11)
        assert_allclose(dense, dense.T, rtol=1e-11, atol=1e-12)
        assert np.linalg.eigvalsh((dense + dense.T) / 2).min() > -1e-12
        assert_allclose(twice, applied, rtol=1e-9, atol=1e-10)


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
