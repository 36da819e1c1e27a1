"""How many operations a step dispatches, in plain steps: counts repeat exactly, so that none creeps in unseen."""

import pytest
import torch
from ftw_conformance.bench.torch_calls import calls_of
from ftw_conformance.bench.torch_models import Llama, lm_loss
from ftw_conformance.bench.torch_variants import TOP_K, Setup, ours, plain


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    model = Llama(256, 32, 12, 2, 1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    return Setup(model, optimizer, lm_loss, 4, 8)


def count(step):
    torch.manual_seed(1)
    pool, target = torch.randint(0, 256, (16, 17)), torch.randint(0, 256, (2, 17))
    for _ in range(4):
        step(pool, target)
    return calls_of(lambda: step(pool, target), 1)  # the fifth and the sixth use: no power of two, no audit


@pytest.mark.parametrize(
    ("options", "ops", "kernels"),
    [(TOP_K, 1.15, 1.15), ({"guard": 0}, 1.20, 1.20), ({}, 1.25, 1.25)],
    ids=["top-k", "guard off", "default"],
)
def test_a_step_calls_little_more_than_a_plain_one(setup, options, ops, kernels):
    base = count(plain(setup))
    got = count(ours(setup, **{"capture": "learned", **options}))
    assert got.ops <= ops * base.ops
    assert got.kernels <= kernels * base.kernels
