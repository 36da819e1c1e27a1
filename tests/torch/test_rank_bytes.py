"""The planner of a rank's bytes against the storages that are alive in a step, counted at every operation."""

import gc

import pytest
import torch
import torch.distributed as dist
from ftw_torch.distributed import DistributedFilterThenWeight, bytes_per_rank
from ranks import run
from test_forward_ranks import FORWARD
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

D, LAYERS = 256, 6


class Alive(TorchDispatchMode):
    """Notes the most bytes of storages that are alive at once."""

    def __init__(self):
        super().__init__()
        self.held, self.most = {}, 0

    def see(self, x):
        x = x.to_local() if hasattr(x, "to_local") else x
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            self.held[storage._cdata] = storage._weak_ref()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            self.see(getattr(x, "_local_tensor", x))
        total = 0
        for key, weak in list(self.held.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak)
            if storage is None:
                torch.UntypedStorage._free_weak_ref(weak)
                del self.held[key]
            else:
                total += storage.nbytes()  # none while fully_shard has freed it
        self.most = max(self.most, total)
        return out


def stack():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(D, D, bias=False) for _ in range(LAYERS)])


def loss(model, batch):
    return model(batch).square().mean(1)


def counted(rank):
    model, mesh = stack(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    selector = DistributedFilterThenWeight(model, optimizer, loss, keep=2, **FORWARD)
    pool, target = torch.randn(4, D), torch.randn(2, D)
    for _ in range(2):
        selector.backward(pool, target)
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    alive = Alive()
    for p in model.parameters():
        for x in (p.detach(), *optimizer.state[p].values()):
            alive.see(x)
    with alive:
        selector.backward(pool, target)
    return alive.most


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_plan_is_what_a_rank_holds(ranks):
    found = run(counted, ranks)
    planned = bytes_per_rank(stack(), ranks)
    assert planned.parameters == 4 * D * D * LAYERS // ranks
    assert planned.layer == 4 * 4 * D * D
    for most in found:
        assert not isinstance(most, str), most
        assert 0.9 * planned.total < most < 1.02 * planned.total


def test_a_plan_of_a_model_that_is_nowhere():
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"blocks": nn.ModuleList(nn.Linear(4096, 4096) for _ in range(8)), "head": nn.Linear(4096, 9)}
        )
    model["head"].requires_grad_(False)
    planned = bytes_per_rank(model, 8, state=1)
    block, head = 4 * (4096 * 4096 + 4096) // 8, 4 * (2 * 4096 + 2)
    assert planned == (8 * block + head, 8 * block, 8 * block, 8 * block, 8 * block, 4 * 8 * block)
    with pytest.raises(ValueError, match="ranks=0"):
        bytes_per_rank(model, 0)
