"""Small PyTorch models, and per-sample gradients by plain autograd: one sample, one backward."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from ftw_torch import batches
from ftw_torch.capture.discovery import Capture
from ftw_torch.records.join import join, seen
from torch import nn

import ftw


class GPT(nn.Module):
    """Two blocks of a byte-level transformer whose head is the embedding."""

    def __init__(self, vocabulary=11, d=8, t=64, heads=2, layers=2, *, tied=True):
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(t, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(d),
                    "qkv": nn.Linear(d, 3 * d, bias=False),
                    "out": nn.Linear(d, d),
                    "norm2": nn.RMSNorm(d),
                    "up": nn.Linear(d, 2 * d),
                    "down": nn.Linear(2 * d, d),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x):
        n, t = x.shape
        h = self.tokens(x) + self.positions(torch.arange(t))
        for b in self.blocks:
            q, k, v = b["qkv"](b["norm1"](h)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + b["out"](a.transpose(1, 2).reshape(n, t, -1))
            h = h + b["down"](F.gelu(b["up"](b["norm2"](h))))
        return self.head(self.norm(h))


class Unruled(nn.Module):
    """A linear layer of the product of two, by a function for which capture has no rule."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, d) / d)

    def forward(self, x, y):
        return torch.tensordot(x * y, self.weight, ([-1], [1]))


def lm_loss(model, batch):
    """Mean over tokens of each sequence's next-token loss: (n,)."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def classifier_loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def per_sample_gradients(model, loss, batch, take):
    """{name: (n, *shape)} by one backward pass a sample, on batches of one."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n = batches.size(batch, "batch")
    rows = {name: [] for name in parameters}
    for i in range(n):
        grads = torch.autograd.grad(loss(model, take(batch, i))[0], list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(row) for name, row in rows.items()}


def errors(model, loss, batch, take=None, *, slow=None, seed=7):
    """Relative errors of scores, Gram matrix and update from captured factors, against `per_sample_gradients`.

    The geometry and target are random; ``slow`` collects the parameters left to per-sample autograd.
    """
    take = take or (lambda batch, i: batches.take(batch, torch.tensor([i])))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n = batches.size(batch, "batch")
    rng = torch.random.get_rng_state()
    with Capture(parameters, n, [x for _, x in batches.leaves(batch)], slow=slow) as capture:
        found = capture.backward(loss(model, batch))
    records = join([found], [n], parameters)
    torch.random.set_rng_state(rng)
    explicit = per_sample_gradients(model, loss, batch, take)
    generator = torch.Generator().manual_seed(seed)
    flat = {name: g.reshape(n, *seen(g.shape[1:])) for name, g in explicit.items()}
    draw = {name: torch.rand(g.shape[1:], generator=generator, dtype=g.dtype) for name, g in flat.items()}
    goal = {name: torch.randn(g.shape[1:], generator=generator, dtype=g.dtype) for name, g in flat.items()}
    metric = {name: ftw.Diagonal(d + 0.1) for name, d in draw.items()}
    weights = torch.rand(n, generator=generator, dtype=next(iter(flat.values())).dtype)
    rows = torch.cat([g.reshape(n, -1) for g in flat.values()], 1).double()  # (n, p)
    p = torch.cat([(d + 0.1).reshape(-1) for d in draw.values()]).double()  # (p,)
    g_t = torch.cat([g.reshape(-1) for g in goal.values()]).double()  # (p,)
    ours = ftw.combine(records, weights)
    pairs = {
        "scores": (ftw.scores(records, goal, metric), rows @ (p * g_t)),
        "gram": (ftw.gram(records, metric), rows @ (p * rows).T),
        "update": (torch.cat([ours[name].reshape(-1) for name in flat]), weights.double() @ rows),
    }
    return {what: float((a.double() - b).norm() / b.norm()) for what, (a, b) in pairs.items()}


def assert_exact(model, loss, batch, take=None, *, slow=(), dtype=torch.float32):
    """Scores to 1e-5, Gram matrix and update to 1e-6 (float64: 1e-10); ``slow`` names what is left to autograd."""
    found = {}
    with warnings.catch_warnings():
        if slow:
            warnings.filterwarnings("ignore", ".* enters .*, for which there is no rule")
        error = errors(model, loss, batch, take, slow=found)
    assert set(found) == set(slow), found
    single = dtype == torch.float32
    assert error["scores"] < (1e-5 if single else 1e-10), error
    assert error["gram"] < (1e-6 if single else 1e-10), error
    assert error["update"] < (1e-6 if single else 1e-10), error
    return error
