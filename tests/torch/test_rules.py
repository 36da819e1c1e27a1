"""Rules of a user's own: a layer and a function that capture cannot follow, each as one decorated function."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from ftw_torch import CaptureWarning, FilterThenWeight, SelectionError, register_rule
from ftw_torch.capture import registry
from torch import nn


class _Scaled(torch.autograd.Function):
    """``x (s W)'``, out of sight of a function mode."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x, weight, scale)
        return x @ (weight * scale).T

    @staticmethod
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        per_row = g.flatten(0, -2).T @ x.flatten(0, -2)
        return g @ (weight * scale), per_row * scale, (per_row * weight).sum()


class ScaledLinear(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in, dtype=torch.float64) / 3)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return _Scaled.apply(x, self.weight, self.scale)


def network():
    torch.manual_seed(0)
    return nn.Sequential(ScaledLinear(5, 7), nn.Tanh(), nn.Linear(7, 3, dtype=torch.float64))


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def batch(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, dtype=torch.float64, generator=g), torch.randint(0, 3, (n,), generator=g)


@pytest.fixture
def registered():
    """Forget the rules of a test after it."""
    kept = dict(registry._functions), dict(registry._modules)
    yield
    for table, before in zip((registry._functions, registry._modules), kept, strict=True):
        table.clear()
        table.update(before)


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = FilterThenWeight(model, optimizer, loss, keep=3, guard=0)
    pool = batch(8, 1)
    return selector, selector.backward(pool, batch(4, 2)), pool


def weighted(model, pool, selection):
    """Return the weighted gradient by plain autograd."""
    chosen = tuple(x[selection.indices] for x in pool)
    return torch.autograd.grad((loss(model, chosen) * selection.weights).sum(), list(model.parameters()))


def test_a_layer_with_a_rule_is_captured_in_one_pass(registered):
    @register_rule(ScaledLinear)
    def scaled_linear(capture, module, x):
        return F.linear(x, module.weight * module.scale)

    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        selector, selection, pool = step(model)
    assert not selector.memory.slow
    assert "forward" not in model[0].__dict__
    for p, g in zip(model.parameters(), weighted(model, pool, selection), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_without_a_rule_it_is_exact_and_slow():
    model = network()
    with pytest.warns(CaptureWarning):
        selector, selection, pool = step(model)
    assert set(selector.memory.slow) == {"0.weight", "0.scale"}
    for p, g in zip(model.parameters(), weighted(model, pool, selection), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_a_wrong_rule_is_refused_by_name(registered):
    @register_rule(ScaledLinear)
    def half_of_it(capture, module, x):
        return F.linear(x, module.weight.detach() * module.scale) + F.linear(x, module.weight - module.weight.detach())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with pytest.raises(SelectionError) as caught:
            step(network())
    assert "0.weight" in caught.value.parameters


def test_a_rule_may_decline(registered):
    @register_rule(ScaledLinear)
    def never(capture, module, x):
        return NotImplemented

    with pytest.warns(CaptureWarning):
        selector, _, _ = step(network())
    assert "0.weight" in selector.memory.slow


def test_a_function_with_a_rule(registered):
    @register_rule(torch.cosine_similarity)
    def similarity(capture, x1, x2, dim=1, eps=1e-8):
        with capture:
            dot = (x1 * x2).sum(dim)
            return dot / ((x1 * x1).sum(dim) * (x2 * x2).sum(dim)).sqrt().clamp(min=eps)

    model = nn.Module()
    model.centre = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def angle(model, x):
        return torch.cosine_similarity(x, model.centre, dim=-1)

    pool, target = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    selector = FilterThenWeight(model, optimizer, angle, keep=2, guard=0)
    selection = selector.backward(pool, target)
    want = torch.autograd.grad((angle(model, pool[selection.indices]) * selection.weights).sum(), [model.centre])[0]
    torch.testing.assert_close(model.centre.grad, want, rtol=1e-10, atol=1e-12)
    assert not selector.memory.slow


def test_what_is_neither_function_nor_module():
    with pytest.raises(TypeError, match="neither a function nor a subclass"):
        register_rule(3)
