"""Equinox: a next-token model on a stream of two languages, led by sixteen samples of the one that is wanted.

python examples/jax_equinox.py
"""

import equinox as eqx
import ftw_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, LENGTH, POOL, TARGET, KEEP, STEPS = 12, 16, 48, 16, 8, 60


class Model(eqx.Module):
    """The next token from the one before."""

    embedding: eqx.nn.Embedding
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(VOCABULARY, 16, key=a)
        self.hidden, self.head = eqx.nn.Linear(16, 32, key=b), eqx.nn.Linear(32, VOCABULARY, key=c)

    def __call__(self, tokens):
        """Return logits (t, vocabulary) for what follows each of the tokens (t,)."""
        x = jax.vmap(self.embedding)(tokens)  # (t, 16)
        return jax.vmap(self.head)(jax.nn.silu(jax.vmap(self.hidden)(x)))


def texts(rng, count, wanted):
    """Return texts (count, LENGTH): up by 5 in the wanted language, down by 1 in the other, a third at random."""
    rows = rng.integers(0, VOCABULARY, (count, LENGTH))
    shift = np.where(rng.uniform(size=count) < wanted, 5, -1)
    for i in range(1, LENGTH):
        rows[:, i] = np.where(rng.uniform(size=count) < 1 / 3, rows[:, i], (rows[:, i - 1] + shift) % VOCABULARY)
    return rows.astype(np.int32)


def train(select):
    """Return the loss on the wanted language after training on what is picked, or on the first of each pool."""
    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, tokens):
        logits = jax.nn.log_softmax(eqx.combine(params, static)(tokens[:-1]))
        return -jnp.mean(jnp.take_along_axis(logits, tokens[1:, None], axis=1))

    def mean(params, batch):
        return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(params, batch))

    tx = optax.adam(optax.linear_schedule(0.0, 0.01, 10))
    choose = ftw_jax.filter_then_weight(loss, tx, keep=KEEP) if select else None

    @jax.jit
    def step(params, state, pool, target):
        grads = jax.grad(mean)(params, pool[:KEEP]) if choose is None else choose(params, state, pool, target)[0]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    target, test, state = texts(rng, TARGET, 1.0), texts(rng, 400, 1.0), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, texts(rng, POOL, 0.25), target)
    return float(mean(params, test))


if __name__ == "__main__":
    print(f"at random {train(False):.3f}, Filter-then-Weight {train(True):.3f}")
