"""A small model in float64 with its exact scores, one sample and one backward at a time."""

from __future__ import annotations

import torch
from ftw_torch import geometry
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_models import GPT, lm_loss


def setting(dtype=torch.float64, seed=0, n=12, m=4):
    torch.manual_seed(seed)
    model = GPT().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pool, target = torch.randint(0, 11, (n, 9)), torch.randint(0, 4, (m, 9))
    for _ in range(2):
        optimizer.zero_grad()
        lm_loss(model, pool).mean().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer, pool, target


def gradient(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def by_autograd(model, optimizer, loss, pool, target, damping=0.1):
    """Return scores (n,), curvatures ``<P g_T, H_i P g_T>`` (n,), g_T and P g_T, one sample at a time."""
    parameters = dict(model.named_parameters())
    goal = gradient(model, loss(model, target).mean())
    operators = geometry(optimizer, parameters, goal, damping=damping)
    along = {name: operators[name].apply(g.reshape(-1, g.shape[-1]) if g.ndim > 2 else g) for name, g in goal.items()}
    along = {name: d.reshape(parameters[name].shape) for name, d in along.items()}
    scores, curvatures = [], []
    for i in range(len(pool)):
        with sdpa_kernel(SDPBackend.MATH):  # it has second derivatives
            own = loss(model, pool[i : i + 1]).sum()
        g = torch.autograd.grad(own, list(parameters.values()), create_graph=True)
        slope = sum((x * d).sum() for x, d in zip(g, along.values(), strict=True))
        h = torch.autograd.grad(slope, list(parameters.values()), allow_unused=True)
        curvatures.append(sum((x * d).sum() for x, d in zip(h, along.values(), strict=True) if x is not None))
        scores.append(slope.detach())
    return torch.stack(scores), torch.stack(curvatures), goal, along


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model, before):
    return all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))


def copies(model):
    return [p.detach().clone() for p in model.parameters()]
