"""The step in JAX against brute force: gradients one by one, P by its formula, the reference's selection."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import ftw
import ftw_jax
import jax_models


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-9), (jnp.float32, 1e-5)])
def test_adam_equals_brute_force(dtype, rtol):
    loss, params, pool, target = jax_models.mlp(dtype)
    tx = optax.adam(0.01)
    state = jax_models.warmed_up(tx, params)
    select = jax.jit(ftw_jax.filter_then_weight(loss, tx, keep=4, shortlist=None))
    grads, selection = select(params, state, pool, target)

    def metric(g_T):
        return jax_models.adam_metric(state[0], params, g_T, lr=0.01)

    expected, update = jax_models.brute_force(loss, params, metric, pool, target, keep=4)
    assert selection.indices.tolist() == expected.indices.tolist()
    scale = np.max(np.abs(expected.scores))
    assert_allclose(selection.scores, expected.scores, rtol=rtol, atol=rtol * scale)
    assert_allclose(selection.weights, expected.weights, rtol=10 * rtol, atol=rtol)
    assert_allclose(jax_models.flat(grads), update, rtol=rtol, atol=10 * rtol * np.max(np.abs(update)))
    assert_allclose(selection.match, expected.match, rtol=10 * rtol)
    assert_allclose(selection.shrinkage, expected.shrinkage, rtol=100 * rtol)
    assert int(selection.status) == ftw.Status.OK
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(g.dtype == dtype for g in jax.tree.leaves(grads))
    losses = [float(loss(params, jax.tree.map(lambda x, i=i: x[i], pool))) for i in range(12)]
    assert_allclose(selection.losses, losses, rtol=1e-6)
