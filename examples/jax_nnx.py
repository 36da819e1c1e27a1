"""Flax nnx: a regressor on a stream in which two labels of three are noise, led by sixteen clean samples.

python examples/jax_nnx.py
"""

import ftw_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

POOL, TARGET, KEEP, STEPS = 64, 16, 8, 80


class Regressor(nnx.Module):
    """A perceptron with one hidden layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        """Return the prediction for one x (8,)."""
        return self.out(nnx.tanh(self.hidden(x)))[0]


def samples(rng, count, noise):
    """Return x (count, 8) and y (count,), a share of the labels replaced by noise."""
    x = rng.normal(size=(count, 8)).astype(np.float32)
    y = np.sin(x[:, 0]) + x[:, 1] * x[:, 2]
    return {"x": x, "y": np.where(rng.uniform(size=count) < noise, 2 * rng.normal(size=count), y).astype(np.float32)}


def train(select):
    """Return the loss on clean samples after training on what ``select`` picks; None picks at random."""
    graph, params, rest = nnx.split(Regressor(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, example):
        return (nnx.merge(graph, params, rest)(example["x"]) - example["y"]) ** 2

    def mean(params, batch):
        return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(params, batch))

    tx = optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(0.01))
    choose = ftw_jax.filter_then_weight(loss, tx, keep=KEEP) if select else None

    @jax.jit
    def step(params, state, pool, target):
        if choose is not None:
            grads, _ = choose(params, state, pool, target)
        else:
            grads = jax.grad(mean)(params, jax.tree.map(lambda x: x[:KEEP], pool))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    target, test, state = samples(rng, TARGET, 0.0), samples(rng, 1000, 0.0), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, samples(rng, POOL, 2 / 3), target)
    return float(mean(params, test))


if __name__ == "__main__":
    print(f"at random {train(False):.3f}, Filter-then-Weight {train(True):.3f}")
