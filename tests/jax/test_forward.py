"""Scores by a forward derivative, and the target's share of the update, against gradients one by one."""

from __future__ import annotations

import ftw_jax
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

TOP = {"filter": "top_k", "weight": "uniform"}


def setting():
    loss, params, pool, target = jax_models.mlp()
    tx = optax.adam(0.01)
    state = jax_models.warmed_up(tx, params)
    G = jax_models.explicit(loss, params, pool)  # (n, p)
    g_T = jax_models.explicit(loss, params, target).mean(0)  # (p,)
    metric = jax_models.adam_metric(state[0], params, g_T, lr=0.01)
    return (loss, tx), (params, state, pool, target), G, g_T, G @ (metric * g_T)


@pytest.mark.parametrize(
    ("options", "micro_batch"),
    [(TOP, None), (TOP, 1), (TOP, 5), ({}, None), ({}, 5), ({"filter": "greedy_utility"}, None)],
    ids=str,
)
def test_scores_choice_and_update(options, micro_batch):
    made, given, G, _, scores = setting()
    exact = jax_models.jit(ftw_jax.filter_then_weight(*made, keep=4, guard=0, **options))(*given)[1]
    more = {"score": "forward", "micro_batch": micro_batch}
    grads, selection = jax_models.jit(ftw_jax.filter_then_weight(*made, keep=4, **more, **options))(*given)
    assert_allclose(selection.scores, scores, rtol=1e-9, atol=1e-9 * np.abs(scores).max())
    assert selection.indices.tolist() == exact.indices.tolist()
    assert_allclose(selection.weights, exact.weights, rtol=1e-7, atol=1e-9)
    assert_allclose(selection.match, exact.match, rtol=1e-9)
    assert_allclose(selection.losses, exact.losses)
    assert_allclose(selection.target_loss, exact.target_loss)
    update = np.asarray(selection.weights) @ G[np.asarray(selection.indices)]
    assert_allclose(jax_models.flat(grads), update, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("score", ["exact", "forward"])
def test_the_target_has_its_share_of_the_update(score):
    made, given, G, g_T, _ = setting()
    select = ftw_jax.filter_then_weight(*made, keep=4, score=score, train_on_target=0.3)
    grads, selection = jax_models.jit(select)(*given)
    update = np.asarray(selection.weights) @ G[np.asarray(selection.indices)]
    assert_allclose(jax_models.flat(grads), 0.7 * update + 0.3 * g_T, rtol=1e-9, atol=1e-12)


def test_without_a_target_the_pool_is_its_own():
    made, given, G, _, _ = setting()
    _, selection = jax_models.jit(ftw_jax.filter_then_weight(*made, keep=4, score="forward", **TOP))(*given[:3])
    metric = jax_models.adam_metric(given[1][0], given[0], G.mean(0), lr=0.01)
    assert_allclose(selection.scores, G @ (metric * G.mean(0)), rtol=1e-9, atol=1e-15)


def test_top_k_forms_no_gradient_of_a_sample():
    made, given, *_ = setting()
    shapes = {}
    for score in ("exact", "forward"):
        select = ftw_jax.filter_then_weight(*made, keep=4, guard=0, capture="dense", score=score, **TOP)
        shapes[score] = str(jax.make_jaxpr(select)(*given))
    kernels = "f64[12,5,7]"  # the pool's gradients of a kernel (5, 7)
    assert kernels in shapes["exact"]
    assert kernels not in shapes["forward"]


def test_a_sample_that_is_not_finite_is_reported():
    made, (params, state, pool, target), *_ = setting()
    pool = pool | {"y": pool["y"].at[3].set(jnp.nan)}
    select = jax_models.jit(ftw_jax.filter_then_weight(*made, keep=4, score="forward", **TOP))
    grads, selection = select(params, state, pool, target)
    assert np.isnan(selection.weights).all()
    assert np.isnan(jax_models.flat(grads)).all()


@pytest.mark.parametrize("options", [{"score": "fast"}, {"train_on_target": -0.1}], ids=str)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ftw_jax.filter_then_weight(lambda p, x: 0.0, optax.sgd(0.1), keep=1, **options)
