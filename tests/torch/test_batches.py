"""Several selections of one scored pool, the weighted loss of each, and the target's share of the update."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_scores import by_autograd, copies, gradient, grads, same, setting
from ftw_reference import matching, solve_qp
from ftw_reference.projections import NonNegative
from ftw_torch import FilterThenWeight
from torch_models import lm_loss

TOP = {"filter": "top_k", "weight": "uniform"}


def explicit(model, optimizer, pool, target):
    """Return scores (n,) and Gram matrix (n, n) from per-sample gradients and the diagonal of P."""
    scores, _, goal, along = by_autograd(model, optimizer, lm_loss, pool, target)
    rows = [gradient(model, lm_loss(model, pool[i : i + 1]).sum()) for i in range(len(pool))]
    diagonal = {name: along[name] / torch.where(goal[name] == 0, 1, goal[name]) for name in goal}
    K = torch.stack([torch.stack([sum((x[n] * diagonal[n] * y[n]).sum() for n in x) for y in rows]) for x in rows])
    return scores.numpy(), K.numpy()


@pytest.mark.parametrize("score", ["exact", "forward"])
def test_top_k_goes_on_by_score(score):
    model, optimizer, pool, target = setting()
    order = by_autograd(model, optimizer, lm_loss, pool, target)[0].argsort(descending=True).tolist()
    before = copies(model)
    selector = FilterThenWeight(model, optimizer, lm_loss, keep=3, score=score, **TOP)
    found = selector.batches(pool, target, steps=4)
    assert [s.indices.tolist() for s in found] == [order[i : i + 3] for i in (0, 3, 6, 9)]
    assert all(torch.isnan(s.match) and torch.isnan(s.predicted_decrease) for s in found)
    assert same(model, before)
    assert not grads(model)


@pytest.mark.parametrize("score", ["exact", "forward"])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_matching_chooses_each_time_among_those_left_over(score, micro_batch):
    model, optimizer, pool, target = setting(n=10)
    target = torch.cat([target, target.flip(1)])
    b, K = explicit(model, optimizer, pool, target)
    selector = FilterThenWeight(
        model, optimizer, lm_loss, keep=3, score=score, shortlist=None, guard=0, micro_batch=micro_batch
    )
    rest = np.arange(len(pool))
    for selection in selector.batches(pool, target, steps=3):
        picks = matching(b[rest], K[np.ix_(rest, rest)], 3).indices
        chosen = rest[picks]
        assert selection.indices.tolist() == chosen.tolist()
        own = K[np.ix_(chosen, chosen)]
        weights = solve_qp(own, b[chosen], NonNegative(), ridge=0.05 * np.diag(own).mean()).weights
        if weights.sum() > 0:
            torch.testing.assert_close(
                selection.weights.double(), torch.as_tensor(weights / weights.sum()), rtol=1e-4, atol=1e-5
            )
        rest = np.setdiff1d(rest, chosen)


@pytest.mark.parametrize("options", [TOP, {}, {"filter": "greedy_utility"}], ids=str)
@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_each_selection_is_trained_by_a_plain_weighted_backward(options, mode):
    model, optimizer, pool, target = setting()
    selector = FilterThenWeight(model, optimizer, lm_loss, keep=3, mode=mode, **options)
    alone = selector.select(pool, target)
    used = set()
    for step, selection in enumerate(selector.batches(pool, target, steps=3)):
        if step == 0:
            assert selection.indices.tolist() == alone.indices.tolist()
            torch.testing.assert_close(selection.weights, alone.weights)
        assert not used & set(selection.indices.tolist())
        used |= set(selection.indices.tolist())
        optimizer.zero_grad()
        selector.weighted_loss(pool, selection).backward()
        losses = lm_loss(model, pool)
        total = sum(w * losses[i] for i, w in zip(selection.indices, selection.weights, strict=True))
        torch.testing.assert_close(grads(model), gradient(model, total))
        optimizer.step()
    assert len(used) == 9


def test_what_is_dropped_is_in_no_selection():
    model, optimizer, pool, target = setting(n=6)

    def loss(model, batch):
        losses = lm_loss(model, batch)
        return losses * torch.where((batch == pool[1]).all(1), torch.nan, 1.0)

    selector = FilterThenWeight(model, optimizer, loss, keep=2, on_nonfinite="drop", score="forward", **TOP)
    found = [s.indices.tolist() for s in selector.batches(pool, target, steps=3)]
    assert sorted(i for indices in found for i in indices) == [0, 2, 3, 4, 5]
    assert [len(indices) for indices in found] == [2, 2, 1]


def test_too_many_steps_are_refused():
    model, optimizer, pool, target = setting()
    selector = FilterThenWeight(model, optimizer, lm_loss, keep=5, **TOP)
    with pytest.raises(ValueError, match="3 selections of keep=5 exceed the pool of 12"):
        selector.batches(pool, target, steps=3)
    with pytest.raises(ValueError, match="steps=0"):
        selector.batches(pool, target, steps=0)


@pytest.mark.parametrize("score", ["exact", "forward"])
@pytest.mark.parametrize("options", [TOP, {}], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_target_has_its_share_of_the_update(score, options, share):
    model, optimizer, pool, target = setting()
    selector = FilterThenWeight(model, optimizer, lm_loss, keep=4, score=score, train_on_target=share, **options)
    selection = selector.backward(pool, target)
    found = grads(model)
    chosen = (lm_loss(model, pool[selection.indices]) * selection.weights).sum()
    expected = gradient(model, (1 - share) * chosen + share * lm_loss(model, target).mean())
    torch.testing.assert_close(found, expected)
    optimizer.zero_grad()
    selector.weighted_loss(pool, selection, target).backward()
    torch.testing.assert_close(grads(model), expected)


def test_the_share_is_of_the_unshrunk_target():
    model, optimizer, pool, target = setting()
    for _ in range(60):  # the target by heart: the guard's gate opens
        optimizer.zero_grad()
        lm_loss(model, target).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    selector = FilterThenWeight(model, optimizer, lm_loss, keep=4, train_on_target=0.5)
    selection = selector.backward(pool, target)
    found = grads(model)
    assert float(selection.shrinkage) > 0
    chosen = (lm_loss(model, pool[selection.indices]) * selection.weights).sum()
    torch.testing.assert_close(found, gradient(model, 0.5 * chosen + 0.5 * lm_loss(model, target).mean()))


def test_the_weighted_loss_wants_the_target_it_trains_on():
    model, optimizer, pool, target = setting()
    selector = FilterThenWeight(model, optimizer, lm_loss, keep=4, train_on_target=0.5, **TOP)
    selection = selector.select(pool, target)
    with pytest.raises(ValueError, match="requires the target"):
        selector.weighted_loss(pool, selection)
