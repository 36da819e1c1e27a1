"""Scores by forward passes: against per-sample autograd in float64, and what must be left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exact_scores import by_autograd, copies, gradient, grads, same, setting
from ftw_torch import FilterThenWeight, SelectionError
from ftw_torch.capture import passes
from torch import nn
from torch_models import Unruled, classifier_loss, lm_loss, mlp

import ftw


def test_scores_are_those_of_autograd_up_to_the_curvature():
    model, optimizer, pool, target = setting()
    exact, curvature, goal, along = by_autograd(model, optimizer, lm_loss, pool, target)
    size = exact.abs().max()
    for step in (1e-3, 1e-4):
        selector = FilterThenWeight(
            model, optimizer, lm_loss, keep=3, filter="top_k", weight="uniform", score="forward", score_step=step
        )
        found = selector.select(pool, target).scores
        assert (found - (exact - step / 2 * curvature)).abs().max() < 50 * step**2 * size
        assert (found - exact).abs().max() > 0.2 * step * curvature.abs().max()
    decrease = sum((goal[name] * d).sum() for name, d in along.items())
    chosen = FilterThenWeight(model, optimizer, lm_loss, keep=3, filter="top_k", weight="uniform", score="forward")
    step = torch.finfo(torch.float64).eps ** 0.5 * lm_loss(model, target).mean() / decrease
    after = [p.detach() - step.detach() * d for p, d in zip(model.parameters(), along.values(), strict=True)]
    losses = torch.func.functional_call(model, dict(zip(along, after, strict=True)), (pool[:, :-1],))
    losses = F.cross_entropy(losses.transpose(1, 2), pool[:, 1:], reduction="none").mean(1)
    difference = (lm_loss(model, pool) - losses).detach() / step.detach()
    torch.testing.assert_close(chosen.select(pool, target).scores, difference, rtol=1e-5, atol=1e-6 * float(size))


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"filter": "top_k", "weight": "uniform"},
        {"filter": "top_k"},
        {"filter": "matching"},
        {"filter": "greedy_utility", "weight": "uniform"},
    ],
    ids=str,
)
def test_the_gradient_is_the_weighted_sum_and_the_choice_that_of_exact_scores(options, micro_batch):
    model, optimizer, pool, target = setting()
    before = copies(model)
    exact = FilterThenWeight(model, optimizer, lm_loss, keep=4, guard=0, **options).select(pool, target)
    selector = FilterThenWeight(model, optimizer, lm_loss, keep=4, score="forward", micro_batch=micro_batch, **options)
    selection = selector.backward(pool, target)
    assert same(model, before)
    assert selection.indices.tolist() == exact.indices.tolist()
    torch.testing.assert_close(selection.weights, exact.weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(selection.match, exact.match, rtol=1e-6, atol=0)
    torch.testing.assert_close(selection.losses, lm_loss(model, pool).detach())
    torch.testing.assert_close(selection.target_loss, lm_loss(model, target).mean().detach())
    found = grads(model)
    total = (lm_loss(model, pool[selection.indices]) * selection.weights).sum()
    torch.testing.assert_close(found, gradient(model, total))


def test_top_k_with_uniform_weights_captures_nothing(monkeypatch):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.mix, self.head = nn.GRU(5, 6, batch_first=True), Unruled(6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.rnn(x)[0][:, -1]
            return self.head(self.mix(h, h))

    def refuse(*args, **kwargs):
        raise AssertionError("captured")

    monkeypatch.setattr(passes, "Capture", refuse)
    torch.manual_seed(0)
    model = Recurrent().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = lambda n: (torch.randn(n, 4, 5, dtype=torch.float64), torch.randint(0, 3, (n,)))  # noqa: E731
    pool, target = batch(10), batch(3)
    selector = FilterThenWeight(
        model, optimizer, classifier_loss, keep=3, filter="top_k", weight="uniform", score="forward"
    )
    selection = selector.backward(pool, target)
    goal = gradient(model, classifier_loss(model, target).mean())
    exact = []
    for i in range(10):
        g = gradient(model, classifier_loss(model, (pool[0][i : i + 1], pool[1][i : i + 1])).sum())
        exact.append(0.1 * sum((g[name] * goal[name]).sum() for name in g))
    torch.testing.assert_close(selection.scores, torch.stack(exact), rtol=1e-4, atol=1e-7)
    assert selection.indices.tolist() == torch.stack(exact).argsort(descending=True)[:3].tolist()


@pytest.mark.parametrize("failing", [2, 3])
def test_parameters_return_after_an_exception_in_either_pass(failing):
    model, optimizer, pool, target = setting(torch.float32)
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == failing:  # 1: the target, 2: the pool after the step, 3: the pool
            raise KeyError("lost")
        return lm_loss(model, batch)

    before, state = copies(model), torch.get_rng_state()
    options = {"keep": 3, "filter": "top_k", "weight": "uniform", "score": "forward"}
    with pytest.raises(KeyError, match="lost"):
        FilterThenWeight(model, optimizer, loss, **options).backward(pool, target)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not grads(model)
    moved = []

    def watched(model, batch):
        moved.append(not same(model, before))
        return lm_loss(model, batch)

    FilterThenWeight(model, optimizer, watched, **options).backward(pool, target)
    assert moved == [False, True, False, False]
    assert same(model, before)


def test_both_passes_draw_the_same_masks_and_leave_buffers_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.drop, self.down = nn.Linear(5, 32), nn.Dropout(0.5), nn.Linear(32, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.down(self.drop(torch.tanh(self.up(x))) * (1 + 0.1 * self.calls))

    torch.manual_seed(0)
    model = Noisy().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pool = torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 3, (8,))
    target = torch.randn(3, 5, dtype=torch.float64), torch.randint(0, 3, (3,))
    for micro_batch, passes_of_pool in ((None, 1), (3, 3)):
        options = {"keep": 2, "filter": "top_k", "weight": "uniform", "score": "forward", "micro_batch": micro_batch}
        model.calls.zero_()
        torch.manual_seed(5)
        selector = FilterThenWeight(model, optimizer, classifier_loss, **options)
        selection = selector.batches(pool, target, steps=1)[0]
        assert float(model.calls) == 1 + passes_of_pool  # the target's forward and the pool's
        model.calls.zero_()
        torch.manual_seed(5)
        goal = gradient(model, classifier_loss(model, target).mean())
        pieces = [(pool[0][i : i + 3], pool[1][i : i + 3]) for i in (0, 3, 6)] if micro_batch else [pool]
        exact = []
        for piece in pieces:
            losses = classifier_loss(model, piece)
            for loss in losses:
                g = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                exact.append(0.1 * sum((x * y).sum() for x, y in zip(g, goal.values(), strict=True)))
        torch.testing.assert_close(selection.scores, torch.stack(exact), rtol=1e-4, atol=1e-7)


def test_an_autocast_around_the_call_does_not_hide_the_step():
    model, optimizer, pool, target = setting(torch.float32)
    exact = by_autograd(model, optimizer, lm_loss, pool, target)[0]
    options = {"keep": 3, "filter": "top_k", "weight": "uniform", "score": "forward"}
    selector = FilterThenWeight(model, optimizer, lm_loss, **options)
    with torch.autocast("cpu", torch.bfloat16):
        plain = lm_loss(model, pool)
        selection = selector.batches(pool, target, steps=1)[0]
        torch.testing.assert_close(lm_loss(model, pool), plain, rtol=0, atol=0)
    assert (selection.scores - exact).norm() < 0.3 * exact.norm()  # .8 where 16-bit copies of the matrices stay put


def test_samples_that_are_not_finite_are_named_or_dropped():
    model, optimizer, pool, target = setting()

    def loss(model, batch):
        losses = lm_loss(model, batch)
        return losses * torch.where((batch == pool[5]).all(1), torch.nan, 1.0)

    options = {"keep": 3, "score": "forward"}
    with pytest.raises(FloatingPointError, match="sample 5"):
        FilterThenWeight(model, optimizer, loss, **options).backward(pool, target)
    assert not grads(model)
    for more in ({"filter": "top_k", "weight": "uniform"}, {}):
        selection = FilterThenWeight(model, optimizer, loss, on_nonfinite="drop", **options, **more).backward(
            pool, target
        )
        assert 5 not in selection.indices.tolist()
        assert torch.isnan(selection.scores[5])
        assert all(bool(torch.isfinite(g).all()) for g in grads(model).values())


def test_a_gradient_that_is_not_finite_behind_a_finite_loss_is_refused():
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, x):
        y = model(x)[:, 0]
        return y + torch.where(x[:, 1] > 5, (y - y.detach()).sqrt(), 0 * y)

    pool, target = torch.randn(6, 3), torch.randn(2, 3)
    pool[:, 1] = 9.0
    selector = FilterThenWeight(model, optimizer, loss, keep=2, filter="top_k", weight="uniform", score="forward")
    with pytest.raises(FloatingPointError, match="weight"):
        selector.backward(pool, target)
    assert model.weight.grad is None


def test_a_scaler_scales_the_gradient_and_skips_an_overflow():
    model, optimizer, pool, target = setting(torch.float32)
    options = {"keep": 3, "filter": "top_k", "weight": "uniform", "score": "forward", "train_on_target": 0.25}
    plain = FilterThenWeight(model, optimizer, lm_loss, **options).backward(pool, target)
    unscaled = grads(model)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    selector = FilterThenWeight(model, optimizer, lm_loss, scaler=scaler, **options)
    selection = selector.backward(pool, target)
    assert selection.indices.tolist() == plain.indices.tolist()
    torch.testing.assert_close(grads(model), {name: 1024 * g for name, g in unscaled.items()}, rtol=1e-4, atol=1e-3)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    selector = FilterThenWeight(model, optimizer, lambda m, b: 1e3 * lm_loss(m, b), scaler=scaler, **options)
    selection = selector.backward(pool, target)
    assert int(selection.status) == ftw.Status.NOT_FINITE
    before = copies(model)
    scaler.step(optimizer)
    assert same(model, before)


def test_tied_and_unused_parameters_and_those_of_several_axes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.idle = nn.Conv2d(1, 2, 3), nn.Linear(8, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.conv(x).flatten(1))

    torch.manual_seed(0)
    model = Mixed().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pool = torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    target = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (3,))
    options = {"keep": 2, "filter": "top_k", "weight": "uniform", "guard": 0, "train_on_target": 0.5}
    for score in ("forward", "exact"):
        optimizer.zero_grad()
        selection = FilterThenWeight(model, optimizer, classifier_loss, score=score, **options).backward(pool, target)
        assert "idle.weight" not in grads(model)
        chosen = pool[0][selection.indices], pool[1][selection.indices]
        total = 0.5 * classifier_loss(model, chosen).mean() + 0.5 * classifier_loss(model, target).mean()
        own = grads(model)
        optimizer.zero_grad()
        total.backward()
        torch.testing.assert_close(own, grads(model))


@pytest.mark.parametrize("options", [{"score": "fast"}, {"score_step": 0.0}, {"train_on_target": 1.5}], ids=str)
def test_options_are_checked(options):
    model, optimizer, _, _ = setting()
    with pytest.raises(ValueError, match=next(iter(options))):
        FilterThenWeight(model, optimizer, lm_loss, keep=3, **options)


def test_a_target_that_moves_nothing_is_refused():
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = lambda n: (torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,)))  # noqa: E731

    def loss(model, batch):
        losses = classifier_loss(model, batch)
        return losses if len(losses) > 3 else 0 * losses

    selector = FilterThenWeight(model, optimizer, loss, keep=3, filter="top_k", weight="uniform", score="forward")
    with pytest.raises(SelectionError, match="exactly zero"):
        selector.backward(batch(8), batch(3))
