"""FilterThenWeight against per-sample autograd, with the method written out in NumPy by the reference."""

import numpy as np
import pytest
import torch
import torch_models as models
from ftw_reference import filter_then_weight as reference
from ftw_torch import FilterThenWeight
from numpy.testing import assert_allclose


def one(batch, i):
    return tuple(x[i : i + 1] for x in batch) if isinstance(batch, tuple) else batch[i : i + 1]


def flat(grads):
    return np.concatenate([g.reshape(g.shape[0], -1).double().numpy() for g in grads.values()], axis=1)


def case(kind, dtype, t=7, n=12, m=3, seed=0):
    """A model that has made a few steps, a pool and a target."""
    torch.manual_seed(seed)
    if kind == "gpt":
        model, loss = models.GPT().to(dtype), models.lm_loss
        pool, target = torch.randint(0, 11, (n, t + 1)), torch.randint(0, 11, (m, t + 1))
    else:
        model, loss = models.mlp().to(dtype), models.classifier_loss
        pool = torch.randn(n, 5, dtype=dtype), torch.randint(0, 3, (n,))
        target = torch.randn(m, 5, dtype=dtype), torch.randint(0, 3, (m,))
    return model, loss, pool, target


def adam_metric(optimizer, parameters, g_t, damping=0.1):
    """diag P of Adam's next step with g_T folded in, parameter by parameter, from the formula."""
    group, out = optimizer.param_groups[0], []
    b1, b2 = group["betas"]
    for p, g in zip(parameters, g_t, strict=True):
        s = optimizer.state.get(p, {})
        v, step = s.get("exp_avg_sq", torch.zeros_like(p)).double(), float(s.get("step", 0))
        v = (b2 * v + (1 - b2) * g.double() ** 2) / (1 - b2 ** (step + 1))
        d = v.sqrt() + group["eps"] + damping * v.mean().sqrt()
        out.append((group["lr"] * (1 - b1) / (1 - b1 ** (step + 1)) / d).reshape(-1) * float((v > 0).any()))
    return torch.cat(out).numpy()


def warm_up(model, loss, pool, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, pool).mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("kind", "t", "m"), [("gpt", 1, 3), ("gpt", 7, 1), ("gpt", 7, 3), ("gpt", 63, 3), ("mlp", 1, 3)]
)
def test_backward_is_exact(kind, t, m, dtype, steps):
    model, loss, pool, target = case(kind, dtype, t, m=m)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    warm_up(model, loss, pool, optimizer, steps)
    grads, goal = (models.per_sample_gradients(model, loss, batch, one) for batch in (pool, target))
    g_t = [g.mean(0) for g in goal.values()]
    metric = adam_metric(optimizer, model.parameters(), g_t)
    mean = torch.cat([g.reshape(-1) for g in g_t]).double().numpy()
    guard = 0.3 if m > 1 else 0.0
    samples = flat(goal) if guard else None
    expected = reference(flat(grads), mean, metric, keep=4, shortlist=6, target_samples=samples, guard=guard)
    before = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = before[name].clone()
    got = FilterThenWeight(model, optimizer, loss, keep=4, guard=guard).backward(pool, target)

    tol = 1e-10 if dtype == torch.float64 else 1e-5
    assert_allclose(got.scores, expected.scores, rtol=tol, atol=tol * np.abs(expected.scores).max())
    if got.shrinkage == 0:
        assert got.indices.tolist() == list(expected.indices)
        assert_allclose(got.weights, expected.weights, atol=30 * tol)
    w = np.zeros(len(flat(grads)))
    w[got.indices] = got.weights.double()
    scale = np.abs(flat(grads)).max()
    ours = torch.cat([(p.grad - before[n]).reshape(-1).double() for n, p in model.named_parameters()])
    assert_allclose(ours, w @ flat(grads), atol=tol * scale)
    assert_allclose(got.losses, loss(model, pool).detach(), rtol=tol)
    assert_allclose(got.target_loss, loss(model, target).mean().detach(), rtol=tol)
