"""Forward scores under tensor parallelism, alone and together with fully_shard on a mesh of two axes."""

import pytest
import torch
from ftw_torch import FilterThenWeight
from ftw_torch.distributed import DistributedFilterThenWeight
from ranks import part, run
from test_forward_ranks import FORWARD, OPTIMIZERS, close, grads, values, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch_models import classifier_loss


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    pool = torch.randn(12, 5, dtype=torch.float64), torch.randint(0, 3, (12,))
    target = torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,))
    return model, pool, target


def parallel(model, shape):
    """Cut a model over ranks; return the number of this rank among those with pools of their own."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if shape[0] > 1:
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return mesh.get_local_rank("dp")


def steps(shape, optimizer, rank):
    model, pool, target = made()
    place = None if rank is None else parallel(model, shape)
    kind, more = OPTIMIZERS[optimizer]
    optimizer = kind(model.parameters(), **more)
    if rank is not None and shape[0] > 1:
        pool = (part(pool, 0, 7), part(pool, 7, 12))[place]
        target = (part(target, 0, 1), part(target, 1, 4))[place]
    make = FilterThenWeight if rank is None else DistributedFilterThenWeight
    selector = make(model, optimizer, classifier_loss, keep=4, score_step=1e-2, train_on_target=0.25, **FORWARD)
    out = []
    for _ in range(3):
        before = [whole(p.detach()).clone() for p in model.parameters()]
        selection = selector.backward(pool, target)
        assert all(torch.equal(a, whole(p.detach())) for a, p in zip(before, model.parameters(), strict=True))
        found = {name: getattr(selection, name).tolist() for name in ("scores", "weights", "match", "target_loss")}
        out.append({"indices": selection.indices.tolist(), "numbers": found, "grads": grads(model)})
        optimizer.step()
        optimizer.zero_grad()
        out[-1]["parameters"] = values(dict(model.named_parameters()))
    return out


NAMES = ("adamw", "sgd", "lion")


def one_axis(rank):
    return {name: steps((1, 2), name, rank) for name in NAMES}


def two_axes(rank):
    return {name: steps((2, 2), name, rank) for name in NAMES}


@pytest.mark.parametrize(("job", "world"), [(one_axis, 2), pytest.param(two_axes, 4, marks=pytest.mark.slow)])
def test_tensor_parallel_ranks_choose_and_step_as_one_process(job, world):
    found = run(job, world)
    for rank in range(world):
        assert not isinstance(found[rank], str), found[rank]
    expected = job(None)
    for name in NAMES:
        for rank in range(world):
            for ours, theirs in zip(found[rank][name], expected[name], strict=True):
                assert ours["indices"] == theirs["indices"], (name, rank)
                for kind in ("numbers", "grads", "parameters"):
                    close(ours[kind], theirs[kind], 1e-10)
