"""JAX's strict switches, and its default width of integers: shapes are traced, which is where these complain."""

from __future__ import annotations

from typing import Any

import ftw_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ftw

SETS = {
    "NonNegative": ftw.NonNegative(),
    "Simplex": ftw.Simplex(1.0),
    "CappedSimplex": ftw.CappedSimplex(0.3),
    "Box": ftw.Box(-1.0, 0.4),
}


@pytest.fixture(params=[True, False])
def strict(request: pytest.FixtureRequest) -> Any:
    """Ranks may not be promoted; with 64 bits, and without."""
    with jax.enable_x64(request.param), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("name", list(SETS))
def test_weights(strict: Any, name: str) -> None:
    K, c = jnp.eye(5, dtype=jnp.float32), jnp.ones(5, jnp.float32)
    many = jnp.stack([K, K])[None], jnp.stack([c, c])[None]  # (1, 2, n, n), (1, 2, n)
    for gram, linear in ((K, c), many):
        shapes = jax.eval_shape(lambda K, c: ftw.solve_qp(K, c, SETS[name], ridge=0.1, start=c), gram, linear)
        assert shapes.weights.shape == linear.shape
        assert jax.eval_shape(lambda v: ftw.constraints.project(SETS[name], v), linear).shape == linear.shape


@pytest.mark.parametrize("filter", ["matching", "top_k", "greedy_utility"])
@pytest.mark.parametrize("kind", ["scale", "diagonal", "vectors", "kronecker", "rotated", "polar"])
def test_selections(strict: Any, filter: str, kind: str) -> None:
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def records(n: int) -> dict[str, Any]:
        ids = jnp.asarray(rng.integers(0, 4, size=(n, 3)), jnp.uint8)
        both = ftw.Sum((ftw.OuterProduct(array(n, 2, 6), array(n, 2, 4)), ftw.Rows(ids, array(n, 3, 6), 4)))
        return {"w": both, "b": ftw.Dense(array(n, 6))}

    square, other = jnp.eye(4, dtype=jnp.float32), jnp.eye(6, dtype=jnp.float32)
    operator = {
        "scale": ftw.Scale(jnp.asarray(1.0, jnp.float32)),
        "diagonal": ftw.Diagonal(jnp.abs(array(4, 6))),
        "vectors": ftw.Kronecker(jnp.abs(array(4)), jnp.abs(array(6))),
        "kronecker": ftw.Kronecker(square, other),
        "rotated": ftw.Rotated(square, jnp.abs(array(4, 6)), other),
        "polar": ftw.Polar(square, jnp.ones(4, jnp.float32), other[:4]),
    }[kind]
    geometry = {"w": operator, "b": ftw.Diagonal(jnp.abs(array(6)))}
    target = {"w": array(4, 6), "b": array(6)}

    def call(x: Any, g: Any, p: Any, samples: Any) -> Any:
        return ftw.filter_then_weight(x, g, p, target_samples=samples, keep=3, filter=filter, shortlist=0.5)

    selection = jax.eval_shape(call, records(8), target, geometry, records(2))
    assert selection.weights.shape == (3,)
    assert selection.weights.dtype == jnp.float32


def test_a_step(strict: Any) -> None:
    def loss(params: Any, x: Any) -> Any:
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]) ** 2)

    params = {"w": jnp.ones((4, 6)), "v": jnp.ones((6, 3)), "b": jnp.ones(3)}
    tx = optax.adam(1e-3)
    select = ftw_jax.filter_then_weight(loss, tx, keep=2)
    grads, _ = jax.eval_shape(select, params, tx.init(params), jnp.ones((8, 4)), jnp.ones((3, 4)))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("name", list(SETS))
def test_extreme_numbers_under_a_strict_error_state_of_numpy(name: str) -> None:
    K, c = np.eye(3), np.array([1.0, 2.0, -1.0])
    extreme = {"Simplex": ftw.Simplex(1e300), "CappedSimplex": ftw.CappedSimplex(1e300, 2e300)}.get(name, SETS[name])
    with np.errstate(all="raise"):
        for size in (1e-300, 1.0, 1e300):
            for gram, linear in ((K * size, c * size), (K, c * size), (K * size, c)):
                for constraint in (SETS[name], extreme):
                    solution = ftw.solve_qp(gram, linear, constraint)
                    assert solution.weights.shape == (3,)
        assert np.all(np.isfinite(ftw.constraints.project(extreme, c)))
