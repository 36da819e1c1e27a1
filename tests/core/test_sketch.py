"""Count sketches: unbiased, with the error that is stated, the same everywhere. Low-rank directions."""

from __future__ import annotations

import tracemalloc

import explicit
import models
import numpy as np
import pytest
from backends import BACKENDS
from numpy.testing import assert_allclose

import ftw
from ftw import sketch

NAMES = ("linear", "wide", "table", "tied", "bias", "kernel")
GOLDEN = [[-14.0, -22.0, -4.0, 2.0, 0.0]]


@pytest.mark.parametrize("kind", [0, 2, 4, 6, "kronecker"])
def test_unbiased_with_the_stated_error(rng, kind):
    x = models.records(rng, 4, names=NAMES)
    p = models.geometry(rng, x, kind)
    K = ftw.gram(x, p)
    size, seeds = 32, 60
    draws = np.stack([sketch.gram(sketch.count_sketch(x, p, size, seed=s)) for s in range(seeds)])
    square = np.diag(K)
    deviation = np.sqrt((np.outer(square, square) + K**2) / size)  # the bound of one draw
    assert np.all(np.abs(draws.mean(axis=0) - K) < 4.5 * deviation / np.sqrt(seeds))
    assert np.all(draws.std(axis=0) < 1.35 * deviation)


def test_the_error_falls_with_the_root_of_the_size(rng):
    x = {"w": ftw.OuterProduct(rng.normal(size=(6, 2, 40)), rng.normal(size=(6, 2, 30)))}
    p = {"w": ftw.Diagonal(rng.uniform(0.5, 2, size=(30, 40)))}
    K = ftw.gram(x, p)

    def error(size):
        return np.mean([np.mean((sketch.gram(sketch.count_sketch(x, p, size, seed=s)) - K) ** 2) for s in range(8)])

    assert 2.5 < np.sqrt(error(32) / error(32 * 16)) < 6  # 4 is expected


@pytest.mark.parametrize("name", ["strict", "torch", "jax", "jit"])
def test_the_same_sketch_on_every_backend(name, rng):
    xp = BACKENDS[name]
    names = NAMES if name in ("strict", "torch") else ("linear", "table", "bias")
    x = models.records(rng, 3, names=names)
    p = models.geometry(rng, x, 1)
    expected = sketch.count_sketch(x, p, 100, seed=7)
    made = xp.call(lambda x, p: sketch.count_sketch(x, p, 100, seed=7), x, p)
    assert_allclose(xp.numpy(made), expected, rtol=1e-9, atol=1e-12)
    assert not np.allclose(sketch.count_sketch(x, p, 100, seed=8), expected)


def test_the_hashes_are_fixed():
    """A sketch that is stored must still compare with one made by a later version."""
    x = {"w": ftw.Dense(np.arange(1.0, 7.0).reshape(1, 2, 3))}
    first = sketch.count_sketch(x, {"w": ftw.Scale(4.0)}, 5, seed=3)
    assert_allclose(first, GOLDEN, rtol=1e-12)


def test_candidates_of_any_record_compare_with_a_dense_target(rng):
    x = models.records(rng, 4, names=NAMES)
    g, p = models.target(rng, x), models.geometry(rng, x, 0)
    dense = {name: ftw.Dense(explicit.dense(r)) for name, r in x.items()}
    assert_allclose(sketch.count_sketch(x, p, 64), sketch.count_sketch(dense, p, 64), rtol=1e-10, atol=1e-10)
    target = sketch.count_sketch({name: ftw.Dense(v[None]) for name, v in g.items()}, p, 4000)
    estimate = sketch.scores(sketch.count_sketch(x, p, 4000), target)
    b, square = ftw.scores(x, g, p), np.diag(ftw.gram(x, p))
    length = sum(p[name].inner(v, v) for name, v in g.items())
    assert np.all(np.abs(estimate - b) < 4 * np.sqrt(2 * square * length / 4000))


def test_little_memory_changes_nothing(rng):
    x = models.records(rng, 3, names=NAMES)
    p = models.geometry(rng, x, 0)
    assert_allclose(
        sketch.count_sketch(x, p, 50, max_bytes=1500), sketch.count_sketch(x, p, 50), rtol=1e-11, atol=1e-11
    )


