"""Fifty steps in float64: both adapters and the reference pick the same samples, with the same weights."""

from __future__ import annotations

import numpy as np
import pytest

ref = pytest.importorskip("ftw_reference")

STEPS, N, V, KEEP, INPUTS, HIDDEN, CLASSES = 50, 16, 4, 4, 5, 6, 3
LR, BETAS, EPS, DAMPING = 2e-2, (0.9, 0.999), 1e-8, 0.1


def problem():
    """Parameters at the start, a fixed target, and a pool a step in which a third of the labels are wrong."""
    rng = np.random.default_rng(7)
    start = [rng.normal(size=s) for s in ((HIDDEN, INPUTS), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,))]
    centres = rng.normal(size=(CLASSES, INPUTS))

    def batch(n, wrong):
        y = rng.integers(0, CLASSES, n)
        x = centres[y] + rng.normal(size=(n, INPUTS))
        return x, np.where(rng.random(n) < wrong, rng.integers(0, CLASSES, n), y)

    return start, batch(V, 0.0), [batch(N, 0.33) for _ in range(STEPS)]


def run_reference():
    """A perceptron and Adam written out, on explicit gradients (n, p)."""
    start, target, pools = problem()
    sizes = [p.size for p in start]
    theta = np.concatenate([p.ravel() for p in start])  # (p,)
    m, v = np.zeros_like(theta), np.zeros_like(theta)

    def gradients(batch):
        x, y = batch
        parts = np.split(theta, np.cumsum(sizes)[:-1])
        W, a, U, c = (part.reshape(p.shape) for part, p in zip(parts, start, strict=True))
        h = np.tanh(x @ W.T + a)  # (n, h)
        z = h @ U.T + c  # (n, c)
        p = np.exp(z - z.max(1, keepdims=True))
        dz = p / p.sum(1, keepdims=True) - np.eye(CLASSES)[y]
        dh = (dz @ U) * (1 - h * h)
        outer = [dh[:, :, None] * x[:, None], dh, dz[:, :, None] * h[:, None], dz]
        return np.concatenate([g.reshape(len(x), -1) for g in outer], axis=1)  # (n, p)

    out = []
    for t, pool in enumerate(pools, start=1):
        G, T = gradients(pool), gradients(target)
        goal = T.mean(0)
        root = np.sqrt((BETAS[1] * v + (1 - BETAS[1]) * goal**2) / (1 - BETAS[1] ** t))  # (p,)
        rms = np.concatenate([np.full(q.size, np.sqrt(np.mean(q**2))) for q in np.split(root, np.cumsum(sizes)[:-1])])
        metric = LR * (1 - BETAS[0]) / (1 - BETAS[0] ** t) / (root + EPS + DAMPING * rms)
        chosen = ref.filter_then_weight(G, goal, metric, keep=KEEP, target_samples=T)
        g = chosen.weights @ G[chosen.indices]
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        theta = theta - LR * m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        out.append((chosen.indices.tolist(), chosen.weights, chosen.shrinkage))
    return out


def run_torch():
    torch = pytest.importorskip("torch")
    from ftw_torch import FilterThenWeight

    start, target, pools = problem()
    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, CLASSES)
    ).double()
    with torch.no_grad():
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(torch.from_numpy(value))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=BETAS, eps=EPS)

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    selector = FilterThenWeight(model, optimizer, loss, keep=KEEP, shortlist=None)
    out = []
    for pool in pools:
        optimizer.zero_grad()
        chosen = selector.backward(*(tuple(map(torch.from_numpy, batch)) for batch in (pool, target)))
        optimizer.step()
        out.append((chosen.indices.tolist(), chosen.weights.numpy(), float(chosen.shrinkage)))
    return out


def run_jax():
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    import ftw_jax
    import jax.numpy as jnp

    def loss(params, example):
        x, y = example
        W, a, U, c = params
        return -jax.nn.log_softmax(U @ jnp.tanh(W @ x + a) + c)[y]

    with jax.enable_x64(True):
        start, target, pools = problem()
        tx = optax.adam(LR, *BETAS, eps=EPS)
        params = tuple(map(jnp.asarray, start))
        state = tx.init(params)
        select = jax.jit(ftw_jax.filter_then_weight(loss, tx, keep=KEEP, shortlist=None))
        out = []
        for pool in pools:
            grads, chosen = select(params, state, *(tuple(map(jnp.asarray, batch)) for batch in (pool, target)))
            change, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, change)
            out.append((chosen.indices.tolist(), np.asarray(chosen.weights), float(chosen.shrinkage)))
    return out


@pytest.fixture(scope="module")
def expected():
    return run_reference()


@pytest.mark.parametrize("run", [run_torch, run_jax])
def test_the_adapters_pick_what_the_reference_picks(expected, run):
    assert sum(a > 0 for _, _, a in expected) >= 5  # the guard has its say
    for step, (ours, theirs) in enumerate(zip(run(), expected, strict=True)):
        assert ours[0] == theirs[0], f"step {step}"
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6, err_msg=f"step {step}")
        np.testing.assert_allclose(ours[2], theirs[2], atol=1e-6, err_msg=f"step {step}")
