"""Quotas and reasons through the JAX adapter: sources from a column of the pool, under jit."""

from __future__ import annotations

import ftw_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ftw

SOURCES = jnp.asarray([0, 0, *[1] * 10])


def loss(params, example):
    return jnp.sum((example["x"] @ params - example["y"]) ** 2)


@pytest.fixture
def problem(rng):
    pool = {"x": jnp.asarray(rng.normal(size=(12, 4))), "y": jnp.asarray(rng.normal(size=(12, 2))), "domain": SOURCES}
    params = jnp.asarray(rng.normal(size=(4, 2)))
    return params, pool, {name: x[:5] for name, x in pool.items()}


def test_a_quota_from_a_column_and_reasons(problem):
    params, pool, target = problem
    tx = optax.adam(1e-2)
    options = {"keep": 4, "filter": "top_k", "weight": "uniform", "guard": 0.0}
    select = ftw_jax.filter_then_weight(loss, tx, quota=ftw.Quota("domain", (2, 0)), explain=True, **options)
    grads, out = jax.jit(select)(params, tx.init(params), pool, target)
    own = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(params, pool))
    assert out.status == ftw.Status.OK
    assert np.sum(np.asarray(SOURCES)[out.indices] == 0) == 2
    rest = [i for i in np.argsort(-np.asarray(out.scores)) if i >= 2][:2]
    assert set(out.indices.tolist()) == {0, 1, *rest}
    np.testing.assert_allclose(grads, np.tensordot(np.asarray(out.weights), own[np.asarray(out.indices)], 1), rtol=1e-6)
    assert (np.asarray(out.reasons.code)[out.indices] == ftw.Reason.PICKED).all()
    select = ftw_jax.filter_then_weight(loss, tx, quota=ftw.Quota("domain", (3, 0)), **options)
    _, out = jax.jit(select)(params, tx.init(params), pool, target)
    assert out.status == ftw.Status.INFEASIBLE
    assert np.isnan(out.weights).all()


def test_a_column_that_is_not_there_is_named(problem):
    params, pool, target = problem
    tx = optax.sgd(1e-2)
    select = ftw_jax.filter_then_weight(loss, tx, keep=4, quota=ftw.Quota("topic", (1, 0)))
    with pytest.raises(ValueError, match=r"no column 'topic' to read sources from; .*'domain', 'x', 'y'"):
        select(params, tx.init(params), pool, target)
