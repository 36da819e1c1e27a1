"""Four processes with forward scores: one mesh axis, and replicated groups of shards (HSDP); pools uneven and empty."""

import pytest
import torch
from ftw_torch import FilterThenWeight
from ftw_torch.distributed import DistributedFilterThenWeight
from ranks import case, part, run
from test_forward_ranks import FORWARD, close, grads, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

SHAPES = {"shards": ((4,), None), "replicated shards": ((2, 2), ("replicate", "shard"))}
POOLS, TARGETS = (0, 5, 5, 9, 12), (0, 1, 2, 2, 4)  # where the samples of each rank begin


def steps(name, rank):
    model, _, loss, pool, target = case("mlp")
    if rank is not None:
        shape, names = SHAPES[name]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        pool = None if rank == 1 else part(pool, POOLS[rank], POOLS[rank + 1])
        target = None if rank == 2 else part(target, TARGETS[rank], TARGETS[rank + 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    make = FilterThenWeight if rank is None else DistributedFilterThenWeight
    selector = make(model, optimizer, loss, keep=4, score_step=1e-2, micro_batch=3, train_on_target=0.2, **FORWARD)
    out = []
    for _ in range(2):
        before = [whole(p.detach()).clone() for p in model.parameters()]
        selection = selector.backward(pool, target)
        assert all(torch.equal(a, whole(p.detach())) for a, p in zip(before, model.parameters(), strict=True))
        out.append((selection.indices.tolist(), {"scores": selection.scores.tolist(), **grads(model)}))
        optimizer.step()
        optimizer.zero_grad()
    return out


def everything(rank):
    return {name: steps(name, rank) for name in SHAPES}


@pytest.mark.slow
def test_four_ranks_choose_and_step_as_one_process():
    found = run(everything, 4)
    expected = everything(None)
    for rank in range(4):
        assert not isinstance(found[rank], str), found[rank]
        for name in SHAPES:
            for (chosen, numbers), (indices, theirs) in zip(found[rank][name], expected[name], strict=True):
                assert chosen == indices, name
                close(numbers, theirs, 1e-10)
