"""Tokens of every integer dtype give the same choice: offsets of row numbers do not wrap."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import ftw_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_models import light_solver


@pytest.mark.parametrize("dtype", ["uint8", pytest.param("int8", marks=pytest.mark.slow)])
def test_narrow_tokens_of_a_flax_embedding(dtype: str) -> None:
    size, d, n, keep = 300, 4, 24, 5  # more rows than a byte can count
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 120, size=(n, 6))
    goal = rng.integers(0, 120, size=(3, 6))
    model = nn.Sequential([nn.Embed(size, d), nn.Dense(2)])
    params = model.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))

    def loss(params: Any, tokens: Any) -> Any:
        return jnp.mean((model.apply(params, tokens) - 1.0) ** 2)

    tx = optax.adam(1e-2)
    select = jax.jit(ftw_jax.filter_then_weight(loss, tx, keep=keep, guard=0.0, solver=light_solver))

    def run(dtype: str) -> Any:
        return select(params, tx.init(params), jnp.asarray(ids, dtype), jnp.asarray(goal, dtype))

    (grads, selection), (_, expected) = run(dtype), run("int32")
    np.testing.assert_array_equal(selection.indices, expected.indices)
    np.testing.assert_allclose(selection.weights, expected.weights, rtol=1e-9)
    grad = jax.jit(jax.grad(loss))
    w = np.zeros(n)
    w[np.asarray(selection.indices)] = selection.weights
    single = [grad(params, jnp.asarray(x, jnp.int32)) for x in ids]
    added = jax.tree.map(lambda *g: sum(a * b for a, b in zip(w, g, strict=True)), *single)
    for got, brute in zip(jax.tree.leaves(grads), jax.tree.leaves(added), strict=True):
        np.testing.assert_allclose(got, brute, rtol=0, atol=1e-6)  # the parameters are float32