def test_memory_is_bounded(rng):
    n, d, limit = 4, 600, 2**20
    x = {"w": ftw.OuterProduct(rng.normal(size=(n, 2, d)), rng.normal(size=(n, 2, d)))}
    p = {"w": ftw.Scale(1.0)}
    tracemalloc.start()
    sketch.count_sketch(x, p, 256, max_bytes=limit)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * limit  # all gradients: 11 times as much


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jit"])
def test_low_rank_direction(name, rng):
    xp = BACKENDS[name]
    x = {
        "w": ftw.OuterProduct(rng.normal(size=(5, 3, 40)), rng.normal(size=(5, 3, 30))),
        "e": ftw.Rows(rng.integers(0, 50, size=(5, 3)), rng.normal(size=(5, 3, 20)), 50),
        "s": ftw.Sum((ftw.Dense(rng.normal(size=(5, 30, 25))), ftw.Dense(rng.normal(size=(5, 30, 25))))),
        "b": ftw.Dense(rng.normal(size=(5, 30))),
    }
    m = {}
    for key, record in x.items():
        m[key] = rng.normal(size=record.shape)
        if len(record.shape) == 2:
            u, s, vt = np.linalg.svd(m[key], full_matrices=False)
            m[key] = (u * 0.5 ** np.arange(len(s))) @ vt
    expected, rest = np.zeros(5), np.zeros(5)
    for key, record in x.items():
        cut, left_out = m[key], 0.0
        if cut.ndim == 2:
            u, s, vt = np.linalg.svd(cut, full_matrices=False)
            cut, left_out = (u[:, :4] * s[:4]) @ vt[:4], s[4]
        G = explicit.dense(record).reshape(5, -1)
        expected += G @ cut.reshape(-1)
        rest += np.linalg.norm(G, axis=1) * left_out * (record.shape[-1] ** 0.5 if left_out else 1)
    out = xp.numpy(xp.call(lambda x, m: sketch.low_rank_scores(x, sketch.low_rank(m, 4)), x, m))
    assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    whole = sum(explicit.dense(r).reshape(5, -1) @ m[key].reshape(-1) for key, r in x.items())
    assert np.all(np.abs(out - whole) <= rest)


def test_small_matrices_and_vectors_stay_exact(rng):
    x = models.records(rng, 5, names=NAMES)
    g, p = models.target(rng, x), models.geometry(rng, x)
    direction = {name: p[name].apply(v) for name, v in g.items()}
    assert_allclose(sketch.low_rank_scores(x, sketch.low_rank(direction, 4)), ftw.scores(x, g, p), rtol=1e-12)


def test_nan_shows(rng):
    m = rng.normal(size=(40, 30))
    m[0, 0] = np.nan
    x = {"w": ftw.Dense(rng.normal(size=(2, 40, 30)))}
    assert np.all(np.isnan(sketch.low_rank_scores(x, sketch.low_rank({"w": m}, 3))))
    x["w"].grads[1, 0, 0] = np.nan
    s = sketch.count_sketch(x, {"w": ftw.Scale(1.0)}, 8)
    assert np.isnan(s).any(axis=1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, p: sketch.count_sketch(x, p, 0), "size=0 must be an int in 1"),
        (lambda x, p: sketch.count_sketch(x, p, 2**15), "in 1 .. 32767"),
        (lambda x, p: sketch.count_sketch(x, p, 8, seed=0.5), "seed=0.5 must be an int"),
        (lambda x, p: sketch.count_sketch(x, {}, 8), "geometry lacks"),
        (lambda x, p: sketch.gram(np.ones((3, 8)), np.ones((3, 9))), "of one size"),
        (lambda x, p: sketch.scores(np.ones((3, 8)), np.ones(9)), "of one size"),
        (lambda x, p: sketch.low_rank({"w": np.ones((3, 4))}, 0), "rank=0 must be an int >= 1"),
        (lambda x, p: sketch.low_rank({}, 1), "non-empty mapping"),
        (lambda x, p: sketch.low_rank_scores(x, {"linear": np.ones((4, 5))}), "direction lacks"),
        (lambda x, p: sketch.low_rank_scores({"linear": x["linear"]}, {"linear": np.ones((5, 5))}), "is \\(5, 5\\)"),
    ],
)
def test_what_does_not_fit_is_named(rng, call, match):
    x = models.records(rng, 3, names=NAMES)
    with pytest.raises((ValueError, TypeError), match=match):
        call(x, models.geometry(rng, x))
