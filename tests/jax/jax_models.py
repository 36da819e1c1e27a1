"""Small models in JAX for tests, and the same step by brute force: vmap(grad), explicit P, the reference."""

from __future__ import annotations

import functools

import ftw_reference as ref
import jax
import jax.numpy as jnp
import numpy as np

import ftw

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
"""Compiled in half the time, to run in twice: these models are tiny."""


def mlp(dtype=jnp.float64, n=12, m=4):
    """A perceptron on three tokens a sample: (loss, params, pool, target)."""
    rng = np.random.default_rng(0)

    def loss(params, example):
        hidden = jnp.tanh(example["x"] @ params["in"]["kernel"] + params["in"]["bias"])
        return jnp.mean((hidden @ params["out"]["kernel"] - example["y"]) ** 2)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.5, dtype)

    params = {"in": {"kernel": draw(5, 7), "bias": draw(7)}, "out": {"kernel": draw(7, 2)}}
    return loss, params, {"x": draw(n, 3, 5), "y": draw(n, 3, 2)}, {"x": draw(m, 3, 5), "y": draw(m, 3, 2)}


def warmed_up(tx, params, steps=3, seed=1):
    """The optimizer's state after a few steps of random gradients, the parameters unchanged."""
    rng = np.random.default_rng(seed)
    state, update = tx.init(params), jit(tx.update)
    for _ in range(steps):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.1, p.dtype), params)
        state = update(grads, state, params)[1]
    return state


def explicit(loss, params, batch):
    """(n, p): per-sample gradients, one sample after the other, in float64."""
    n = jax.tree.leaves(batch)[0].shape[0]
    rows, gradient = [], jit(jax.grad(loss))
    for i in range(n):
        g = gradient(params, jax.tree.map(lambda x, i=i: x[i], batch))
        rows.append(np.concatenate([np.asarray(x, float).reshape(-1) for x in jax.tree.leaves(g)]))
    return np.stack(rows)


def adam_metric(state, params, target, *, lr, b1=0.9, b2=0.999, eps=1e-8, damping=0.1):
    """(p,): Adam's response with the target's gradient folded in, by its formula."""
    t = int(state.count) + 1
    out, start = [], 0
    for v in jax.tree.leaves(state.nu):
        a = target[start : start + v.size]
        start += v.size
        vhat = (b2 * np.asarray(v, float).reshape(-1) + (1 - b2) * a**2) / (1 - b2**t)
        root = np.sqrt(vhat)
        out.append(lr * (1 - b1) / (1 - b1**t) / (root + eps + damping * np.sqrt(np.mean(root**2))))
    return np.concatenate(out)


def brute_force(loss, params, metric, pool, target, **options):
    """The reference's selection and its weighted gradient (p,)."""
    grads, samples = explicit(loss, params, pool), explicit(loss, params, target)
    g_T = samples.mean(axis=0)
    selection = ref.filter_then_weight(grads, g_T, metric(g_T), target_samples=samples, **options)
    return selection, selection.weights @ grads[selection.indices]


def flat(tree):
    """(p,): the leaves of a tree, one after the other."""
    return np.concatenate([np.asarray(x, float).reshape(-1) for x in jax.tree.leaves(tree)])


def light_solver(K, c, constraint, *, ridge=0.0, start=None):
    """Non-negative least squares by coordinate descent: exact for a few samples, and compiled in no time."""
    assert isinstance(constraint, ftw.NonNegative)
    n = c.shape[0]
    K = K + ridge * jnp.eye(n, dtype=K.dtype)

    def one(step, w):
        i = step % n
        return w.at[i].set(jnp.maximum(0.0, w[i] + (c[i] - K[i] @ w) / jnp.where(K[i, i] > 0, K[i, i], 1)))

    w = jax.lax.fori_loop(0, 1000 * n, one, jnp.zeros_like(c))
    return ftw.QPSolution(w, *[jnp.zeros((), c.dtype)] * 3, *[jnp.zeros((), jnp.int32)] * 2)
