"""Quotas, shares and reasons through the torch selector: sources from a column, errors with names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ftw_torch import FilterThenWeight, NonFiniteError, SelectionError
from torch import nn

import ftw
from ftw import Quota, Reason, SourceShares

N = 16
DOMAINS = ["wiki"] * 3 + ["code"] * 8 + ["news"] * 5


def loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum(dim=1)


@pytest.fixture
def step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pool = {"x": torch.randn(N, 4).double(), "y": torch.randn(N, 2).double(), "domain": list(DOMAINS)}
    target = {"x": torch.randn(8, 4).double(), "y": torch.randn(8, 2).double()}
    return model, optimizer, pool, target


def selector(step, **options):
    model, optimizer, _, _ = step
    return FilterThenWeight(model, optimizer, loss, **({"keep": 6} | options))


def shares(selection, name, weights=False):
    mine = torch.tensor([DOMAINS[i] == name for i in selection.indices.tolist()])
    return float(selection.weights[mine].sum()) if weights else int(mine.sum())


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("filter", ["matching", "top_k", "greedy_utility"])
def test_a_quota_by_name_is_obeyed(step, mode, filter):
    _, _, pool, target = step
    quota = Quota("domain", at_least={"wiki": 3, "news": 0.3}, at_most={"news": 2})
    out = selector(step, quota=quota, mode=mode, filter=filter, micro_batch=5).select(pool, target)
    assert shares(out, "wiki") == 3
    assert shares(out, "news") == 2
    assert int(out.relaxed) == 0


def test_the_choice_is_that_of_the_core(step):
    model, optimizer, pool, target = step
    numbers = torch.tensor([["wiki", "code", "news"].index(d) for d in DOMAINS])
    for quota in (
        Quota("domain", {"wiki": 2, "code": 0.5, "news": None}),
        Quota(numbers, (2, 0.5, None)),
        Quota(None, (2, 0.5, None)),
    ):
        batch = pool if isinstance(quota.sources, str) else pool | {"number": numbers}
        own = FilterThenWeight(model, optimizer, loss, keep=6, quota=quota, sources="number", explain=True, guard=0.0)
        out = own.select(batch, target)
        records = {}
        for name, p in model.named_parameters():
            grads = []
            for i in range(N):
                one = {k: v[i : i + 1] for k, v in pool.items() if k != "domain"}
                grads.append(torch.autograd.grad(loss(model, one)[0], p)[0])
            records[name] = ftw.Dense(torch.stack(grads))
        g = {n: torch.autograd.grad(loss(model, target).mean(), p)[0] for n, p in model.named_parameters()}
        from ftw_torch import geometry

        P = geometry(optimizer, dict(model.named_parameters()), g, damping=0.1)
        best = ftw.filter_then_weight(
            records, g, P, keep=6, shortlist=0.5, guard=0, quota=Quota(numbers, (2, 0.5, None)), explain=True
        )
        assert out.indices.tolist() == best.indices.tolist()
        torch.testing.assert_close(out.weights, best.weights)
        assert out.reasons.code.tolist() == best.reasons.code.tolist()
        torch.testing.assert_close(out.reasons.residual, best.reasons.residual, equal_nan=True)


def test_shares_by_name(step):
    _, _, pool, target = step
    constraint = SourceShares("domain", lower={"wiki": 0.3}, upper={"code": 0.2, "wiki": 0.5})
    out = selector(step, constraint=constraint).select(pool, target)
    assert 0.3 - 1e-9 <= shares(out, "wiki", weights=True) <= 0.5 + 1e-9
    assert shares(out, "code", weights=True) <= 0.2 + 1e-9
    assert abs(float(out.weights.sum()) - 1) < 1e-9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quota": Quota("domain", {"wiki": 4})}, "at_least=4 of source 'wiki', of which the pool holds 3"),
        ({"quota": Quota("domain", {"wiki": 3, "code": 4})}, "at_least asks for 7 of 6 places"),
        ({"quota": Quota("domain", {"law": 1})}, "of source 'law', of which the pool holds 0"),
        ({"quota": Quota("domain", {"wiki": 2}, {"wiki": 1})}, "at_least=2 of source 'wiki' exceeds at_most=1"),
        ({"constraint": SourceShares("domain", {"law": 0.1})}, "lower=0.1 of source 'law', .* holds no sample"),
        ({"constraint": SourceShares("domain", {"wiki": 0.7, "code": 0.6})}, "adds up to 1.3, more than the total 1"),
        (
            {"constraint": SourceShares("domain", None, {"wiki": 0.1, "code": 0.2, "news": 0.3})},
            "adds up to 0.6, less than the total 1",
        ),
    ],
)
def test_bounds_that_cannot_be_filled_name_the_source(step, options, says):
    model, _, pool, target = step
    own = selector(step, **options)
    with pytest.raises(SelectionError, match=says + ".*fill='relax'") as caught:
        own.backward(pool, target)
    assert caught.value.status == ftw.Status.INFEASIBLE
    assert all(p.grad is None for p in model.parameters())
    out = selector(step, fill="relax", **options).backward(pool, target)
    assert int(out.relaxed) > 0
    assert torch.isfinite(out.weights).all()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"quota": Quota(None, (1,))}, ValueError, "name a column"),
        ({"quota": Quota("domain")}, ValueError, "no bounds: give at_least= or at_most="),
        ({"quota": Quota(DOMAINS, {"wiki": 1})}, TypeError, "expected the name of a column"),
        ({"quota": {"wiki": 1}}, TypeError, "quota is a dict"),
        ({"quota": Quota("domain", {"wiki": 1}, (1, 1))}, TypeError, "both of its bounds by name"),
        ({"fill": "drop"}, ValueError, "fill='drop' must be one of raise, relax"),
        ({"sources": 3}, TypeError, "sources=3 must be the name of a column"),
        ({"explain": "yes"}, ValueError, "explain='yes'"),
    ],
)
def test_wrong_options_raise_at_construction(step, options, error, says):
    with pytest.raises(error, match=says):
        selector(step, **options)


def test_wrong_columns_are_named(step):
    _, _, pool, target = step
    with pytest.raises(ValueError, match=r"no column 'topic' to read sources from; .*'domain', 'x', 'y'"):
        selector(step, quota=Quota("topic", (1,))).select(pool, target)
    with pytest.raises(TypeError, match="give the bounds by name"):
        selector(step, quota=Quota("domain", (1,))).select(pool, target)
    with pytest.raises(ValueError, match="give integers"):
        selector(step, quota=Quota("x", (1,))).select(pool, target)


def test_dropped_candidates_have_a_reason_and_no_place(step):
    _, _, pool, target = step
    pool["x"][1] = float("nan")
    quota = Quota("domain", {"wiki": 2}, {"code": 2})
    own = selector(step, quota=quota, on_nonfinite="drop", explain=True)
    out = own.select(pool, target)
    assert shares(out, "wiki") == 2
    assert out.reasons.code[1] == Reason.DROPPED
    assert np.sum(out.reasons.code.numpy() == Reason.DROPPED) == 1
    assert (out.reasons.code[out.indices] == Reason.PICKED).all()
    redundant = out.reasons.code == Reason.REFUSED_REDUNDANT
    assert torch.isin(out.reasons.rival[redundant], out.indices).all()
    with pytest.raises(SelectionError, match="of source 'wiki', of which the pool holds 2"):
        selector(step, quota=Quota("domain", {"wiki": 3}), on_nonfinite="drop").select(pool, target)
    with pytest.raises(NonFiniteError):
        selector(step, quota=quota).select(pool, target)


def test_several_selections_of_a_pool_obey_in_turn(step):
    _, _, pool, target = step
    own = selector(step, keep=3, quota=Quota("domain", {"wiki": 1}), explain=True)
    seen = []
    for out in own.batches(pool, target, steps=3):
        assert shares(out, "wiki") >= 1
        assert not set(seen) & set(out.indices.tolist())
        assert (out.reasons.code[out.indices] == Reason.PICKED).all()
        assert (out.reasons.code[seen] == Reason.DROPPED).all()
        seen += out.indices.tolist()
